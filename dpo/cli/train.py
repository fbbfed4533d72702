"""``dpo train``."""

from typing import TYPE_CHECKING

import click

from dpo.cli.options import TRAIN_KEYS, config_flags, resolve_flags
from dpo.launch import Launch
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.run import RunResult


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
    """Say what a run brought and where it is."""
    from dpo.model_card import headline

    if Launch.of_environment().rank:
        return  # the first of several processes tells
    if result.first is not None and result.last is not None:
        click.echo(f"{'held out':<18}{'before':>10}{'after':>10}")
        for name, before, after in headline(result.first, result.last):
            click.echo(f"{name:<18}{before:>10.4f}{after:>10.4f}")
    click.echo(f"model   {result.model}")
    click.echo(f"report  {result.report}")
