"""Expected rewards and estimated chances: recovered where they are known, never from oneself."""

import numpy as np
import pytest

from dpo.eval.nuisance import (
    FOLDS,
    estimated_propensities,
    expected_rewards,
    make_folds,
    state_features,
)


def test_states_become_standardised_columns() -> None:
    features = state_features(
        [
            {"a": {"n": 1, "on": True}, "kind": "x", "same": 5, "list": ["p"]},
            {"a": {"n": 3, "on": False}, "kind": "y", "same": 5, "list": ["p", "q"]},
        ]
    )
    # ones; a.n; a.on; kind=x; kind=y; list=q (list=p and same are constant)
    assert features.shape == (2, 6)
    assert features[:, 0].tolist() == [1.0, 1.0]
    assert np.abs(features[:, 1:]).tolist() == [[1.0] * 5] * 2


def test_a_number_that_some_states_lack_gets_a_column_that_says_so() -> None:
    features = state_features([{"n": 1.0}, {"n": 3.0}, {}])
    assert features.shape == (3, 3)
    assert features[2, 1] == pytest.approx(0.0)  # the mean, standardised


def test_folds_keep_groups_whole_and_even() -> None:
    groups = [f"g{number // 3}" for number in range(60)]
    folds = make_folds(groups, seed=1)
    assert all(len(set(folds[i : i + 3].tolist())) == 1 for i in range(0, 60, 3))
    assert np.bincount(folds).tolist() == [60 // FOLDS] * FOLDS


def test_two_groups_make_two_folds() -> None:
    assert set(make_folds(["a", "a", "b"], seed=0).tolist()) == {0, 1}


def test_expected_rewards_of_a_linear_world_are_found() -> None:
    generator = np.random.default_rng(0)
    features = np.concatenate([np.ones((3000, 1)), generator.normal(size=(3000, 2))], axis=1)
    truth = np.stack([0.2 * features[:, 1], 0.3 - 0.2 * features[:, 2]], axis=1)  # (N, 2)
    arms = generator.integers(0, 2, size=3000)
    rewards = truth[np.arange(3000), arms] + 0.1 * generator.normal(size=3000)
    folds = make_folds([*range(3000)], seed=0)
    found = expected_rewards(features, arms, rewards, folds, arm_count=3)
    assert np.abs(found[:, :2] - truth).mean() < 0.01
    # an arm that was never taken is predicted like the average arm
    assert np.abs(found[:, 2] - truth.mean(axis=1)).mean() < 0.05


def test_expected_rewards_do_not_see_the_examples_own_reward() -> None:
    generator = np.random.default_rng(1)
    features = np.concatenate([np.ones((50, 1)), generator.normal(size=(50, 2))], axis=1)
    arms, rewards = generator.integers(0, 2, size=50), generator.uniform(-0.5, 0.5, size=50)
    rewards[:2] = -1.0, 1.0  # the range stays as it is
    folds = make_folds([*range(50)], seed=0)
    before = expected_rewards(features, arms, rewards, folds, arm_count=2)
    rewards[7] = 0.9
    after = expected_rewards(features, arms, rewards, folds, arm_count=2)
    assert after[7].tolist() == before[7].tolist()
    assert not np.array_equal(after, before)


def test_expected_rewards_stay_within_the_rewards() -> None:
    features = np.array([[1.0, x] for x in range(-20, 20)])
    rewards = np.clip(features[:, 1], -1.0, 1.0)
    folds = make_folds([*range(40)], seed=0)
    found = expected_rewards(features, np.zeros(40, np.int64), rewards, folds, arm_count=1)
    assert (found.min(), found.max()) == (-1.0, 1.0)


def test_propensities_of_a_softmax_log_are_found() -> None:
    generator = np.random.default_rng(2)
    features = np.concatenate([np.ones((6000, 1)), generator.normal(size=(6000, 1))], axis=1)
    scores = features @ np.array([[0.0, 0.5, -0.5], [0.0, 1.0, -1.0]])
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    arms = (generator.random((6000, 1)) > chances.cumsum(axis=1)).sum(axis=1)
    folds = make_folds([*range(6000)], seed=0)
    found = estimated_propensities(features, arms, folds, arm_count=3)
    truth = chances[np.arange(6000), arms]
    assert np.abs(found - truth).mean() < 0.02
    assert found.min() > 0.0
