"""Who is compared: settings of this engine and of TRL, each at what may be its best.

TRL 1.16 makes log-probs by its fused head in any case: there is no flag for it, on or off. It takes
SDPA attention and the fused AdamW by itself, as this engine does. To add a contender, add an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

OURS: Final = "ours"
TRL: Final = "trl"
KEPT_HEAP: Final = {  # of glibc: memory that is given back stays in the process, its pages mapped
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Contender:
    """A setting.

    Attributes:
        flags: of ``step.py`` or of ``trl_steps.py``.
        environment: variables of its process, beside those of the comparison itself.
    """

    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _cached(*flags: str, environment: Mapping[str, str] | None = None) -> Contender:
    return Contender(("--precompute", *flags), environment or {})


CONTENDERS: Final[dict[str, Contender]] = {
    "ours": Contender(),
    "ours, kept heap": Contender(environment=KEPT_HEAP),
    "ours, 512-token micro-batches": Contender(("--tokens-per-micro-batch", "512")),
    "ours, no sharing": Contender(("--no-prefix-sharing",)),
    "ours, live reference": Contender(("--live-reference",)),
    "ours, compiled": Contender(("--compile",)),
    "trl, precomputed": _cached(),
    "trl, precomputed, kept heap": _cached(environment=KEPT_HEAP),
    "trl, precomputed, micro-batch 1/2": _cached("--accumulation", "2"),
    "trl, precomputed, micro-batch 1/2, kept heap": _cached(
        "--accumulation", "2", environment=KEPT_HEAP
    ),
    "trl, precomputed, micro-batch 1/4": _cached("--accumulation", "4"),
    "trl, precomputed, micro-batch 1/4, kept heap": _cached(
        "--accumulation", "4", environment=KEPT_HEAP
    ),
    "trl, precomputed, micro-batch 1/8": _cached("--accumulation", "8"),
    "trl, precomputed, micro-batch 1/8, kept heap": _cached(
        "--accumulation", "8", environment=KEPT_HEAP
    ),
    "trl, precomputed, compiled": _cached("--compile"),
    "trl, live reference": Contender(),
}
