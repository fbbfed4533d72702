"""Expected texts were printed by node 20: x.toFixed(2), String(x), JSON.stringify(x, null, 2)."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.kinds.javascript import json_text, number_text, to_fixed, utf16_length


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.125, "0.13"),  # Python's own formatting gives 0.12
        (0.375, "0.38"),
        (0.625, "0.63"),
        (-0.125, "-0.13"),
        (1.005, "1.00"),  # lies below the tie in binary
        (0.345, "0.34"),
        (1, "1.00"),
        (0.85, "0.85"),
        (-0.0, "0.00"),
        (-0.001, "-0.00"),
        (1e20, "100000000000000000000.00"),
        (1e21, "1e+21"),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
    ],
)
def test_to_fixed_prints_as_javascript_does(value: float, text: str) -> None:
    assert to_fixed(value) == text


@settings(deadline=None)
@given(st.integers(-(2**40), 2**40), st.integers(0, 3))
def test_to_fixed_moves_exact_ties_away_from_zero(units: int, digits: int) -> None:
    tie = (units * 2 + 1) / 2  # k + 1/2 at zero digits, exact in binary

    text = to_fixed(tie, 0)

    assert abs(int(text)) == math.floor(abs(tie) + 0.5)
    assert float(to_fixed(tie, digits + 1)) == tie


@settings(deadline=None)
@given(st.floats(-1e20, 1e20))
def test_to_fixed_is_within_half_a_unit_of_the_last_digit(value: float) -> None:
    assert abs(float(to_fixed(value)) - value) <= 0.005 + abs(value) * 1e-15


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e21, "1e+21"),
        (123456789012345680000.0, "123456789012345680000"),
        (9007199254740991, "9007199254740991"),
        (0.000001, "0.000001"),
        (1e-7, "1e-7"),
        (1.5e-7, "1.5e-7"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (-12.5, "-12.5"),
        (1.5, "1.5"),
        (100, "100"),
        (math.inf, "Infinity"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_print_as_in_javascript(value: float, text: str) -> None:
    assert number_text(value) == text


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_printed_numbers_read_back_as_themselves(value: float) -> None:
    assert float(number_text(value)) == value


def test_json_is_laid_out_as_by_stringify() -> None:
    value = {
        "a": [1, 2.0, {"b": [], "c": {}}, 'é\u2028"\\\n\x01\x7f😀/', None, True],
        "z": 1e-7,
        "s": "\ud800x",
        "n": math.nan,
    }

    assert json_text(value) == (
        '{\n  "a": [\n    1,\n    2,\n    {\n      "b": [],\n      "c": {}\n    },\n'
        '    "é\u2028\\"\\\\\\n\\u0001\x7f😀/",\n    null,\n    true\n  ],\n'
        '  "z": 1e-7,\n  "s": "\\ud800x",\n  "n": null\n}'
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@settings(deadline=None)
@given(json_values)
def test_json_text_reads_back_as_the_same_value(value: object) -> None:
    assert json.loads(json_text(value)) == value


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="not a JSON value: set"):
        json_text({"a": {1}})


def test_a_length_counts_utf16_units() -> None:
    assert utf16_length("a😀é") == 4
