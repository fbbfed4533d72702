"""The training loop: one policy, batches that carry their reference, one loss.

The trainer does the mathematics and holds the state; files, signals and terminals belong to
``dpo.run``.

Shapes: P pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo.accumulation import (
    LackOfMemoryError,
    LossInputs,
    Score,
    StepResult,
    differentiate,
    evaluate,
    mean_log_ratio,
)
from dpo.averaging import averaged_weights
from dpo.best import BestEvaluation
from dpo.checkpoint import (
    optimizer_tensors,
    restore_optimizer,
    restore_weights,
    trained_weights,
)
from dpo.displacement import DisplacementAlarm
from dpo.errors import InputError, RunError
from dpo.health import StepMeans, WeightSample, relative_change
from dpo.identity import Identity, refuse_another_run, training_identity
from dpo.live_reference import LiveReference
from dpo.losses import Loss, PairLogProbs, make_loss
from dpo.metrics import ALWAYS_LOGGED, MetricSums
from dpo.mismatch import mismatched_rows
from dpo.optim import (
    clip_gradients,
    make_schedule,
    set_learning_rate,
)
from dpo.policy import Policy
from dpo.precision import precision_of
from dpo.ranks import Ranks
from dpo.reference import AnswerLogProbs, ReferenceLogProbs, reference_in_memory
from dpo.routing import Routed
from dpo.run_optimizer import make_run_optimizer
from dpo.sampling import make_sampler
from dpo.scoring import (
    MicroBatches,
    ScoredPairs,
    answer_log_probs,
)
from dpo.sources import sources_of
from dpo.step_scoring import StepScorer
from dpo.throughput import Throughput, peak_memory_mib
from dpo.tokenization import TokenizedPairs
from dpo.train_config import EVALUATION_OPTIONS, TrainConfig

Metrics = Mapping[str, float]
Callback = Callable[["Trainer", Metrics], None]
Watch = Callable[[int], AbstractContextManager[Callable[[int], object]]]


def uses_live_reference(loss: Loss, config: TrainConfig) -> bool:
    """Say whether the reference is held in memory: it moves, or the loss reads all of it."""
    return loss.token_statistic == "reference_kl" or config.reference_sync_every is not None


def _told(score: Score, tell: Callable[[int], object]) -> Score:
    """Return what scores rows and then tells how many it has scored in all."""
    done = 0

    def scored(rows: Sequence[int]) -> ScoredPairs:
        nonlocal done
        found = score(rows)
        done += len(rows)
        tell(done)
        return found

    return scored


class NonFiniteError(RunError):
    """A loss or gradient is not finite; the weights are those before the step.

    Attributes:
        step: the optimizer step that was not done, counted from 1 as in the metrics.
        rows: the rows of the data that cause it, or all of the step if no single one does.
    """

    def __init__(self, step: int, rows: Sequence[int], ids: Sequence[str]) -> None:
        shown = ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
        super().__init__(
            f"step {step}: the loss or a gradient is not finite, from rows {shown}; "
            "the weights are unchanged. Lower the learning rate, look at the rows, "
            "or give --on-nonfinite skip"
        )
        self.step, self.rows = step, list(rows)


@dataclass(frozen=True)
class Step:
    """What an optimizer step left behind.

    Attributes:
        number: optimizer steps done, this one included.
        metrics: the window's metrics, on steps that log.
        evaluation: the evaluation's metrics under ``eval/``, on steps that evaluate.
    """

    number: int
    metrics: Metrics | None
    evaluation: Metrics | None


class Trainer:
    """Trains a policy on preference pairs.

    ``for step in trainer`` runs to the end and yields after each optimizer step; ``train()`` does
    the same without stopping. The result of a step does not depend on how it is cut into
    micro-batches.

    Attributes:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        best: the evaluation of the lowest loss.
        should_stop: set it to end the run after the current step.
        notes: what a person should hear of the steps done; who tells it takes it out.
        watch: told how many held-out pairs there are, gives what is told how many are evaluated.
        evaluated: the window of the last evaluation, with all of its pairs; None before one.

    Example:
        >>> from dpo import TrainConfig, Trainer, load_model, load_tokenizer
        >>> from dpo import read_pairs, tokenize_pairs
        >>> pairs = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model")).pairs
        >>> trainer = Trainer(load_model("model"), pairs, TrainConfig(batch_size=8, steps=2))
        >>> [step.number for step in trainer]
        [1, 2]
    """

    def __init__(
        self,
        policy: nn.Module,
        pairs: TokenizedPairs,
        config: TrainConfig | None = None,
        *,
        loss: str | Loss | Callable[[PairLogProbs], Tensor] = "sigmoid",
        reference: ReferenceLogProbs | None = None,
        eval_pairs: TokenizedPairs | None = None,
        eval_reference: ReferenceLogProbs | None = None,
        mismatched_reference: ReferenceLogProbs | None = None,
        eval_mismatched_reference: ReferenceLogProbs | None = None,
        reference_weights: Mapping[str, Tensor] | None = None,
        starts_at_reference: bool = True,
        rate_factors: Mapping[str, float] | None = None,
        callbacks: Sequence[Callback] = (),
        ranks: Ranks | None = None,
    ) -> None:
        """Prepare the run; nothing is computed yet but a reference that is not given.

        Args:
            policy: any module that follows the ``Policy`` protocol, on the device to train on.
            pairs: what to train on.
            config: options; its device, threads, compile, recompute and resume are for ``dpo.run``
                and not read here; of tf32 only what it means for the noise.
            loss: a name in ``LOSSES``, a ``Loss`` or a function of ``PairLogProbs``.
            reference: reference log-probs of ``pairs``; the policy's own at the start if not given.
            eval_pairs: what to evaluate on.
            eval_reference: reference log-probs of ``eval_pairs``.
            mismatched_reference: those of ``mismatched_rows(pairs, seed=config.seed)``, for a loss
                with ``needs_mismatch``.
            eval_mismatched_reference: the same of ``eval_pairs``.
            reference_weights: a reference of the policy's architecture, by parameter name, where
                the reference is live (`uses_live_reference`); else the policy as it starts.
            starts_at_reference: the policy is its own reference, so the first loss is known and
                checked.
            rate_factors: on the learning rate by parameter name, besides those of ``config.rates``.
            callbacks: called with the trainer and each line of metrics, on every rank.
            ranks: the processes that train together (``dpo.distributed``), each with all of this;
                the weights are those of the first. None for a process that is alone.

        Raises:
            InputError: the loss would ignore a column of the data, an option needs held-out pairs
            that are not given, or the policy lacks the protocol.
        """
        if not isinstance(policy, Policy):
            raise InputError(
                f"{type(policy).__name__} is no policy: it has no output_head(), "
                "which dpo.policy.Policy asks for"
            )
        self.config = config or TrainConfig()
        if eval_pairs is None:
            for name in EVALUATION_OPTIONS:
                if getattr(self.config, name):
                    raise InputError(f"train.{name} needs held-out pairs: give eval_pairs")
        self.policy: Policy = policy
        self.module: nn.Module = policy
        self.loss = make_loss(loss)
        self.precision = precision_of(self.config)
        self.device = next(policy.parameters()).device
        self.ranks = ranks or Ranks()
        self.ranks.share_weights(p for p in policy.parameters() if p.requires_grad)
        self.callbacks = list(callbacks)
        self._throughput = Throughput(policy, self.config, self.device, self.ranks.processes)
        self.starts_at_reference = starts_at_reference
        if self.config.reference_sync_every is not None and not self.loss.needs_reference:
            raise InputError(f"train.reference_sync_every: {self.loss} has no reference to move")
        if self.config.router_loss is not None and not (
            isinstance(policy, Routed) and policy.record_routers()
        ):
            raise InputError("train.router_loss: the policy has no experts that a router chooses")
        self.live_reference = (
            LiveReference(policy, reference_weights)
            if uses_live_reference(self.loss, self.config)
            else None
        )
        self.score = StepScorer(
            self.policy,
            self.loss,
            self.precision,
            self.device,
            self._throughput,
            self.live_reference,
            with_router=self.config.router_loss is not None,
        )
        self.running = torch.tensor(self.loss.running_start, device=self.device)  # (S,)
        self.batches = self._batches(pairs, reference)
        self.mismatched = self._mismatched(pairs, mismatched_reference)
        self.eval_batches = self.eval_mismatched = None
        if eval_pairs is not None:
            self.eval_batches = self._batches(eval_pairs, eval_reference)
            self.eval_mismatched = self._mismatched(eval_pairs, eval_mismatched_reference)
        self._checks_start = self.batches.reference is not None and starts_at_reference
        self.sampler = make_sampler(self.loss, pairs, self.config)
        self.total_steps = self.config.total_steps(self.sampler.steps_per_epoch)
        self._schedule = make_schedule(self.config.schedule, decay_share=self.config.decay_share)
        self.ranks.take_apart(policy)  # the reference may have been computed with it
        self.optimizer = make_run_optimizer(policy, self.config, rate_factors or {})
        self.scaler = torch.GradScaler(self.device.type, enabled=self.precision.scales_loss)
        self.step = 0
        self.skipped_steps = 0
        self.tokens_seen = 0
        self.best = BestEvaluation(self.config.early_stopping)
        self.should_stop = False
        self._sources = sources_of(pairs)
        self._eval_sources = None if eval_pairs is None else sources_of(eval_pairs)
        self._window, self._means = MetricSums.of_loss(self.loss, self._sources), StepMeans()
        # of a model in parts, which move in memory, there is none
        self._weight_sample = None if self.ranks.in_step else WeightSample(policy.parameters())
        self.notes: list[str] = []
        self.evaluated: MetricSums | None = None
        self.watch: Watch = lambda _pairs: nullcontext(lambda _done: None)
        self._alarm = DisplacementAlarm()

    def _batches(self, pairs: TokenizedPairs, reference: ReferenceLogProbs | None) -> MicroBatches:
        if not len(pairs):
            raise InputError("there are no pairs to train or evaluate on")
        self.loss.check(pairs)
        batches = MicroBatches.of_run(self.config, pairs, reference, loss=self.loss)
        return self._with_reference(batches)

    def _mismatched(
        self, pairs: TokenizedPairs, reference: ReferenceLogProbs | None
    ) -> MicroBatches | None:
        if not self.loss.needs_mismatch:
            return None
        rows = mismatched_rows(pairs, seed=self.config.seed)
        return self._with_reference(replace(self.batches, pairs=rows, reference=reference))

    def _with_reference(self, batches: MicroBatches) -> MicroBatches:
        """Compute the reference log-probs, if they are needed, not given and not live."""
        if batches.reference is not None or not self.loss.needs_reference:
            return batches
        if self.live_reference is not None:
            return batches
        return replace(batches, reference=self._own_reference(batches))

    @torch.no_grad()
    def _own_reference(self, batches: MicroBatches) -> ReferenceLogProbs:
        """Score the pairs with the policy as it is before the first step."""

        def score(rows: Sequence[int]) -> list[AnswerLogProbs]:
            return answer_log_probs(self.score(rows, batches))

        return reference_in_memory(score, batches.pairs, batches=batches.split_sorted)

    # The loop

    def train(self) -> None:
        """Run to the end."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[Step]:
        """Run to the end, yielding after each optimizer step.

        Raises:
            RunError: the policy does not start at its reference, or no gradient reaches it.
            NonFiniteError: a step is not finite and ``on_nonfinite`` is "stop".
        """
        if self.step == 0 and (self.eval_batches is not None or self.ranks.processes > 1):
            self.check_start()  # before what takes long, and on all ranks alike
        if self.step == 0 and self.eval_batches is not None:
            self._emit(self.evaluate())
        while self.step < self.total_steps and not self.ranks.any(self.should_stop):
            yield self._advance()

    def _advance(self) -> Step:
        """Do one optimizer step and what is due after it."""
        self.train_step()
        is_last = self.step == self.total_steps
        metrics = evaluation = None
        if self._logs(self.step):
            metrics = self.close_window()
            self._emit(metrics)
        every = self.config.eval_every
        if self.eval_batches is not None and (is_last or (every and self.step % every == 0)):
            evaluation = self.evaluate()
            self.best.hears(evaluation["eval/loss"], self.step)
            self.should_stop |= self.best.is_out_of_patience
            self._emit(evaluation)
        return Step(self.step, metrics, evaluation)

    def _logs(self, step: int) -> bool:
        """Say whether a line of metrics follows on step number ``step``, from 1."""
        return step % self.config.log_every == 0 or step == self.total_steps

    def train_step(self) -> None:
        """Do one optimizer step over its micro-batches.

        The gradient is that of ``sum(w * loss) / sum(w)`` over the pairs of the whole step.

        Raises:
            NonFiniteError: the loss or a gradient is not finite and ``on_nonfinite`` is "stop".
        """
        with self._throughput.clock.running("data"):
            rows = self.sampler.rows(self.step)
            result = self._differentiate(rows, self._total_weight(rows))
            self.ranks.sum_gradients(self.module.parameters())
            self._throughput.clock.begin("data")
            self._look_ahead()
            self._throughput.clock.begin("optimizer")
            self._finish_step(result)
        lengths = self.batches.pairs.lengths()[rows]
        self.tokens_seen += int(lengths.sum())
        self._throughput.add_step(lengths)

    def _finish_step(self, result: StepResult) -> None:
        """Update the weights by the gradient that they have, if it is finite."""
        set_learning_rate(self.optimizer, self.learning_rate)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.module.parameters(), self.config.max_grad_norm, self.ranks)
        if self._is_finite(norm, result.losses):
            self._update(norm)
            self.running = result.running
            self._window.merge(result.sums)
            if result.balance is not None:
                self._means.add("router/balance", result.balance)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _differentiate(
        self, rows: Sequence[int], total_weight: float, ranks: Ranks | None = None
    ) -> StepResult:
        """Give the parameters, which have none, this rank's part of the gradient of ``rows``.

        A lack of memory on a rank drops what part of it there is and begins the step again, there
        in smaller micro-batches, which the steps after it keep.
        """
        ranks = ranks or self.ranks
        own = self._own(rows, ranks)
        while True:
            try:
                return self._differentiate_at_once(rows, own, total_weight, ranks)
            except LackOfMemoryError as lack:
                error = lack.error
            # not in the handler, where the error's traceback still holds the tensors of the step
            self._free_memory()
            if error is not None:
                self._take_smaller(own, error)

    def _own(self, rows: Sequence[int], ranks: Ranks) -> list[int]:
        """Return the rows of this rank."""
        return self.batches.divide(rows, ranks.count)[ranks.rank]

    def _free_memory(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_smaller(self, rows: Sequence[int], error: RuntimeError) -> None:
        """Cut steps smaller, from this one on, whose ``rows`` found no memory."""
        smaller = self.batches.smaller(rows)
        if smaller is None:
            raise error
        self.notes.append(
            f"step {self.step + 1}: the memory is full: going on in micro-batches of at most "
            f"{smaller.limit}, {len(smaller.split(rows))} in place of "
            f"{len(self.batches.split(rows))} a step, which changes no result"
        )
        self.batches = smaller
        if self.mismatched is not None:
            self.mismatched = self.mismatched.cut_as(smaller)

    def _differentiate_at_once(
        self, rows: Sequence[int], own: Sequence[int], total_weight: float, ranks: Ranks
    ) -> StepResult:
        score = partial(self.score, batches=self.batches, step=self.step + 1)
        step = LossInputs(
            self.loss.at_progress(self.step / self.total_steps),
            self._checked(score) if self.step == 0 else score,
            self.batches.split(own),
            rows,
            sums=MetricSums.of_loss(self.loss, self._sources),
            running=self.running,
            mismatch=self._mismatch(self.mismatched, rows, ranks),
            ranks=ranks,
        )
        return differentiate(
            step,
            total_weight=total_weight,
            scale=self.scaler.scale,
            router_weight=self.config.router_loss,
        )

    def _mismatch(
        self, batches: MicroBatches | None, rows: Sequence[int], ranks: Ranks | None = None
    ) -> Tensor:
        """Return the mean log-ratio of the mismatched answers of ``rows``, 0 if none are needed."""
        if batches is None:
            return torch.zeros((), device=self.device)
        ranks = ranks or self.ranks
        own = batches.split_sorted(batches.divide(rows, ranks.count)[ranks.rank])
        score = partial(self.score, batches=batches)
        return mean_log_ratio(score, own, rows=rows, ranks=ranks).to(self.device)

    def _look_ahead(self) -> None:
        """Put the first micro-batch of the next step together while the device computes this one.

        The host would wait for it next, to see whether the step is finite.
        """
        if self.step + 1 < self.total_steps:
            own = self._own(self.sampler.rows(self.step + 1), self.ranks)
            for rows in self.batches.split(own)[:1]:
                self.score.look_ahead(rows, self.batches, self.step + 2)

    def _total_weight(self, rows: Sequence[int]) -> float:
        """Sum of the loss's pair weights over a whole step, known before the first forward pass."""
        pairs = self.batches.pairs
        lengths = torch.from_numpy(pairs.scored_lengths[rows]).float()  # (P, 2)
        nothing = torch.zeros(len(rows))
        data = PairLogProbs(
            *(nothing,) * 4,
            chosen_tokens=lengths[:, 0],
            rejected_tokens=lengths[:, 1],
            weight=torch.from_numpy(pairs.weights[rows]),
            margin=torch.from_numpy(pairs.margins[rows]),
            label_prob=torch.from_numpy(pairs.label_probs[rows]),
        )
        total = float(self.loss.pair_weights(data).double().sum())
        if total <= 0:
            raise RunError(
                f"step {self.step + 1}: the weights of its {len(rows)} pairs sum to {total}"
            )
        return total

    def _is_finite(self, norm: Tensor, losses: Tensor) -> bool:
        """Ask the device once per step; on "stop" name the rows and leave the weights alone.

        Every rank has the norm of the whole gradient, and the losses of its own pairs.
        """
        flags = torch.stack([norm.isfinite(), losses.isfinite().all()])
        norm_is_finite, own_are_finite = flags.tolist()
        losses_are_finite = not self.ranks.any(not own_are_finite)
        if norm_is_finite and losses_are_finite:
            return True
        if self.precision.scales_loss and losses_are_finite:
            self.scaler.update()  # float16 overflowed: the scale was too large, not the loss
        elif self.config.on_nonfinite == "stop":
            rows = self._rows_not_finite()
            ids = [self.batches.pairs.ids[row] for row in rows]
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(self.step + 1, rows, ids)
        self.skipped_steps += 1
        return False

    def _rows_not_finite(self) -> list[int]:
        """Find the rows of the step whose loss or gradient alone is not finite; all if none is."""
        rows = self.sampler.rows(self.step)
        guilty = []
        in_step = self.ranks.in_step  # each row on all ranks, else each on one
        for row in rows if in_step else self._own(rows, self.ranks):
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._differentiate([row], 1.0, Ranks()).losses
            norm = clip_gradients(self.module.parameters(), None, self.ranks if in_step else None)
            if not bool(norm.isfinite() & losses.isfinite().all()):
                guilty.append(row)
        found = self.ranks.gather(torch.tensor(guilty, dtype=torch.int64))
        assert found is not None
        return [row for row in rows if row in set(found.tolist())] or rows

    def _update(self, norm: Tensor) -> None:
        """Apply the accumulated gradient."""
        if self.step == 0 and not bool(norm > 0):
            raise RunError(
                "no gradient reaches the policy: every parameter is frozen, "
                "or the loss does not depend on the answers"
            )
        sample = self._weight_sample if self._logs(self.step + 1) else None
        before = None if sample is None else sample.read()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._means.add("grad_norm", norm)
        if (bound := self.config.max_grad_norm) is not None:
            self._means.add("health/clip_share", (norm > bound).to(norm.dtype))
        if sample is not None and before is not None:
            change = relative_change(before, sample.read())
            self._means.add("health/update_ratio", change)
        every = self.config.reference_sync_every
        if every is not None and (self.step + 1) % every == 0:
            assert self.live_reference is not None
            assert self.config.reference_sync_share is not None
            self.live_reference.follow(self.config.reference_sync_share)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step, but for ``train.rates``."""
        return self._learning_rate_at(self.step)

    def _learning_rate_at(self, step: int) -> float:
        factor = self._schedule(step, self.config.warmup_steps, self.total_steps)
        return self.config.learning_rate * factor

    # Looking

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Hold what is to be evaluated and saved in ``module`` while a ``with`` block runs.

        That is an average of the weights with ``train.ema_decay`` and with an optimizer that
        averages by itself, else the weights as they are.
        """
        self.ranks.take_apart(self.module)  # what is put together would be that of before
        with averaged_weights(self.optimizer):
            yield
            self.ranks.take_apart(self.module)

    @torch.no_grad()
    def check_start(self) -> None:
        """Compare the policy with its reference on the first micro-batch, before any update.

        The first step does it with what it scores, if this was not called before.

        Raises:
            RunError: an answer's log-prob differs by more than the noise of the numerics.
        """
        if self._checks_start:
            self._checked(partial(self.score, batches=self.batches))(
                self.batches.split(self.sampler.rows(0))[0]
            )

    def _checked(self, score: Score) -> Score:
        """Let what is scored first show whether the policy starts at its reference."""

        def checked(rows: Sequence[int]) -> ScoredPairs:
            scored = score(rows)
            if self._checks_start:
                self._checks_start = False
                self._compare_with_reference(scored.loss_pairs)
            return scored

        return checked

    @torch.no_grad()
    def _compare_with_reference(self, pairs: PairLogProbs) -> None:
        tokens = torch.stack([pairs.chosen_tokens, pairs.rejected_tokens])
        gaps = torch.stack([pairs.chosen_log_ratio, pairs.rejected_log_ratio]).abs()
        if bool((gaps <= self.precision.noise * tokens.sqrt()).all()):
            return
        raise RunError(
            f"the policy does not start at its reference: an answer's log-prob differs by "
            f"{gaps.max():.4g} nats, {self._first_loss(pairs)}. "
            "Likely causes: the reference log-probs are of another model or of other tokens "
            "(template, tokenizer, a cache that was changed), or the policy has dropout. If "
            "another reference is meant, say starts_at_reference=False"
        )

    def _first_loss(self, pairs: PairLogProbs) -> str:
        """Say what the loss of the first micro-batch is and what it should be."""
        pairs, loss = replace(pairs, running=self.running), self.loss.at_progress(0.0)
        found, expected = loss(pairs).mean(), loss.at_reference(pairs).mean()
        return f"the first loss is {found:.6g} and should be {expected:.6g}"

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the held-out pairs; the result does not depend on the batch size.

        The weights are those of ``averaged_weights``.

        Returns:
            ``step`` and the metrics under ``eval/``.
        """
        assert self.eval_batches is not None, "the trainer has no eval_pairs"
        rows = range(len(self.eval_batches.pairs))
        own = self.eval_batches.divide(rows, self.ranks.count)[self.ranks.rank]
        self.module.eval()
        sums = MetricSums.of_loss(self.loss, self._eval_sources)
        score = partial(self.score, batches=self.eval_batches)
        with self.averaged_weights(), self.watch(len(own)) as tell:
            data = LossInputs(
                self.loss.at_progress(1.0),  # the same at each step, so that evaluations compare
                _told(score, tell),
                self.eval_batches.split_sorted(own),
                rows,
                sums=sums,
                running=self.running,
                mismatch=self._mismatch(self.eval_mismatched, rows),
                ranks=self.ranks,
            )
            evaluate(data)
        self.module.train()
        self.evaluated = sums.of_all(self.ranks)
        metrics = self.evaluated.result()
        return {"step": self.step} | {f"eval/{name}": value for name, value in metrics.items()}

    def close_window(self) -> dict[str, float]:
        """Turn what was gathered since the last line of metrics into one.

        The loop does so by itself every ``log_every`` steps; this is for a loop of one's own over
        ``train_step``.
        """
        window = self._window.of_all(self.ranks).result()
        line = {
            "step": self.step,
            "epoch": self.step / self.sampler.steps_per_epoch,
            **dict.fromkeys(ALWAYS_LOGGED, math.nan),  # what a skipped step has none of
            **window,
            **self._means.result(),
            "learning_rate": self._learning_rate_at(self.step - 1),
            **self._throughput.close(),
            "mem/peak_mib": self.ranks.max(peak_memory_mib(self.device)),
            "data/tokens": self.tokens_seen,
            "health/nonfinite": self.skipped_steps,
        }
        if self.starts_at_reference and {"displacement/chosen", "rewards/margin"} <= window.keys():
            line["displacement/alarm"] = float(self._alarm.hears(window))
        self._window, self._means = MetricSums.of_loss(self.loss, self._sources), StepMeans()
        return line

    def _emit(self, metrics: Metrics) -> None:
        for callback in self.callbacks:
            callback(self, metrics)

    # State

    def state(self) -> dict[str, float | int | str | None]:
        """Return the counters of the run and what must not change when it goes on."""
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "tokens_seen": self.tokens_seen,
            **self.best.state(),
            "displaced_windows": self._alarm.windows,
            "displaced_margin": self._alarm.first_margin,
            "loss_scale": float(self.scaler.get_scale()),
            **self._identity(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the trained weights, the optimizer state by parameter name, the random state.

        Of what the ranks divide it is this rank's part.
        """
        self.ranks.take_apart(self.module)
        return {
            "model": trained_weights(self.module),
            "optimizer": optimizer_tensors(self.optimizer, self.module),
            "random": {"cpu": torch.get_rng_state()},
            "loss": {"running": self.running},
            **({"reference": self.live_reference.weights} if self.live_reference else {}),
        }

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Go on from what ``tensors`` and ``state`` returned; bit-exact on a CPU.

        Raises:
            InputError: the data or an option that decides the mathematics is another one.
        """
        refuse_another_run(state, self._identity(), source="this state")
        self.restore_weights(tensors)
        torch.set_rng_state(tensors["random"]["cpu"])
        self.running = tensors["loss"]["running"].to(self.device)
        if self.live_reference is not None:
            self.live_reference.restore(tensors["reference"])
        self.step = int(state["step"])
        self.skipped_steps = int(state["skipped_steps"])
        self.tokens_seen = int(state["tokens_seen"])
        self.best.restore(state)
        self.should_stop = self.best.is_out_of_patience
        self._alarm = DisplacementAlarm(
            int(state.get("displaced_windows", 0)), float(state.get("displaced_margin", 0.0))
        )
        if self.precision.scales_loss:
            self.scaler.update(float(state["loss_scale"]))

    def restore_weights(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the weights of what ``tensors`` returned and the optimizer's averages."""
        self.ranks.take_apart(self.module)
        restore_weights(self.module, tensors["model"], self.ranks)
        restore_optimizer(self.optimizer, self.module, tensors["optimizer"], self.ranks)

    def _identity(self) -> Identity:
        eval_pairs = None if self.eval_batches is None else self.eval_batches.pairs
        return training_identity(self.config, self.loss, self.batches.pairs, eval_pairs)
