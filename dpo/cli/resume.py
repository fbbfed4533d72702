"""``dpo resume``."""

from pathlib import Path

import click

from dpo.cli.options import config_flags, resolve_flags
from dpo.cli.train import show_result
from dpo.progress import Console
from dpo.settings import Setting, settings_of_run


@click.command
@click.argument("run", type=click.Path(path_type=Path))
@config_flags("loss.name", "train.")
@click.pass_context
def resume(
    context: click.Context, /, *, run: Path, print_config: bool, quiet: bool, **_flags: object
) -> None:
    """Go on with a run that was stopped or killed, or further than it was to go.

    RUN is the folder of a run; its config.toml says what it is, and options given here override
    that. One that would change what has been trained is refused with both values; --epochs or
    --steps reach further where the learning rates of the steps done do not depend on the end. A
    loss of your own is to be named again (--loss), for a file cannot name code to run.
    """
    newest = Setting("train.resume", "auto", "dpo resume")
    resolved = resolve_flags(context, below=[*settings_of_run(run), newest])
    if print_config:
        click.echo(resolved.to_toml(), nl=False)
        return
    from dpo import run as runs

    show_result(runs.train(resolved.config, console=Console(quiet=quiet)))
