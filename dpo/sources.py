"""Which source each pair of a data set is from, as the metrics tell them apart.

Shapes: P pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpo.tokenized_pairs import TokenizedPairs

MOST: Final = 16  # names in a line of metrics
OTHER: Final = "other"
UNNAMED: Final = "unnamed"


@dataclass(frozen=True, eq=False)
class Sources:
    """The sources of a data set.

    Attributes:
        names: at most ``MOST``, the most frequent first, of letters, digits, ``_``, ``.`` and
            ``-``.
        numbers: (P,) int64, the place in ``names`` of each row's source.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int64]


def sources_of(pairs: TokenizedPairs) -> Sources | None:
    """Tell the sources of ``pairs`` apart; None if there are not two.

    Other characters than those of ``Sources.names`` become ``_``; sources that are then the same
    are one. Pairs without a source are ``UNNAMED``. Of more than ``MOST`` sources, the rarest are
    one, ``OTHER``.
    """
    plain = {source: re.sub(r"[^\w.-]+", "_", source or UNNAMED) for source in set(pairs.sources)}
    named = [plain[source] for source in pairs.sources]
    names = [name for name, _ in Counter(named).most_common()]
    if len(names) < 2:
        return None
    if len(names) > MOST:
        names = [*(name for name in names[: MOST - 1] if name != OTHER), OTHER]
    numbers = {name: number for number, name in enumerate(names)}
    rest = len(names) - 1
    return Sources(tuple(names), np.array([numbers.get(name, rest) for name in named], np.int64))
