"""JSON that means the same to every reader: no key twice, no NaN, no half of a surrogate pair."""

import json
import math
from collections.abc import Mapping
from typing import Any

from dpo.errors import InputError


def decode_json(text: str | bytes, where: str) -> Any:
    """Decode JSON, refusing what could not be written again or would be lost.

    Raises:
        InputError: not JSON; a key twice in one object; NaN or a number too large for a float; half
            of a surrogate pair.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = _DECODER.decode(text.rstrip())  # so that an end too early is still on line 1
        if "\\ud" in text or "\\uD" in text:
            _ENCODER.encode(value).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: malformed JSON: {error}") from error
    return value


def encode_json(value: object, where: str) -> str:
    """Return compact JSON in the order of the keys.

    Raises:
        InputError: it holds NaN, an infinity, half of a surrogate pair, or what JSON cannot say.
    """
    try:
        text = _ENCODER.encode(value)
        text.encode()  # refuses a surrogate
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: cannot be written as JSON: {error}") from error
    return text


def same_json(one: object, other: object) -> bool:
    """Return whether two values are the same JSON, whatever the order of the keys."""
    return _SORTING_ENCODER.encode(one) == _SORTING_ENCODER.encode(other)


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(items)
    if len(content) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
_ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain
)
_SORTING_ENCODER = json.JSONEncoder(sort_keys=True, default=_plain)
