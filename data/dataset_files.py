"""A data set on disk: pairs to train on, what they rest on, and the examples to evaluate on.

For the policy ``extraction`` the folder holds, each file once for ``train`` and once for ``eval``::

    extraction_dpo_train.jsonl        {"prompt", "chosen", "rejected"}; "weight" if asked for
    extraction_evidence_train.jsonl   rewards, margin, grouping key and ids of the pair on that line
    extraction_examples_train.jsonl   {"state", "action", "reward", "metadata"} of every example
    extraction_unpaired_train.jsonl   {"prompt", "completion", "label", "reward", "id", "reason"}

and ``extraction_metadata.json``, ``README.md`` (the data set card) and ``manifest.json``. The same
data set and options give the same bytes: ``createdAt`` is the time of the latest example unless
another is given, never that of the clock.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.data.card import dataset_card
from dpo.data.dataset import BuildOptions, Dataset, DatasetStats
from dpo.data.examples import Examples, read_examples
from dpo.data.filters import parse_moment
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.base import Action, State
from dpo.data.kinds.schema import RecordSchema, to_json
from dpo.data.pairs import PairFormation, PairOptions, PairReport, UnpairedExample, form_pairs
from dpo.data.records import format_time
from dpo.data.texts import json_line
from dpo.errors import InputError
from dpo.files import (
    JSON,
    atomic_directory,
    check_replaceable,
    read_json,
    write_json,
    write_manifest,
)
from dpo.preferences import write_pairs

MIN_PAIRS = 100


@dataclass(frozen=True, slots=True)
class WrittenDataset:
    """Where a data set was written, and what became of the examples of each side."""

    folder: Path
    train: PairReport
    eval: PairReport


def write_dataset(
    dataset: Dataset[State, Action],
    folder: str | Path,
    *,
    pair_options: PairOptions | None = None,
    min_pairs: int = MIN_PAIRS,
    created_at: str | None = None,
    replace: bool = False,
) -> WrittenDataset:
    """Form the pairs of both sides and write everything, whole or not at all.

    Args:
        dataset: what a builder returned.
        folder: is made; must not exist unless ``replace``.
        pair_options: how pairs are formed.
        min_pairs: least number of different training pairs.
        created_at: goes into the metadata; None is the time of the latest example.
        replace: whether an existing data set is replaced.

    Raises:
        InputError: fewer than ``min_pairs`` different training pairs, or the folder exists, or it
            holds files that are not of a data set and would be lost.
    """
    check_writing(Path(folder), min_pairs=min_pairs, created_at=created_at, replace=replace)
    options = pair_options or PairOptions()
    created = format_time(parse_moment("created_at", created_at or dataset.stats.date_range.end))
    name = dataset.kind.name
    train = form_pairs(dataset.train, dataset.kind, options)
    check_enough_pairs(train.report, min_pairs)
    evaluation = form_pairs(dataset.eval, dataset.kind, options)
    with atomic_directory(Path(folder), replace=replace) as temporary:
        _write_side(temporary, name, "train", dataset.train, train)
        _write_side(temporary, name, "eval", dataset.eval, evaluation)
        metadata: dict[str, JSON] = {
            "policy": name,
            "config": to_json(dataset.options),
            "pairConfig": {**to_json(options), "minPairs": min_pairs},
            "dataset": to_json(dataset.stats),
            "trainPairs": len(train.pairs),
            "evalPairs": len(evaluation.pairs),
            "pairReports": {"train": to_json(train.report), "eval": to_json(evaluation.report)},
            "createdAt": created,
        }
        write_json(temporary / f"{name}_metadata.json", metadata)
        (temporary / "README.md").write_text(
            dataset_card(dataset, options, train.report, evaluation.report), encoding="utf-8"
        )
        write_manifest(temporary)
    return WrittenDataset(Path(folder), train.report, evaluation.report)


def check_writing(folder: Path, *, min_pairs: int, created_at: str | None, replace: bool) -> None:
    """Refuse what `write_dataset` would refuse, before any work is done for it.

    Raises:
        InputError: ``min_pairs`` is below 1, ``created_at`` is no time, or the folder is not free.
    """
    if min_pairs < 1:
        raise InputError(f"min_pairs must be at least 1, got {min_pairs}")
    if created_at is not None:
        parse_moment("created_at", created_at)
    check_replaceable(folder, replace=replace)


def check_enough_pairs(report: PairReport, min_pairs: int) -> None:
    """Refuse a training side with fewer than ``min_pairs`` different pairs.

    Raises:
        InputError: gives both counts, and why decisions are in no pair.
    """
    if report.unique < min_pairs:
        unpaired = report.unpaired_examples
        raise InputError(
            f"Insufficient training pairs: {report.formed} formed, {report.unique} of them unique "
            f"(minimum {min_pairs} required). Of {report.examples} decisions in {report.contexts} "
            f"contexts, {unpaired.one_action} stand where only one action was tried and "
            f"{unpaired.within_margin} differ by no more than the margin. More decisions, "
            "match 'group', strategy 'all', a smaller margin or a lower --min-pairs would help"
        )


@dataclass(frozen=True, slots=True)
class DatasetMetadata:
    """What ``<policy>_metadata.json`` says of the data set beside it."""

    policy: str
    stats: DatasetStats
    options: BuildOptions
    pair_options: PairOptions
    created_at: str


def read_metadata(folder: str | Path) -> DatasetMetadata:
    """Read what was written of a data set, of whichever kind.

    Raises:
        InputError: the folder holds no data set, or more than one, or its metadata are damaged.
    """
    path = find_metadata(folder)
    content = read_json(path)
    policy = content.get("policy") if isinstance(content, Mapping) else None
    if not isinstance(policy, str) or policy != path.name.removesuffix("_metadata.json"):
        raise InputError(f"{path}: expected an object with the policy of its name, got {policy!r}")
    pair_config = content.get("pairConfig")
    if isinstance(pair_config, Mapping):
        pair_config = {name: pair_config[name] for name in pair_config if name != "minPairs"}
    return DatasetMetadata(
        policy,
        RecordSchema(DatasetStats).parse(content.get("dataset"), f"{path}: dataset"),
        RecordSchema(BuildOptions).parse(content.get("config"), f"{path}: config"),
        RecordSchema(PairOptions).parse(pair_config, f"{path}: pairConfig"),
        str(content.get("createdAt")),
    )


def load_dataset(folder: str | Path, kind: PolicyKind | None = None) -> Dataset[Any, Any]:
    """Read back the data set that `write_dataset` wrote.

    Args:
        folder: where it was written.
        kind: of its policy; needed for a kind that is not in ``KINDS``.

    Raises:
        InputError: the folder holds no data set, one of another kind, or a damaged one.
    """
    metadata = read_metadata(folder)
    kinds = KINDS if kind is None else {kind.name: kind}
    if metadata.policy not in kinds:
        raise InputError(
            f"{folder} is a data set of {metadata.policy!r}, not of {', '.join(kinds)}; in Python, "
            "give a policy kind of your own as kind"
        )
    kind = kinds[metadata.policy]
    train, evaluation = (
        read_examples(Path(folder) / f"{kind.name}_examples_{side}.jsonl", kind)
        for side in ("train", "eval")
    )
    return Dataset(kind, train, evaluation, metadata.stats, metadata.options)


def find_metadata(folder: str | Path) -> Path:
    """Return the metadata file of a data set.

    Raises:
        InputError: there is none, or more than one.
    """
    found = sorted(Path(folder).glob("*_metadata.json"))
    if len(found) != 1:
        raise InputError(
            f"{folder}: expected a data set with one <policy>_metadata.json, found {len(found)}"
        )
    return found[0]


def _write_side(
    folder: Path,
    policy: str,
    side: str,
    examples: Examples[State, Action],
    formation: PairFormation,
) -> None:
    """Write the four files of one side."""
    write_pairs(formation.pairs, folder / f"{policy}_dpo_{side}.jsonl")
    evidence = (json_line(to_json(each)) for each in formation.evidence)
    _write_lines(folder / f"{policy}_evidence_{side}.jsonl", evidence)
    lines = (examples.line(row) for row in range(len(examples)))
    _write_lines(folder / f"{policy}_examples_{side}.jsonl", lines)
    unpaired = (_unpaired_line(each) for each in formation.unpaired if each.label is not None)
    _write_lines(folder / f"{policy}_unpaired_{side}.jsonl", unpaired)


def _unpaired_line(example: UnpairedExample) -> str:
    """Return a row for the losses that need no pairs."""
    return json_line(
        {
            "prompt": example.prompt,
            "completion": example.completion,
            "label": example.label,
            "reward": example.reward,
            "id": example.id,
            "reason": example.reason,
        }
    )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
