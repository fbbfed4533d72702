"""Reports for machines: plain JSON objects with the document's names."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime

from dpo.eval.comparison import PolicyComparison
from dpo.eval.evaluation import EvaluationResult
from dpo.files import JSON


def evaluation_to_json(result: EvaluationResult) -> dict[str, JSON]:
    """Return the document's figures first, and everything else behind them."""
    return {
        "policy": result.policy,
        "accuracy": result.accuracy,
        "precision": result.precision,
        "recall": result.recall,
        "f1": result.f1,
        "avgReward": result.avg_reward,
        "rewardStdDev": result.reward_std_dev,
        "confusionMatrix": to_json(result.confusion_matrix),
        "perClassMetrics": {
            name: {
                "precision": scores.precision.mean,
                "recall": scores.recall.mean,
                "f1": scores.f1.mean,
                "support": scores.support,
            }
            for name, scores in result.per_class_metrics.items()
        },
        "detail": to_json(result),
    }


def comparison_to_json(comparison: PolicyComparison) -> dict[str, JSON]:
    """Return the document's figures, and everything else behind them."""
    plain = to_json(comparison)
    assert isinstance(plain, dict)
    return {
        **plain,
        "policyA": evaluation_to_json(comparison.policy_a),
        "policyB": evaluation_to_json(comparison.policy_b),
    }


def to_json(value: object) -> JSON:
    """Convert dataclasses to objects with camelCase names; NaN and infinity become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            _camel_case(each.name): to_json(getattr(value, each.name)) for each in fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat()
    assert value is None or isinstance(value, str | int)
    return value


def _camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)
