"""A training step rehearsed on tensors without memory: what it would hold, of which kind, and when.

What runs is the engine itself (model, loss, trainer, optimizer) under torch's ``FakeTensorMode``,
so an architecture, an option or a loss needs nothing here. Two or three layers are run and the rest
follows, since each further layer of a kind adds the same to each phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.adapter_files import check_names
from dpo.adapters import adapt, find_targets
from dpo.config import RunConfig
from dpo.memory_tracker import (
    ACTIVATIONS,
    GRADIENTS,
    HEAD,
    OPTIMIZER,
    REFERENCE,
    Bytes,
    MemoryTracker,
    Peaks,
)
from dpo.mismatch import mismatched_rows
from dpo.models import Decoder, ModelConfig
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.quantization import quantize_linears
from dpo.ranks import Ranks
from dpo.reference import ReferenceLogProbs
from dpo.scoring import MicroBatches, score_rows
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

_CPU: Final = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """What a step is rehearsed with.

    Attributes:
        pairs: the data.
        micro_batch: rows of ``pairs`` that are run at once.
        is_alone: the micro-batch is all of a step; else gradients of others are there before.
    """

    pairs: TokenizedPairs
    micro_batch: Sequence[int]
    is_alone: bool = False


def peak(peaks: Peaks) -> Bytes:
    """Return what is held at the highest of the peaks."""
    return max(peaks.values(), key=lambda held: sum(held.values()))


def rehearse_step(
    config: RunConfig, model: ModelConfig, rows: Rows, ranks: Ranks | None = None
) -> Peaks:
    """Return the peaks of a step on one micro-batch, from its second on: the optimizer has states.

    Args:
        config: of the run; the sizes of its batches are not read.
        model: the policy's shape.
        rows: of the micro-batch.
        ranks: those of the run, as ``dpo.rehearsed_ranks`` makes them; None for one process.
    """
    rehearsed = replace(config, train=_on_fakes(config.train, len(rows.micro_batch)))
    ranks = ranks or Ranks()
    return over_layers(
        model, lambda few: _rehearse_step(few, rehearsed, rows, ranks), ends=_ends_of(ranks)
    )


def rehearse_reference(
    config: RunConfig, model: ModelConfig, rows: Rows, ranks: Ranks | None = None
) -> Peaks:
    """Return the peaks of a micro-batch of the reference pass; arguments as above."""
    ranks = ranks or Ranks()
    return over_layers(
        model, lambda few: _rehearse_reference(few, config, rows, ranks), ends=_ends_of(ranks)
    )


def over_layers(
    model: ModelConfig, rehearse: Callable[[ModelConfig], Peaks], *, ends: int = 1
) -> Peaks:
    """Rehearse with few layers and add what those left out would.

    Run are the first and the last ``ends`` layers of each kind, and for each kind these and one
    more.
    """
    kinds = layer_kinds(model)
    between = {kind: _places(kinds, kind)[ends:-ends] for kind in dict.fromkeys(kinds)}
    left_out = [place for places in between.values() for place in places]
    if len(left_out) <= 1:
        return rehearse(model)
    run = [place for place in range(model.layers) if place not in left_out]
    base = total = rehearse(_with_layers(model, run))
    for places in between.values():
        if places:
            longer = rehearse(_with_layers(model, sorted([*run, places[0]])))
            total = extrapolate(total, base, longer, times=len(places))
    return total


def _ends_of(ranks: Ranks) -> int:
    """Return how many layers at each end differ in their peaks from those between.

    Where a layer is put together for its backward pass, so is the one before it, and the gradient
    of the one behind is still on its way.
    """
    return 2 if ranks.in_step else 1


def layer_kinds(model: ModelConfig) -> list[int]:
    """Number the kinds of layers from 0: of one kind are those of which all is said alike."""
    layers = zip(*(getattr(model, name) for name in _per_layer(model)), strict=True)
    numbers: dict[object, int] = {}
    return [numbers.setdefault(layer, len(numbers)) for layer in layers]


def _places(kinds: Sequence[int], kind: int) -> list[int]:
    """Return the layers of a kind."""
    return [place for place, found in enumerate(kinds) if found == kind]


def extrapolate(start: Peaks, base: Peaks, more: Peaks, *, times: float) -> Peaks:
    """Return ``start + times * (more - base)``, phase by phase and kind by kind."""
    return {
        phase: {
            kind: start[phase].get(kind, 0)
            + times * (more[phase].get(kind, 0) - base[phase].get(kind, 0))
            for kind in start[phase].keys() | more[phase].keys()
        }
        for phase in start
    }


def hollow_policy(model: ModelConfig, config: RunConfig) -> Decoder:
    """Make a decoder as a run would load it, without memory under ``FakeTensorMode``."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(precision_of(config.train).parameters)
    try:
        policy = Decoder(model)
    finally:
        torch.set_default_dtype(usual)
    if config.adapter.quantize is not None:
        quantize_linears(policy, config.adapter.quantize)
    return policy


def outlined_policy(model: ModelConfig, config: RunConfig) -> Decoder:
    """Make the policy that a run would train, on the meta device: names, shapes, what is trained.

    Raises:
        InputError: an option of the adapter finds nothing.
    """
    with torch.device("meta"):
        policy = hollow_policy(model, config)
        if config.adapter.kind is not None:
            adapt(policy, find_targets(policy, config.adapter.targets), config.adapter.build())
            check_names(policy)
    return policy


def _per_layer(model: ModelConfig) -> list[str]:
    """Name what the configuration says of each layer."""
    values = {item.name: getattr(model, item.name) for item in fields(model)}
    return [
        name
        for name, value in values.items()
        if isinstance(value, tuple) and len(value) == model.layers
    ]


def _with_layers(model: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Return the configuration of a model that has these layers of ``model``."""
    chosen: dict[str, Any] = {
        name: tuple(getattr(model, name)[layer] for layer in layers) for name in _per_layer(model)
    }
    return replace(model, layers=len(layers), **chosen)


def _on_fakes(config: TrainConfig, pairs: int) -> TrainConfig:
    """Return the options of a rehearsal with one micro-batch of so many pairs.

    On a CPU, in bf16-mixed for fp16-mixed, which is as large; not compiled.
    """
    return replace(
        config,
        micro_batch_size=pairs,
        tokens_per_micro_batch=None,
        device="auto",
        dtype="bf16-mixed" if config.dtype == "fp16-mixed" else config.dtype,
        tf32=False,
        compile=False,
        eval_every=None,
        keep_best=False,
        early_stopping=None,
    )


def _rehearse_step(model: ModelConfig, config: RunConfig, rows: Rows, ranks: Ranks) -> Peaks:
    tracker = MemoryTracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        policy = hollow_policy(model, config)
        ranks.prepare(policy)
        prepare_policy(policy, config, NoHost())
        tracker.watch_weights(policy)
        trainer = _trainer(policy, config, rows, ranks)
        if trainer.live_reference is not None:
            for weight in trainer.live_reference.weights.values():
                tracker.label(weight, REFERENCE)
        _mark_phases(tracker, policy, trainer, ends=_ends_of(ranks))
        trainer.train_step()  # of one row, which gives the optimizer its states
        for tensor in _tensors(trainer.optimizer.state):
            tracker.label(tensor, OPTIMIZER)
        if not rows.is_alone:
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    tracker.label(parameter.grad, GRADIENTS)
        tracker.peaks.clear()
        tracker.enter("start")
        trainer.train_step()
    return tracker.peaks


class NoHost:
    """A lane to a host whose memory does not count."""

    def follow(self) -> None:
        """Nothing is under way."""

    def to_host(self, source: Tensor) -> Tensor:
        """Return nothing, in a shape that says how much it is."""
        return source.new_empty(0, len(source))

    def to_device(self, source: Tensor) -> Tensor:
        """Return what is as much."""
        return source.new_empty(source.shape[1])

    def mark(self) -> Callable[[], None]:
        """Nothing is under way."""
        return lambda: None


def _rehearse_reference(model: ModelConfig, config: RunConfig, rows: Rows, ranks: Ranks) -> Peaks:
    tracker, precision = MemoryTracker(), precision_of(config.train)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        policy = hollow_policy(model, config)
        ranks.prepare(policy)
        tracker.watch_weights(policy)
        tracker.peaks.clear()
        batches = MicroBatches.of_run(config.train, rows.pairs)
        _mark_forward(tracker, policy)
        score_rows(policy, batches, rows.micro_batch, precision=precision, device=_CPU)
    return tracker.peaks


@dataclass(frozen=True)
class _TwoSteps:
    """A sampler of a step of one row, and one of those that are rehearsed."""

    micro_batch: Sequence[int]
    steps_per_epoch: int = 2

    def rows(self, step: int) -> list[int]:
        """Rows of a step."""
        return list(self.micro_batch if step else self.micro_batch[:1])


def _trainer(policy: Decoder, config: RunConfig, rows: Rows, ranks: Ranks) -> Trainer:
    loss, mismatched = config.loss.build(), None
    if loss.needs_mismatch:
        mismatched = _zeros(mismatched_rows(rows.pairs, seed=config.train.seed))
    trainer = Trainer(
        policy,
        rows.pairs,
        config.train,
        loss=loss,
        reference=_zeros(rows.pairs) if loss.needs_reference else None,
        mismatched_reference=mismatched,
        ranks=ranks,
    )
    trainer.sampler = _TwoSteps(rows.micro_batch)
    return trainer


def _zeros(pairs: TokenizedPairs) -> ReferenceLogProbs:
    """Return reference log-probs of zero."""
    lengths = pairs.lengths()[:, 1:].ravel()  # (A,)
    places = np.stack([np.zeros_like(lengths), np.zeros_like(lengths), lengths], axis=1)
    return ReferenceLogProbs([np.zeros(int(lengths.max()), np.float32)], places)


def _mark_phases(tracker: MemoryTracker, policy: Decoder, trainer: Trainer, *, ends: int) -> None:
    """Let the tracker know which part of a step runs.

    Backward through the last and the first ``ends`` layers of each kind are phases of their own:
    between them activations fall and gradients rise evenly, so one of them is the peak of the kind,
    whatever the number of layers.
    """
    _mark_forward(tracker, policy)
    _on_gradient(policy, lambda: tracker.enter("backward, last norm"))
    kinds = layer_kinds(policy.config)
    for kind in set(kinds):
        places = _places(kinds, kind)
        for before, place in enumerate(places):
            behind = len(places) - 1 - before
            near = "between"
            if min(before, behind) < ends:
                near = f"last but {behind}" if behind < ends else f"first but {before}"
            phase = f"backward, layer of kind {kind}, {near}"
            _on_gradient(policy.model.layers[place], partial(tracker.enter, phase))
    _on_gradient(policy.model.embed_tokens, lambda: tracker.enter("backward, embedding"))
    trainer.optimizer.register_step_pre_hook(lambda *_: tracker.enter("update"))


def _mark_forward(tracker: MemoryTracker, policy: nn.Module) -> None:
    policy.register_forward_pre_hook(lambda *_: tracker.enter("forward", ACTIVATIONS), prepend=True)
    policy.register_forward_hook(lambda *_: tracker.enter("head", HEAD))


def _on_gradient(module: nn.Module, act: Callable[[], None]) -> None:
    """Act when the gradient of what a module returns is there: before its own backward pass."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: act())

    module.register_forward_hook(hook, prepend=True)  # before one that puts weights together


def _tensors(states: Any) -> list[Tensor]:
    return [
        value for state in states.values() for value in state.values() if isinstance(value, Tensor)
    ]
