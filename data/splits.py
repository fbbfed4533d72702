"""Cut examples into a training and an evaluation side along whole units.

A unit (a session, a grouping key) lies on one side as a whole; which side follows from the seed and
the unit's name, never from the order of the rows. What crosses nevertheless, such as one prompt met
in two sessions, is found by `crossing_rows`.

Shapes: N examples, U units.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError

SPLIT_UNITS = ("session", "group", "time")


def seeded_rank(name: str, seed: int) -> int:
    """Give ``name`` a uniform 64-bit rank that depends on it and on the seed only."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def split_by_unit(
    units: NDArray[np.int64], names: Sequence[str], *, eval_split: float, seed: int
) -> NDArray[np.bool_]:
    """Send whole units to the evaluation side, in seeded order, until their share is closest.

    Every unit is as likely to be taken as every other, wherever its rows stand: the order is that
    of `seeded_rank`.

    Args:
        units: (N,) index of each row's unit.
        names: (U,) the units' names; a name not used by any row is ignored.
        eval_split: wanted share of rows on the evaluation side, in (0, 1).
        seed: another seed gives another independent split.

    Returns:
        (N,) true on the evaluation side; each side has at least one unit.

    Raises:
        InputError: ``eval_split`` is out of range, or there are fewer than two units.
    """
    _check_share(eval_split)
    used, rows_per_unit = np.unique(units, return_counts=True)
    used_names = [names[int(unit)] for unit in used]
    if len(used) < 2:
        raise InputError(
            f"cannot split {len(units)} examples by unit: {len(used)} unit(s) found, "
            "at least 2 needed; choose another split_by"
        )
    order = sorted(
        range(len(used)), key=lambda i: (seeded_rank(used_names[i], seed), used_names[i])
    )
    taken = _closest_cut(np.cumsum(rows_per_unit[order]), eval_split * len(units))
    return np.isin(units, used[order[:taken]])


def split_by_time(times: NDArray[np.int64], *, eval_split: float) -> NDArray[np.bool_]:
    """Send the latest rows to the evaluation side; rows of one instant stay together.

    Args:
        times: (N,) any unit of time.
        eval_split: wanted share of rows on the evaluation side, in (0, 1).

    Returns:
        (N,) true on the evaluation side; each side has at least one instant.

    Raises:
        InputError: ``eval_split`` is out of range, or all rows have one time.
    """
    _check_share(eval_split)
    instants, rows_per_instant = np.unique(times, return_counts=True)
    if len(instants) < 2:
        raise InputError(
            f"cannot split {len(times)} examples by time: they have {len(instants)} different "
            "time(s), at least 2 needed; choose another split_by"
        )
    taken = _closest_cut(np.cumsum(rows_per_instant[::-1]), eval_split * len(times))
    is_eval: NDArray[np.bool_] = times >= instants[-taken]
    return is_eval


def crossing_rows(keys: NDArray[np.int64], is_eval: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the evaluation rows whose key also occurs on the training side.

    Args:
        keys: (N,) for example the index of each row's prompt.
        is_eval: (N,) true on the evaluation side.

    Returns:
        (N,) true only on evaluation rows.
    """
    return is_eval & np.isin(keys, keys[~is_eval])


def _check_share(eval_split: float) -> None:
    if not 0 < eval_split < 1:
        raise InputError(f"eval_split must be in (0, 1), got {eval_split}")


def _closest_cut(rows_taken: NDArray[np.int64], wanted: float) -> int:
    """Return how many units to take so that rows_taken[units - 1] is closest to ``wanted``."""
    return 1 + int(np.argmin(np.abs(rows_taken[:-1] - wanted)))
