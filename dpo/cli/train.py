"""``dpo train``."""

import shlex
from typing import TYPE_CHECKING

import click

from dpo.cli.options import TRAIN_KEYS, config_flags, resolve_flags
from dpo.launch import Launch
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.run_loop import RunResult


@click.command
@config_flags(*TRAIN_KEYS)
@click.pass_context
def train(context: click.Context, /, *, print_config: bool, quiet: bool, **_flags: object) -> None:
    """Train a model on preference pairs.

    With --out RUN the model is written to RUN/model, the metrics of each step to RUN/metrics.jsonl
    and a page about the run to RUN/report.html.
    """
    resolved = resolve_flags(context)
    if print_config:
        click.echo(resolved.to_toml(), nl=False)
        return
    from dpo import run

    show_result(run.train(resolved.config, console=Console(quiet=quiet)))


def show_result(result: "RunResult") -> None:
    """Say what a run brought, how long it took, where things are and what may come next."""
    from dpo.model_card import headline
    from dpo.report import interval

    if Launch.of_environment().rank:
        return  # the first of several processes tells
    if result.first is not None and result.last is not None:
        click.echo(f"{'held out':<18}{'before':>10}{'after':>10}   95 % interval")
        for name, before, after in headline(result.first, result.last):
            low_high = interval(result.last, f"eval/{name}")
            click.echo(f"{name:<18}{before:>10.4f}{after:>10.4f}   {low_high}".rstrip())
    click.echo(f"steps   {result.steps:,}, in {duration(result.seconds)}")
    click.echo(f"memory  {result.peak_mib:,.0f} MiB at the peak")
    click.echo(f"model   {result.model}")
    click.echo(f"report  {result.report}")
    click.echo(f"next    dpo generate {shlex.quote(str(result.model))} --prompt ...")


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
