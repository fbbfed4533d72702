"""The planner: a step without memory takes what a real one takes, and the text says so."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from dpo import device as device_module
from dpo import planner, rehearsal, run, token_budget
from dpo.accelerators import ACCELERATORS
from dpo.adapter_config import AdapterConfig
from dpo.bench.memory import Comparison, predicted_mib, run_of
from dpo.bench.scenarios import SCENARIOS, SHAPES, Scenario
from dpo.cli import main
from dpo.cli import plan as plan_command
from dpo.config import LossConfig, RunConfig
from dpo.device import available_memory
from dpo.errors import InputError
from dpo.flops import training_flops, visible_tokens
from dpo.losses import LOSSES, TokenLoss
from dpo.memory_tracker import (
    ACTIVATIONS,
    COPIES,
    GRADIENTS,
    HEAD,
    OPTIMIZER,
    REFERENCE,
    TEMPORARY,
    TOGETHER,
    WEIGHTS,
    Peaks,
)
from dpo.models import ARCHITECTURES, Decoder, ModelConfig, parse_config
from dpo.models.transforms import RECOMPUTED
from dpo.optim import OPTIMIZERS
from dpo.prepare import prepare_policy
from dpo.progress import Console
from dpo.quantization import SCHEMES, quantize_linears
from dpo.rehearsal import Rows, over_layers, peak, rehearse_reference, rehearse_step
from dpo.rehearsed_ranks import RanksAlike, pretended_ranks
from dpo.token_budget import (
    Line,
    MemoryPlan,
    choose_budget,
    plan_data,
    plan_memory,
    room_on,
)
from dpo.tokenization import TokenizedPair, TokenizedPairs, columns_of
from dpo.train_config import Dtype, Recompute, TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CPU = torch.device("cpu")


def config(**train: Any) -> RunConfig:
    return RunConfig(model="M", data="D", out="O", train=TrainConfig(**train))


def shape(**changes: Any) -> ModelConfig:
    return parse_config(TINY | changes)


def total(peaks: Peaks) -> float:
    return sum(peak(peaks).values())


def rows_of(pairs: TokenizedPairs, count: int | None = None, *, is_alone: bool = True) -> Rows:
    return Rows(pairs, range(len(pairs) if count is None else count), is_alone)


# --- the rehearsal against the real thing -----------------------------------------------------


@pytest.mark.parametrize("dtype", [name for name in get_args(Dtype) if name != "fp16-mixed"])
@pytest.mark.parametrize("part", ["layer", "mlp", None])
def test_tensors_without_memory_count_as_real_ones(
    make_pairs: MakePairs,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Dtype,
    part: Recompute | None,
) -> None:
    options = config(dtype=dtype, recompute=part)
    rows = rows_of(make_pairs(3), is_alone=part == "layer")
    found = rehearse_step(options, shape(tie_word_embeddings=True), rows)
    monkeypatch.setattr(rehearsal, "FakeTensorMode", lambda **_: nullcontext())
    assert found == rehearse_step(options, shape(tie_word_embeddings=True), rows)


def test_peak_is_that_of_torchs_own_tracker(make_model: MakeModel, make_pairs: MakePairs) -> None:
    pairs, model = make_pairs(3), make_model(tie_word_embeddings=False)
    trainer = Trainer(model, pairs, TrainConfig(batch_size=3, epochs=3))
    trainer.train_step()
    theirs = MemTracker()
    theirs.track_external(model, trainer.optimizer)
    with theirs:
        trainer.train_step()
    (expected,) = theirs.get_tracker_snapshot("peak").values()
    ours = rehearse_step(config(), model.config, rows_of(pairs))
    assert total(ours) == pytest.approx(expected["Total"], rel=0.01)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_gradients_and_states_are_exact(
    make_model: MakeModel, make_pairs: MakePairs, optimizer: Any
) -> None:
    model, pairs = make_model(), make_pairs(2)
    options = {"optimizer": optimizer, "schedule": "constant"}
    trainer = Trainer(model, pairs, TrainConfig(batch_size=2, epochs=2, **options))
    trainer.train_step()
    states = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    found = rehearse_step(config(**options), model.config, rows_of(pairs))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert found["update"][WEIGHTS] == found["update"][GRADIENTS] == weights
    assert found["update"][OPTIMIZER] == sum(state.untyped_storage().nbytes() for state in states)


@pytest.mark.parametrize("quantize", [None, *SCHEMES])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_and_quantized_bases_are_exact(
    make_model: MakeModel, make_pairs: MakePairs, kind: Any, quantize: Any
) -> None:
    adapter = AdapterConfig(kind=kind, rank=2, quantize=quantize)
    run = replace(config(), adapter=adapter)
    model, pairs = make_model(), make_pairs(2)
    if quantize is not None:
        quantize_linears(model, quantize)
    prepare_policy(model, run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in (
        *model.parameters(), *model.buffers(),
    )}  # fmt: skip
    found = rehearse_step(run, model.config, rows_of(pairs, is_alone=False))
    assert found["update"][WEIGHTS] == sum(tensor.nbytes for tensor in held.values())
    assert found["update"][GRADIENTS] == sum(parameter.nbytes for parameter in trained)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_rehearsed(make_pairs: MakePairs, name: str) -> None:
    sizes = {key: value for key, value in TINY.items() if key != "model_type"}
    sizes |= {"num_experts": 8, "num_local_experts": 8}
    source = transformers.AutoConfig.for_model(name, **sizes).to_dict()
    model = parse_config(source)
    found = rehearse_step(config(), model, rows_of(make_pairs(1)))
    weights = 4 * sum(parameter.numel() for parameter in Decoder(model).parameters())
    assert found["forward"][WEIGHTS] == weights


def test_reference_pass_keeps_no_activations(make_pairs: MakePairs) -> None:
    pairs, found = make_pairs(2), []
    for layers in (2, 3):
        model = shape(num_hidden_layers=layers)
        held = peak(rehearse_reference(config(), model, rows_of(pairs)))
        assert held[WEIGHTS] == 4 * sum(weight.numel() for weight in Decoder(model).parameters())
        found.append(sum(held.values()) - held[WEIGHTS])
    assert found[0] == found[1]


def first_of_each_kind() -> set[str]:
    """Name the first loss of those that the engine treats alike."""
    kinds: dict[object, str] = {}
    for name, loss in LOSSES.items():
        asks = (loss.needs_reference, loss.needs_mismatch, loss.token_statistic, loss.draws,
                loss.sees_whole_step, loss.sees_chains, issubclass(loss, TokenLoss))  # fmt: skip
        kinds.setdefault(asks, name)
    return set(kinds.values())


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(name, marks=() if name in first_of_each_kind() else pytest.mark.slow)
        for name in LOSSES
    ],
)
def test_every_loss_can_be_rehearsed(make_pairs: MakePairs, loss: str) -> None:
    pairs = make_pairs(2)
    if loss == "odpo":
        pairs = columns_of([replace(pair, margin=1.0) for pair in pairs])
    if loss.startswith("aot"):
        pairs = columns_of([replace(pair, weight=1.0) for pair in pairs])
    options = replace(config(), loss=LossConfig(loss))
    found = rehearse_step(options, shape(), rows_of(pairs))
    is_live = LOSSES[loss].token_statistic == "reference_kl"
    assert found["forward"].get(REFERENCE, 0) == (found["forward"][WEIGHTS] if is_live else 0)


def test_frozen_weights_have_neither_gradients_nor_states(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_one_layer(policy: Decoder, *_options: object) -> None:
        policy.requires_grad_(False)
        policy.model.layers[1].requires_grad_(True)

    monkeypatch.setattr(rehearsal, "prepare_policy", train_one_layer)
    model = shape(num_hidden_layers=2)
    found = rehearse_step(config(optimizer="lion"), model, rows_of(make_pairs(2)))
    trained = 4 * sum(weight.numel() for weight in Decoder(model).model.layers[1].parameters())
    assert found["update"][GRADIENTS] == found["update"][OPTIMIZER] == trained


def test_matrices_are_copied_to_16_bits_once(make_pairs: MakePairs) -> None:
    found = rehearse_step(config(dtype="bf16-mixed"), shape(), rows_of(make_pairs(2)))
    layers = Decoder(shape()).model.layers
    matrices = [weight.numel() for weight in layers.parameters() if weight.dim() == 2]
    assert found["forward"][COPIES] == 2 * sum(matrices)


def test_gradients_of_a_tied_embedding_are_added_in_place(make_pairs: MakePairs) -> None:
    model = shape(vocab_size=5000, tie_word_embeddings=True)
    options = config(
        log_every=10
    )  # a sample of the weights, taken on steps that log, is all of these
    held = rehearse_step(options, model, rows_of(make_pairs(2)))["backward, embedding"]
    of_embedding = held[HEAD] + held[TEMPORARY]  # one from the head, one from the embedding
    assert 2 * 4 * 5000 * 32 <= of_embedding < 2.2 * 4 * 5000 * 32


def test_gradients_of_earlier_micro_batches_are_there(make_pairs: MakePairs) -> None:
    pairs, held = make_pairs(2), []
    for is_alone in (True, False):
        found = rehearse_step(config(), shape(), rows_of(pairs, is_alone=is_alone))
        held.append(found["forward"].get(GRADIENTS, 0))
    assert held == [0, 4 * sum(weight.numel() for weight in Decoder(shape()).parameters())]


# --- few layers for many ------------------------------------------------------------------------


GEMMA2 = {"model_type": "gemma2", "head_dim": 4, "sliding_window": 5}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
EVERY_OTHER = {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4,
    "moe_intermediate_size": 20, "decoder_sparse_step": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, None),
        pytest.param({}, "mlp", marks=pytest.mark.slow),
        pytest.param(MIXTRAL, "layer", marks=pytest.mark.slow),
        pytest.param(GEMMA2, None, marks=pytest.mark.slow),
        pytest.param(EVERY_OTHER, "layer", marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_left_out_take_what_they_would(
    make_pairs: MakePairs,
    monkeypatch: pytest.MonkeyPatch,
    changes: Mapping[str, Any],
    part: Recompute | None,
) -> None:
    model = shape(num_hidden_layers=6, **changes)
    options, rows = config(recompute=part), rows_of(make_pairs(1))
    found = rehearse_step(options, model, rows)
    monkeypatch.setattr(rehearsal, "over_layers", lambda model, rehearse, ends: rehearse(model))
    whole = rehearse_step(options, model, rows)
    assert total(found) == pytest.approx(total(whole), rel=0.001)


def test_first_and_last_layer_of_each_kind_are_run_and_one_more() -> None:
    run_with: list[tuple[int | None, ...]] = []

    def rehearse(model: ModelConfig) -> Peaks:
        run_with.append(model.windows)
        return {"forward": {WEIGHTS: sum(window or 100 for window in model.windows)}}

    found = over_layers(shape(num_hidden_layers=8, **GEMMA2), rehearse)
    assert run_with == [(5, None, 5, None), (5, None, 5, 5, None), (5, None, None, 5, None)]
    assert found == {"forward": {WEIGHTS: 4 * 5 + 4 * 100}}


# --- a model in parts ---------------------------------------------------------------------------

EVEN = {"vocab_size": 96, "num_hidden_layers": 3, "tie_word_embeddings": False}


def rehearse_rank(options: RunConfig, model: ModelConfig, rows: Rows, *, count: int = 4) -> Peaks:
    with pretended_ranks(options, count) as ranks:
        return rehearse_step(options, model, rows, ranks)


@pytest.mark.parametrize(
    ("divided", "count", "parts"),
    [
        ({"parallel": "data"}, 4, 1),
        ({"parallel": "shard"}, 4, 4),
        ({"parallel": "hybrid"}, 16, 8),
        ({"parallel": "data", "tensor_ranks": 2}, 4, 2),
        ({"parallel": "shard", "tensor_ranks": 2}, 8, 8),
    ],
    ids=str,
)
def test_rank_of_a_model_in_parts_holds_its_part_of_the_state(
    make_pairs: MakePairs, divided: Mapping[str, Any], count: int, parts: int
) -> None:
    rows = rows_of(make_pairs(2), is_alone=False)
    found = rehearse_rank(config(**divided), shape(**EVEN), rows, count=count)
    model = Decoder(shape(**EVEN))
    matrices = sum(weight.nbytes for weight in model.parameters() if weight.dim() == 2)
    others = sum(weight.nbytes for weight in model.parameters() if weight.dim() == 1)
    own = matrices / parts + others / (parts // divided.get("tensor_ranks", 1) or 1)
    steps = 4 * len([*model.parameters()])  # counted by the optimizer
    assert found["update"][WEIGHTS] == found["update"][GRADIENTS] == own
    assert found["update"][OPTIMIZER] == 2 * own + steps
    assert not any(found["update"].get(kind, 0) for kind in (TOGETHER, ACTIVATIONS, HEAD))


def test_what_is_put_together_by_hand(make_pairs: MakePairs) -> None:
    """A block while it computes; all outside of blocks; and what was received of either."""
    even = shape(**EVEN | {"vocab_size": 960})
    found, model = (
        rehearse_rank(config(parallel="shard"), even, rows_of(make_pairs(2))),
        Decoder(even),
    )
    block = nbytes(model.model.layers[0])
    outside = nbytes(model) - 3 * block
    assert found["forward"][TOGETHER] == 2 * outside + 2 * block
    assert found["head"][TOGETHER] == outside
    # while the last block is differentiated, what the one before receives is on its way
    assert found["backward, layer of kind 0, last but 0"][TOGETHER] == outside + 2 * block


def test_adapters_of_a_model_in_parts_are_whole(make_pairs: MakePairs) -> None:
    options = replace(config(parallel="shard"), adapter=AdapterConfig(kind="lora", rank=2))
    model = Decoder(shape(**EVEN))
    base = nbytes(model)
    prepare_policy(model, options)
    adapters = nbytes(model) - base
    found = rehearse_rank(options, shape(**EVEN), rows_of(make_pairs(2)))
    assert found["update"][WEIGHTS] == base / 4 + adapters
    assert found["update"][GRADIENTS] == adapters


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"recompute": "layer"}),
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param(GEMMA2, {"recompute": "mlp"}, marks=pytest.mark.slow),
        pytest.param({}, {"tensor_ranks": 2, "dtype": "bf16-mixed"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_that_are_left_out_of_a_model_in_parts_take_what_they_would(
    make_pairs: MakePairs,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: dict[str, Any],
) -> None:
    run, rows = config(parallel="shard", **options), rows_of(make_pairs(2), is_alone=False)
    model = shape(**EVEN | changes | {"num_hidden_layers": 7})
    found = rehearse_rank(run, model, rows)
    monkeypatch.setattr(rehearsal, "over_layers", lambda model, rehearse, ends: rehearse(model))
    whole = rehearse_rank(run, model, rows)
    assert total(found) == pytest.approx(total(whole), rel=0.001)


@pytest.mark.slow
def test_ranks_in_between_hold_what_a_line_says(make_pairs: MakePairs) -> None:
    options, rows = config(parallel="shard", recompute="layer"), rows_of(make_pairs(2))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    model = shape(**EVEN | sizes | {"vocab_size": 128})  # 64 ranks have equal parts of it
    found = planner.by_count(options, model, rows)
    assert list(found) == list(planner.COUNTS)
    assert sorted(found.values(), reverse=True) == list(found.values())
    for count in (2, 8, 64):
        exact = total(rehearse_rank(options, model, rows, count=count))
        assert found[count] == pytest.approx(exact, rel=0.01)


def nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


# --- data ---------------------------------------------------------------------------------------


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    texts = [np.arange(size, dtype=np.int32) for size in (prompt, chosen, rejected)]
    return TokenizedPair(texts[0], texts[1], texts[2])


def test_tokens_by_hand() -> None:
    pairs = columns_of([pair(16, 20, 12), pair(30, 10, 8), pair(10, 4, 2)])
    found = plan_data(config(batch_size=3, tokens_per_micro_batch=64, epochs=2), pairs)
    # 48 + 48 + 16 useful; bins of 64: {48, 16}, {48}; padded: six texts of 40
    assert (found.pairs, found.useful_tokens, found.computed_share) == (3, 112, 1.0)
    assert found.padded_share == pytest.approx(6 * 40 / 112)
    assert (found.steps, found.epochs, found.micro_batches) == (2, 2.0, 2.0)
    assert (found.largest_tokens, found.longest_tokens, found.step_tokens) == (64, 48, 112)
    assert [found.tokens_within(budget) for budget in (16, 60, 500)] == [48, 60, 112]


def test_each_of_several_ranks_has_its_part_of_the_tokens() -> None:
    pairs = columns_of([pair(16, 20, 12)] * 2 + [pair(30, 10, 8)])
    found = plan_data(config(batch_size=3, tokens_per_micro_batch=48), pairs, processes=2)
    assert (found.step_tokens, found.micro_batches, found.largest_tokens) == (96, 2.0, 48)
    divided = config(batch_size=3, tokens_per_micro_batch=48, tensor_ranks=2)
    assert plan_data(divided, pairs, processes=2).step_tokens == 144


def test_unpaired_rows_are_padded_once() -> None:
    pairs = columns_of([pair(16, 20, 0), pair(10, 4, 2)])
    found = plan_data(replace(config(batch_size=2), loss=LossConfig("kto")), pairs)
    assert found.padded_share == pytest.approx(3 * 36 / 52)


# --- budgets ------------------------------------------------------------------------------------


def long_pairs(count: int = 12) -> TokenizedPairs:
    generator = np.random.default_rng(0)
    return columns_of([pair(*generator.integers(20, 60, 3)) for _ in range(count)])


@pytest.mark.parametrize("part", [pytest.param("layer", marks=pytest.mark.slow), None])
def test_peak_is_a_line_in_tokens(part: Recompute | None) -> None:
    pairs, model = long_pairs(), shape()
    options = config(batch_size=12, tokens_per_micro_batch=256)
    options = replace(options, train=replace(options.train, recompute=part))
    data = plan_data(options, pairs)
    found = plan_memory(options, model, pairs, data)
    assert found.at(data.largest_tokens) == pytest.approx(found.total)
    more = replace(options, train=replace(options.train, tokens_per_micro_batch=1024))
    bigger = plan_data(more, pairs)
    exact = rehearse_step(more, model, Rows(pairs, bigger.largest))
    # the masks of branch runs grow with their lengths, which differ from one row to another
    assert found.at(bigger.largest_tokens) == pytest.approx(total(exact), rel=0.1)


def test_largest_micro_batch_of_one_row_has_a_line_too() -> None:
    pairs = columns_of([pair(200, 50, 50), pair(10, 5, 5), pair(12, 5, 5)])
    options = config(batch_size=1)
    found = plan_memory(options, shape(), pairs, plan_data(options, pairs))
    assert found.at(600) > found.at(300) > 0
    alone = columns_of([pair(20, 5, 5)])
    found = plan_memory(options, shape(), alone, plan_data(options, alone))
    assert found.at(600) == found.total


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the host have so many bytes for a run."""

    def have(room: float) -> None:
        available = int(room / token_budget.CPU_SHARE)
        monkeypatch.setattr(token_budget, "available_memory", lambda _: available)

    return have


def test_chosen_budget_is_the_largest_that_fits(memory: Callable[[float], None]) -> None:
    pairs, model = long_pairs(), shape()
    sizes = [256, 512, 1024]
    needed = [token_budget.rehearsed(config(batch_size=12), model, pairs, size) for size in sizes]
    assert needed == sorted(needed)
    for size, bytes_needed in zip(sizes[:2], needed[:2], strict=True):
        memory(1.15 * bytes_needed)
        found = choose_budget(config(batch_size=12), model, pairs, device=CPU)
        assert (found.tokens, found.needed) == (size, bytes_needed)
        assert "the most that fits" in found.describe()


def test_budget_that_only_the_line_lets_pass_is_not_chosen(
    memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, pairs = config(batch_size=12), long_pairs()
    memory(1.01 * token_budget.rehearsed(options, shape(), pairs, 256))
    nothing = MemoryPlan(None, {}, {"forward": Line(0.0, 0.0)})
    monkeypatch.setattr(token_budget, "plan_memory", lambda *_: nothing)
    assert choose_budget(options, shape(), pairs, device=CPU).tokens == 256


@pytest.mark.slow
def test_budget_of_a_model_in_parts_is_larger(memory: Callable[[float], None]) -> None:
    options = config(batch_size=64, parallel="shard", recompute="layer")
    pairs, model = long_pairs(64), shape(**EVEN | {"num_hidden_layers": 48})
    memory(1.3 * token_budget.rehearsed(options, model, pairs, 512))
    whole = choose_budget(options, model, pairs, device=CPU).tokens
    with pretended_ranks(options, 4) as ranks:
        found = choose_budget(options, model, pairs, device=CPU, ranks=ranks)
        exact = token_budget.rehearsed(options, model, pairs, found.tokens, ranks)
    assert found.tokens > whole
    assert found.needed == exact <= found.room


def test_budget_is_no_larger_than_a_step(memory: Callable[[float], None]) -> None:
    memory(1e12)
    pairs = long_pairs()
    tokens = choose_budget(config(batch_size=4), shape(), pairs, device=CPU).tokens
    data = plan_data(config(batch_size=4), pairs)
    assert tokens / 2 < data.step_tokens <= tokens


def test_least_budget_is_taken_where_none_fits_and_that_is_said(
    memory: Callable[[float], None],
) -> None:
    memory(1.0)
    found = choose_budget(config(batch_size=12), shape(), long_pairs(), device=CPU)
    assert found.tokens == token_budget.SMALLEST
    assert "the least; it may not fit" in found.describe()


def test_gpu_keeps_something_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 2**30, 81 * 2**30))
    found = room_on(torch.device("cuda"))
    assert found == 0.9 * 80 * 2**30 - 2**30 - 4 * 56 * 2**20


def test_memory_of_a_container_is_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    host = available_memory(CPU)
    assert host > 2**20
    monkeypatch.setattr(device_module, "_available_in_container", lambda: 2**20)
    assert available_memory(CPU) == 2**20


def test_budget_that_nobody_has_chosen_is_refused() -> None:
    with pytest.raises(InputError, match="auto is chosen by dpo train and dpo plan"):
        _ = TrainConfig(tokens_per_micro_batch="auto").token_budget


# --- arithmetic ---------------------------------------------------------------------------------


def test_tokens_that_each_token_sees_by_hand() -> None:
    # prompt: 1 + 2 + 3; chosen: 4 + 5; rejected: 4; with a window of 2: 1 + 2 + 2, 2 + 2, 2
    lengths = np.array([[3, 2, 1]])
    assert visible_tokens(lengths) == 6 + 9 + 4
    assert visible_tokens(lengths, 2) == 5 + 4 + 2


def test_arithmetic_by_hand(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=1, **{"vocab_size": 10})
    lengths = np.array([[3, 2, 1]])
    block = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24  # q and o, k and v, the MLP
    products, attention, head = 2 * block * 6, 4 * 16 * 19, 2 * 16 * 10 * 3
    assert training_flops(model, lengths) == 3 * (products + attention + head)
    last = 2 * 16 * 24 * 6  # nothing reads its result
    again = training_flops(model, lengths, recompute="layer")
    assert again == 4 * (products + attention) + 3 * head - last
    again = training_flops(model, lengths, recompute="mlp")
    assert again == 3 * (products + attention + head) + 2 * last
    model.requires_grad_(False)
    assert training_flops(model, lengths) == 2 * (products + head) + 3 * attention


def test_experts_count_as_often_as_they_are_taken() -> None:
    lengths = np.array([[30, 20, 10]])
    with torch.device("meta"):
        half, all_of_them = (
            training_flops(
                Decoder(shape(num_hidden_layers=2, **MIXTRAL | {"num_experts_per_tok": taken})),
                lengths,
            )
            for taken in (2, 4)
        )
    experts = 2 * 4 * 3 * 32 * 24  # of two layers
    assert all_of_them - half == 3 * 2 * experts / 2 * 60


def test_rates_depend_on_the_numerics() -> None:
    rates = [
        ACCELERATORS["H100"].flops_per_s(options)
        for options in (TrainConfig(dtype="bf16-mixed"), TrainConfig(tf32=True), TrainConfig())
    ]
    assert rates == [989e12, 494.5e12, 67e12]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "_PRODUCTS", (64,))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dpo(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_plan_is_told_and_reads_no_weight(
    make_model_folder: Callable[..., Path], tmp_path: Path, data: Path
) -> None:
    folder = make_model_folder(tmp_path / "hollow")
    (folder / "model.safetensors").write_bytes(b"")
    told = dpo("plan", "--model", folder, "--data", data, "--batch-size", 2, "--quiet")
    assert told.exit_code == 0, told.output
    for expected in ("model   llama, 2 layers", "16 pairs", "steps   8, 1 epochs",
                     "--recompute none *", "optimizer states", "this cpu",
                     *ACCELERATORS):  # fmt: skip
        assert expected in told.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "sft"),
        pytest.param(("--loss", "tdpo2"), marks=pytest.mark.slow),
        pytest.param(("--tokens-per-micro-batch", "auto"), marks=pytest.mark.slow),
        pytest.param(("--offload-activations",), marks=pytest.mark.slow),
        pytest.param(
            ("--recompute", "layer", "--dtype", "bf16-mixed", "--micro-batch-size", "2"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_plan_takes_the_options_of_a_run_and_prints_json(
    model_folder: Path, data: Path, options: tuple[str, ...]
) -> None:
    words = ("--model", model_folder, "--data", data, "--batch-size", "4", "--json", "--quiet")
    result = dpo("plan", *words, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["reference_peak"] is not None) == (options[0] != "--loss")
    assert found["model"]["parameters"] == found["model"]["trained"]
    assert [device["name"] for device in found["devices"][1:]] == list(ACCELERATORS)
    assert found["memory"][0]["peak"][WEIGHTS] == 4 * found["model"]["parameters"]


def test_plan_of_a_model_in_parts_tells_what_each_rank_holds(
    model_folder: Path, data: Path
) -> None:
    words = ("--model", model_folder, "--data", data, "--parallel", "shard", "--batch-size", "2")
    told = dpo("plan", *words, "--ranks", "4", "--quiet")
    assert told.exit_code == 0, told.output
    assert "MiB on each of 4 ranks" in told.stdout
    assert "put together" in told.stdout
    assert re.search(r"--parallel shard over +2 +4 +8 +16 +32 +64\n", told.stdout)
    refused = dpo("plan", *words, "--optimizer", "muon")
    assert refused.exit_code == 2
    assert "train.parallel = shard does not go with train.optimizer = muon" in refused.stderr


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1), ({"parallel": "shard"}, 8), ({"parallel": "hybrid"}, 16), ({"tensor_ranks": 2}, 8),
    ],
    ids=str,
)  # fmt: skip
def test_run_is_taken_to_be_of_a_machine_or_two(options: Mapping[str, Any], count: int) -> None:
    assert planner.default_ranks(config(**options)) == count


def test_model_in_parts_that_cannot_be_is_refused(model_folder: Path, data: Path) -> None:
    words = ("plan", "--model", model_folder, "--data", data, "--quiet")
    found = dpo(*words, "--tensor-ranks", "4", "--ranks", "4")
    assert found.exit_code == 2
    assert "which are divided by 1, 2 alone" in found.stderr
    found = dpo(*words, "--parallel", "hybrid", "--ranks", "8")
    assert found.exit_code == 2
    assert "train.parallel = hybrid does not go with one machine" in found.stderr


def test_plan_prints_its_config(model_folder: Path, data: Path) -> None:
    found = dpo("plan", "--model", model_folder, "--data", data, "--print-config")
    assert "tokens_per_micro_batch = 8192" in found.stdout


def test_run_chooses_its_budget_and_trains_the_same(
    model_folder: Path, data: Path, tmp_path: Path, memory: Callable[[float], None]
) -> None:
    said = io.StringIO()
    memory(1e9)
    train = TrainConfig(
        batch_size=8, steps=2, device="cpu", threads=1, tokens_per_micro_batch="auto"
    )
    given = replace(train, tokens_per_micro_batch=256)
    for options, name in ((train, "auto"), (given, "given")):
        out = str(tmp_path / name)
        whole = RunConfig(model=str(model_folder), data=str(data), out=out, train=options)
        run.train(whole, console=Console(said))
    assert "tokens per micro-batch, auto: 256, the most that fits" in said.getvalue()
    written = (tmp_path / "auto/config.toml").read_text(encoding="utf-8")
    assert "tokens_per_micro_batch = 256" in written
    models = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("auto", "given")
    ]
    assert models[0] == models[1]


def test_auto_is_refused_where_nothing_is_trained(model_folder: Path, data: Path) -> None:
    found = dpo("reference", "--model", model_folder, "--data", data,
                "--tokens-per-micro-batch", "auto")  # fmt: skip
    assert found.exit_code == 2
    assert "give a number" in found.stderr


def test_word_that_is_no_number_is_refused_naming_what_is_allowed(
    model_folder: Path, data: Path
) -> None:
    found = dpo("plan", "--model", model_folder, "--data", data,
                "--tokens-per-micro-batch", "many")  # fmt: skip
    assert found.exit_code == 2
    assert "must be an integer or auto, or none, got 'many'" in found.stderr


# --- against this machine -----------------------------------------------------------------------


PAGE = (Path(__file__).parents[1] / "dpo/PLANNER.md").read_text(encoding="utf-8")


def rows_of_page(beginning: str) -> list[list[str]]:
    """The cells of each row of a table whose first cell begins so."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if re.match(rf"\| {beginning}", line)
    ]


def scenario_of(row: list[str]) -> Scenario:
    """What a row of the two tables beside resident memory is about."""
    part = next((part for part in RECOMPUTED if part == row[2]), None)
    scenario = replace(SCENARIOS[row[0].removeprefix("of two: ")], recompute=part)
    assert scenario.dtype == row[1]
    return scenario


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", rows_of_page("(5m|135m)"), ids=lambda row: f"{row[0]}, recompute {row[2]}"
)
def test_page_says_what_the_planner_predicts(row: list[str]) -> None:
    scenario = scenario_of(row)
    assert f"{predicted_mib(scenario):.0f}" == row[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", rows_of_page("of two: "), ids=lambda row: f"{row[0]}, recompute {row[2]}"
)
def test_page_says_what_the_planner_predicts_of_a_rank(row: list[str]) -> None:
    scenario = scenario_of(row)
    options = run_of(scenario, models=2, parallel="shard")
    with pretended_ranks(options, 2) as ranks:
        assert isinstance(ranks, RanksAlike)
        found = Comparison(scenario, options, ranks.own, ranks).predicted_mib()
    assert f"{found:.0f}" == row[4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", rows_of_page(r"\d+b \|"), ids=lambda row: f"{row[0]} on {row[1]}, {row[2]}"
)
def test_page_says_what_a_rank_of_a_large_model_holds(row: list[str]) -> None:
    words = row[2].strip("`").split()
    divided: dict[str, Any] = {"parallel": words[1]}
    if len(words) > 2:
        divided["tensor_ranks"] = int(words[3])
    options = config(dtype="bf16-mixed", recompute="layer", **divided)
    rows = Rows(columns_of([pair(1024, 512, 512)]), [0])
    found = peak(rehearse_rank(options, parse_config(SHAPES[row[0]]), rows, count=int(row[1])))
    state = sum(found[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER))
    numbers = (state, found[TOGETHER], sum(found.values()))
    for number, told in zip(numbers, row[3:], strict=True):
        assert number / 2**20 == pytest.approx(float(told), abs=2)


@pytest.mark.slow
def test_resident_memory_of_a_rank_is_within_a_tenth_of_the_plan() -> None:
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = subprocess.run(
        [sys.executable, *words, "-m", "dpo.bench.memory", "5m-chat", "--parallel", "shard"],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    peaks = json.loads(found.stdout)
    assert peaks["measured_mib"] == pytest.approx(peaks["predicted_mib"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--recompute", "mlp"], ["--recompute", "layer"]])
def test_resident_memory_of_a_step_is_within_a_tenth_of_the_plan(flags: list[str]) -> None:
    """In a process of its own, whose C library gives back what is not in use."""
    found = subprocess.run(
        [sys.executable, "-m", "dpo.bench.memory", "5m-chat", *flags],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    peaks = json.loads(found.stdout)
    assert peaks["measured_mib"] == pytest.approx(peaks["predicted_mib"], rel=0.1)
