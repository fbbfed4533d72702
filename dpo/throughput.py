"""How fast a run is and how much memory it takes, as it logs it.

Shapes: P pairs.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from torch import nn

from dpo.accelerators import accelerator_of
from dpo.batching import AnswerBatch
from dpo.flops import Lengths, TrainingFlops
from dpo.models import Decoder
from dpo.step_clock import StepClock
from dpo.train_config import TrainConfig


@dataclass
class _Work:
    """What was done since the last line of metrics.

    Attributes:
        steps: of the optimizer.
        pairs: in them.
        tokens: a prompt counted once and each answer once.
        flops: that these cannot do without.
        computed: tokens of the streams that were run.
        filler: those of them that only fill a stream up.
        plain: tokens of the same pairs with a prompt for each answer.
    """

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    flops: float = 0.0
    computed: int = 0
    filler: int = 0
    plain: int = 0


class Throughput:
    """Counts the work of steps and takes their time.

    Attributes:
        clock: of the steps.
    """

    def __init__(
        self, policy: nn.Module, config: TrainConfig, device: torch.device, count: int = 1
    ) -> None:
        """Begin to count.

        Args:
            policy: its arithmetic is known if it is a ``Decoder``.
            config: its numerics.
            device: whose rate is the datasheet's, if it is known.
            count: of such devices that do a step together.
        """
        self.clock = StepClock(device)
        self._flops = TrainingFlops.of(policy) if isinstance(policy, Decoder) else None
        known = accelerator_of(device)
        self._flops_per_s = None if known is None else count * known.flops_per_s(config)
        self._work = _Work()

    def add_step(self, lengths: Lengths) -> None:
        """Add an optimizer step on pairs of (P, 3) tokens: prompt, chosen and rejected answer."""
        work = self._work
        work.steps += 1
        work.pairs += len(lengths)
        work.tokens += int(lengths.sum())
        work.flops += 0.0 if self._flops is None else self._flops(lengths)

    def add_stream(self, texts: AnswerBatch, lengths: Lengths) -> None:
        """Add a micro-batch that is run for pairs of (P, 3) tokens, if it is of a step."""
        if not self.clock.is_running:
            return
        prompts, answers = lengths[:, :1], lengths[:, 1:]
        self._work.computed += len(texts.stream.input_ids)
        self._work.filler += texts.filler
        self._work.plain += int((prompts + answers)[answers > 0].sum())

    def close(self) -> dict[str, float]:
        """Return ``perf/`` and ``time/`` of the steps since the last call; waits for the device."""
        work, self._work = self._work, _Work()
        parts = self.clock.read()
        seconds, steps = max(sum(parts.values()), 1e-9), max(1, work.steps)
        metrics = {
            "perf/step_s": seconds / steps,
            "perf/pairs_per_s": work.pairs / seconds,
            "perf/tokens_per_s": work.tokens / seconds,
            "perf/pad_fraction": work.filler / max(1, work.computed),
            "perf/shared_fraction": 1 - (work.computed - work.filler) / max(1, work.plain),
        }
        if self._flops is not None:
            metrics["perf/tflops_per_s"] = work.flops / seconds / 1e12
            if self._flops_per_s is not None:
                metrics["perf/mfu"] = work.flops / seconds / self._flops_per_s
        return metrics | {f"time/{part}": spent / steps for part, spent in parts.items()}


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory used so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
