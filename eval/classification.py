"""How often two lists of action classes agree: accuracy, precision, recall, F1, confusion matrix.

Every figure is what scikit-learn computes with ``zero_division=0`` and is a function of the counts
of the confusion matrix, so each gets its bootstrap interval. A resample in which a class does not
occur leaves that class's rates undefined; averages are over the classes that occur in it.

Shapes: N examples, C classes, B resamples.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo.errors import InputError
from dpo.eval.bootstrap import (
    DEFAULTS,
    BootstrapOptions,
    ConfidenceInterval,
    Statistic,
    bootstrap,
    divide,
)
from dpo.eval.resampling import Floats

AVERAGES = (
    "accuracy", "precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1",
)  # fmt: skip
"""The outputs of ``average_scores``; without a prefix they are weighted by support."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """How well one class is met; a rate of nothing (never predicted) is 0, without interval."""

    precision: ConfidenceInterval
    recall: ConfidenceInterval
    f1: ConfidenceInterval
    support: int
    """Number of examples that expect the class."""
    predicted: int
    """Number of examples for which the policy chose it."""


@dataclass(frozen=True, slots=True)
class Classification:
    """Agreement of predicted with expected classes."""

    classes: tuple[str, ...]
    """Every class that occurs on either side, sorted."""
    confusion: tuple[tuple[int, ...], ...]
    """Counts; rows are expected classes, columns predicted ones."""
    averages: Mapping[str, ConfidenceInterval]
    """One entry for each of ``AVERAGES``."""
    per_class: Mapping[str, ClassScores]


def classify(
    expected: Sequence[str],
    predicted: Sequence[str],
    options: BootstrapOptions = DEFAULTS,
    *,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> Classification:
    """Score ``predicted`` (N,) against ``expected`` (N,), with intervals.

    Raises:
        InputError: lists of different lengths, or as ``bootstrap``.
    """
    classes = tuple(sorted({*expected, *predicted}))
    cells = confusion_columns(expected, predicted, classes)  # (N, C * C)

    def scores(sums: Floats) -> Floats:
        return np.concatenate([average_scores(sums), class_scores(sums)], axis=1)

    found = bootstrap(cells, scores, options, groups=groups, strata=strata)
    counts = cells.sum(axis=0).reshape(len(classes), -1).astype(int)  # (C, C)
    rates = [_zero_where_undefined(interval) for interval in found[len(AVERAGES) :]]
    return Classification(
        classes=classes,
        confusion=tuple(tuple(row) for row in counts.tolist()),
        averages=dict(zip(AVERAGES, found, strict=False)),
        per_class={
            name: ClassScores(
                precision=rates[i],
                recall=rates[len(classes) + i],
                f1=rates[2 * len(classes) + i],
                support=int(counts[i].sum()),
                predicted=int(counts[:, i].sum()),
            )
            for i, name in enumerate(classes)
        },
    )


def confusion_columns(
    expected: Sequence[str], predicted: Sequence[str], classes: Sequence[str]
) -> Floats:
    """Mark each example's cell of the confusion matrix: (N, C * C), one 1 in each row."""
    if len(expected) != len(predicted):
        raise InputError(
            f"each example needs one predicted class: got {len(predicted)} for {len(expected)}"
        )
    index = {name: i for i, name in enumerate(classes)}
    cells = np.zeros((len(expected), len(classes) ** 2))
    cell = [index[e] * len(classes) + index[p] for e, p in zip(expected, predicted, strict=True)]
    cells[np.arange(len(cell)), cell] = 1.0
    return cells


def average_scores(sums: Floats) -> Floats:
    """Map confusion counts (B, C * C) to the ``AVERAGES``: (B, 7)."""
    rates = np.nan_to_num(_rates(sums))  # (3, B, C)
    expected, predicted, _ = _margins(sums)  # (B, C)
    total = expected.sum(axis=1, keepdims=True)  # (B, 1)
    occurs = (expected + predicted) > 0
    weighted = (rates * divide(expected, total)).sum(axis=2)  # (3, B)
    macro = (rates * occurs).sum(axis=2) / np.maximum(occurs.sum(axis=1), 1)  # (3, B)
    # recall weighted by support is the share of agreement
    return np.stack([weighted[1], *weighted, *macro], axis=1)


def class_scores(sums: Floats) -> Floats:
    """Map confusion counts (B, C * C) to precision, recall and F1 of each class: (B, 3 * C)."""
    return np.concatenate(list(_rates(sums)), axis=1)


def statistic_of(name: str) -> Statistic:
    """Return the statistic of confusion counts that gives one of the ``AVERAGES``."""
    column = AVERAGES.index(name)
    return lambda sums: average_scores(sums)[:, column : column + 1]


def _margins(sums: Floats) -> tuple[Floats, Floats, Floats]:
    size = round(sums.shape[1] ** 0.5)
    table = sums.reshape(len(sums), size, size)
    return table.sum(axis=2), table.sum(axis=1), np.diagonal(table, axis1=1, axis2=2)


def _rates(sums: Floats) -> Floats:
    """Return precision, recall and F1, NaN where undefined: (3, B, C)."""
    expected, predicted, both = _margins(sums)
    return np.stack(
        [divide(both, predicted), divide(both, expected), divide(2 * both, expected + predicted)]
    )


def _zero_where_undefined(interval: ConfidenceInterval) -> ConfidenceInterval:
    return replace(interval, mean=0.0) if np.isnan(interval.mean) else interval
