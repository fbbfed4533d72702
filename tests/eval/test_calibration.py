"""Calibration error, Brier score and the reliability curve."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from dpo.errors import InputError
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.calibration import calibrate

FEW = BootstrapOptions(resamples=40)


def test_calibration_by_hand() -> None:
    # bin .9: 1 of 2 right, off by .4; bin .3: 0 of 1, off by .3; bin .5: 1 of 1, off by .5
    found = calibrate([0.9, 0.9, 0.3, 0.5], [1, 0, 0, 1], FEW)
    assert found.expected_error.mean == pytest.approx(0.4 * 0.5 + 0.3 * 0.25 + 0.5 * 0.25)
    assert found.brier.mean == pytest.approx((0.01 + 0.81 + 0.09 + 0.25) / 4)
    assert [(each.low, each.count) for each in found.bins] == [(0.3, 1), (0.5, 1), (0.9, 2)]


def test_curve_and_brier_equal_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(500)
    right = (generator.random(500) < confidence**2).astype(int)
    found = calibrate(confidence, right, FEW)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    assert [each.accuracy.mean for each in found.bins] == pytest.approx(accuracy.tolist())
    assert [each.confidence for each in found.bins] == pytest.approx(mean.tolist())
    assert found.brier.mean == pytest.approx(brier_score_loss(right, confidence))


def test_confidence_of_one_falls_into_the_last_bin() -> None:
    found = calibrate([1.0, 1.0], [1, 1], FEW)
    assert [(each.low, each.high, each.count) for each in found.bins] == [(0.9, 1.0, 2)]
    assert found.expected_error.mean == 0.0


def test_calibrated_policy_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.5, 1.0, size=4000)
    honest = calibrate(confidence, generator.random(4000) < confidence)
    boastful = calibrate(confidence, generator.random(4000) < 0.5)
    assert honest.expected_error.mean < 0.03
    assert boastful.expected_error.lower > 0.2


@pytest.mark.parametrize("confidence", [-0.1, 1.1, float("nan")])
def test_confidence_outside_the_unit_interval_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match=r"confidences must lie in \[0, 1\]; decision 1 "):
        calibrate([0.5, confidence], [1, 0])
