"""Spans of time as people write them: ``90s``, ``15m``, ``2h30m``, ``1d``."""

import re

from dpo.errors import InputError

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_SPAN = re.compile("".join(rf"(?:(\d{{1,9}}){unit})?" for unit in _UNITS), re.ASCII)


def seconds_of(text: str) -> int:
    """Return the seconds, at least 1, of days, hours, minutes and seconds in this order.

    Raises:
        InputError: it is no such span.
    """
    found = _SPAN.fullmatch(text)
    counts = found.groups(default="0") if found else ()
    seconds = sum(int(count) * unit for count, unit in zip(counts, _UNITS.values(), strict=False))
    if not seconds:
        raise InputError(f"expected a span of time such as 90s, 15m, 2h30m or 1d, got {text!r}")
    return seconds
