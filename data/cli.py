"""The commands ``dpo data ...``.

They read arguments, call the library and print; what they call is imported when they run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpo.data import cli_text as text
from dpo.data.kinds import KINDS
from dpo.errors import InputError
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.data.stores import FeedbackStore

SOURCE_HELP = "A file (.jsonl, .jsonl.gz, .db, .sqlite) or a postgresql:// URL."


_quiet = click.option("--quiet", is_flag=True, help="Show no progress.")


@click.group
def cli() -> None:
    """From an agent's feedback log to preference pairs."""


# --- build ---------------------------------------------------------------------------------------


@cli.command
@click.argument("policy", type=click.Choice(list(KINDS)))
@click.option("--feedback", required=True, help=f"The feedback store. {SOURCE_HELP}")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--start-date", help="First day or moment taken.")
@click.option("--end-date", help="Last day or moment taken; a day is taken whole.")
@click.option("--session", "sessions", multiple=True, help="Only this session; may be repeated.")
@click.option("--entry-type", "entry_types", multiple=True, help="Only decisions naming it.")
@click.option("--scope-type", "scope_types", multiple=True, help="Only decisions in this scope.")
@click.option("--outcome-type", "outcome_types", multiple=True, help="Only tasks that ended so.")
@click.option("--min-confidence", type=float, help="Least confidence of a decision.")
@click.option(
    "--missing-confidence",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="What --min-confidence does with decisions that have none.",
)
@click.option("--max-examples", type=int, help="Draw at most so many, evenly.")
@click.option("--eval-split", default=0.2, show_default=True, help="Share for evaluation.")
@click.option(
    "--split-by",
    type=click.Choice(["session", "group", "time"]),
    default="session",
    show_default=True,
    help="What lies whole on one side.",
)
@click.option(
    "--remove-crossing",
    type=click.Choice(["both", "prompt", "none"]),
    default="both",
    show_default=True,
    help="Evaluation examples removed because training has the same prompt or grouping key.",
)
@click.option("--seed", default=0, show_default=True, help="Of the split and of --max-examples.")
@click.option(
    "--match",
    type=click.Choice(["prompt", "group"]),
    default="prompt",
    show_default=True,
    help="What makes decisions comparable.",
)
@click.option("--margin", default=0.1, show_default=True, help="Least difference in reward.")
@click.option(
    "--strategy",
    type=click.Choice(["best-worst", "all", "adjacent"]),
    default="best-worst",
    show_default=True,
    help="Which pairs of a context.",
)
@click.option("--max-pairs-per-context", type=int, help="Bound for all and adjacent.")
@click.option(
    "--weight",
    type=click.Choice(["none", "margin", "confidence", "margin-confidence"]),
    default="none",
    show_default=True,
    help="Weight of a pair in training.",
)
@click.option("--min-pairs", default=100, show_default=True, help="Least unique training pairs.")
@click.option("--created-at", help="For the metadata  [default: time of the latest example]")
@click.option("--replace", is_flag=True, help="Replace the folder if it exists.")
@_quiet
def build(
    policy: str,
    feedback: str,
    out: Path,
    match: Any,
    margin: float,
    strategy: str,
    max_pairs_per_context: int | None,
    weight: Any,
    min_pairs: int,
    created_at: str | None,
    replace: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Build the data set of POLICY: examples, a split without leakage, and preference pairs."""
    from dpo.data.builder import build_dataset
    from dpo.data.dataset import BuildOptions
    from dpo.data.dataset_files import check_writing, write_dataset
    from dpo.data.pairs import PairOptions
    from dpo.data.stores import open_store

    check_writing(out, min_pairs=min_pairs, created_at=created_at, replace=replace)
    build_options = BuildOptions(**{name: _given(value) for name, value in options.items()})
    pair_options = PairOptions(
        match=match,
        margin=margin,
        strategy=strategy,
        max_pairs_per_context=max_pairs_per_context,
        weight=weight,
    )
    with open_store(feedback) as store:
        try:
            console = Console(quiet=quiet)
            dataset = build_dataset(store, KINDS[policy], build_options, console=console)
        finally:
            _warn(store)
    written = write_dataset(
        dataset,
        out,
        pair_options=pair_options,
        min_pairs=min_pairs,
        created_at=created_at,
        replace=replace,
    )
    click.echo(text.dataset_text(dataset, written))


def _given(value: Any) -> Any:
    """Return an option's value; one that may be repeated and was not given is None."""
    return None if value == () else value


# --- export, check -------------------------------------------------------------------------------


@cli.command
@click.argument("source")
@click.option(
    "--format",
    "format_name",
    required=True,
    help="huggingface, openai, chat, prompt-completion, csv, parquet or jsonl.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--columns", help="Other names of the columns: prompt=question,chosen=good,...")
@click.option("--replace", is_flag=True, help="Replace the folder if it exists.")
@_quiet
def export(
    source: str, format_name: str, out: Path, columns: str | None, replace: bool, quiet: bool
) -> None:
    """Write the pairs of SOURCE in another format.

    SOURCE is a folder of dpo data build or a file of pairs.
    """
    from dpo.data.export import export_pairs

    report = export_pairs(
        source,
        out,
        format_name=format_name,
        columns=_columns(columns),
        replace_folder=replace,
        console=Console(quiet=quiet),
    )
    click.echo(text.export_text(report))


@cli.command
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--eval",
    "eval_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file for evaluation, for the check leak; a name with eval, test or valid is enough.",
)
@click.option("--columns", help="Other names of the columns: prompt=question,chosen=good,...")
@click.option("--model", help="Model whose tokenizer is asked: a folder or a Hub id.")
@click.option("--max-length", type=int, help="Tokens that training will take; needs --model.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="CHECK=ignore|warn|drop|error; all=... sets every check. May be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the findings, one a line.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with histograms.")
@click.option(
    "--clean",
    type=click.Path(path_type=Path),
    help="Folder to make: the files without dropped rows.",
)
@_quiet
def check(
    files: tuple[Path, ...],
    eval_files: tuple[Path, ...],
    columns: str | None,
    model: str | None,
    max_length: int | None,
    policies: tuple[str, ...],
    out: Path | None,
    html: Path | None,
    clean: Path | None,
    quiet: bool,
) -> None:
    """Say what is odd about FILES of preference pairs, and which rows.

    Exit code 2 if a check with the policy error finds something.
    """
    from dpo.data.doctor import DoctorOptions, examine, write_cleaned, write_findings
    from dpo.data.doctor_page import doctor_page
    from dpo.files import atomic_write

    options = DoctorOptions(
        _policies(policies, model), eval_files, _columns(columns), model, max_length
    )
    if (clean is None) == ("drop" in options.policies.values()):
        raise InputError("--clean and a --policy CHECK=drop need each other")
    report = examine(files, options, console=Console(quiet=quiet))
    if out is not None:
        write_findings(report, out)
    if html is not None:
        atomic_write(html, doctor_page(report))
    click.echo(text.doctor_text(report))
    if failed := report.failed():
        drops = " ".join(f"--policy {check}=drop" for check in failed)
        raise InputError(
            f"rows that training would refuse or that are errors: {', '.join(failed)}; "
            f"{drops} --clean FOLDER writes the file without them"
        )
    if clean is not None:
        click.echo(text.cleaned_text(write_cleaned(report, clean)))


def _policies(arguments: Sequence[str], model: str | None) -> dict[str, str]:
    """Read CHECK=POLICY arguments; a later one wins over an earlier one."""
    from dpo.data.doctor_checks import CHECKS

    policies: dict[str, str] = {}
    for argument in arguments:
        name, policy = _equation("--policy", argument)
        if name != "all":
            policies[name] = policy
            continue
        for check in CHECKS:
            is_possible = model is not None or not CHECKS[check].needs_model
            if is_possible and (check, policy) != ("length-bias", "drop"):
                policies[check] = policy
    return policies


def _columns(argument: str | None) -> dict[str, str]:
    """Read ``prompt=question,chosen=good``."""
    return dict(_equation("--columns", each) for each in argument.split(",")) if argument else {}


def _equation(option: str, argument: str) -> tuple[str, str]:
    """Split ``name=value``."""
    name, sign, value = argument.partition("=")
    if not (name and sign and value):
        raise InputError(f"{option} expects NAME=VALUE, got {argument!r}")
    return name, value


# --- feedback stores -----------------------------------------------------------------------------


@cli.command
@click.argument("feedback")
@click.option("--policy", type=click.Choice(list(KINDS)), help="Only this policy.")
@click.option("--start-date", help="First day or moment counted.")
@click.option("--end-date", help="Last day or moment counted; a day is counted whole.")
def stats(feedback: str, policy: str | None, start_date: str | None, end_date: str | None) -> None:
    """Say what the store FEEDBACK holds."""
    from dpo.data.filters import DecisionFilter
    from dpo.data.stats import feedback_stats
    from dpo.data.stores import open_store

    wanted = DecisionFilter(policy=policy, start=start_date, end=end_date)
    with open_store(feedback) as store:
        found = feedback_stats(store.decisions(wanted))
        _warn(store)
    click.echo("\n".join(line for each in found for line in each.lines()) or "No decisions.")


@cli.command("import")
@click.argument("database", type=click.Path(path_type=Path))
@click.option("--out", required=True, help=f"The feedback store to add to. {SOURCE_HELP}")
def import_(database: Path, out: str) -> None:
    """Copy the decisions of an agent-memory DATABASE (SQLite) into a feedback store."""
    from dpo.data.import_original import check_original, import_original
    from dpo.data.stores import open_store

    check_original(database)
    with open_store(out, create=True) as store:
        report = import_original(database, store)
    click.echo("\n".join(report.lines()))


def _warn(store: "FeedbackStore") -> None:
    """Say on stderr what the user should know about a store."""
    for warning in store.warnings:
        click.echo(f"Note: {warning}", err=True)


# --- simulate ------------------------------------------------------------------------------------


@cli.command
@click.argument("policy", type=click.Choice(list(KINDS)))
@click.option("--out", required=True, help=f"The feedback store to add to. {SOURCE_HELP}")
@click.option("--decisions", default=10_000, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--situations", default=300, show_default=True, help="Size of the pool of states.")
@click.option(
    "--exploration", default=0.5, show_default=True, help="Share of actions drawn at random."
)
@click.option("--drift", default=1.0, show_default=True, help="How far frequencies change.")
@_quiet
def simulate(
    policy: str,
    out: str,
    decisions: int,
    seed: int,
    situations: int,
    exploration: float,
    drift: float,
    quiet: bool,
) -> None:
    """Write the decisions of a SIMULATED agent of POLICY, whose right answers are known."""
    from dpo.data import simulate as simulator
    from dpo.data.stores import open_store

    drawn = simulator.simulate(
        policy, decisions, seed, situations=situations, exploration=exploration, drift=drift
    )
    bar = Console(quiet=quiet).bar("simulate", decisions, unit="decisions")
    with open_store(out, create=True) as store, bar as counted:
        recorded = store.record_decisions(counted.each(drawn))
    click.echo(
        f"SIMULATION: {recorded:,} decisions of {policy} written to {out}; none was observed."
    )
