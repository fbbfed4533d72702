"""Numbers and JSON exactly as JavaScript writes them.

The prompts and responses of the document were made by JavaScript, so text made here from the same
state must equal them byte for byte: ``toFixed`` rounds exact ties away from zero, ``1.0`` prints as
``1``, and a string's length counts UTF-16 units.
"""

import json
import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal

# The largest whole number that JavaScript, and so every JSON reader, holds without rounding.
MAX_SAFE_INTEGER = 2**53 - 1

# toFixed and String() both change to exponents from here on.
_EXPONENT_FROM = 1e21


def to_fixed(value: float, digits: int = 2) -> str:
    """Return ``value.toFixed(digits)``: rounded on its exact binary value, ties away from zero."""
    value = float(value)
    if not math.isfinite(value) or abs(value) >= _EXPONENT_FROM:
        return number_text(value)
    if not (value * 2 ** (digits + 1)).is_integer():  # no tie: every tie is a multiple of that
        return f"{value:.{digits}f}"
    magnitude = Decimal(abs(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{'-' if value < 0 else ''}{magnitude}"


def number_text(value: float) -> str:
    """Return ``String(value)``: the shortest digits that read back as the same 64-bit float."""
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text = "".join(map(str, digits))
    point = len(text) + int(exponent)  # the number is 0.<text> * 10**point
    return "-" * sign + _place_point(text, point)


def json_text(value: object, *, indent: int = 2) -> str:
    """Return ``JSON.stringify(value, null, indent)`` for a decoded JSON value.

    Numbers that JSON cannot hold become null and lone surrogates are escaped, as in JavaScript.
    """
    return _json_lines(value, "\n", " " * indent)


def utf16_length(text: str) -> int:
    """Return ``text.length``: UTF-16 units, of which an emoji takes two."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _place_point(digits: str, point: int) -> str:
    if len(digits) <= point <= 21:
        return digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e{point - 1:+d}"


def _json_lines(value: object, newline: str, step: str) -> str:
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float():
            return number_text(value) if math.isfinite(value) else "null"
        case str():
            return _string_text(value)
        case Mapping():
            items = [
                f"{_string_text(name)}: {_json_lines(item, newline + step, step)}"
                for name, item in value.items()
            ]
            return _bracketed("{", items, "}", newline, step)
        case Sequence():
            items = [_json_lines(item, newline + step, step) for item in value]
            return _bracketed("[", items, "]", newline, step)
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def _string_text(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")  # \udXXX for lone surrogates


def _bracketed(opening: str, items: list[str], closing: str, newline: str, step: str) -> str:
    if not items:
        return opening + closing
    inner = newline + step
    return f"{opening}{inner}{f',{inner}'.join(items)}{newline}{closing}"
