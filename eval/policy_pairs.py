"""The pairs that a policy is trained on, formed from a data set or read from its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.data.dataset import Dataset
from dpo.data.dataset_files import MIN_PAIRS, check_enough_pairs, load_dataset, read_metadata
from dpo.data.examples import Example
from dpo.data.kinds import PolicyKind
from dpo.data.kinds.schema import to_json
from dpo.data.pairs import form_pairs
from dpo.errors import InputError
from dpo.files import JSON
from dpo.preferences import PreferencePair, read_pairs


@dataclass(frozen=True, slots=True)
class PolicyPairs:
    """What a policy is trained on.

    Attributes:
        kind: of the policy.
        demonstrations: what to imitate before DPO, in the layout of pairs (see ``demonstrate``).
        train: pairs to train on.
        eval: pairs to hold out.
        situations: the different states of the held-out examples, in order of appearance.
        dataset: what the metadata tell about the data set.
        created_at: time of the data set.
    """

    kind: PolicyKind
    demonstrations: Sequence[PreferencePair]
    train: Sequence[PreferencePair]
    eval: Sequence[PreferencePair]
    situations: Sequence[Any]
    dataset: JSON
    created_at: str


def pairs_of_dataset(
    dataset: Dataset[Any, Any], kind: PolicyKind, min_pairs: int = MIN_PAIRS
) -> PolicyPairs:
    """Form the pairs of a data set with the default options.

    Raises:
        InputError: it is of another kind, or gives fewer than ``min_pairs`` training pairs.
    """
    if dataset.kind.name != kind.name:
        raise InputError(f"expected a data set of the policy {kind.name}, got {dataset.kind.name}")
    train = form_pairs(dataset.train, kind)
    check_enough_pairs(train.report, min_pairs)
    return PolicyPairs(
        kind,
        demonstrate(dataset.train, kind),
        train.pairs,
        form_pairs(dataset.eval, kind).pairs,
        _situations(dataset.eval),
        to_json(dataset.stats),
        dataset.stats.date_range.end,
    )


def read_policy_pairs(folder: str | Path, kind: PolicyKind) -> PolicyPairs:
    """Read the pairs and examples that ``write_dataset`` wrote, as they were formed there.

    Raises:
        InputError: the folder holds no data set, one of another kind, or damaged pairs.
    """
    metadata = read_metadata(folder)
    if metadata.policy != kind.name:
        raise InputError(
            f"{folder}: expected a data set of the policy {kind.name}, got {metadata.policy!r}"
        )
    files = [Path(folder) / f"{kind.name}_dpo_{side}.jsonl" for side in ("train", "eval")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{folder}: no data set: missing {', '.join(missing)}")
    train, held_out = map(read_side, files)
    dataset = load_dataset(folder, kind)
    return PolicyPairs(
        kind=kind,
        demonstrations=demonstrate(dataset.train, kind),
        train=train,
        eval=held_out,
        situations=_situations(dataset.eval),
        dataset=to_json(metadata.stats),
        created_at=metadata.created_at,
    )


def demonstrate(examples: Iterable[Example[Any, Any]], kind: PolicyKind) -> list[PreferencePair]:
    """Return what a log shows to imitate: in each situation the action that it speaks for most.

    Every decision speaks for its action with exp(reward): advantage-weighted regression (Peng et
    al. 2019, eq. 9) with the reward as it is and a temperature of 1. So in a situation met often
    the usual action wins unless it is punished again and again; luck alone does not win.

    Returns:
        For each situation, in order of appearance, its prompt and as ``chosen`` this action,
        weighted by the mean of exp(reward) over its decisions. ``rejected`` is any other action:
        the loss ``sft``, for which these are, does not look at it.
    """
    votes: dict[str, dict[Any, list[float]]] = {}
    for example in examples:
        actions = votes.setdefault(kind.render_prompt(example.state), {})
        actions.setdefault(example.action, []).append(math.exp(example.reward))
    return [_demonstration(prompt, actions, kind) for prompt, actions in votes.items()]


def _demonstration(
    prompt: str, votes: Mapping[Any, Sequence[float]], kind: PolicyKind
) -> PreferencePair:
    action = max(votes, key=lambda action: sum(votes[action]))
    other = next(each for each in kind.actions() if each != action)
    return PreferencePair(
        prompt,
        kind.render_action(action),
        kind.render_action(other),
        weight=sum(votes[action]) / len(votes[action]),
    )


def _situations(examples: Iterable[Example[Any, Any]]) -> list[Any]:
    return list(dict.fromkeys(example.state for example in examples))


def read_side(path: Path) -> list[PreferencePair]:
    """Read the pairs of one side, of which there may be none.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    return list(read_pairs(path)) if not path.exists() or path.stat().st_size else []
