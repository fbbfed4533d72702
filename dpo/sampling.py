"""Which pairs make up which optimizer step, computed from the step number.

Shapes: P pairs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError
from dpo.losses import Loss
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig

_ROUNDS = 8  # of the Feistel network: four leave a bias that 3,000 shuffles of seven rows show


class Sampler(Protocol):
    """What the trainer asks of a sampler."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        ...

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs."""
        ...


def make_sampler(loss: Loss, pairs: TokenizedPairs, config: TrainConfig) -> Sampler:
    """Choose the sampler that a loss and the options ask for.

    Raises:
        InputError: they contradict each other.
    """
    if loss.sees_chains:
        if config.group_prompts:
            raise InputError(
                f"train.group_prompts has no effect with {loss}, whose steps hold whole lists"
            )
        return ChainSampler(pairs.chains, config.batch_size, config.seed)
    if config.group_prompts:
        return GroupSampler(pairs.prompt_groups, config.batch_size, config.seed)
    return StepSampler(len(pairs), config.batch_size, config.seed)


@dataclass(frozen=True)
class StepSampler:
    """Which rows make up which optimizer step, computed from the step number alone.

    Each epoch is a permutation of all rows, cut into steps of ``batch_size``; the last step of an
    epoch takes what is left. Nothing is stored and nothing is replayed: a resumed run asks for the
    next step.
    """

    pairs: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(self.pairs / self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.batch_size
        last = min(first + self.batch_size, self.pairs)
        return [
            permuted(index, self.pairs, seed=(self.seed, epoch)) for index in range(first, last)
        ]


@dataclass(eq=False)
class GroupSampler:
    """Like ``StepSampler``, but rows of one group follow each other.

    Each epoch is a permutation of the groups, cut into steps of ``batch_size`` rows, so that a step
    holds whole groups except at its ends. An epoch's order follows from the seed and the epoch.

    Attributes:
        groups: (P,) number of each row's group, from 0.
    """

    groups: NDArray[np.int64]
    batch_size: int
    seed: int
    _epoch: int = field(default=-1, init=False, repr=False)
    _order: list[int] = field(default_factory=list, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(len(self.groups) / self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        first = step_of_epoch * self.batch_size
        return self._order[first : first + self.batch_size]

    def _shuffled(self, epoch: int) -> list[int]:
        """Return all rows in the order of an epoch."""
        count = int(self.groups.max()) + 1
        places = [permuted(group, count, seed=(self.seed, epoch)) for group in range(count)]
        order: list[int] = np.argsort(np.array(places)[self.groups], kind="stable").tolist()
        return order


@dataclass(frozen=True)
class ChainSampler:
    """Like ``StepSampler``, but of whole chains of pairs, ``batch_size`` chains a step.

    Attributes:
        chains: (P,) number of each row's chain, from 0; rows of a chain are neighbours.
    """

    chains: NDArray[np.int64]
    batch_size: int
    seed: int

    @cached_property
    def _of_chains(self) -> StepSampler:
        return StepSampler(int(self.chains[-1]) + 1, self.batch_size, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return self._of_chains.steps_per_epoch

    def rows(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs; each chain in order."""
        chains = np.array(self._of_chains.rows(step))
        starts, ends = (np.searchsorted(self.chains, chains + more) for more in (0, 1))
        return [row for start, end in zip(starts, ends, strict=True) for row in range(start, end)]


def permuted(index: int, size: int, *, seed: tuple[int, ...]) -> int:
    """Return where a seeded permutation of ``range(size)`` sends ``index``, in O(1) memory.

    A Feistel network permutes the next power of four; walking its cycle until it lands below
    ``size`` permutes the range (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half_bits = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    low = (1 << half_bits) - 1
    key = hashlib.blake2b(repr(seed).encode(), digest_size=8 * _ROUNDS).digest()
    keys = [int.from_bytes(key[first : first + 8]) for first in range(0, len(key), 8)]
    while True:
        left, right = index >> half_bits, index & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        index = left << half_bits | right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31
