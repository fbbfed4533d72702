"""Metrics of a window of pairs: kept on the device, made of sums and counts, read once.

A window is what one line of ``metrics.jsonl`` is about: the pairs since the last line, or those of
an evaluation. Every metric is a function of sums over its pairs, or of all its gaps, so none
depends on how the window was split into micro-batches.

``gap = r_w - r_l`` below is the difference of the rewards that the loss gives to the two answers
(``beta u - beta v`` for DPO), ``omega`` the row's weight, other letters as in ``dpo.losses``; a
mean is over pairs unless it says tokens.

================================ ===================================================================
loss                             sum(w loss) / sum(w), with w the loss's weight of the pair
loss_se                          its standard error: ``_standard_error``
rewards/chosen                   sum(omega r_w) / sum(omega)
rewards/rejected                 sum(omega r_l) / sum(omega)
rewards/margin                   sum(omega gap) / sum(omega)
rewards/margin_se                its standard error
rewards/margin_p05               5 % quantile of gap
rewards/margin_p50               median of gap
rewards/margin_p95               95 % quantile of gap
rewards/accuracy                 share of gap > 0, where a tie counts half
rewards/accuracy_se              its standard error
rewards/accuracy_strict          share of gap > 0
accuracy_len_controlled          mean of the accuracies among n_w > n_l, n_w = n_l and n_w < n_l
rewards/tie_rate                 share of gap = 0
rewards/saturated                share of s(gap) > 0.99
grad_weight                      mean s(-gap): the factor on a pair's gradient in DPO
logps/chosen                     mean lw
logps/rejected                   mean ll
logps_tok/chosen                 sum(lw) / sum(n_w)
logps_tok/rejected               sum(ll) / sum(n_l)
nll/chosen                       -sum(lw) / sum(n_w)
ppl                              e to the nll/chosen
length/chosen                    mean n_w
length/rejected                  mean n_l
length/diff                      mean n_w - n_l
length/reward_corr               Pearson correlation of n_w - n_l and gap
calibration/ece                  sum over ten bins of s(gap) of abs(sum(s(gap) - p)) / pairs
calibration/brier                mean (s(gap) - p)^2, with p the label_prob
entropy                          of the policy, mean over the tokens of both answers, nats
token_accuracy                   share of chosen tokens that are the most likely one
================================ ===================================================================

Of a mixture also each term, under its name in ``dpo.losses.LOSSES`` and without its coefficient, so
that ``loss`` is the sum of the terms times their coefficients:

================================ ===================================================================
loss/<term>                      sum(omega term) / sum(omega), a mean over pairs also of ``sft``
================================ ===================================================================

And against a reference:

================================ ===================================================================
kl/k1_seq_chosen                 mean u
kl/k1_seq_rejected               mean v
kl/k1_tok                        sum(u + v) / sum(n_w + n_l)
kl/k3_tok                        mean of ``k3_estimate`` over the tokens of both answers
kl/full_fwd                      mean KL(reference || policy) of whole distributions at the tokens
                                 of both answers, with a loss that reads it: tdpo1, tdpo2
displacement/chosen              mean u: below 0 where the chosen answers became less likely
displacement/share_u_negative    share of u < 0
================================ ===================================================================

Of each source, where the data has several (``dpo.sources`` names them, 16 at most):

================================ ===================================================================
source/<name>/loss               loss of its pairs
source/<name>/rewards/accuracy   rewards/accuracy of its pairs
source/<name>/rewards/margin     rewards/margin of its pairs
source/<name>/pairs              how many they are in the window
================================ ===================================================================

All of these stand under ``eval/`` in the line of an evaluation. A line about steps has besides, of
the steps since the last:

================================ ===================================================================
step                             optimizer steps done; also of an evaluation
epoch                            passes over the data done
grad_norm                        mean L2 norm of the gradient before clipping
router/balance                   mean ``dpo.routing.balance_loss`` of a step, with train.router_loss
learning_rate                    of the last step, before the factors of train.rates
displacement/alarm               1 where ``dpo.displacement`` gives the alarm, else 0
perf/step_s                      mean seconds of a step
perf/pairs_per_s                 pairs / seconds
perf/tokens_per_s                tokens / seconds, a prompt and each of its answers counted once
perf/tflops_per_s                10^12 operations / seconds, of those that ``dpo.flops`` counts
perf/mfu                         the same / the datasheet's rate, on a GPU of ``dpo.accelerators``
perf/pad_fraction                share of the computed tokens that only fill a micro-batch up
perf/shared_fraction             share of the tokens of plain texts, each answer with its prompt,
                                 that need not be computed, because texts share prefixes
time/data                        mean seconds of a step in which micro-batches are put together
time/reference                   the same for a reference in memory (``dpo.live_reference``)
time/forward                     for the policy's forward passes
time/backward                    for the losses, the sums of metrics and the backward passes
time/optimizer                   for clipping and the update
mem/peak_mib                     most memory so far: allocated on a GPU, resident of the process
data/tokens                      tokens trained on since the first step
health/clip_share                share of steps whose gradient norm was above train.max_grad_norm
health/update_ratio              norm of the last step's change of the trained weights / norm of the
                                 weights before it, over a sample: ``dpo.health.WeightSample``
health/nonfinite                 steps skipped since the first
================================ ===================================================================

The parts of ``time/`` add up to ``perf/step_s``. On a GPU they are what its stream spends between
marks (``dpo.step_clock``): time that it waits for data is data's, and a transfer too. Only what is
under ``perf/``, ``time/`` and ``mem/`` depends on the machine and on how steps are cut up. There is
no ``perf/mfu`` where no datasheet's rate is known, as on a CPU: ``dpo bench`` measures one.

Of rows with one answer, the metrics of an answer count those that have it; the metrics of gaps and
of differences count no such row. The ``kl`` metrics are estimates over given answers, not over the
policy's own: gauges of drift. A metric whose denominator is 0 is left out; those of
``ALWAYS_LOGGED`` stand in every line of ``metrics.jsonl`` about a step, as null where the step was
skipped.

Shapes: P pairs, K tokens, T terms of a mixture, C columns, M sums, S sources.

To add a metric: its numerator and denominator in one of the ``_*_quotients``, or a line in
``_derived`` if it is made of several.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from dpo.losses import Loss, PairLogProbs, term_names
from dpo.losses.base import MAX_EXPONENT, PAIR_COLUMNS
from dpo.ranks import Ranks
from dpo.sources import Sources

if TYPE_CHECKING:
    from dpo.scoring import ScoredPairs

ALWAYS_LOGGED: Final = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
    *("logps/chosen", "logps/rejected", "grad_norm"),
)
_QUANTILES: Final = {
    "rewards/margin_p05": 0.05,
    "rewards/margin_p50": 0.5,
    "rewards/margin_p95": 0.95,
}
_WITH_ERROR: Final = ("loss", "rewards/accuracy", "rewards/margin")
_BINS: Final = 10
_BY_SOURCE: Final = ("loss", "rewards/accuracy", "rewards/margin")

Quotients = dict[str, tuple[Tensor, Tensor]]  # numerators and denominators, each yet to be summed


@dataclass(frozen=True, slots=True, eq=False)
class TokenStatistics:
    """What single tokens add to the metrics; each field is summed, whatever its shape.

    Attributes:
        entropy: of the policy at the tokens of both answers, nats.
        chosen_is_top: whether a chosen answer's token is the most likely one.
        k3: ``k3_estimate`` at the tokens of both answers; None without a reference.
        full_kl: the reference's divergence at the tokens of both answers, where the loss reads it.
    """

    entropy: Tensor
    chosen_is_top: Tensor
    k3: Tensor | None = None
    full_kl: Tensor | None = None


def k3_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Return ``e^(r - l) - 1 - (r - l)`` >= 0 of each token, (K,); the exponent stops at 80."""
    difference = (reference_log_probs - log_probs).clamp(max=MAX_EXPONENT)
    return difference.expm1() - difference


class MetricSums:
    """One window; feed it each micro-batch, read it once."""

    def __init__(self, sources: Sources | None = None, *, terms: Sequence[str] = ()) -> None:
        """Start an empty window; with ``sources`` it has metrics of each, and is fed by ``add``.

        ``terms`` are the ``term_names`` of the loss, if their losses are given too.
        """
        self._sources, self._terms = sources, terms
        self._rows: list[int] = []  # of the data, as the columns
        self._has_reference = True
        self._columns: list[Tensor] = []  # (C, P) of each micro-batch
        self._token_sums: list[Tensor] = []  # (2, 4) of each micro-batch

    @classmethod
    def of_loss(cls, loss: Loss, sources: Sources | None = None) -> "MetricSums":
        """Start an empty window that is fed with ``loss.with_terms``."""
        return cls(sources, terms=term_names(loss))

    def add(self, loss: Loss, scored: "ScoredPairs", losses: Tensor | None) -> None:
        """Add a scored micro-batch, without waiting.

        Args:
            loss: the loss.
            scored: the micro-batch.
            losses: as for ``update``; None if ``assign_losses`` is to follow.
        """
        pairs, tokens, reference = scored.pairs, scored.tokens, scored.batch.reference
        is_chosen = scored.batch.texts.answers % 2 == 0  # (K,)
        with torch.no_grad():
            seen, has_kl = scored.loss_pairs, loss.token_statistic == "reference_kl"
            statistics = TokenStatistics(
                entropy=tokens.entropy,
                chosen_is_top=tokens.is_top & is_chosen,
                k3=None if reference is None else k3_estimate(tokens.log_probs, reference),
                full_kl=seen.chosen_statistic + seen.rejected_statistic if has_kl else None,
            )
            weights, rewards = loss.pair_weights(seen), loss.rewards(seen)
            if losses is None:
                losses = pairs.chosen.new_zeros(1 + len(self._terms), len(pairs.chosen))
        has_reference = reference is not None
        self._rows += scored.batch.rows
        self.update(pairs, losses, weights, rewards, statistics, has_reference=has_reference)

    @torch.no_grad()
    def update(
        self,
        pairs: PairLogProbs,
        losses: Tensor,
        weights: Tensor,
        rewards: tuple[Tensor, Tensor],
        tokens: TokenStatistics | None = None,
        *,
        has_reference: bool = True,
    ) -> None:
        """Add a micro-batch, without waiting for the device.

        Args:
            pairs: its log-probs.
            losses: (P,) the loss of each pair, or (1 + T, P) with those of the terms below it.
            weights: (P,) ``Loss.pair_weights``.
            rewards: (P,) each, ``Loss.rewards``.
            tokens: where given, adds the metrics of single tokens.
            has_reference: if not, the window has no metrics against a reference.
        """
        self._has_reference &= has_reference
        of_pairs = [getattr(pairs, name) for name in PAIR_COLUMNS]
        self._columns.append(torch.stack([*of_pairs, weights, *rewards, *torch.atleast_2d(losses)]))
        if tokens is not None:
            self._token_sums.append(_token_sums(pairs, tokens))

    def assign_losses(self, losses: Tensor) -> None:
        """Replace the losses of all pairs added so far by (1 + T, P) others, in the same order."""
        parts = losses.split([columns.shape[1] for columns in self._columns], dim=1)
        for columns, part in zip(self._columns, parts, strict=True):
            columns[-len(losses) :] = part

    def merge(self, other: "MetricSums") -> None:
        """Add the window of ``other`` to this one."""
        self._has_reference &= other._has_reference
        self._rows += other._rows
        self._columns += other._columns
        self._token_sums += other._token_sums

    def of_all(self, ranks: Ranks) -> "MetricSums":
        """Return the window of all ranks, of which this is one."""
        whole = MetricSums(self._sources, terms=self._terms)
        whole._has_reference = not ranks.any(not self._has_reference)
        rows = ranks.gather(torch.tensor(self._rows, dtype=torch.int64))
        whole._rows = [] if rows is None else rows.tolist()
        columns = ranks.gather(torch.cat(self._columns, dim=1).T if self._columns else None)
        whole._columns = [] if columns is None else [columns.T]  # (C, P)
        sums = ranks.gather(torch.stack(self._token_sums) if self._token_sums else None)
        whole._token_sums = [] if sums is None else list(sums)
        return whole

    @torch.no_grad()
    def result(self) -> dict[str, float]:
        """Return the metrics, of which an empty window has none, by one transfer to the host."""
        if not self._columns:
            return {}
        quotients, gap = _pair_quotients(wide(torch.cat(self._columns, dim=1)), self._terms)
        token_sums = torch.stack([gap.new_zeros(2, len(_TOKEN_METRICS)), *self._token_sums])
        sums = torch.cat([_summed(quotients), token_sums.sum(dim=0)], dim=1)  # (2, M)
        levels = torch.tensor(list(_QUANTILES.values()), dtype=gap.dtype, device=gap.device)
        errors = torch.stack([_standard_error(*quotients[name]) for name in _WITH_ERROR])
        of_sources = self._source_sums(quotients)
        values = torch.cat([sums.flatten(), gap.nanquantile(levels), errors, *of_sources]).tolist()

        names = [*quotients, *_TOKEN_METRICS]
        numerators, denominators = values[: len(names)], values[len(names) : 2 * len(names)]
        ratios = _ratios(names, numerators, denominators)
        rest = values[2 * len(names) :]
        quantiles = dict(zip(_QUANTILES, rest, strict=False))
        rest = rest[len(_QUANTILES) :]
        of_names = zip(_WITH_ERROR, rest, strict=False)
        standard_errors = {f"{name}_se": error for name, error in of_names if name in ratios}
        if "_gap" not in ratios:
            quantiles = {}  # no row has two answers
        metrics = {**ratios, **standard_errors, **quantiles, **_derived(ratios)}
        metrics |= self._source_metrics(rest[len(_WITH_ERROR) :])
        return {name: value for name, value in metrics.items() if self._is_public(name)}

    def gaps(self) -> dict[int, float]:
        """Return the gap of each row of the data that has two answers."""
        if not self._columns:
            return {}
        _, gap = _pair_quotients(wide(torch.cat(self._columns, dim=1)), self._terms)
        of_rows = zip(self._rows, gap.tolist(), strict=True)
        return {row: value for row, value in of_rows if not math.isnan(value)}

    def _source_sums(self, quotients: Quotients) -> list[Tensor]:
        """Sum ``_BY_SOURCE`` over the pairs of each source: (S * 2 * 3,), or nothing."""
        if self._sources is None:
            return []
        of_names = [quotients[name] for name in _BY_SOURCE]
        values = torch.stack([*(n for n, _ in of_names), *(d for _, d in of_names)], dim=1)
        numbers = torch.from_numpy(self._sources.numbers[self._rows]).to(values.device)
        sums = values.new_zeros(len(self._sources.names), values.shape[1])  # (S, 6)
        return [sums.index_add_(0, numbers, values).flatten()]

    def _source_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics of the sources that the window holds."""
        if self._sources is None:
            return {}
        metrics: dict[str, float] = {}
        counts = np.bincount(self._sources.numbers[self._rows]).tolist()
        width, middle = 2 * len(_BY_SOURCE), len(_BY_SOURCE)
        for number, (name, count) in enumerate(zip(self._sources.names, counts, strict=False)):
            if count:
                of_source = sums[number * width : (number + 1) * width]
                ratios = _ratios(_BY_SOURCE, of_source[:middle], of_source[middle:])
                ratios["pairs"] = count
                metrics |= {f"source/{name}/{metric}": value for metric, value in ratios.items()}
        return metrics

    def _is_public(self, name: str) -> bool:
        against_reference = name.startswith(("kl/", "displacement/"))
        return not name.startswith("_") and (self._has_reference or not against_reference)


def _ratios(
    names: Sequence[str], numerators: Sequence[float], denominators: Sequence[float]
) -> dict[str, float]:
    """Divide, but where the denominator is 0."""
    return {
        name: numerator / denominator
        for name, numerator, denominator in zip(names, numerators, denominators, strict=True)
        if denominator
    }


_TOKEN_METRICS: Final = ("entropy", "token_accuracy", "kl/k3_tok", "kl/full_fwd")


def wide(values: Tensor) -> Tensor:
    """Widen to float64, where the device has it: float32 sums would depend on the split."""
    return values if values.device.type == "mps" else values.double()


def _pair_quotients(columns: Tensor, terms: Sequence[str]) -> tuple[Quotients, Tensor]:
    """Return all quotients over pairs, and the gaps, NaN without two answers, of (C, P) columns."""
    count = len(PAIR_COLUMNS)
    pairs = PairLogProbs(*columns[:count])
    weights, chosen, rejected, *losses = columns[count:]
    gap = chosen - rejected
    of_chosen, of_rejected = pairs.weight * pairs.has_chosen, pairs.weight * pairs.has_rejected
    of_gaps = {
        "rewards/margin": (pairs.weight * gap, pairs.weight),
        **_gap_quotients(pairs, gap),
        **_calibration_quotients(pairs, gap),
    }
    is_pair = pairs.has_chosen * pairs.has_rejected
    names = ["loss", *(f"loss/{term}" for term in terms)]
    quotients = {
        **{name: (weights * values, weights) for name, values in zip(names, losses, strict=True)},
        "rewards/chosen": (of_chosen * chosen, of_chosen),
        "rewards/rejected": (of_rejected * rejected, of_rejected),
        **_log_prob_quotients(pairs),
        **{name: (above * is_pair, below * is_pair) for name, (above, below) in of_gaps.items()},
    }
    return quotients, gap.masked_fill(is_pair == 0, torch.nan)


def _log_prob_quotients(pairs: PairLogProbs) -> Quotients:
    """Return what the log-probs and the lengths say; (P,) each."""
    has_chosen, has_rejected = pairs.has_chosen, pairs.has_rejected
    u, v = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    return {
        "logps/chosen": (pairs.chosen, has_chosen),
        "logps/rejected": (pairs.rejected, has_rejected),
        "logps_tok/chosen": (pairs.chosen, pairs.chosen_tokens),
        "logps_tok/rejected": (pairs.rejected, pairs.rejected_tokens),
        "nll/chosen": (-pairs.chosen, pairs.chosen_tokens),
        "kl/k1_seq_chosen": (u, has_chosen),
        "kl/k1_seq_rejected": (v, has_rejected),
        "kl/k1_tok": (u + v, pairs.chosen_tokens + pairs.rejected_tokens),
        "displacement/chosen": (u, has_chosen),
        "displacement/share_u_negative": ((u < 0).to(u.dtype), has_chosen),
        "length/chosen": (pairs.chosen_tokens, has_chosen),
        "length/rejected": (pairs.rejected_tokens, has_rejected),
    }


def _gap_quotients(pairs: PairLogProbs, gap: Tensor) -> Quotients:
    """Return what the gaps say, alone and against the lengths; (P,) each."""
    one = torch.ones_like(gap)
    win, tie = (gap > 0).to(gap.dtype), (gap == 0).to(gap.dtype)
    longer = pairs.chosen_tokens - pairs.rejected_tokens
    strata = {"_longer": longer > 0, "_equal": longer == 0, "_shorter": longer < 0}
    return {
        "rewards/accuracy": (win + tie / 2, one),
        "rewards/accuracy_strict": (win, one),
        "rewards/tie_rate": (tie, one),
        "rewards/saturated": ((gap.sigmoid() > 0.99).to(gap.dtype), one),
        "grad_weight": ((-gap).sigmoid(), one),
        "length/diff": (longer, one),
        "_gap": (gap, one),
        "_gap^2": (gap.square(), one),
        "_diff^2": (longer.square(), one),
        "_diff*gap": (longer * gap, one),
        **{name: ((win + tie / 2) * rows, rows * one) for name, rows in strata.items()},
    }


def _calibration_quotients(pairs: PairLogProbs, gap: Tensor) -> Quotients:
    """Return the error of ``s(gap)`` as a forecast of the label, whole and by bin; (P,) each."""
    one = torch.ones_like(gap)
    error = gap.sigmoid() - pairs.label_prob
    bins = (gap.sigmoid() * _BINS).floor().clamp(max=_BINS - 1)
    return {
        "calibration/brier": (error.square(), one),
        **{f"_bin{index}": (error * (bins == index), one) for index in range(_BINS)},
    }


def _standard_error(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Return that of the quotient of two sums over pairs drawn independently, (P,) each.

    The variance of a ratio estimate, Cochran 1977, "Sampling Techniques", chapter 6, for a sample
    that is small beside all.
    """
    total = denominators.sum()
    residuals = numerators - numerators.sum() / total * denominators
    return residuals.square().sum().sqrt() / total


def _summed(quotients: Quotients) -> Tensor:
    """Sum numerators and denominators over the pairs: (2, M)."""
    numerators, denominators = zip(*quotients.values(), strict=True)
    return torch.stack([torch.stack(numerators), torch.stack(denominators)]).sum(dim=2)


def _token_sums(pairs: PairLogProbs, tokens: TokenStatistics) -> Tensor:
    """Return the numerators and denominators of ``_TOKEN_METRICS``: (2, 4)."""
    chosen_tokens = wide(pairs.chosen_tokens).sum()
    both = chosen_tokens + wide(pairs.rejected_tokens).sum()
    zero = torch.zeros_like(both)
    quotients = [(tokens.entropy, both), (tokens.chosen_is_top, chosen_tokens)]
    quotients += [
        (zero, zero) if values is None else (values, both) for values in (tokens.k3, tokens.full_kl)
    ]
    sums = [numerator.sum(dtype=zero.dtype) for numerator, _ in quotients]
    return torch.stack([torch.stack(sums), torch.stack([below for _, below in quotients])])


def _derived(ratios: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are functions of several quotients."""
    derived = {}
    if ratios.get("nll/chosen", math.inf) < math.log(1e300):
        derived["ppl"] = math.exp(ratios["nll/chosen"])
    if "_gap" not in ratios:
        return derived
    strata = [ratios[name] for name in ("_longer", "_equal", "_shorter") if name in ratios]
    derived |= {
        "accuracy_len_controlled": sum(strata) / len(strata),
        "calibration/ece": sum(abs(ratios[f"_bin{index}"]) for index in range(_BINS)),
    }
    gap, diff = ratios["_gap"], ratios["length/diff"]
    gap_variance = ratios["_gap^2"] - gap**2
    diff_variance = ratios["_diff^2"] - diff**2
    # Lengths are whole numbers, so their variance is exact; of equal gaps round-off leaves some.
    if diff_variance > 0 and gap_variance > 1e-12 * gap**2:
        covariance = ratios["_diff*gap"] - gap * diff
        derived["length/reward_corr"] = covariance / math.sqrt(gap_variance * diff_variance)
    return derived
