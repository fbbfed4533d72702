"""A step that finds no memory is done again in smaller micro-batches, and nothing else changes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo import run
from dpo.config import RunConfig
from dpo.errors import RunError
from dpo.models import Decoder
from dpo.progress import Console
from dpo.scoring import MicroBatches
from dpo.segments import TokenStream
from dpo.tokenization import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
LACKS = {"gpu": torch.OutOfMemoryError("CUDA out of memory."), "cpu": RuntimeError(CPU_ALLOCATOR)}


def limit_memory(
    model: nn.Module, *, tokens: int, where: str = "forward", lack: str = "gpu"
) -> None:
    """Let a model find no memory for a stream of more than so many tokens, in place.

    Args:
        model: whose training is to fail.
        tokens: of the longest stream that does not.
        where: in the forward pass, when the gradient has come down to the embedding, so that all
            layers have theirs, or in a forward pass without gradient.
        lack: of which device.
    """

    def fail(_gradient: Tensor) -> None:
        raise LACKS[lack].with_traceback(None)

    def before(module: nn.Module, arguments: tuple[TokenStream]) -> None:
        here = "forward" if torch.is_grad_enabled() else "scoring"
        if where == here and len(arguments[0].input_ids) > tokens:
            raise LACKS[lack].with_traceback(None)

    def embedded(module: nn.Module, _arguments: object, hidden: Tensor) -> None:
        if where == "backward" and len(hidden) > tokens and hidden.requires_grad:
            hidden.register_hook(fail)

    model.register_forward_pre_hook(before)
    model.get_submodule("model.embed_tokens").register_forward_hook(embedded)


def make_trainer(
    model: Decoder, pairs: TokenizedPairs, *, steps: int = 3, loss: str = "sigmoid", **options: Any
) -> Trainer:
    """Make a trainer whose reference is computed before memory is short."""
    config = TrainConfig(batch_size=8, steps=steps, learning_rate=1e-2, **options)
    reference = Trainer(model, pairs, config, loss=loss)
    return Trainer(
        model,
        pairs,
        config,
        loss=loss,
        reference=reference.batches.reference,
        mismatched_reference=reference.mismatched.reference if reference.mismatched else None,
    )


def do_steps(trainer: Trainer) -> None:
    """Do all steps, without the look at the start, which is no step."""
    for _ in range(trainer.total_steps):
        trainer.train_step()


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.module.named_parameters()}


@pytest.mark.parametrize(
    ("loss", "where", "lack"),
    [("sigmoid", "forward", "gpu"), ("sigmoid", "forward", "cpu"), ("sigmoid", "backward", "gpu"),
     ("kto", "scoring", "gpu"), ("bco", "forward", "gpu"), ("dr_dpo", "backward", "cpu")],
)  # fmt: skip
def test_run_equals_one_in_the_smaller_micro_batches_bit_for_bit(
    make_model: MakeModel, make_pairs: MakePairs, where: str, lack: str, loss: str
) -> None:
    pairs = make_pairs(16)
    short = make_trainer(make_model(), pairs, loss=loss, micro_batch_size=8)
    limit_memory(short.module, tokens=64, where=where, lack=lack)
    do_steps(short)
    size = short.batches.micro_batch_size
    unbroken = make_trainer(make_model(), pairs, loss=loss, micro_batch_size=size)
    do_steps(unbroken)
    assert size in (2, 4)
    assert len(short.notes) == {4: 1, 2: 2}[size]
    for name, value in weights(unbroken).items():
        assert torch.equal(weights(short)[name], value), name


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradient_of_a_broken_attempt_does_not_count(
    make_model: MakeModel, make_pairs: MakePairs, where: str
) -> None:
    """Micro-batches that were done before the one that failed are not added twice."""
    pairs = make_pairs(16, seed=2, longest=40)
    short = make_trainer(make_model(dtype=torch.float64), pairs, micro_batch_size=3)
    sizes = [
        len(short.batches.collate(rows).texts.stream.input_ids)
        for rows in short.batches.split(short.sampler.rows(0))
    ]
    assert sizes[0] < max(sizes)
    limit_memory(short.module, tokens=max(sizes) - 1, where=where)
    do_steps(short)
    unbroken = make_trainer(make_model(dtype=torch.float64), pairs, micro_batch_size=3)
    do_steps(unbroken)
    assert short.notes
    for name, value in weights(unbroken).items():
        torch.testing.assert_close(weights(short)[name], value, rtol=0, atol=1e-10)


def test_smaller_micro_batches_are_kept_and_told_once(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = make_trainer(make_model(), make_pairs(16), micro_batch_size=8)
    limit_memory(trainer.module, tokens=110)
    do_steps(trainer)
    assert trainer.notes == [
        "step 1: the memory is full: going on in micro-batches of at most 4 pairs, 2 in place of 1 "
        "a step, which changes no result"
    ]


def test_row_that_does_not_fit_alone_ends_the_run(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = make_trainer(make_model(), make_pairs(16))
    limit_memory(trainer.module, tokens=1)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        trainer.train_step()


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    make_model: MakeModel, make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LACKS, "gpu", RuntimeError("expected scalar type Float"))
    trainer = make_trainer(make_model(), make_pairs(16))
    limit_memory(trainer.module, tokens=1)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        trainer.train_step()
    assert trainer.notes == []


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 8), st.one_of(st.none(), st.integers(1, 8)), st.booleans())
def test_smaller_is_more_micro_batches_until_each_holds_one_row(
    make_pairs: MakePairs, rows: int, size: int | None, share_prefix: bool
) -> None:
    batches: MicroBatches | None = MicroBatches(
        make_pairs(rows),
        micro_batch_size=size,
        tokens_per_micro_batch=None if size else 8192,
        share_prefix=share_prefix,
    )
    count = 0
    while batches is not None:
        pieces = batches.split(range(rows))
        assert len(pieces) > count
        count, batches = len(pieces), batches.smaller(range(rows))
    assert count == rows


def test_run_says_that_it_goes_on_in_smaller_micro_batches(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def short_of_memory(*arguments: Any, **options: Any) -> Trainer:
        trainer = Trainer(*arguments, **options)
        limit_memory(trainer.module, tokens=tokens)
        return trainer

    monkeypatch.setattr(run, "Trainer", short_of_memory)
    config = RunConfig(
        model=str(model_folder),
        data=str(data),
        out=str(tmp_path / "RUN"),
        train=TrainConfig(batch_size=8, steps=2, device="cpu", threads=1),
    )
    said, tokens = io.StringIO(), 80
    run.train(config, console=Console(said, quiet=True))
    assert said.getvalue().count("the memory is full: going on in micro-batches of at most") == 1
    tokens = 1
    alone = replace(config, out=str(tmp_path / "ALONE"))
    with pytest.raises(RunError, match=r"^CUDA out of memory\. Less memory is needed with a"):
        run.train(alone, console=Console(said, quiet=True))
