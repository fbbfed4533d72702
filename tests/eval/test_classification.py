"""Accuracy, precision, recall and F1: scikit-learn is the oracle."""

import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.classification import AVERAGES, average_scores, classify, confusion_columns

ORACLE: Any = sklearn.metrics
FEW = BootstrapOptions(resamples=40)
LABELS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=2, max_size=40
)


@settings(max_examples=30, deadline=None)
@given(pairs=LABELS)
def test_scores_equal_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    expected, predicted = zip(*pairs, strict=True)
    found = classify(expected, predicted, FEW)
    names = list(found.classes)
    for prefix, average in (("", "weighted"), ("macro_", "macro")):
        theirs = ORACLE.precision_recall_fscore_support(
            expected, predicted, average=average, zero_division=0.0
        )
        ours = [found.averages[prefix + name].mean for name in ("precision", "recall", "f1")]
        assert ours == pytest.approx(list(theirs[:3]))
    by_class = ORACLE.precision_recall_fscore_support(
        expected, predicted, labels=names, average=None, zero_division=0.0
    )
    for index, name in enumerate(names):
        scores = found.per_class[name]
        assert scores.precision.mean == pytest.approx(by_class[0][index])
        assert scores.recall.mean == pytest.approx(by_class[1][index])
        assert scores.f1.mean == pytest.approx(by_class[2][index])
        assert scores.support == by_class[3][index]
    assert found.averages["accuracy"].mean == pytest.approx(
        ORACLE.accuracy_score(expected, predicted)
    )
    theirs = ORACLE.confusion_matrix(expected, predicted, labels=[*names, "none"])[:-1, :-1]
    assert np.array(found.confusion).tolist() == theirs.tolist()


@settings(max_examples=20, deadline=None)
@given(pairs=LABELS, seed=st.integers(0, 100))
def test_a_resample_scores_as_scikit_learn_scores_its_rows(
    pairs: list[tuple[str, str]], seed: int
) -> None:
    rows = np.random.default_rng(seed).integers(0, len(pairs), size=len(pairs))
    expected, predicted = zip(*(pairs[row] for row in rows), strict=True)
    sums = confusion_columns(expected, predicted, "abcd").sum(axis=0, keepdims=True)
    ours = dict(zip(AVERAGES, average_scores(sums)[0].tolist(), strict=True))
    theirs = ORACLE.precision_recall_fscore_support(
        expected, predicted, average="macro", zero_division=0.0
    )
    assert ours["macro_f1"] == pytest.approx(theirs[2])


def test_scores_by_hand() -> None:
    # a: 2 expected, both met; b: 2 expected, 1 met, the other taken for a
    found = classify(["a", "a", "b", "b"], ["a", "a", "a", "b"], FEW)
    assert found.confusion == ((2, 0), (1, 1))
    assert found.averages["accuracy"].mean == 0.75
    assert found.per_class["a"].precision.mean == pytest.approx(2 / 3)
    assert found.per_class["b"].recall.mean == 0.5
    assert found.per_class["b"].f1.mean == pytest.approx(2 / 3)


def test_classes_that_are_only_predicted_are_shown() -> None:
    found = classify(["a", "a", "b"], ["a", "c", "b"], FEW)
    assert found.classes == ("a", "b", "c")
    assert (found.per_class["c"].support, found.per_class["c"].predicted) == (0, 1)


def test_a_class_never_predicted_has_precision_zero_and_no_interval() -> None:
    found = classify(["a", "b"] * 20, ["a"] * 40, BootstrapOptions(resamples=200))
    precision = found.per_class["b"].precision
    assert (precision.mean, precision.is_defined) == (0.0, False)


def test_every_average_has_an_interval_around_it() -> None:
    generator = np.random.default_rng(0)
    expected = generator.choice(["a", "b", "c"], size=300).tolist()
    predicted = [
        e if u < 0.7 else "a" for e, u in zip(expected, generator.random(300), strict=True)
    ]
    found = classify(expected, predicted)
    assert all(each.lower < each.mean < each.upper for each in found.averages.values())


def test_stratified_intervals_hold_the_class_sizes() -> None:
    # all of a right and all of b wrong: with fixed class sizes the accuracy cannot vary
    expected = ["a"] * 30 + ["b"] * 10
    found = classify(expected, ["a"] * 40, FEW, strata=expected)
    assert (found.averages["accuracy"].lower, found.averages["accuracy"].upper) == (0.75, 0.75)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="each example needs one predicted class: got 1 for 2"):
        classify(["a", "b"], ["a"])


def test_scores_raise_no_warnings_on_empty_classes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classify(["a", "a"], ["b", "b"], FEW)
