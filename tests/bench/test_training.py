"""What ``dpo bench`` counts and times."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo.bench import clock, training
from dpo.bench.results import LACK_OF_MEMORY
from dpo.bench.scenarios import (
    FAMILIES,
    MINUTES,
    PROFILES,
    SCENARIOS,
    SHAPES,
    SUITES,
    Profile,
    Scenario,
)
from dpo.bench.training import (
    FEWEST_STEPS,
    main,
    measure,
    random_pairs,
    useful_flops,
)
from dpo.models import init_model, parse_config

TINY = {
    **SHAPES["5m"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A scenario that takes milliseconds, in the tables while the test runs."""
    scenario = Scenario(shape="tiny", profile="short", dtype="float32", batch_size=3)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(PROFILES, "short", Profile((3, 9), (2, 5)))
    monkeypatch.setitem(SCENARIOS, "tiny", scenario)
    monkeypatch.setattr(clock, "PRODUCT_SIZES", (64,))
    return "tiny"


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_made_of_what_the_tables_hold(name: str) -> None:
    scenario = SCENARIOS[name]
    assert parse_config(SHAPES[scenario.shape]).vocab_size == SHAPES[scenario.shape]["vocab_size"]
    low, high = PROFILES[scenario.profile].prompt
    prompts = random_pairs(scenario, 4).lengths()[:, 0]
    assert prompts.min() >= low
    assert prompts.max() <= high


def test_suites_name_scenarios() -> None:
    assert {name for suite in SUITES.values() for name in suite} <= set(SCENARIOS)
    assert set(MINUTES) <= set(SUITES)


@pytest.mark.parametrize("name", FAMILIES)
def test_work_of_a_family_grows_by_eight(name: str) -> None:
    first, *_, last = FAMILIES[name].values()
    tokens = [
        random_pairs(scenario, scenario.batch_size).lengths().sum() for scenario in (first, last)
    ]
    assert tokens[1] / tokens[0] == pytest.approx(8, rel=0.15)


def test_useful_arithmetic_by_hand() -> None:
    config = parse_config(
        TINY | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"hidden_size": 4, "intermediate_size": 8, "head_dim": 2, "vocab_size": 10}
    )  # fmt: skip
    # block: q and o 4x4 each, k and v 4x2 each, three of 4x8: 32 + 16 + 96 = 144 weights
    # prompt of 3, answers of 2 and 1: 6 tokens; pairs of token and seen token: 6 + (6+3) + (3+1)
    # head: 3 answer tokens
    forward = 2 * 144 * 6 + 4 * 4 * 19 + 2 * 4 * 10 * 3
    assert useful_flops(config, np.array([[3, 2, 1]])) == 3 * forward


def test_a_measurement_adds_up(tiny: str) -> None:
    found = measure(tiny, steps=2, device_kind="cpu")
    assert found.scenario == tiny
    assert len(found.step_seconds) == 2
    assert found.useful_share == 1.0
    median = sum(found.step_seconds) / 2
    assert found.pairs_per_s == pytest.approx(3 / median)
    assert found.mfu == pytest.approx(found.useful_flops / median / found.matrix_flops_per_s)
    assert found.reference_seconds is not None
    assert 0 < found.reference_seconds < found.wall_seconds
    assert found.datasheet_flops_per_s is None
    assert set(found.split) == {"data", "forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in found.split.values())
    weights = sum(p.numel() for p in init_model(parse_config(TINY)).parameters())
    assert found.state_mib == pytest.approx(4 * 4 * weights / 2**20, rel=0.01)


def test_a_prompt_computed_twice_is_useful_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = measure(tiny, steps=1, device_kind="cpu")
    twice = replace(SCENARIOS[tiny], shares_prefix=False)
    monkeypatch.setitem(SCENARIOS, tiny, twice)
    unshared = measure(tiny, steps=1, device_kind="cpu")
    lengths = random_pairs(twice, 3).lengths()
    expected = lengths.sum() / (lengths.sum() + lengths[:, 0].sum())
    assert unshared.useful_share == pytest.approx(expected)
    assert unshared.useful_flops == shared.useful_flops


def test_little_time_makes_few_steps(tiny: str) -> None:
    found = measure(tiny, steps=50, device_kind="cpu", seconds=0.0)
    assert len(found.step_seconds) == FEWEST_STEPS
    found = measure(tiny, steps=3, device_kind="cpu", seconds=600.0)
    assert len(found.step_seconds) == 3


@pytest.mark.parametrize(("loss", "parts"), [("simpo", 4), ("tdpo2", 5)])
def test_loss_that_needs_no_reference_beforehand_has_no_pass(
    tiny: str, monkeypatch: pytest.MonkeyPatch, loss: str, parts: int
) -> None:
    monkeypatch.setitem(SCENARIOS, tiny, replace(SCENARIOS[tiny], loss=loss))
    found = measure(tiny, steps=1, device_kind="cpu")
    assert found.reference_seconds is None
    assert len(found.split) == parts  # a reference in memory is a part of the step


def test_lack_of_memory_has_an_exit_code_of_its_own(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(training, "measure", fill)
    monkeypatch.setattr("sys.argv", ["training", tiny])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == LACK_OF_MEMORY
    assert capsys.readouterr().err == "CUDA out of memory\n"
