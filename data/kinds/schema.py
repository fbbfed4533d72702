"""JSON records declared once, as frozen dataclasses.

The annotations of a dataclass say what its JSON must hold; the reader, which reports every fault of
a record together, and the writer both follow from them::

    @dataclass(frozen=True, slots=True)
    class QueryFeatures:
        query_length: Count                                  # "queryLength": a whole number >= 0
        query_complexity: Share                              # "queryComplexity": in [0, 1]
        semantic_category: Literal["social", "question"]     # one of these texts

A field is a ``bool``, a ``str``, a ``Literal`` of texts, an ``Annotated`` int or float with its
``Range``, a ``tuple[..., ...]`` of one of these, or another such dataclass, which is a nested
object. ``| None = None`` makes it optional: None is left out of the JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from dpo.data.kinds.javascript import MAX_SAFE_INTEGER
from dpo.errors import InputError
from dpo.files import JSON

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from ``low`` to ``high``; None leaves the upper end open.

    Both ends are included, unless ``is_open``.
    """

    low: float
    high: float | None = None
    is_open: bool = False


Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]


class RecordSchema(Generic[Record]):
    """Reads one dataclass from decoded JSON and checks everything its annotations say."""

    def __init__(self, record: type[Record]) -> None:
        self._make: Callable[..., Record] = record
        hints = typing.get_type_hints(record, include_extras=True)
        self.fields = tuple(
            _field(field, hints[field.name]) for field in dataclasses.fields(record)
        )
        self._json_names = {field.json_name for field in self.fields}

    def parse(self, value: object, where: str) -> Record:
        """Return the record that decoded JSON holds.

        Raises:
            InputError: ``where`` and every fault: what is missing, unknown, of another type or out
                of range, each named by its path, such as ``contextFeatures.turnNumber``.
        """
        try:
            return self.convert(value)
        except ValueError as error:
            faults = "; ".join(self.faults(value, "")) or str(error)
            raise InputError(f"{where}: {faults}") from error

    def convert(self, value: object) -> Record:
        """Return the record; a ValueError says that there are `faults`, or what the record says."""
        if not isinstance(value, dict | Mapping):
            raise ValueError
        values: dict[str, object] = {}
        for name, json_name, is_required, convert, _ in self.fields:
            item = value.get(json_name)
            if item is not None:
                values[name] = convert(item)
            elif is_required:
                raise ValueError
        if not self._json_names.issuperset(value):
            raise ValueError
        return self._make(**values)

    def faults(self, value: object, path: str) -> Iterator[str]:
        """Yield what keeps ``value`` from being converted; ``path`` leads to it."""
        if not isinstance(value, Mapping):
            yield f"{path or 'the record'} must be an object, got {_shown(value)}"
            return
        prefix = f"{path}." if path else ""
        for _, json_name, is_required, _, faults in self.fields:
            item = value.get(json_name)
            if item is not None:
                yield from faults(item, prefix + json_name)
            elif is_required:
                yield f"{prefix}{json_name} is missing"
        yield from self._unknown(value, prefix)

    def _unknown(self, value: Mapping[object, object], prefix: str) -> Iterator[str]:
        known = ", ".join(sorted(self._json_names))
        for name in sorted(value.keys() - self._json_names, key=str):
            yield f"{prefix}{name} is not a field, expected only {known}"


def to_json(record: DataclassInstance) -> dict[str, JSON]:
    """Return the record as a JSON object, optional fields that are None left out."""
    return {
        json_name: _plain(value)
        for name, json_name in _names(type(record))
        if (value := getattr(record, name)) is not None
    }


def check_fields(record: DataclassInstance) -> None:
    """Check a record made in Python as `RecordSchema` checks JSON, and make 5.0 the count 5.

    Call it in ``__post_init__``.

    Raises:
        InputError: every field whose value is of another type or out of range, by its name.
    """
    found: list[str] = []
    schema = RecordSchema(type(record))
    for field, item in zip(dataclasses.fields(record), schema.fields, strict=True):
        value = getattr(record, item.name)
        if value is None and field.default is None:
            continue
        of_field = list(item.faults(value, item.name))
        if not of_field:
            object.__setattr__(record, item.name, item.convert(value))
        found += of_field
    if found:
        raise InputError("; ".join(found))


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A value without fields of its own: how to convert it, and what to say when that fails."""

    expected: str
    convert: Callable[[object], object]  # raises ValueError

    def faults(self, value: object, path: str) -> Iterator[str]:
        try:
            self.convert(value)
        except ValueError:
            yield f"{path} must be {self.expected}, got {_shown(value)}"


class _Field(NamedTuple):
    name: str
    json_name: str
    is_required: bool
    convert: Callable[[object], object]  # raises ValueError
    faults: Callable[[object, str], Iterator[str]]


def _field(field: dataclasses.Field[object], annotation: object) -> _Field:
    is_required = field.default is dataclasses.MISSING
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation, _ = typing.get_args(annotation)  # X | None
    type_: RecordSchema[Any] | _Leaf
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        type_ = RecordSchema(annotation)
    else:
        type_ = _leaf(annotation)
    return _Field(field.name, _camel_case(field.name), is_required, type_.convert, type_.faults)


def _leaf(annotation: object) -> _Leaf:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if annotation is bool:
        return _Leaf("true or false", _boolean)
    if annotation is str:
        return _Leaf("text", _text)
    if origin is Literal:
        return _Leaf(
            f"one of {', '.join(arguments)}", functools.partial(_choice, choices=arguments)
        )
    if origin is Annotated:
        return _number(*arguments)
    if origin is tuple:
        item = _leaf(arguments[0])
        return _Leaf(f"a list, each {item.expected}", functools.partial(_items, item=item))
    raise TypeError(f"a record's field cannot be {annotation}")


def _number(type_: type[int] | type[float], allowed: Range) -> _Leaf:
    largest = MAX_SAFE_INTEGER if type_ is int else sys.float_info.max
    low, high = allowed.low, largest if allowed.high is None else allowed.high
    noun = "a whole number" if type_ is int else "a number"
    if allowed.is_open:
        bounds = f"in ({low:g}, {high:g})"
        low, high = math.nextafter(low, high), math.nextafter(high, low)
    else:
        bounds = f">= {low:g}" if allowed.high is None else f"in [{low:g}, {high:g}]"

    def convert(value: object) -> int | float:
        if type(value) is type_ and low <= value <= high:  # the common case, told fast
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        if not low <= value <= high or (type_ is int and value != int(value)):
            raise ValueError
        return type_(value)  # 5.0 is the whole number 5: JSON has one type of number

    return _Leaf(f"{noun} {bounds}", convert)


def _boolean(value: object) -> object:
    if value is True or value is False:
        return value
    raise ValueError


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError
    return value


def _choice(value: object, *, choices: tuple[str, ...]) -> object:
    if value not in choices:
        raise ValueError
    return value


def _items(value: object, *, item: _Leaf) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(item.convert(each) for each in value)


@functools.cache
def _names(record: type[DataclassInstance]) -> tuple[tuple[str, str], ...]:
    return tuple((field.name, _camel_case(field.name)) for field in dataclasses.fields(record))


def _plain(value: object) -> JSON:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    assert isinstance(value, bool | int | float | str)
    return value


def _camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
