"""Micro-batches of a run, put together, scored by its policy and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo.batching import PairBatch
from dpo.live_reference import LiveReference
from dpo.losses import Loss
from dpo.policy import Policy
from dpo.precision import Precision
from dpo.scoring import MicroBatches, ScoredPairs, run_reference, score_batch
from dpo.throughput import Throughput


@dataclass(frozen=True)
class _Collated:
    """A micro-batch on the device that is not yet run, and what it is of."""

    batch: PairBatch
    rows: Sequence[int]
    batches: MicroBatches
    step: int

    def is_of(self, rows: Sequence[int], batches: MicroBatches, step: int) -> bool:
        return (self.rows, self.step) == (rows, step) and self.batches is batches


@dataclass
class StepScorer:
    """Scores micro-batches for a loss.

    Attributes:
        policy: what scores them, with gradient unless the caller says otherwise.
        loss: that they are scored for.
        precision: of the forward pass.
        device: of the policy.
        throughput: counts the work and takes the time of its parts.
        live_reference: is run beside the policy if there is one.
        with_router: whether the use of experts is recorded.
    """

    policy: Policy
    loss: Loss
    precision: Precision
    device: torch.device
    throughput: Throughput
    live_reference: LiveReference | None = None
    with_router: bool = False
    _ahead: _Collated | None = None

    def __call__(self, rows: Sequence[int], batches: MicroBatches, step: int = 0) -> ScoredPairs:
        """Score ``rows`` of ``batches`` as one micro-batch; ``step`` decides on random numbers."""
        clock, of_reference = self.throughput.clock, None
        clock.begin("data")
        if self._ahead is not None and self._ahead.is_of(rows, batches, step):
            batch = self._ahead.batch
        else:
            batch = batches.collate(rows, step=step).to(self.device)
        self.throughput.add_stream(batch.texts, batches.pairs.lengths()[list(rows)])
        with self.precision.context(self.device):
            if self.live_reference is not None:
                clock.begin("reference")
                batch, of_reference = run_reference(self.policy, batch, self.live_reference)
            clock.begin("forward")
            scored = score_batch(
                self.policy, batch, self.loss, of_reference, with_router=self.with_router
            )
        clock.begin("backward")
        return scored

    def look_ahead(self, rows: Sequence[int], batches: MicroBatches, step: int) -> None:
        """Put a micro-batch together that is soon to be scored."""
        batch = batches.collate(rows, step=step).to(self.device)
        self._ahead = _Collated(batch, rows, batches, step)
