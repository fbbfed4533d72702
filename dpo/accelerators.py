"""Processors that people train on: what their datasheets say and what an hour of them costs.

To add one, add a line to ``ACCELERATORS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from dpo.train_config import TrainConfig

PRICES_OF: Final = 2025
MFU: Final = 0.4  # assumed share of the datasheet's rate; well-tuned training reaches 0.3 to 0.5


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One processor.

    Attributes:
        memory_gib: as torch counts it, somewhat less than the name says.
        bf16_tflops: dense matrix products in 16 bits with sums in float32, 10^12 per second.
        float32_tflops: the same in float32, without tensor cores.
        usd_per_hour: typical of rented ones in ``PRICES_OF``; half and double are found too.
        device_names: what torch calls those that the figures are true of: a board of another form
            (PCIe for SXM) may be slower.
    """

    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    usd_per_hour: float
    device_names: tuple[str, ...]

    def flops_per_s(self, config: TrainConfig) -> float:
        """Return the datasheet's rate in the numerics of a run; TF32 has half that of bf16."""
        if config.dtype != "float32":
            return self.bf16_tflops * 1e12
        return (self.bf16_tflops / 2 if config.tf32 else self.float32_tflops) * 1e12


ACCELERATORS: Final[dict[str, Accelerator]] = {
    "H100": Accelerator(79, 989, 67, 3.0, ("NVIDIA H100 80GB HBM3",)),
    "H200": Accelerator(139, 989, 67, 3.8, ("NVIDIA H200",)),
    "A100-80": Accelerator(
        *(79, 312, 19.5, 1.8), ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")
    ),
    "L4": Accelerator(22, 121, 30.3, 0.8, ("NVIDIA L4",)),
    "RTX 4090": Accelerator(23.5, 165, 82.6, 0.5, ("NVIDIA GeForce RTX 4090",)),
    "MI300X": Accelerator(191, 1307, 163.4, 3.0, ("AMD Instinct MI300X",)),
}


def accelerator_of(device: torch.device) -> Accelerator | None:
    """Return what is known of a device; None of a CPU, or of a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((each for each in ACCELERATORS.values() if name in each.device_names), None)
