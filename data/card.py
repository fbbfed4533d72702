"""The data set card: what a reader of the folder must know before using it."""

from dpo.data.dataset import BuildOptions, Dataset, DatasetStats
from dpo.data.kinds.base import Action, State
from dpo.data.pairs import PairOptions, PairReport


def dataset_card(
    dataset: Dataset[State, Action], options: PairOptions, train: PairReport, evaluation: PairReport
) -> str:
    """Return the card as Markdown; its header lets ``datasets.load_dataset`` read the folder."""
    name, stats = dataset.kind.name, dataset.stats
    sides = {"train": train, "eval": evaluation}
    files = [
        f"      - split: {side}\n        path: {name}_dpo_{side}.jsonl"
        for side, report in sides.items()
        if report.unique
    ]
    rows = [
        ("examples", *(report.examples for report in sides.values())),
        ("contexts", *(report.contexts for report in sides.values())),
        ("pairs", *(report.unique for report in sides.values())),
        ("paired examples", *(report.paired_examples for report in sides.values())),
    ]
    table = "\n".join(f"| {label} | {first} | {second} |" for label, first, second in rows)
    return f"""---
configs:
  - config_name: default
    data_files:
{chr(10).join(files)}
tags:
  - preference
  - dpo
---

# Preference pairs for the {name} policy

{simulation_notice(stats)}Each line of `{name}_dpo_train.jsonl` and `{name}_dpo_eval.jsonl` is
an object with the texts `prompt`, `chosen` and `rejected`.

| | train | eval |
|---|---|---|
{table}

{data_facts(dataset.stats, dataset.options, options)}
- A chosen action is better than the rejected one, not necessarily good: the rewards of line n
  are in line n of `{name}_evidence_train.jsonl`.
"""


def simulation_notice(stats: DatasetStats) -> str:
    """Return a Markdown paragraph that says how much was simulated; nothing if nothing was."""
    if not stats.simulated_examples:
        return ""
    return (
        f"**{stats.simulated_examples} of {stats.total_examples} examples were simulated: "
        "nobody observed them.**\n\n"
    )


def data_facts(stats: DatasetStats, build: BuildOptions, options: PairOptions) -> str:
    """Return Markdown points: where the pairs come from, how they were split and formed."""
    split = stats.split
    return f"""\
- The pairs were formed from logged decisions between {stats.date_range.start} and
  {stats.date_range.end}.
- Split by {build.split_by} (seed {build.seed}): {split.train_units} and {split.eval_units} units.
- Of the evaluation examples {split.crossing_prompts} shared their prompt with training,
  {split.crossing_groups} their grouping key and {split.crossing_sessions} their session;
  {split.removed_examples} were removed for it (`remove_crossing`: {build.remove_crossing}).
- Two actions are compared under the same {options.match}; an action's reward is the mean over its
  decisions, and a pair's rewards differ by more than {options.margin} (strategy
  {options.strategy}, weight {options.weight})."""
