"""Direct Preference Optimization: the engine, the dataset builder and the evaluator.

The public names are imported when they are first used, so that ``import dpo`` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo import losses as losses
    from dpo.batching import collate as collate
    from dpo.data.builder import build_consolidation_dataset as build_consolidation_dataset
    from dpo.data.builder import build_extraction_dataset as build_extraction_dataset
    from dpo.data.builder import build_retrieval_dataset as build_retrieval_dataset
    from dpo.eval.bootstrap import compute_confidence_interval as compute_confidence_interval
    from dpo.eval.comparison import compare_policies as compare_policies
    from dpo.eval.evaluation import evaluate_policy as evaluate_policy
    from dpo.eval.language_model import LanguageModelPolicy as LanguageModelPolicy
    from dpo.eval.policy_training import PolicyTrainingConfig as PolicyTrainingConfig
    from dpo.eval.policy_training import train_consolidation_policy as train_consolidation_policy
    from dpo.eval.policy_training import train_extraction_policy as train_extraction_policy
    from dpo.eval.policy_training import train_retrieval_policy as train_retrieval_policy
    from dpo.eval.report_text import format_comparison_report as format_comparison_report
    from dpo.eval.report_text import format_evaluation_report as format_evaluation_report
    from dpo.log_probs import completion_log_probs as completion_log_probs
    from dpo.models import load_model as load_model
    from dpo.preferences import PreferencePair as PreferencePair
    from dpo.preferences import read_pairs as read_pairs
    from dpo.preferences import write_pairs as write_pairs
    from dpo.reference import ReferenceCache as ReferenceCache
    from dpo.score import reference_log_probs as reference_log_probs
    from dpo.score import score_pairs as score_pairs
    from dpo.tokenization import tokenize_pairs as tokenize_pairs
    from dpo.tokenizer import load_tokenizer as load_tokenizer
    from dpo.train_config import TrainConfig as TrainConfig
    from dpo.trainer import Trainer as Trainer

_HOMES = {
    "LanguageModelPolicy": "dpo.eval.language_model",
    "PolicyTrainingConfig": "dpo.eval.policy_training",
    "PreferencePair": "dpo.preferences",
    "ReferenceCache": "dpo.reference",
    "TrainConfig": "dpo.train_config",
    "Trainer": "dpo.trainer",
    "build_consolidation_dataset": "dpo.data.builder",
    "build_extraction_dataset": "dpo.data.builder",
    "build_retrieval_dataset": "dpo.data.builder",
    "collate": "dpo.batching",
    "compare_policies": "dpo.eval.comparison",
    "completion_log_probs": "dpo.log_probs",
    "compute_confidence_interval": "dpo.eval.bootstrap",
    "evaluate_policy": "dpo.eval.evaluation",
    "format_comparison_report": "dpo.eval.report_text",
    "format_evaluation_report": "dpo.eval.report_text",
    "load_model": "dpo.models",
    "load_tokenizer": "dpo.tokenizer",
    "losses": "dpo",
    "read_pairs": "dpo.preferences",
    "reference_log_probs": "dpo.score",
    "score_pairs": "dpo.score",
    "tokenize_pairs": "dpo.tokenization",
    "train_consolidation_policy": "dpo.eval.policy_training",
    "train_extraction_policy": "dpo.eval.policy_training",
    "train_retrieval_policy": "dpo.eval.policy_training",
    "write_pairs": "dpo.preferences",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *_HOMES])
