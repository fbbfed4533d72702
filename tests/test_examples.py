"""Every program in ``dpo/examples`` runs, and does what it is there to show."""

import math
import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dpo import PreferencePair, TrainConfig, Trainer, reference_log_probs, tokenize_pairs
from dpo.errors import InputError
from dpo.models.tiny import make_tiny_model
from dpo.tokenizer import byte_tokenizer

FOLDER = Path(__file__).parents[1] / "dpo/examples"


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run(name: str) -> Mapping[str, object]:
    """Run a program; return what it leaves."""
    return runpy.run_module(f"dpo.examples.{name}", run_name="__main__")


def numbers(left: Mapping[str, object], name: str) -> list[float]:
    found = left[name]
    assert isinstance(found, list)
    return found


def test_custom_loss_trains_up_to_its_cap() -> None:
    losses = numbers(run("custom_loss"), "losses")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert math.log1p(math.exp(-0.5)) <= losses[-1] < losses[1] < losses[0]


def test_custom_model_learns_every_pair() -> None:
    margins = numbers(run("custom_model"), "margins")
    assert len(margins) == 16
    assert min(margins) > 1


def test_custom_loop_equals_the_trainer() -> None:
    losses = numbers(run("custom_loop"), "losses")
    tokenizer = byte_tokenizer()
    pairs = tokenize_pairs(
        [PreferencePair(f"{n} + 1 =", f" {n + 1}", " I do not know") for n in range(16)], tokenizer
    ).pairs
    config = TrainConfig(batch_size=16, steps=8, learning_rate=1e-4, schedule="constant")
    trainer = Trainer(make_tiny_model(tokenizer, seed=0), pairs, config)
    expected = [step.metrics["loss"] for step in trainer if step.metrics is not None]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.5


def test_active_learning_asks_about_the_smallest_margins_and_never_twice() -> None:
    left = run("active_learning")
    labelled, margins = left["labelled"], left["margin_by_id"]
    assert isinstance(labelled, list)
    assert isinstance(margins, dict)
    ids = [pair.id for pair in labelled]
    assert len(ids) == len(set(ids)) == 24
    assert [pair.id for pair in left["asked"]] == sorted(margins, key=margins.__getitem__)[:8]  # type: ignore[attr-defined]


def test_online_dpo_raises_the_judges_reward() -> None:
    rewards = numbers(run("online_dpo"), "rewards")
    assert sum(rewards[-2:]) > 2 * sum(rewards[:2]) > 0


def test_shared_reference_is_computed_by_the_first_of_ten_runs() -> None:
    assert run("shared_reference")["computed"] == [16] + [0] * 9


def test_every_program_has_a_test() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    names = [path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    assert [name for name in names if f'run("{name}")' not in tested] == []


def test_reference_in_memory_leaves_the_policy_as_it_was() -> None:
    tokenizer = byte_tokenizer()
    pairs = tokenize_pairs([PreferencePair("a", "b", "c")], tokenizer).pairs
    policy = make_tiny_model(tokenizer, seed=0).train()
    chosen, rejected = reference_log_probs(policy, pairs)[0]
    assert policy.training
    assert (len(chosen), len(rejected)) == (2, 2)  # a byte and the end
    assert not (chosen == rejected).all()


def test_module_that_is_no_policy_has_no_reference() -> None:
    pairs = tokenize_pairs([PreferencePair("a", "b", "c")], byte_tokenizer()).pairs
    with pytest.raises(InputError, match=r"Linear is no policy: it has no output_head\(\)"):
        reference_log_probs(torch.nn.Linear(2, 2), pairs)
