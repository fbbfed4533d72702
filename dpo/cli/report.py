"""``dpo report``."""

from pathlib import Path

import click

from dpo.errors import InputError


@click.command
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The page; of one run, RUN/report.html unless this is given.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page about a run, or one that lays several runs side by side.

    RUNS are folders of dpo train, finished or not. The page of several (--out compare.html) has
    their curves in the same axes, what differs between their configs, where each ended, and
    held-out accuracy against KL to the reference.
    """
    from dpo.report import write_comparison, write_report
    from dpo.report.record import check_run

    for run in runs:
        check_run(run)
    if len(runs) == 1:
        click.echo(write_report(runs[0], out))
    elif out is None:
        raise InputError(f"--out is missing: name the page about {len(runs)} runs")
    else:
        click.echo(write_comparison(runs, out))
