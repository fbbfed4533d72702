"""How this process was started: alone, or as one of several by torchrun. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Launch:
    """One of ``count`` processes, as torchrun numbers them.

    Attributes:
        rank: its number among all, from 0.
        count: of the processes.
        local_rank: its number among those of its machine, from 0.
        local_count: of the processes of its machine.
        restarts: how often torchrun has started the processes again.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    restarts: int = 0

    @classmethod
    def of_environment(cls) -> Self:
        """Read the variables that torchrun sets; a process without them is alone."""
        if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
            return cls()

        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return cls(
            rank=number("RANK", 0),
            count=number("WORLD_SIZE", 1),
            local_rank=number("LOCAL_RANK", 0),
            local_count=number("LOCAL_WORLD_SIZE", 1),
            restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
        )
