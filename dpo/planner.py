"""What a run would take, before it is begun: memory by kind, tokens, arithmetic, time and cost.

Memory is that of the engine itself, rehearsed without memory (``dpo.rehearsal``); tokens are those
of the data, cut as the run would cut them; time and cost are estimates (``dpo.accelerators``).
Of several processes one is rehearsed (``dpo.rehearsed_ranks``), and the others do as it does.
``PLANNER.md`` beside this file says what is assumed and how far it was found to hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from dpo.accelerators import ACCELERATORS, MFU, PRICES_OF
from dpo.config import RunConfig
from dpo.flops import training_flops
from dpo.inputs import Models
from dpo.memory_tracker import KINDS, Bytes, Peaks
from dpo.models import Decoder, ModelConfig
from dpo.models.transforms import RECOMPUTED
from dpo.parallel import check_parts, is_in_parts
from dpo.ranks import Ranks
from dpo.rehearsal import (
    Rows,
    extrapolate,
    outlined_policy,
    peak,
    rehearse_reference,
    rehearse_step,
)
from dpo.rehearsed_ranks import A_MACHINE, pretended_ranks
from dpo.scoring import MicroBatches
from dpo.token_budget import (
    DataPlan,
    MemoryPlan,
    choose_budget,
    largest_budget,
    plan_data,
    plan_memory,
    room_on,
    room_on_gpu,
    stream_tokens,
    with_budget,
)
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import AUTO, Recompute
from dpo.trainer import uses_live_reference

POLICIES: Final[tuple[Recompute | None, ...]] = (None, *RECOMPUTED)
MEASURED_MFU: Final = 0.6  # assumed share of a rate of products that was measured
COUNTS: Final = (2, 4, 8, 16, 32, 64)  # of ranks
_LONGEST: Final = 1024  # rows among which the reference pass has its largest micro-batch


@dataclass(frozen=True)
class ModelPlan:
    """The policy: the name of its architecture, and counts of layers and of numbers."""

    architecture: str
    layers: int
    parameters: int
    trained: int


@dataclass(frozen=True)
class DevicePlan:
    """One device.

    Attributes:
        name: of the device.
        room: bytes of its memory for the tensors of a run.
        budgets: the largest token budget that fits, for each of ``POLICIES``; None where none does.
        seconds: of the run, estimated.
        usd: of the run, estimated; None where no price is known.
    """

    name: str
    room: float
    budgets: tuple[int | None, ...]
    seconds: float
    usd: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        model: the policy.
        data: the data.
        ranks: processes of the run, each on a device of its own.
        memory: of a step, on each rank, for each of ``POLICIES``.
        recompute: as the run is set up.
        reference_peak: bytes by kind at the peak of the reference pass; None if there is none.
        flops: of the run, its reference pass included.
        devices: where it could run, the one at hand first.
        in_parts: bytes at the peak of a step on the same micro-batch by the number of ranks, of
            each of them, with ``train.parallel`` = shard.
    """

    model: ModelPlan
    data: DataPlan
    ranks: int
    memory: tuple[MemoryPlan, ...]
    recompute: Recompute | None
    reference_peak: Bytes | None
    flops: float
    devices: tuple[DevicePlan, ...]
    in_parts: Mapping[int, float]


def default_ranks(config: RunConfig) -> int:
    """Return of how many processes a run is taken to be if nobody says: a machine's, or two's."""
    train = config.train
    if train.parallel == "hybrid":
        return 2 * A_MACHINE
    return max(A_MACHINE, train.tensor_ranks) if is_in_parts(train) else 1


def make_plan(
    config: RunConfig,
    models: Models,
    pairs: TokenizedPairs,
    *,
    device: torch.device,
    flops_per_s: float,
    count: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        models: their config.json is read, no weight.
        pairs: what is trained on.
        device: the one at hand.
        flops_per_s: its rate of matrix products in the run's numerics.
        count: of processes; None for ``default_ranks``.

    Raises:
        InputError: an option or the model does not go with so many processes.
    """
    count = default_ranks(config) if count is None else count
    model = models.policy.config
    with pretended_ranks(config, count) as ranks:
        if is_in_parts(config.train):
            check_parts(config, models)
        if config.train.tokens_per_micro_batch == AUTO:
            budget = choose_budget(config, model, pairs, device=device, ranks=ranks)
            config = with_budget(config, budget.tokens)
        data = plan_data(config, pairs, count)
        memory = tuple(
            plan_memory(_recomputing(config, part), model, pairs, data, ranks) for part in POLICIES
        )
        reference_peak = _reference_peak(config, models.reference.config, pairs, ranks)
    policy = outlined_policy(model, config)
    flops = _flops(config, policy, pairs, data)
    rows = Rows(pairs, data.largest, is_alone=data.micro_batches == 1)
    return Plan(
        model=_model_plan(policy),
        data=data,
        ranks=count,
        memory=memory,
        recompute=config.train.recompute,
        reference_peak=reference_peak,
        flops=flops,
        devices=tuple(
            _devices(
                config, memory, data, flops, device=device, flops_per_s=flops_per_s, count=count
            )
        ),
        in_parts=by_count(config, model, rows) if config.train.parallel == "shard" else {},
    )


def by_count(config: RunConfig, model: ModelConfig, rows: Rows) -> dict[int, float]:
    """Return the bytes on each rank at the peak of a step, for some counts of ranks.

    Rehearsed are the least and the greatest: what a rank holds of each phase is a line in the share
    that it has of the model.
    """
    counts = [count * config.train.tensor_ranks for count in COUNTS]
    counts = [count for count in counts if count <= COUNTS[-1]] or counts[:1]

    def rehearse(count: int) -> Peaks:
        with pretended_ranks(config, count) as ranks:
            return rehearse_step(config, model, rows, ranks)

    least, most = counts[0], counts[-1]
    few = rehearse(least)
    if least == most:
        return {least: _total(few)}
    many = rehearse(most)
    shares = {count: (1 / least - 1 / count) / (1 / least - 1 / most) for count in counts}
    return {
        count: _total(extrapolate(few, few, many, times=share)) for count, share in shares.items()
    }


def _total(peaks: Peaks) -> float:
    return sum(peak(peaks).values())


def _recomputing(config: RunConfig, part: Recompute | None) -> RunConfig:
    return replace(config, train=replace(config.train, recompute=part))


def _model_plan(policy: Decoder) -> ModelPlan:
    sizes = [(weight.numel(), weight.requires_grad) for weight in policy.parameters()]
    return ModelPlan(
        policy.config.architecture,
        policy.config.layers,
        sum(size for size, _ in sizes),
        sum(size for size, is_trained in sizes if is_trained),
    )


def _flops(config: RunConfig, policy: Decoder, pairs: TokenizedPairs, data: DataPlan) -> float:
    """Count the arithmetic of all steps, and that of the reference: in one pass or beside each."""
    lengths, loss = pairs.lengths(), config.loss.build()
    steps = data.epochs * training_flops(policy, lengths, recompute=config.train.recompute)
    forward = training_flops(policy, lengths) / 3
    if uses_live_reference(loss, config.train):
        return steps + data.epochs * forward
    return steps + (forward if loss.needs_reference else 0.0)


def _reference_peak(
    config: RunConfig, model: ModelConfig, pairs: TokenizedPairs, ranks: Ranks
) -> Bytes | None:
    """Return the peak of the reference pass, whose largest micro-batch has the longest rows."""
    loss = config.loss.build()
    if not loss.needs_reference or uses_live_reference(loss, config.train):
        return None
    batches = MicroBatches.of_run(config.train, pairs)
    longest = np.argsort(-pairs.lengths().sum(axis=1), kind="stable")[:_LONGEST].tolist()
    largest = max(batches.split(longest), key=lambda rows: stream_tokens(batches, rows))
    return peak(rehearse_reference(config, model, Rows(pairs, largest), ranks))


def _devices(
    config: RunConfig,
    memory: tuple[MemoryPlan, ...],
    data: DataPlan,
    flops: float,
    *,
    device: torch.device,
    flops_per_s: float,
    count: int,
) -> Iterator[DevicePlan]:
    """Yield the device at hand, then the others, ``count`` of each."""

    def plan(name: str, room: float, rate: float, usd_per_hour: float | None) -> DevicePlan:
        budgets = tuple(largest_budget(each, data, room) for each in memory)
        seconds = flops / rate / count
        usd = None if usd_per_hour is None else count * seconds / 3600 * usd_per_hour
        return DevicePlan(name, room, budgets, seconds, usd)

    yield plan(f"this {device.type}", room_on(device), MEASURED_MFU * flops_per_s, None)
    for name, found in ACCELERATORS.items():
        rate = MFU * found.flops_per_s(config.train)
        yield plan(name, room_on_gpu(found.memory_gib * 2**30), rate, found.usd_per_hour)


def describe(plan: Plan) -> Iterator[str]:
    """Yield the lines that tell a person all of it."""
    yield from _describe_work(plan)
    yield ""
    yield from _describe_memory(plan)
    yield ""
    if plan.in_parts:
        yield from _describe_parts(plan)
        yield ""
    yield from _describe_devices(plan)


def _describe_work(plan: Plan) -> Iterator[str]:
    model, data = plan.model, plan.data
    frozen = model.parameters - model.trained
    yield (
        f"model   {model.architecture}, {model.layers} layers, {model.parameters:,} parameters, "
        + (f"{model.trained:,} trained" if frozen else "all trained")
    )
    yield (
        f"data    {data.pairs:,} pairs, {data.useful_tokens:,} useful tokens; "
        f"{data.computed_share:.2f} computed for each, {data.padded_share:.2f} in a padded batch"
    )
    yield (
        f"steps   {data.steps:,}, {data.epochs:.3g} epochs; {data.micro_batches:.3g} micro-batches "
        f"each, the largest of {data.largest_tokens:,} tokens in {len(data.largest):,} pairs"
    )
    yield f"FLOPs   {plan.flops:.3g} in all"


def _describe_memory(plan: Plan) -> Iterator[str]:
    """Yield a table of the kinds of memory that there are."""
    peaks = [each.peak for each in plan.memory]
    columns = [
        f"--recompute {each.recompute or 'none'}{' *' * (each.recompute == plan.recompute)}"
        for each in plan.memory
    ]
    title = "MiB at the peak of a step" if plan.ranks == 1 else f"MiB on each of {plan.ranks} ranks"
    yield f"{title:<26}" + "".join(f"{name:>20}" for name in columns)
    for kind in KINDS:
        held = [each.get(kind, 0.0) for each in peaks]
        if any(held):
            yield f"  {kind:<24}" + "".join(f"{_mib(nbytes):>20}" for nbytes in held)
    yield f"  {'all':<24}" + "".join(f"{_mib(each.total):>20}" for each in plan.memory)
    note = "* as the run is set up"
    if plan.reference_peak is not None:
        note += f"; the reference pass before takes {_mib(sum(plan.reference_peak.values()))} MiB"
    yield note


def _describe_parts(plan: Plan) -> Iterator[str]:
    yield f"{'--parallel shard over':<26}" + "".join(f"{count:>10}" for count in plan.in_parts)
    held = "".join(f"{_mib(nbytes):>10}" for nbytes in plan.in_parts.values())
    yield f"{'MiB on each rank':<26}{held}"


def _describe_devices(plan: Plan) -> Iterator[str]:
    columns = "".join(f"{part or 'tokens':>10}" for part in POLICIES)
    yield f"{'estimates':<12}{'MiB free':>10}{'fits':>6}{columns}{'time':>10}{'USD':>10}"
    needed = plan.memory[POLICIES.index(plan.recompute)].total
    for device in plan.devices:
        fits = "yes" if needed <= device.room else "no"
        budgets = "".join(f"{f'{budget:,}' if budget else 'none':>10}" for budget in device.budgets)
        cost = "" if device.usd is None else f"{device.usd:,.2f}"
        yield (
            f"  {device.name:<10}{_mib(device.room):>10}{fits:>6}{budgets}"
            f"{_duration(device.seconds):>10}{cost:>10}"
        )
    yield "MiB free: for tensors. Tokens: the largest --tokens-per-micro-batch that fits a step,"
    yield "with --recompute mlp and layer behind it."
    yield f"Time: {MFU:.0%} of a datasheet's rate, {MEASURED_MFU:.0%} of the rate measured here."
    yield f"USD: typical rent of {PRICES_OF}."
    if plan.ranks > 1:
        yield f"Time and USD: of {plan.ranks} such devices that never wait for each other."


def _duration(seconds: float) -> str:
    units = (("d", 86400), ("h", 3600), ("min", 60))
    name, size = next((unit for unit in units if seconds >= unit[1]), ("s", 1))
    return f"{seconds / size:.1f} {name}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f}"
