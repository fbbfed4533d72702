"""The tables and the picture of ``dpo bench``."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from dpo.bench.plot import BAR, plot
from dpo.bench.results import Measurement, scaling_table, table

ROW = Measurement(
    scenario="one",
    device="a GPU",
    threads=2,
    torch="2.13.0",
    settings={},
    step_seconds=[2.0, 1.0, 1.5],
    pairs_per_s=4.0,
    useful_tokens_per_s=800.0,
    useful_share=1.0,
    useful_flops=3e12,
    matrix_flops_per_s=4e12,
    mfu=0.5,
    datasheet_flops_per_s=8e12,
    peak_mib=3000.0,
    state_mib=2000.0,
    reference_seconds=0.3,
    split={"data": 0.1, "forward": 0.5, "backward": 1.2, "optimizer": 0.2},
    notes=[],
    wall_seconds=30.0,
)


def cells(markdown: str, line: int) -> list[str]:
    return [cell.strip() for cell in markdown.splitlines()[line].strip("|").split("|")]


def test_table_by_hand() -> None:
    heads, values = (cells(table([ROW]), line) for line in (0, 2))
    found = dict(zip(heads, values, strict=True))
    assert found["s/step"] == "1.5"
    assert found["spread"] == "67%"  # (2 - 1) / 1.5
    assert found["of datasheet"] == "25%"  # 3e12 / (1.5 x 8e12)
    assert found["before"] == "20%"  # 0.3 of 1.5
    assert found["backward"] == "60.0%"  # 1.2 of 2.0


def test_table_without_datasheet_and_reference_says_so() -> None:
    row = replace(ROW, datasheet_flops_per_s=None, reference_seconds=None)
    found = dict(zip(cells(table([row]), 0), cells(table([row]), 2), strict=True))
    assert (found["of datasheet"], found["before"]) == ("", "")


def test_scaling_by_hand() -> None:
    # four times the tokens and five times the arithmetic (attention) in six times the time
    twice = replace(
        ROW, scenario="two", step_seconds=[9.0], useful_tokens_per_s=800 * 4 / 6, useful_flops=15e12
    )
    found = scaling_table({"two": twice, "one": ROW}, [["one", "two"]])
    assert cells(found, 2) == ["one", "1.00", "1.00", "1.00", "1.00", "1.00"]
    assert cells(found, 3) == ["two", "4.00", "5.00", "6.00", "1.50", "1.20"]


def test_family_that_is_not_whole_has_no_scaling() -> None:
    assert scaling_table({"one": ROW}, [["one", "two"]]) == ""


def test_bars_are_as_long_as_the_numbers() -> None:
    slower = replace(ROW, scenario="two", useful_tokens_per_s=200.0, mfu=0.25)
    root = ElementTree.fromstring(plot([ROW, slower], title="a & b"))
    bars = [
        float(node.attrib["width"])
        for node in root.iter("{http://www.w3.org/2000/svg}rect")
        if node.attrib["height"] == "14"
    ]
    tokens, mfu, parts, memory = bars[:2], bars[2:4], bars[4:9], bars[14:16]
    assert tokens == [BAR, BAR / 4]
    assert mfu == [BAR / 2, pytest.approx(BAR / 4, abs=0.1)]
    assert parts == pytest.approx([BAR * share for share in (0.05, 0.0, 0.25, 0.6, 0.1)], abs=0.1)
    assert memory == pytest.approx([BAR * 2 / 3, BAR / 3], abs=0.1)
