"""How many tokens a micro-batch may have: what a step takes in memory, and what there is.

A step is rehearsed on two micro-batches (``dpo.rehearsal``); in between and beyond, the peak of
each of its phases grows with the tokens as a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from dpo.config import RunConfig
from dpo.device import available_memory
from dpo.launch import Launch
from dpo.log_probs import CPU_TILE_BYTES, TILE_BYTES
from dpo.memory_tracker import Bytes, Peaks
from dpo.models import ModelConfig
from dpo.ranks import Ranks
from dpo.rehearsal import Rows, peak, rehearse_step
from dpo.sampling import make_sampler
from dpo.scoring import MicroBatches
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import Recompute

STEPS: Final = 64  # of the first epoch, looked at
GPU_SHARE: Final = 0.9  # of a GPU's memory: the rest is for fragmentation
CPU_SHARE: Final = (
    0.6  # the C library keeps memory that is not in use: up to 1.6 times it was found
)
# Beside tensors a GPU holds the context and the workspaces of matrix products; and the tiles of
# logits, of which four live at once, are larger there than in the rehearsal.
GPU_EXTRA_BYTES: Final = 2**30 + 4 * (TILE_BYTES - CPU_TILE_BYTES)
SMALLEST: Final = 256


@dataclass(frozen=True)
class DataPlan:
    """The data, as the first steps of the run cut it.

    Attributes:
        pairs: in the data.
        useful_tokens: of the data, a prompt once for each pair and each answer once.
        computed_share: tokens computed by useful ones; below 1 where pairs share a prompt.
        padded_share: tokens by useful ones if each answer had its prompt before it and was padded
            to the longest of its step.
        steps: of the run.
        epochs: of the run; no whole number where the steps are given.
        micro_batches: of a rank in a step, mean of the most that one has.
        largest: rows of the largest micro-batch.
        largest_tokens: in it.
        longest_tokens: in a micro-batch of the longest row alone, the least there can be.
        step_tokens: of a rank in the largest step, the most that a micro-batch can hold.
    """

    pairs: int
    useful_tokens: int
    computed_share: float
    padded_share: float
    steps: int
    epochs: float
    micro_batches: float
    largest: tuple[int, ...]
    largest_tokens: int
    longest_tokens: int
    step_tokens: int

    def tokens_within(self, budget: int) -> int:
        """Return the tokens of the largest micro-batch under a token budget."""
        return max(min(budget, self.step_tokens), self.longest_tokens)


@dataclass(frozen=True)
class Line:
    """Bytes at the peak of a phase: ``fixed + per_token * tokens`` of the micro-batch."""

    fixed: float
    per_token: float


@dataclass(frozen=True)
class MemoryPlan:
    """What a step needs.

    Attributes:
        recompute: what is computed again in the backward pass, as for ``dpo train``.
        peak: bytes by kind at the peak of a step on the largest micro-batch.
        phases: how the peak of each phase of a step depends on the micro-batch.
    """

    recompute: Recompute | None
    peak: Bytes
    phases: Mapping[str, Line]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())

    def at(self, tokens: int) -> float:
        """Return the bytes at the peak of a step with a micro-batch of so many tokens."""
        return max(line.fixed + line.per_token * tokens for line in self.phases.values())


@dataclass(frozen=True)
class Budget:
    """A token budget that was chosen.

    Attributes:
        tokens: per micro-batch.
        needed: bytes at the peak of a step, predicted.
        room: bytes that there are for it.
    """

    tokens: int
    needed: float
    room: float

    def describe(self) -> str:
        """Say what was chosen and why, in a line."""
        verdict = "the most that fits" if self.needed <= self.room else "the least; it may not fit"
        return (
            f"tokens per micro-batch, auto: {self.tokens:,}, {verdict}: a step is predicted to "
            f"take {self.needed / 2**20:,.0f} MiB, of {self.room / 2**20:,.0f} MiB to plan with"
        )


def choose_budget(
    config: RunConfig,
    model: ModelConfig,
    pairs: TokenizedPairs,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
) -> Budget:
    """Choose the largest token budget with which a step fits into the memory of a device.

    A power of two, and no larger than it takes to hold a whole step. Nothing a run computes depends
    on it.

    Args:
        config: of the run.
        model: the policy's shape.
        pairs: what is trained on.
        device: of each rank.
        ranks: of the rehearsal (``dpo.rehearsed_ranks``); None for one process.
    """
    room, ranks = room_on(device), ranks or Ranks()
    config = with_budget(config, 4 * SMALLEST)  # of the micro-batch from which the others follow
    data = plan_data(config, pairs, ranks.processes)
    memory = plan_memory(config, model, pairs, data, ranks)
    for tokens in reversed(budgets(data)):
        if memory.at(data.tokens_within(tokens)) > room and tokens > SMALLEST:
            continue
        exact = rehearsed(config, model, pairs, tokens, ranks)
        if exact <= room or tokens == SMALLEST:
            return Budget(tokens, exact, room)
    raise AssertionError


def with_budget(config: RunConfig, tokens: int) -> RunConfig:
    """Return the same run with another token budget."""
    return replace(config, train=replace(config.train, tokens_per_micro_batch=tokens))


def room_on(device: torch.device) -> float:
    """Return the bytes of a device's memory that are free for the tensors of a run.

    Of a machine's memory each of its processes has an equal part.
    """
    available = available_memory(device)
    if device.type == "cpu":
        return CPU_SHARE * available / Launch.of_environment().local_count
    return room_on_gpu(available)


def room_on_gpu(memory: float) -> float:
    """Return what is for tensors in a GPU's memory, in bytes."""
    return GPU_SHARE * memory - GPU_EXTRA_BYTES


def budgets(data: DataPlan) -> list[int]:
    """List the token budgets to choose from, up to the first that holds every step whole."""
    sizes = [SMALLEST]
    while sizes[-1] < data.step_tokens:
        sizes.append(2 * sizes[-1])
    return sizes


def largest_budget(memory: MemoryPlan, data: DataPlan, room: float) -> int | None:
    """Return the largest token budget with which a step fits into ``room`` bytes."""
    fitting = [size for size in budgets(data) if memory.at(data.tokens_within(size)) <= room]
    return max(fitting, default=None)


def plan_data(config: RunConfig, pairs: TokenizedPairs, processes: int = 1) -> DataPlan:
    """Cut the first steps of a run of so many processes as the run would, and count."""
    sampler = make_sampler(config.loss.build(), pairs, config.train)
    batches = MicroBatches.of_run(config.train, pairs)
    steps = [sampler.rows(step) for step in range(min(STEPS, sampler.steps_per_epoch))]
    parts = processes // config.train.tensor_ranks
    by_step = [[batches.split(own) for own in batches.divide(rows, parts)] for rows in steps]
    most = [max(map(len, of_ranks)) for of_ranks in by_step]
    cut = [micro_batches for of_ranks in by_step for micro_batches in of_ranks]
    sizes = [[stream_tokens(batches, rows) for rows in micro_batches] for micro_batches in cut]
    longest = [int(pairs.lengths().sum(axis=1).argmax())]
    longest_tokens = stream_tokens(batches, longest)
    rows_by_size = {
        size: rows
        for micro_batches, of_rank in zip(cut, sizes, strict=True)
        for rows, size in zip(micro_batches, of_rank, strict=True)
    } | {longest_tokens: longest}
    useful = sum(int(pairs.lengths()[rows].sum()) for rows in steps)
    total_steps = config.train.total_steps(sampler.steps_per_epoch)
    return DataPlan(
        pairs=len(pairs),
        useful_tokens=int(pairs.lengths().sum()),
        computed_share=sum(map(sum, sizes)) / useful,
        padded_share=sum(_padded_tokens(pairs, rows) for rows in steps) / useful,
        steps=total_steps,
        epochs=total_steps / sampler.steps_per_epoch,
        micro_batches=sum(most) / len(most),
        largest=tuple(rows_by_size[max(rows_by_size)]),
        largest_tokens=max(rows_by_size),
        longest_tokens=longest_tokens,
        step_tokens=max(map(sum, sizes)),
    )


def stream_tokens(batches: MicroBatches, rows: Sequence[int]) -> int:
    """Count the tokens that ``rows`` are as one micro-batch."""
    return len(batches.collate(rows).texts.stream.input_ids)


def _padded_tokens(pairs: TokenizedPairs, rows: Sequence[int]) -> int:
    lengths = pairs.lengths()[rows]  # (P, 3)
    return int(np.count_nonzero(lengths[:, 1:]) * (lengths[:, 0] + lengths[:, 1:].max(1)).max())


def plan_memory(
    config: RunConfig,
    model: ModelConfig,
    pairs: TokenizedPairs,
    data: DataPlan,
    ranks: Ranks | None = None,
) -> MemoryPlan:
    """Rehearse a step of a run on its largest micro-batch, and on another for the slope."""
    batches = MicroBatches.of_run(config.train, pairs)
    is_alone = data.micro_batches == 1
    (tokens, peaks), (other_tokens, other_peaks) = (
        (
            stream_tokens(batches, rows),
            rehearse_step(config, model, Rows(pairs, rows, is_alone), ranks),
        )
        for rows in (data.largest, _another(data, pairs))
    )
    return MemoryPlan(
        config.train.recompute,
        peak(peaks),
        dict(_lines(peaks, tokens, other_peaks, other_tokens)),
    )


def _another(data: DataPlan, pairs: TokenizedPairs) -> Sequence[int]:
    """Return rows of a smaller micro-batch than the largest; of a larger one if that is one row."""
    if len(data.largest) > 1:
        return data.largest[: len(data.largest) // 2]
    return [*data.largest, *(row for row in range(min(4, len(pairs))) if row not in data.largest)]


def _lines(
    peaks: Peaks, tokens: int, other_peaks: Peaks, other_tokens: int
) -> Iterator[tuple[str, Line]]:
    for phase, held in peaks.items():
        here, there = sum(held.values()), sum(other_peaks[phase].values())
        slope = (here - there) / (tokens - other_tokens) if tokens != other_tokens else 0.0
        yield phase, Line(here - slope * tokens, slope)


def rehearsed(
    config: RunConfig,
    model: ModelConfig,
    pairs: TokenizedPairs,
    tokens: int,
    ranks: Ranks | None = None,
) -> float:
    """Return the bytes at the peak of a step under a token budget."""
    config = with_budget(config, tokens)
    data = plan_data(config, pairs, (ranks or Ranks()).processes)
    rows = Rows(pairs, data.largest, is_alone=data.micro_batches == 1)
    return sum(peak(rehearse_step(config, model, rows, ranks)).values())
