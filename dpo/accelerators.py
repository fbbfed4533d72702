"""Processors that people train on: what their datasheets say and what an hour of them costs.

To add one, add a line to ``ACCELERATORS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
    """

    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    usd_per_hour: float

    def flops_per_s(self, config: TrainConfig) -> float:
        """Return the datasheet's rate in the numerics of a run; TF32 has half that of bf16."""
        if config.dtype != "float32":
            return self.bf16_tflops * 1e12
        return (self.bf16_tflops / 2 if config.tf32 else self.float32_tflops) * 1e12


ACCELERATORS: Final[dict[str, Accelerator]] = {
    "H100": Accelerator(79, 989, 67, 3.0),
    "H200": Accelerator(139, 989, 67, 3.8),
    "A100-80": Accelerator(79, 312, 19.5, 1.8),
    "L4": Accelerator(22, 121, 30.3, 0.8),
    "RTX 4090": Accelerator(23.5, 165, 82.6, 0.5),
    "MI300X": Accelerator(191, 1307, 163.4, 3.0),
}
