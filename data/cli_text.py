"""What the commands ``dpo data ...`` print: plain text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.data.dataset import Dataset
    from dpo.data.dataset_files import WrittenDataset
    from dpo.data.doctor import DoctorReport
    from dpo.data.export import ExportReport
    from dpo.data.pairs import PairReport


def dataset_text(dataset: Dataset[Any, Any], written: WrittenDataset) -> str:
    """Return what was read, split, paired and written."""
    from dpo.data.dataset import crossing_note

    stats, split = dataset.stats, dataset.stats.split
    note = crossing_note(stats, dataset.options)
    units = _UNITS[dataset.options.split_by]
    dates = stats.date_range
    lines = [
        *_simulated(stats.simulated_examples, stats.total_examples),
        "Decisions",
        *_filters(asdict(stats.filters)),
        "",
        f"Examples, {dates.start[:10]} to {dates.end[:10]}",
        f"  {stats.train_examples:>10,}  for training, in {split.train_units:,} {units}",
        f"  {stats.eval_examples:>10,}  for evaluation, of {split.eval_units:,} {units}; of these",
        f"  {split.crossing_prompts:>10,}  shared their prompt with training,",
        f"  {split.crossing_groups:>10,}  their grouping key,",
        f"  {split.crossing_sessions:>10,}  their session;",
        f"  {split.removed_examples:>10,}  were removed for prompt or grouping key",
        *(["", f"Note: {note}"] if note else []),
        "",
        *_pairs({"train": written.train, "eval": written.eval}),
        "",
        f"Written to {written.folder}",
    ]
    return "\n".join(lines)


_UNITS = {"session": "sessions", "group": "grouping keys", "time": "different times"}


def _simulated(simulated: int, total: int) -> list[str]:
    """Say first of all that data is simulated."""
    if not simulated:
        return []
    return [f"SIMULATION: {simulated:,} of {total:,} examples were simulated, not observed.", ""]


def _filters(left: Mapping[str, int]) -> Iterator[str]:
    """Yield the first count and each that a filter made smaller."""
    before = left["policy"]
    yield f"  {before:>10,}  of this policy in the store"
    for name, count in left.items():
        if count != before:
            yield f"  {count:>10,}  left by {name} ({before - count:,} fewer)"
        before = count


def _pairs(sides: Mapping[str, PairReport]) -> Iterator[str]:
    unpaired = [side.unpaired_examples for side in sides.values()]
    yield f"{'Pairs':<34}" + "".join(f"{side:>12}" for side in sides)
    for label, numbers in (
        ("contexts", [side.contexts for side in sides.values()]),
        ("pairs formed", [side.formed for side in sides.values()]),
        ("dropped as duplicates", [side.duplicates for side in sides.values()]),
        ("dropped as contradictions", [side.contradictions for side in sides.values()]),
        ("unique pairs", [side.unique for side in sides.values()]),
        ("with an unlisted action", [side.beyond_actions for side in sides.values()]),
        ("examples in pairs", [side.paired_examples for side in sides.values()]),
        ("unpaired: one action only", [each.one_action for each in unpaired]),
        ("unpaired: within the margin", [each.within_margin for each in unpaired]),
        ("unpaired: others were chosen", [each.not_selected for each in unpaired]),
        ("unpaired: their pair was dropped", [each.dropped for each in unpaired]),
        ("unpaired: reward 0, in no file", [side.unlabelled_examples for side in sides.values()]),
    ):
        yield f"  {label:<32}" + "".join(f"{number:>12,}" for number in numbers)


def export_text(report: ExportReport) -> str:
    """Return which files were written, and what the format could not hold."""
    width = max(map(len, report.file_bytes))
    files = [f"  {name:<{width}} {size:>12,} bytes" for name, size in report.file_bytes.items()]
    return "\n".join([*report.notes, f"Written to {report.folder}", *files])


def doctor_text(report: DoctorReport) -> str:
    """Return the table of checks and what lengths tell."""
    from dpo.data.doctor import told_count
    from dpo.data.doctor_checks import CHECKS

    first = {finding.check: finding for finding in reversed(report.findings)}
    width = max(len(check) for check in report.policies)
    lines = [
        f"{report.rows:,} rows in {', '.join(map(str, report.files))}",
        "",
        f"{'check':<{width}} {'rows':>8}  policy",
    ]
    for check, count in report.counts().items():
        policy = report.policies[check]
        lines.append(
            f"{check:<{width}} {told_count(check, count):>8}  {policy:<6}  {CHECKS[check].summary}"
        )
        if check in first:
            lines.append(f"{'':{width}} first at {first[check].place}: {first[check].detail}")
    if report.counts().get("unreadable") == report.rows:
        lines += ["", "Columns with other names are read by --columns prompt=...,chosen=..."]
    return "\n".join([*lines, "", report.lengths.describe()])


def cleaned_text(rows_left: Mapping[Path, int]) -> str:
    """Return how many rows the cleaned files have."""
    return "\n".join(f"{rows:,} rows left in {path}" for path, rows in rows_left.items())
