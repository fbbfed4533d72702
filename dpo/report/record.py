"""What the pages read of a run's folder; any of it may be missing, and what is damaged is left out.

``metrics.jsonl``
    an object per optimizer step and, under ``eval/``, per evaluation: ``dpo.metrics``
``config.toml``
    the options of the run
``data.json``
    the lengths of the data and what the run said about it: ``DataSide``
``eval_pairs.jsonl``
    the held-out pairs at the evaluation of the saved model: ``EvalPair``
``samples.jsonl``
    what the model wrote before and after, with ``train.samples``: ``Sample``
``summary.json``
    what was measured before and after the training, beside the run::

        {"reward accuracy": {"before": {"value": 0.5, "low": 0.45, "high": 0.55}, "after": {...}}}
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from dpo.errors import InputError
from dpo.files import OTHER_SHAPE, read_json
from dpo.settings import read_settings

METRICS, CONFIG, REPORT = "metrics.jsonl", "config.toml", "report.html"
DATA, EVAL_PAIRS, SAMPLES = "data.json", "eval_pairs.jsonl", "samples.jsonl"
SUMMARY = "summary.json"
PARTS = ("prompt", "chosen", "rejected")  # of a pair

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class DataSide:
    """The pairs to train on, or those held out.

    Attributes:
        pairs: how many.
        tokens: of all of them, a prompt and each of its answers counted once.
        edges: of the bins of lengths, in tokens.
        counts: of the texts in each bin, by part of a pair.
        lengths: by part of a pair: the least, the median, the 95 % quantile, the greatest.
    """

    pairs: int
    tokens: int
    edges: list[float]
    counts: dict[str, list[int]]
    lengths: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class EvalPair:
    """A held-out pair at an evaluation.

    Attributes:
        id: of the pair.
        step: of the evaluation.
        chosen_tokens: those that are scored.
        rejected_tokens: the same.
        margin: reward of the chosen answer less that of the rejected one.
        margin_before: the same at the first evaluation, if that is known.
    """

    id: str
    step: int
    chosen_tokens: int
    rejected_tokens: int
    margin: float
    margin_before: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt, the chosen answer to it, and what the model wrote."""

    id: str
    prompt: str
    chosen: str
    before: str
    after: str | None = None


@dataclass(slots=True)
class Ends:
    """First and last value of a metric."""

    first: float
    last: float


@dataclass(slots=True)
class History:
    """What a page needs of ``metrics.jsonl``: the series of some metrics, the ends of all.

    Attributes:
        names: the metrics whose series are kept, also of evaluations.
        series: by metric, its value at each step.
        ends: by metric.
        steps: the optimizer steps that are recorded.
        unreadable_lines: how many there were.
    """

    names: frozenset[str]
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    ends: dict[str, Ends] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    unreadable_lines: int = 0

    def add(self, record: Mapping[str, object]) -> None:
        """Take in one line; a step that was run again after a resume replaces the old one."""
        step = record.get("step")
        if not isinstance(step, int):
            self.unreadable_lines += 1
            return
        if "loss" in record:
            self.steps.add(step)
        for name, value in record.items():
            number = _number(value)
            if name == "step" or number is None:
                continue
            self.ends.setdefault(name, Ends(number, number)).last = number
            if name.removeprefix("eval/") in self.names:
                self.series.setdefault(name, {})[step] = number


@dataclass(frozen=True, slots=True)
class Record:
    """All that is read of a run."""

    folder: Path
    history: History
    config_text: str
    config: Mapping[str, object]
    train: DataSide | None
    held_out: DataSide | None
    told: tuple[str, ...]
    eval_pairs: tuple[EvalPair, ...]
    samples: tuple[Sample, ...]
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    def ends(self) -> dict[str, float]:
        """Return the finite held-out metrics, of those with a series, at the saved model.

        That is the last evaluation, or with ``train.keep_best`` the one of the lowest loss.
        """
        series = self.history.series
        losses = {step: loss for step, loss in series.get("eval/loss", {}).items() if step}
        is_best = self.config.get("train.keep_best") is True and bool(losses)
        step = min(losses, key=lambda step: losses[step]) if is_best else None
        found = {
            name.removeprefix("eval/"): values[max(values) if step is None else step]
            for name, values in series.items()
            if name.startswith("eval/") and (step is None or step in values)
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


def read_record(folder: Path, names: frozenset[str]) -> Record:
    """Read the folder of a run.

    Args:
        folder: of the run.
        names: the metrics whose series are wanted.

    Raises:
        OSError: a file cannot be read.
    """
    data = _read_object(folder / DATA)
    config_path = folder / CONFIG
    text = config_path.read_text("utf-8", errors="replace") if config_path.exists() else ""
    return Record(
        folder=folder,
        history=_read_history(folder / METRICS, names),
        config_text=text,
        config=_read_config(config_path),
        train=_side(data.get("train")),
        held_out=_side(data.get("held out")),
        told=_told(data.get("told")),
        eval_pairs=tuple(read_rows(folder / EVAL_PAIRS, eval_pair)),
        samples=tuple(read_rows(folder / SAMPLES, sample)),
        summary=_read_object(folder / SUMMARY),
    )


def check_run(folder: Path) -> None:
    """Refuse what is no folder of a run.

    Raises:
        InputError: neither a config nor metrics are there.
    """
    if not any((folder / name).is_file() for name in (METRICS, CONFIG)):
        raise InputError(
            f"{folder} is no folder of a run: neither {CONFIG} nor {METRICS} is there; name what "
            "was --out of dpo train"
        )


def read_rows(path: Path, make: Callable[[Mapping[str, Any]], Row]) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines that look as they should; none if there is no file."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield make(json.loads(line))
        except OTHER_SHAPE:
            continue


def eval_pair(row: Mapping[str, Any]) -> EvalPair:
    """Make a row of ``eval_pairs.jsonl`` of decoded JSON.

    Raises:
        ValueError: a margin is not finite.
    """
    pair = EvalPair(
        id=str(row["id"]),
        step=int(row["step"]),
        chosen_tokens=int(row["chosen_tokens"]),
        rejected_tokens=int(row["rejected_tokens"]),
        margin=float(row["margin"]),
        margin_before=None if row["margin_before"] is None else float(row["margin_before"]),
    )
    if not math.isfinite(pair.margin) or not math.isfinite(pair.margin_before or 0.0):
        raise ValueError("a margin is not finite")
    return pair


def sample(row: Mapping[str, Any]) -> Sample:
    """Make a row of ``samples.jsonl`` of decoded JSON."""
    texts = {name: str(row[name]) for name in ("id", "prompt", "chosen", "before")}
    return Sample(**texts, after=None if row["after"] is None else str(row["after"]))


def _read_history(path: Path, names: frozenset[str]) -> History:
    history = History(names)
    if not path.exists():
        return history
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # the last line of a run that was killed
                history.unreadable_lines += 1
                continue
            history.add(record if isinstance(record, dict) else {})
    return history


def _number(value: object) -> float | None:
    """Return a number, NaN for null, None for what is neither."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 2**1023 else math.nan


def _read_config(path: Path) -> dict[str, object]:
    """Return the options by key; none if the file is absent or no TOML."""
    try:
        return {setting.key: setting.value for setting in read_settings(path)}
    except InputError:
        return {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path) if path.exists() else {}
    except (InputError, *OTHER_SHAPE):
        return {}
    return found if isinstance(found, dict) else {}


def _side(found: Any) -> DataSide | None:
    try:
        edges = [float(edge) for edge in found["edges"]]
        counts = {part: [int(count) for count in found["counts"][part]] for part in PARTS}
        lengths = {part: [float(value) for value in found["lengths"][part]] for part in PARTS}
        is_rising = all(math.isfinite(b) and a < b for a, b in pairwise(edges))
        if not is_rising or any(len(each) != len(edges) - 1 for each in counts.values()):
            return None
        return DataSide(int(found["pairs"]), int(found["tokens"]), edges, counts, lengths)
    except OTHER_SHAPE:
        return None


def _told(found: Any) -> tuple[str, ...]:
    return tuple(map(str, found)) if isinstance(found, list) else ()
