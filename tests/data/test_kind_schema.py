import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from dpo.data.dataset import BuildOptions
from dpo.data.kinds.schema import Count, Range, RecordSchema, Share, to_json
from dpo.errors import InputError


@dataclass(frozen=True, slots=True)
class Inner:
    turn_number: Count
    quality: Share
    is_done: bool


@dataclass(frozen=True, slots=True)
class Outer:
    inner_part: Inner
    colour: Literal["red", "green"]
    names: tuple[str, ...] | None = None
    level: Annotated[int, Range(1, 5)] | None = None
    rate: Annotated[float, Range(0)] = 0.5


SCHEMA = RecordSchema(Outer)
INNER: dict[str, object] = {"turnNumber": 3, "quality": 0.25, "isDone": False}
OUTER: dict[str, object] = {"innerPart": INNER, "colour": "red"}


def test_camel_case_groups_become_nested_dataclasses() -> None:
    record = SCHEMA.parse({**OUTER, "names": ["a", "b"], "level": 5, "rate": 2}, "row 1")

    assert record == Outer(Inner(3, 0.25, is_done=False), "red", ("a", "b"), 5, 2.0)


def test_what_is_none_is_left_out_of_the_json() -> None:
    assert to_json(SCHEMA.parse(OUTER, "row 1")) == {**OUTER, "rate": 0.5}


def test_null_is_the_same_as_a_missing_optional_field() -> None:
    assert SCHEMA.parse({**OUTER, "level": None}, "row 1") == SCHEMA.parse(OUTER, "row 1")


def test_five_point_zero_is_the_whole_number_five() -> None:
    level = SCHEMA.parse({**OUTER, "level": 5.0}, "row 1").level

    assert (level, type(level)) == (5, int)


def test_the_largest_whole_number_is_the_largest_that_json_readers_keep() -> None:
    data = {**OUTER, "innerPart": {**INNER, "turnNumber": 2**53 - 1}}

    assert SCHEMA.parse(data, "row 1").inner_part.turn_number == 2**53 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turnNumber": True}, "innerPart.turnNumber must be a whole number >= 0, got true"),
        ({"turnNumber": -1}, "innerPart.turnNumber must be a whole number >= 0, got -1"),
        ({"turnNumber": 1.5}, "innerPart.turnNumber must be a whole number >= 0, got 1.5"),
        ({"turnNumber": "3"}, 'innerPart.turnNumber must be a whole number >= 0, got "3"'),
        ({"turnNumber": 2**53}, "innerPart.turnNumber must be a whole number >= 0, got 9007"),
        ({"turnNumber": float("inf")}, "innerPart.turnNumber must be a whole number >= 0"),
        ({"turnNumber": None}, "innerPart.turnNumber is missing"),
        ({"quality": 1.01}, "innerPart.quality must be a number in [0, 1], got 1.01"),
        ({"quality": float("nan")}, "innerPart.quality must be a number in [0, 1], got NaN"),
        ({"quality": 10**400}, "innerPart.quality must be a number in [0, 1], got 1000"),
        ({"isDone": 1}, "innerPart.isDone must be true or false, got 1"),
        ({"quallity": 1}, "innerPart.quallity is not a field, expected only isDone, quality, turn"),
    ],
)
def test_a_fault_in_a_group_is_named_by_its_path(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SCHEMA.parse({**OUTER, "innerPart": {**INNER, **change}}, "row 1")

    assert str(caught.value).startswith(f"row 1: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "blue"}, 'colour must be one of red, green, got "blue"'),
        ({"colour": ["red"]}, 'colour must be one of red, green, got ["red"]'),
        ({"names": "ab"}, 'names must be a list, each text, got "ab"'),
        ({"names": ["a", 1]}, 'names must be a list, each text, got ["a", 1]'),
        ({"level": 6}, "level must be a whole number in [1, 5], got 6"),
        ({"rate": float("inf")}, "rate must be a number >= 0, got Infinity"),
        ({"innerPart": 7}, "innerPart must be an object, got 7"),
        ({"colour": "x" * 99}, f'colour must be one of red, green, got "{"x" * 56}...'),
    ],
)
def test_a_fault_at_the_top_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SCHEMA.parse({**OUTER, **change}, "row 1")

    assert str(caught.value) == f"row 1: {message}"


def test_all_faults_of_a_record_are_reported_together() -> None:
    inner = {"turnNumber": -1, "isDone": True, "other": 0}

    with pytest.raises(InputError) as caught:
        SCHEMA.parse({"innerPart": inner, "colour": "blue", "more": 1}, "feedback.jsonl:3: state")

    assert str(caught.value) == (
        "feedback.jsonl:3: state: innerPart.turnNumber must be a whole number >= 0, got -1; "
        "innerPart.quality is missing; "
        "innerPart.other is not a field, expected only isDone, quality, turnNumber; "
        'colour must be one of red, green, got "blue"; '
        "more is not a field, expected only colour, innerPart, level, names, rate"
    )


@pytest.mark.parametrize("value", [None, 3, [], "{}"])
def test_a_record_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="row 1: the record must be an object, got"):
        SCHEMA.parse(value, "row 1")


def test_a_type_that_json_cannot_hold_is_refused_when_the_schema_is_made() -> None:
    @dataclass(frozen=True)
    class Unfit:
        when: complex

    with pytest.raises(TypeError, match="a record's field cannot be <class 'complex'>"):
        RecordSchema(Unfit)


@pytest.mark.parametrize("loads", [json.loads, lambda text: json.loads(text, parse_int=float)])
def test_whole_numbers_come_back_whole_however_they_were_decoded(
    loads: Callable[[str], object],
) -> None:
    record = SCHEMA.parse(OUTER, "row 1")

    again = SCHEMA.parse(loads(json.dumps(to_json(record))), "row 1")

    assert json.dumps(to_json(again)) == json.dumps(to_json(record))


def test_what_a_record_itself_refuses_is_told_with_its_place() -> None:
    with pytest.raises(InputError, match=r"^row 1: seed has no effect"):
        RecordSchema(BuildOptions).parse({"seed": 1, "splitBy": "time"}, "row 1")
