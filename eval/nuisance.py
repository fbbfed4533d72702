"""What off-policy estimates need to guess: expected rewards and the log's own chances.

Both are fitted on four fifths of the sessions and asked about the last fifth (cross-fitting,
Chernozhukov et al. 2018), so that no example is predicted from itself.

Shapes: N examples, P features, A arms (the actions to tell apart).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dpo.eval.resampling import Floats, Integers
from dpo.files import JSON

FOLDS = 5
PENALTY = 10.0  # ridge penalty, in units of examples, on features of unit variance
# Penalties of the softmax regression. Too small a one makes rare arms look rarer still, and so
# their weights too large; the likelihood of examples that were not fitted chooses.
CHANCE_PENALTIES = (10.0, 30.0, 100.0, 300.0)
STEPS = 200  # of the softmax regression; each is monotone, so stopping early only smooths


def state_features(states: Iterable[Mapping[str, JSON]]) -> Floats:
    """Turn states, as JSON objects, into numbers: (N, P), standardised, the first column ones.

    A number or a boolean is one column, a text one column a value, a list one column an item; a
    number that some states lack gets a column that says so. Constant columns are dropped.
    """
    rows = [_flat("", state) for state in states]
    names = sorted({name for row in rows for name in row})
    absent = [0.0 if "=" in name else np.nan for name in names]  # one-hot columns are 0
    table = np.array(
        [[row.get(name, gap) for name, gap in zip(names, absent, strict=True)] for row in rows]
    )
    missing = np.isnan(table)
    seen = np.maximum((~missing).sum(axis=0), 1)
    means = np.where(missing, 0.0, table).sum(axis=0) / seen
    filled = np.where(missing, means, table)
    columns = np.concatenate([filled, missing.astype(np.float64)], axis=1)
    spread = columns.std(axis=0)
    kept = spread > 1e-12 * (1.0 + np.abs(columns).max(axis=0, initial=0.0))
    standard = (columns[:, kept] - columns[:, kept].mean(axis=0)) / spread[kept]
    return np.concatenate([np.ones((len(rows), 1)), standard], axis=1)


def make_folds(groups: Sequence[object], seed: int) -> Integers:
    """Deal the groups into at most ``FOLDS`` folds of nearly equal size at random: (N,)."""
    numbers = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    dealt = np.arange(len(numbers)) % min(FOLDS, len(numbers))
    np.random.default_rng(seed).shuffle(dealt)
    return dealt[[numbers[key] for key in groups]]


def expected_rewards(
    features: Floats, arms: Integers, rewards: Floats, folds: Integers, *, arm_count: int
) -> Floats:
    """Predict the reward of every arm for every example: (N, A), within the range of the rewards.

    A ridge regression over all arms plus, for each arm, one of what it leaves over, so that an arm
    with few examples leans on the others.

    Args:
        features: (N, P), the first column ones.
        arms: (N,) index of the arm taken.
        rewards: (N,) what it earned.
        folds: (N,) from ``make_folds``.
        arm_count: A.
    """
    predicted = np.empty((len(features), arm_count))
    for fold in range(int(folds.max()) + 1):
        held, fitted = folds == fold, folds != fold
        mean = rewards[fitted].mean()  # apart, so that the penalty does not pull it to 0
        shared = _ridge(features[fitted], rewards[fitted] - mean)
        left_over = rewards - mean - features @ shared
        for arm in range(arm_count):
            own = fitted & (arms == arm)
            weights = shared + _ridge(features[own], left_over[own])
            predicted[held, arm] = mean + features[held] @ weights
    return np.clip(predicted, rewards.min(), rewards.max())


def estimated_propensities(
    features: Floats, arms: Integers, folds: Integers, *, arm_count: int
) -> Floats:
    """Estimate the log's chance of the arm that it took, by softmax regression: (N,), in (0, 1].

    The penalty is that of ``CHANCE_PENALTIES`` under which the held out arms are the likeliest.

    Args:
        features: (N, P), the first column ones.
        arms: (N,) index of the arm taken.
        folds: (N,) from ``make_folds``.
        arm_count: A.
    """
    candidates = [
        _held_out_chances(features, arms, folds, arm_count, penalty) for penalty in CHANCE_PENALTIES
    ]
    return max(candidates, key=lambda chances: float(np.log(chances).sum()))


def _held_out_chances(
    features: Floats, arms: Integers, folds: Integers, arm_count: int, penalty: float
) -> Floats:
    chances = np.empty(len(features))
    for fold in range(int(folds.max()) + 1):
        held, fitted = folds == fold, folds != fold
        weights = _softmax_regression(features[fitted], arms[fitted], arm_count, penalty)
        chances[held] = _softmax(features[held] @ weights)[np.arange(held.sum()), arms[held]]
    return np.maximum(chances, np.finfo(np.float64).tiny)


def _flat(prefix: str, value: Mapping[str, JSON]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, bool | int | float):
            flat[name] = float(item)
        elif isinstance(item, Mapping):
            flat.update(_flat(f"{name}.", item))
        elif isinstance(item, str):
            flat[f"{name}={item}"] = 1.0
        elif item is not None:
            flat.update({f"{name}={each}": 1.0 for each in item})
    return flat


def _ridge(features: Floats, values: Floats) -> Floats:
    """Solve (X'X + PENALTY I) w = X'y: (P,)."""
    square = features.T @ features + PENALTY * np.eye(features.shape[1])
    return np.asarray(np.linalg.solve(square, features.T @ values), dtype=np.float64)


def _softmax_regression(features: Floats, arms: Integers, arm_count: int, penalty: float) -> Floats:
    """Fit by minorise-maximise: every step uses one fixed bound of the Hessian (Boehning 1992)."""
    hits = np.eye(arm_count)[arms]  # (N, A)
    size = features.shape[1]
    inverse = np.linalg.inv(features.T @ features / 2.0 + penalty * np.eye(size))
    weights = np.zeros((size, arm_count))
    for _ in range(STEPS):
        slope = features.T @ (hits - _softmax(features @ weights)) - penalty * weights
        step = inverse @ slope
        weights += step
        if np.abs(step).max() < 1e-4:
            break
    return weights


def _softmax(scores: Floats) -> NDArray[np.float64]:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float64)
