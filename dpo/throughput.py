"""How fast a run is and how much memory it takes, as it logs it."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass
class Throughput:
    """Work done since the last line of metrics; tokens count a prompt once and each answer once."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, pairs: int, tokens: int, seconds: float) -> None:
        """Add one optimizer step."""
        self.steps += 1
        self.pairs += pairs
        self.tokens += tokens
        self.seconds += seconds

    def rates(self) -> dict[str, float]:
        """Return the ``perf/`` metrics: means over the steps added."""
        seconds = max(self.seconds, 1e-9)
        return {
            "perf/step_s": seconds / max(1, self.steps),
            "perf/pairs_per_s": self.pairs / seconds,
            "perf/tokens_per_s": self.tokens / seconds,
        }


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory used so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
