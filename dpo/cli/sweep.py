"""``dpo sweep``."""

from typing import TYPE_CHECKING

import click

from dpo.cli.options import TRAIN_KEYS, config_flags, flag_name, layers_of
from dpo.progress import Console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpo.sweep import Outcome


@click.command
@config_flags(*TRAIN_KEYS)
@click.pass_context
def sweep(context: click.Context, /, *, print_config: bool, quiet: bool, **_flags: object) -> None:
    """Train every combination of some options, one run after another.

    The options are those of dpo train. Several values separated by commas, of an option that takes
    a number, a switch (--set train.tf32=true,false), one of a few words or the name of a loss, make
    a grid: --beta 0.05,0.1,0.3 --learning-rate 1e-6,5e-6 are six runs, each in a folder of --out
    that is named by its values. Tokens and reference log-probs are computed once for all of them.

    Called again, it leaves alone what is done and goes on with what is not. A run that fails is
    told, the others are done, and the exit code is 1. OUT/report.html lays all runs side by side.
    """
    from dpo.sweep import plan_sweep, report_of, run_sweep

    runs = plan_sweep(layers_of(context), name_of=flag_name)
    if print_config:
        for each in runs:
            click.echo(f"# {each.name}\n{each.config.to_toml()}")
        return
    outcomes = list(run_sweep(runs, console=Console(quiet=quiet)))
    for line in _table(outcomes):
        click.echo(line)
    click.echo(f"report  {report_of(runs)}")
    failed = [each.run.name for each in outcomes if each.state == "failed"]
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def _table(outcomes: "Sequence[Outcome]") -> list[str]:
    """Return a line of each run with its held-out ends, and one of the best."""
    from dpo.report import interval
    from dpo.report.several_runs import ENDS
    from dpo.sweep import best_of

    width = max(len("held out"), *(len(each.run.name) for each in outcomes))
    lines = [f"{'held out':<{width}}  " + "".join(f"{word:>10}" for word in ENDS.values())]
    for each in outcomes:
        cells = [f"{each.ends[name]:.4f}" if name in each.ends else "-" for name in ENDS]
        state = "" if each.state == "done" else f"  {each.state}"
        lines.append(f"{each.run.name:<{width}}  {''.join(f'{cell:>10}' for cell in cells)}{state}")
    if (best := best_of(outcomes)) is not None:
        name = "rewards/accuracy"
        shown = f"{best.ends[name]:.4f} {interval(best.ends, name)}"
        lines.append(f"best    {best.run.folder / 'model'}, of accuracy {shown}".rstrip())
    return lines
