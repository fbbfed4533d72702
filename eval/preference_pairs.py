"""How well a model's implicit rewards agree with preference pairs, from the file of ``dpo score``.

Pairs of one prompt are drawn together. Shapes: P pairs.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo.errors import InputError
from dpo.eval.bootstrap import (
    DEFAULTS,
    BootstrapOptions,
    ConfidenceInterval,
    bootstrap,
    divide,
    ratio_of_sums,
)
from dpo.eval.calibration import (
    Calibration,
    brier_score,
    calibrate,
    calibration_columns,
    expected_error,
)
from dpo.eval.comparison import Difference, Winner, judge, metric_differences
from dpo.eval.metrics import Metric
from dpo.eval.resampling import Floats
from dpo.eval.significance import McNemar, mcnemar
from dpo.preferences import file_rows

REQUIRED = ("chosen_reward", "rejected_reward")
TOKENS = ("chosen_tokens", "rejected_tokens")
LOG_PROBS = ("chosen_log_prob", "rejected_log_prob")
SHOWN_FAULTS = 5


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """The rewards that a model gives to both answers of P pairs."""

    ids: tuple[str, ...]
    margins: Floats
    """(P,) reward of the chosen answer minus that of the rejected one."""
    longer: Floats
    """(P,) 1 where the chosen answer has more tokens, 0 where fewer, 0.5 where as many; NaN where
    the file does not tell."""
    likelier: Floats
    """(P,) 1 where the chosen answer is the likelier one, 0 where the other is, 0.5 where neither;
    NaN where the file does not tell."""
    prompts: tuple[str, ...]
    """(P,) what tells prompts apart; the id of the pair where the file does not tell."""

    @property
    def hits(self) -> Floats:
        """(P,) 1 where the chosen answer has the higher reward, a tie 0.5."""
        return np.asarray((np.sign(self.margins) + 1.0) / 2.0, dtype=np.float64)

    @property
    def confidences(self) -> Floats:
        """(P,) probability that the model gives to the order it prefers: sigmoid(|margin|)."""
        return np.asarray(1.0 / (1.0 + np.exp(-np.abs(self.margins))), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class PairEvaluation:
    """Agreement of a model with preference pairs."""

    pairs: int
    ties: int
    """Pairs whose answers have the same reward."""
    metrics: Mapping[str, ConfidenceInterval]
    """By name, as in ``PAIR_METRICS``; without length control where the file has no lengths."""
    calibration: Calibration
    """Of sigmoid(|margin|) as the chance that the preferred order is the right one."""
    chosen_is_longer: float | None
    """Share of pairs whose chosen answer is the longer one, ties half; None without lengths."""
    options: BootstrapOptions


@dataclass(frozen=True, slots=True)
class PairComparison:
    """Two models on the same pairs."""

    a: PairEvaluation
    b: PairEvaluation
    metric: str
    winner: Winner
    verdict: str
    differences: Mapping[str, Difference]
    mcnemar: McNemar
    """Of pairs that one model orders rightly and the other wrongly; ties are left out."""


def _mean(values: Floats) -> Floats:
    return np.stack([values, np.ones(len(values))], axis=1)


def _log_loss(pairs: ScoredPairs) -> Floats:
    return _mean(np.logaddexp(0.0, -pairs.margins))


def _calibration(pairs: ScoredPairs) -> Floats:
    return calibration_columns(pairs.confidences, pairs.hits)


def _by_length(pairs: ScoredPairs) -> Floats:
    longer, shorter = pairs.longer, 1.0 - pairs.longer
    return np.stack([pairs.hits * longer, longer, pairs.hits * shorter, shorter], axis=1)


def _length_controlled(sums: Floats) -> Floats:
    """Average the accuracy where the chosen answer is longer and where it is shorter."""
    return (ratio_of_sums(sums[:, :2]) + divide(sums[:, 2:3], sums[:, 3:])) / 2.0


LENGTH_CONTROLLED = "length_controlled_accuracy"
LIKELIER = "chosen_likelier"
PAIR_METRICS: dict[str, Metric[ScoredPairs]] = {
    "reward_accuracy": Metric(lambda pairs: _mean(pairs.hits), ratio_of_sums),
    "margin": Metric(lambda pairs: _mean(pairs.margins), ratio_of_sums),
    # of the policy alone, whatever the reference says
    LIKELIER: Metric(lambda pairs: _mean(pairs.likelier), ratio_of_sums),
    # 1/2 for a model that only prefers the longer answer, however often that is the chosen one
    LENGTH_CONTROLLED: Metric(_by_length, _length_controlled),
    "log_loss": Metric(_log_loss, ratio_of_sums, is_better_higher=False),
    "calibration_error": Metric(_calibration, expected_error, is_better_higher=False),
    "brier": Metric(_calibration, brier_score, is_better_higher=False),
}


_NEEDED = {LENGTH_CONTROLLED: TOKENS, LIKELIER: LOG_PROBS}


def evaluate_pairs(pairs: ScoredPairs, options: BootstrapOptions = DEFAULTS) -> PairEvaluation:
    """Measure how the rewards of one model agree with the preferences.

    Raises:
        InputError: pairs of fewer than two prompts.
    """
    has_lengths = not np.isnan(pairs.longer).any()
    return PairEvaluation(
        pairs=len(pairs.ids),
        ties=int((pairs.margins == 0.0).sum()),
        metrics={
            name: bootstrap(metric.columns(pairs), metric.statistic, options, groups=pairs.prompts)[
                0
            ]
            for name, metric in _usable(pairs).items()
        },
        calibration=calibrate(pairs.confidences, pairs.hits, options, groups=pairs.prompts),
        chosen_is_longer=float(pairs.longer.mean()) if has_lengths else None,
        options=options,
    )


def compare_pairs(
    a: ScoredPairs,
    b: ScoredPairs,
    options: BootstrapOptions = DEFAULTS,
    *,
    metric: str = "reward_accuracy",
) -> PairComparison:
    """Compare two models on the same pairs, matched by id.

    Raises:
        InputError: another metric, or files that do not hold the same pairs.
    """
    if metric not in PAIR_METRICS:
        raise InputError(f"metric must be one of {', '.join(PAIR_METRICS)}, got {metric!r}")
    b = _in_order_of(a, b)
    metrics = {name: each for name, each in _usable(a).items() if name in _usable(b)}
    if metric not in metrics:
        raise InputError(f"{metric} needs {' and '.join(_NEEDED[metric])} in every line")
    differences = metric_differences(metrics, a, b, options, groups=a.prompts)
    if metric not in differences:
        raise InputError(f"{metric} is undefined: the same side is the longer one in all pairs")
    verdict = judge(metric, differences[metric])
    return PairComparison(
        a=evaluate_pairs(a, options),
        b=evaluate_pairs(b, options),
        metric=metric,
        winner=verdict.winner,
        verdict=verdict.reason,
        differences=differences,
        mcnemar=mcnemar(a.hits, b.hits),
    )


def read_scores(path: str | Path) -> ScoredPairs:
    """Read a file of ``dpo score``: in each line ``chosen_reward`` and ``rejected_reward``.

    ``id`` (else the line's number), ``prompt_hash``, ``chosen_tokens``, ``rejected_tokens``,
    ``chosen_log_prob`` and ``rejected_log_prob`` are used if present.

    Raises:
        InputError: no such file, no pairs, lines that are no scored pairs (all faults together), an
            id that occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the scores that dpo score writes")
    rows, faults = [], []
    for row in file_rows([path]):
        try:
            rows.append(_parse_row(row.decode(), row.number))
        except InputError as error:
            faults.append(f"{row.place}: not a scored pair: {error}")
    if faults:
        more = f"\nand {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise InputError("\n".join(faults[:SHOWN_FAULTS]) + more)
    if not rows:
        raise InputError(f"{path} holds no scored pairs: there is nothing to evaluate")
    ids = tuple(row.id for row in rows)
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{path}: the id {twice!r} occurs more than once")
    return ScoredPairs(
        ids,
        np.array([row.margin for row in rows]),
        np.array([row.longer for row in rows]),
        np.array([row.likelier for row in rows]),
        tuple(row.prompt for row in rows),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    prompt: str
    margin: float
    longer: float
    likelier: float


def _parse_row(row: object, number: int) -> _Row:
    if not isinstance(row, Mapping):
        raise InputError(f"expected an object, got {type(row).__name__}")
    chosen, rejected = (_finite(row, name) for name in REQUIRED)
    identity = str(number if row.get("id") is None else row["id"])
    prompt = row.get("prompt_hash")
    return _Row(
        identity,
        f"id {identity}" if prompt is None else str(prompt),
        chosen - rejected,
        _is_larger(row, TOKENS),
        _is_larger(row, LOG_PROBS),
    )


def _is_larger(row: Mapping[str, object], names: tuple[str, str]) -> float:
    """Return 1 where the first field is larger, 0 where the second, 0.5 for a tie; NaN unknown."""
    if any(row.get(name) is None for name in names):
        return math.nan
    first, second = (_finite(row, name) for name in names)
    return float(np.sign(first - second) + 1.0) / 2.0


def _finite(row: Mapping[str, object], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    if not abs(value) <= sys.float_info.max:
        raise InputError(f"{name} must be a finite number, got {str(value)[:20]}")
    return float(value)


def _usable(pairs: ScoredPairs) -> dict[str, Metric[ScoredPairs]]:
    unknown = {LENGTH_CONTROLLED: pairs.longer, LIKELIER: pairs.likelier}
    lacking = {name for name, values in unknown.items() if np.isnan(values).any()}
    return {name: each for name, each in PAIR_METRICS.items() if name not in lacking}


def _in_order_of(a: ScoredPairs, b: ScoredPairs) -> ScoredPairs:
    if set(a.ids) != set(b.ids):
        shared = len(set(a.ids) & set(b.ids))
        raise InputError(
            f"both files must score the same pairs: A has {len(a.ids)}, B has {len(b.ids)}, "
            f"{shared} ids occur in both"
        )
    place = {each: index for index, each in enumerate(b.ids)}
    order = [place[each] for each in a.ids]
    return ScoredPairs(a.ids, b.margins[order], b.longer[order], b.likelier[order], a.prompts)
