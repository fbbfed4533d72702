"""The data doctor: goes through files of preference pairs and reports what is odd about which row.

Shapes: N rows that can be trained on and have two answers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from dpo.data.doctor_checks import CHECKS, Check, Policy
from dpo.data.doctor_rows import FaultyRow, PairRow, raw_lines, read_rows
from dpo.data.texts import json_line
from dpo.errors import InputError
from dpo.files import atomic_directory, atomic_write
from dpo.pair_rows import check_columns
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.tokenizer import Tokenizer

TOKENIZED_AT_ONCE = 512
BIASED_SHARE = 0.6  # of rows whose longer answer is chosen; the other way round below 0.4
_EVAL_NAME = re.compile(r"(?:^|[_\-.])(?:eval|test|valid|validation|dev)(?:[_\-.]|$)")


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What is looked for and how.

    Attributes:
        policies: by check, what is done; checks left out keep their own policy.
        eval_files: files for evaluation, besides those whose name says so (eval, test, valid, dev).
        columns: field of a pair -> column that holds it, for rows with other names.
        model: path or Hub id of the model whose tokenizer is asked; None leaves its checks out.
        max_length: tokens of a prompt with its longer answer that training will take.

    Raises:
        InputError: an unknown check or policy, or an option that would be ignored.
    """

    policies: Mapping[str, str]
    eval_files: Sequence[Path] = ()
    columns: Mapping[str, str] | None = None
    model: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for check, policy in self.policies.items():
            if check not in CHECKS:
                raise InputError(f"there is no check {check!r}, only {', '.join(CHECKS)}")
            if policy not in get_args(Policy):
                allowed = ", ".join(get_args(Policy))
                raise InputError(f"policy of {check} must be one of {allowed}, got {policy!r}")
            if CHECKS[check].needs_model and self.model is None:
                raise InputError(f"the check {check} needs a model, to ask its tokenizer")
        check_columns(self.columns or {})
        if self.policies.get("length-bias") == "drop":
            raise InputError("length-bias is of all rows together, so none can be dropped for it")
        if self.max_length is not None and self.model is None:
            raise InputError("max_length counts tokens and so needs a model")

    def policy(self, check: str) -> str:
        """Return what is done about a check."""
        return self.policies.get(check, CHECKS[check].policy)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found; ``row`` counts the rows of the file from 0."""

    check: str
    file: str
    row: int
    place: str
    detail: str


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of both answers of all rows that can be trained on, (N,), in ``unit``."""

    unit: str
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]

    @property
    def mean_difference(self) -> float:
        """By how much chosen answers are longer on average."""
        return float((self.chosen - self.rejected).mean()) if len(self.chosen) else 0.0

    @property
    def longer_is_chosen(self) -> float:
        """Probability that the longer answer is the chosen one; ties count half."""
        if not len(self.chosen):
            return 0.5
        wins = (self.chosen > self.rejected) + 0.5 * (self.chosen == self.rejected)
        return float(wins.mean())

    @property
    def is_biased(self) -> bool:
        """Whether length alone tells the chosen answer, and by more than two standard errors."""
        distance = abs(self.longer_is_chosen - 0.5)
        return distance > max(BIASED_SHARE - 0.5, 1 / math.sqrt(max(len(self.chosen), 1)))

    def describe(self) -> str:
        """Return one sentence about both figures."""
        if not len(self.chosen):
            return "No row can be trained on as a pair, so there are no lengths to compare."
        longer = "longer" if self.mean_difference >= 0 else "shorter"
        return (
            f"Chosen answers are {abs(self.mean_difference):,.1f} {self.unit} {longer} on average; "
            f"the longer answer is chosen with probability {self.longer_is_chosen:.3f} "
            "(ties count half)."
        )


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What was found.

    Attributes:
        files: those looked at.
        rows: how many they hold.
        policies: of each check that ran, what is done about it.
        findings: in the order of the rows.
        lengths: of the answers.
    """

    files: Sequence[Path]
    rows: int
    policies: Mapping[str, str]
    findings: Sequence[Finding]
    lengths: Lengths

    def counts(self) -> dict[str, int]:
        """Return by check how many rows it found; length-bias counts as one."""
        found = Counter(finding.check for finding in self.findings)
        found["length-bias"] = int(self.lengths.is_biased)
        return {check: found[check] for check in self.policies}

    def failed(self) -> list[str]:
        """Return the checks with the policy "error" that found something."""
        return [
            name
            for name, count in self.counts().items()
            if count and self.policies[name] == "error"
        ]

    def dropped(self) -> frozenset[tuple[str, int]]:
        """Return file and row of what is to be dropped."""
        return frozenset(
            (each.file, each.row) for each in self.findings if self.policies[each.check] == "drop"
        )


def told_count(check: str, count: int) -> str:
    """Return the figure of a check for people: rows, or whether there is a length bias."""
    return ("yes" if count else "no") if check == "length-bias" else f"{count:,}"


def write_findings(report: DoctorReport, path: Path) -> None:
    """Write one JSON object a finding: check, policy, file, row (from 0), place, detail."""
    lines = (
        json_line({"policy": report.policies[finding.check], **asdict(finding)})
        for finding in report.findings
    )
    atomic_write(path, "".join(f"{line}\n" for line in lines))


def write_cleaned(report: DoctorReport, folder: Path) -> dict[Path, int]:
    """Write a copy of every file without the rows to be dropped, as JSON Lines.

    Lines of a JSON Lines file are copied as they are.

    Args:
        report: what was found.
        folder: is made; must not exist.

    Returns:
        The files written and how many rows each has left.

    Raises:
        InputError: the folder exists, or two files have one name.
    """
    dropped, left = report.dropped(), {}
    with atomic_directory(folder) as temporary:
        for path in report.files:
            name = f"{path.name.split('.')[0]}.jsonl"
            if (temporary / name).exists():
                raise InputError(f"{path}: another file is already cleaned to {name}")
            kept = (
                line for row, line in enumerate(raw_lines(path)) if (str(path), row) not in dropped
            )
            left[folder / name] = _write_lines(temporary / name, kept)
    return left


def _write_lines(path: Path, lines: Iterable[bytes]) -> int:
    with path.open("wb") as file:
        return sum(file.write(line + b"\n") > 0 for line in lines)


def examine(
    files: Sequence[Path], options: DoctorOptions | None = None, *, console: Console | None = None
) -> DoctorReport:
    """Look at every row of some files of pairs, training files before evaluation files.

    Memory: a few hundred bytes a row; texts are not kept. Progress is shown on ``console``.

    Raises:
        InputError: a file is absent, unreadable or given twice, no file has a row, or the tokenizer
            cannot be loaded.
    """
    options = options or DoctorOptions({})
    eval_files = _evaluation_files(files, options.eval_files)
    ordered = sorted([*files, *options.eval_files], key=lambda path: path in eval_files)
    if len(set(ordered)) < len(ordered):
        raise InputError(f"a file is named twice among {', '.join(map(str, ordered))}")
    examination = _Examination(eval_files, options)
    with (console or Console(quiet=True)).bar("check", unit="rows") as bar:
        for path in ordered:
            for row in bar.each(read_rows(path, options.columns or {})):
                examination.add(row)
    report = examination.report(ordered)
    if not report.rows:
        raise InputError(f"{', '.join(map(str, ordered))}: no rows; expected at least one pair")
    return report


def _evaluation_files(files: Sequence[Path], named: Sequence[Path]) -> frozenset[Path]:
    """Return the files for evaluation; where all names say so, none is taken at its word."""
    found = {path for path in files if _EVAL_NAME.search(path.name.split(".json")[0].lower())}
    return frozenset(named) | (found if len(found) < len(files) else frozenset())


class _Examination:
    """What has been found while going through the rows."""

    def __init__(self, eval_files: frozenset[Path], options: DoctorOptions) -> None:
        self._options = options
        self._tokenizer = _load_tokenizer(options.model)
        self._policies = {
            name: options.policy(name)
            for name, check in CHECKS.items()
            if options.policy(name) != "ignore" and self._can_run(name, check)
        }
        self._finders = {
            name: make(eval_files)
            for name in self._policies
            if (make := CHECKS[name].make) and not (name == "typed-token" and self._tokenizer)
        }
        self._rows = 0
        self._findings: list[Finding] = []
        self._lengths: list[tuple[int, int]] = []
        self._waiting: list[PairRow] = []

    def _can_run(self, name: str, check: Check) -> bool:
        if name == "too-long":
            return self._options.max_length is not None
        return self._tokenizer is not None or not check.needs_model

    def add(self, row: PairRow | FaultyRow) -> None:
        """Look at one row."""
        self._rows += 1
        if isinstance(row, FaultyRow):
            self._find(row.check, row, row.detail)
            return
        for name, find in self._finders.items():
            if detail := find(row):
                self._find(name, row, detail)
        if self._tokenizer is None:
            if not row.pair.is_unpaired:
                self._lengths.append((len(row.texts.chosen), len(row.texts.rejected)))
            return
        self._waiting.append(row)
        if len(self._waiting) == TOKENIZED_AT_ONCE:
            self._tokenize()

    def report(self, files: Sequence[Path]) -> DoctorReport:
        """Return what was found in all rows."""
        self._tokenize()
        order = {str(path): number for number, path in enumerate(files)}
        unit = "characters" if self._tokenizer is None else "tokens"
        chosen, rejected = np.array(self._lengths, dtype=np.int64).reshape(-1, 2).T
        return DoctorReport(
            files=files,
            rows=self._rows,
            policies=self._policies,
            findings=sorted(self._findings, key=lambda each: (order[each.file], each.row)),
            lengths=Lengths(unit, chosen, rejected),
        )

    def _find(self, check: str, row: PairRow | FaultyRow, detail: str) -> None:
        if check in self._policies:
            self._findings.append(Finding(check, str(row.path), row.number, row.place, detail))

    def _tokenize(self) -> None:
        """Look at the tokens of the rows that wait for it."""
        if not self._waiting or self._tokenizer is None:
            return
        from dpo.data.doctor_tokens import view_tokens

        pairs = [row.pair for row in self._waiting]
        view = view_tokens(pairs, self._tokenizer, self._options.max_length)
        for index, check, detail in view.findings:
            self._find(check, self._waiting[index], detail)
        self._lengths += view.answer_lengths
        self._waiting = []


def _load_tokenizer(model: str | None) -> "Tokenizer | None":
    """Load a tokenizer, if one is named; only then are its packages imported."""
    if model is None:
        return None
    from dpo.tokenizer import load_tokenizer

    return load_tokenizer(model)
