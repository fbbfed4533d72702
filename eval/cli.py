"""The commands ``dpo eval`` and ``dpo compare``.

They read arguments, call the library and print; numpy and torch are imported when a command runs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import click

from dpo.errors import InputError
from dpo.files import JSON, atomic_write
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.eval.bootstrap import BootstrapOptions
    from dpo.eval.evaluation import EvaluationOptions
    from dpo.eval.examples import EvaluationExample
    from dpo.eval.policies import Policy

Command = TypeVar("Command", bound=Callable[..., Any])
EPILOG = (
    "A policy is rules, uniform, constant:CLASS or the folder of a trained policy, and needs "
    "--data: the examples that dpo data build writes. In place of policies, files of dpo score "
    "(.jsonl) can be given; then it is their preference pairs that are evaluated."
)


class Shared(TypedDict):
    """Options that both commands have."""

    data: Path | None
    confidence: float
    method: Any  # one of METHODS: click has checked it
    resamples: int
    seed: int
    independent: bool
    stratify: bool
    arms: Any  # one of ARMS
    as_json: bool
    html: Path | None
    quiet: bool


@dataclass(frozen=True, slots=True)
class Output:
    """What a command found, in every form it can be shown in."""

    text: str
    data: JSON
    page: str | None


def shared_options(command: Command) -> Command:
    """Add the options of ``Shared``."""
    options = [
        click.option("--data", type=click.Path(path_type=Path), help="Examples, one a line."),
        click.option(
            "--confidence", default=0.95, show_default=True, help="Coverage of the intervals."
        ),
        click.option(
            "--method",
            type=click.Choice(["percentile", "basic", "bca", "studentised"]),
            default="bca",
            show_default=True,
            help="How intervals are made.",
        ),
        click.option("--resamples", default=2000, show_default=True, help="Bootstrap resamples."),
        click.option("--seed", default=0, show_default=True, help="Seed of the resamples."),
        click.option(
            "--independent", is_flag=True, help="Draw single examples, not whole sessions."
        ),
        click.option(
            "--stratify", is_flag=True, help="Hold class sizes fixed; needs --independent."
        ),
        click.option(
            "--arms",
            type=click.Choice(["action", "class"]),
            default="action",
            show_default=True,
            help="What the estimate of a policy's reward tells apart.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
        click.option(
            "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page as well."
        ),
        click.option("--quiet", is_flag=True, help="Show no progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("eval", epilog=EPILOG)
@click.argument("policy")
@shared_options
def evaluate(policy: str, **shared: Unpack[Shared]) -> None:
    """Evaluate POLICY on logged decisions, or the rewards of a scored file on its pairs."""
    output = _evaluate_scores(policy, shared) if _is_scores(policy) else _evaluate(policy, shared)
    _show(output, shared)


@click.command("compare", epilog=EPILOG)
@click.argument("policies", nargs=-1, required=True)
@click.option(
    "--metric", help="What decides [default: avg_reward, of scored files reward_accuracy]."
)
@click.option(
    "--ab-split",
    type=float,
    help="Deal the sessions out, this share of them to the first of two policies.",
)
@shared_options
def compare(
    policies: tuple[str, ...],
    metric: str | None,
    ab_split: float | None,
    **shared: Unpack[Shared],
) -> None:
    """Compare two POLICIES on the same decisions, or rank several; or compare two scored files."""
    if len(policies) < 2:
        raise InputError(f"compare needs at least two policies, got {' '.join(policies)} alone")
    if all(map(_is_scores, policies)):
        if len(policies) > 2 or ab_split is not None:
            raise InputError("scored files are compared two at a time and without --ab-split")
        output = _compare_scores(policies, metric or "reward_accuracy", shared)
    elif ab_split is not None:
        if shared["html"] is not None:
            raise InputError("--html: there is no page for an A/B test; leave it out")
        output = _ab_test(policies, metric or "avg_reward", ab_split, shared)
    elif len(policies) == 2:
        output = _compare(policies, metric or "avg_reward", shared)
    else:
        output = _rank(policies, metric or "avg_reward", shared)
    _show(output, shared)


def _evaluate(name: str, shared: Shared) -> Output:
    from dpo.eval.evaluation import evaluate_policy
    from dpo.eval.report_html import evaluation_page
    from dpo.eval.report_json import evaluation_to_json
    from dpo.eval.report_text import format_evaluation_report

    task = _load((name,), shared)
    result = evaluate_policy(task.policies[0], task.examples, task.options)
    return Output(
        format_evaluation_report(result), evaluation_to_json(result), evaluation_page(result)
    )


def _compare(names: Sequence[str], metric: str, shared: Shared) -> Output:
    from dpo.eval.comparison import compare_policies
    from dpo.eval.report_html import comparison_page
    from dpo.eval.report_json import comparison_to_json
    from dpo.eval.report_text import format_comparison_report

    task = _load(names, shared)
    a, b = task.policies
    result = compare_policies(a, b, task.examples, task.options, metric=metric)
    return Output(
        format_comparison_report(result), comparison_to_json(result), comparison_page(result)
    )


def _rank(names: Sequence[str], metric: str, shared: Shared) -> Output:
    from dpo.eval.ranking import rank_policies
    from dpo.eval.report_html import ranking_page
    from dpo.eval.report_json import to_json
    from dpo.eval.report_text import format_ranking

    task = _load(names, shared)
    ranking = rank_policies(task.policies, task.examples, task.options, metric=metric)
    return Output(format_ranking(ranking), to_json(ranking), ranking_page(ranking))


def _ab_test(names: Sequence[str], metric: str, ratio: float, shared: Shared) -> Output:
    from dpo.eval.ranking import ab_test
    from dpo.eval.report_json import to_json
    from dpo.eval.report_text import format_ab_test_report

    if len(names) > 2:
        raise InputError(f"--ab-split takes two policies, got {len(names)}")
    task = _load(names, shared)
    a, b = task.policies
    test = ab_test(a, b, task.examples, task.options, metric=metric, split_ratio=ratio)
    return Output(format_ab_test_report(test, *names), to_json(test), page=None)


def _evaluate_scores(name: str, shared: Shared) -> Output:
    from dpo.eval.preference_pairs import evaluate_pairs, read_scores
    from dpo.eval.report_html import pair_page
    from dpo.eval.report_json import to_json
    from dpo.eval.report_text import format_pair_report

    options = _pair_options(shared)
    result = evaluate_pairs(read_scores(name), options)
    return Output(format_pair_report(result), to_json(result), pair_page(result))


def _compare_scores(names: Sequence[str], metric: str, shared: Shared) -> Output:
    from dpo.eval.preference_pairs import compare_pairs, read_scores
    from dpo.eval.report_html import pair_comparison_page
    from dpo.eval.report_json import to_json
    from dpo.eval.report_text import format_pair_comparison

    options = _pair_options(shared)
    a, b = map(read_scores, names)
    result = compare_pairs(a, b, options, metric=metric)
    return Output(
        format_pair_comparison(result, *names),
        to_json(result),
        pair_comparison_page(result, *names),
    )


@dataclass(frozen=True, slots=True)
class _Task:
    policies: "list[Policy]"
    examples: "list[EvaluationExample]"
    options: "EvaluationOptions"


def _load(names: Sequence[str], shared: Shared) -> _Task:
    """Read the examples and the policies; options are checked first, since models load slowly."""
    from dpo.eval.examples import read_examples
    from dpo.eval.policies import load_policy

    options = _options(shared)
    if shared["data"] is None:
        raise InputError(
            "--data is missing: the examples to evaluate on, as dpo data build writes them"
        )
    file = read_examples(shared["data"])
    console = Console(quiet=shared["quiet"])
    policies = [load_policy(name, file.kind, console=console) for name in names]
    return _Task(policies, file.examples, options)


def _options(shared: Shared) -> "EvaluationOptions":
    from dpo.eval.bootstrap import BootstrapOptions
    from dpo.eval.evaluation import EvaluationOptions

    return EvaluationOptions(
        bootstrap=BootstrapOptions(
            shared["confidence"], shared["method"], shared["resamples"], shared["seed"]
        ),
        by_session=not shared["independent"],
        stratify_by_class=shared["stratify"],
        arms=shared["arms"],
    )


def _pair_options(shared: Shared) -> "BootstrapOptions":
    """Return what scored pairs can use, and refuse what would be ignored."""
    ignored = {
        "--data": shared["data"] is not None,
        "--independent": shared["independent"],
        "--stratify": shared["stratify"],
        "--arms": shared["arms"] != "action",
    }
    given = [name for name, is_given in ignored.items() if is_given]
    if given:
        raise InputError(f"{', '.join(given)}: of no use with a scored file; leave it out")
    return _options(shared).bootstrap


def _is_scores(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz"))


def _show(output: Output, shared: Shared) -> None:
    if shared["html"] is not None:
        assert output.page is not None
        atomic_write(shared["html"], output.page)
    if shared["as_json"]:
        click.echo(json.dumps(output.data, ensure_ascii=False, indent=2))
    else:
        click.echo(output.text, nl=False)
