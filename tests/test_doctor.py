"""``dpo doctor``: what is installed, and whether training is sound here."""

import math
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpo import doctor
from dpo.cli import main
from dpo.doctor import SelfTest


def test_it_tells_versions_devices_extras_and_trains() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    for said in (
        f"dpo-engine {metadata.version('dpo-engine')}, Python 3.",
        f"torch {metadata.version('torch')}",
        f"parquet     pyarrow {metadata.version('pyarrow')} (Parquet files in and out)",
        "caches  ",
    ):
        assert said in result.output
    tests = [line for line in result.output.splitlines() if "after 10 steps" in line]
    assert [line.split()[:2] for line in tests[:2]] == [["cpu", "float32"], ["cpu", "bf16-mixed"]]
    assert all(": sound (" in line for line in tests)


def test_a_missing_extra_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"sky": ("no-such-package", "clouds")})
    lines = list(doctor.describe_installation())
    assert "  sky         missing: pip install 'dpo-engine[sky]' (clouds)" in lines


@pytest.mark.parametrize(
    ("first", "last", "is_sound"),
    [
        (math.log(2), 0.5, True),
        (math.log(2), 0.8, False),
        (math.log(2) + 1e-3, 0.5, False),
        (float("nan"), 0.5, False),
        (math.log(2), float("nan"), False),
    ],
)
def test_sound_training_begins_at_ln_2_and_lowers_the_loss(
    first: float, last: float, is_sound: bool
) -> None:
    assert SelfTest("cpu", "float32", first, last, 0.1).is_sound == is_sound


def test_unsound_training_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SelfTest("cpu", "float32", 0.8, 0.5, 0.1)
    monkeypatch.setattr(doctor, "self_tests", lambda: iter([broken]))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "NOT SOUND" in result.output
    assert result.stderr == "Error: training is not sound on cpu in float32\n"


def test_every_extra_but_that_of_the_tests_is_told() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert {*doctor.EXTRAS, "test"} == set(settings["project"]["optional-dependencies"])
