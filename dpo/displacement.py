"""An alarm for likelihood displacement: chosen answers that training makes less likely.

DPO only asks for a gap. It may widen it by lowering both answers, the rejected one by more, and the
probability goes to answers that nobody asked for (Pal et al. 2024, arXiv 2402.13228; Razin et al.
2024, arXiv 2410.08847).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NATS: Final = 3.0  # e^-3: a twentieth of the probability; a rule of thumb
WINDOWS: Final = 10  # in a row: one window may hold odd pairs

ADVICE: Final = (
    f"likelihood displacement: for {WINDOWS} lines of metrics the chosen answers were on average "
    f"over {NATS:g} nats less likely than at the start (displacement/chosen), while the margin "
    "rose. If that is not meant: --loss rpo or dpop, a mixture such as --loss sigmoid:1,sft:0.2, "
    "a larger --beta or fewer steps"
)


@dataclass(slots=True)
class DisplacementAlarm:
    """Looks at the metrics of one window after another, against a reference that is the start.

    Attributes:
        windows: how many in a row up to the last had chosen answers below the bound.
        first_margin: ``rewards/margin`` of the first of those.
    """

    windows: int = 0
    first_margin: float = 0.0

    def hears(self, metrics: Mapping[str, float]) -> bool:
        """Take in a window; say whether so many are displaced, with a margin above the first's."""
        margin = metrics["rewards/margin"]
        if metrics["displacement/chosen"] >= -NATS:
            self.windows = 0
            return False
        if self.windows == 0:
            self.first_margin = margin
        self.windows += 1
        return self.windows >= WINDOWS and margin > self.first_margin
