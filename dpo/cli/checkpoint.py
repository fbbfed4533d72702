"""``dpo checkpoint``."""

from pathlib import Path

import click

from dpo.errors import RunError

_RUN = click.argument("run", type=click.Path(path_type=Path))


@click.group
def checkpoint() -> None:
    """List and verify the checkpoints of a run, or make a model of one.

    RUN is the folder of the run.
    """


@checkpoint.command("list")
@_RUN
def list_checkpoints(run: Path) -> None:
    """List the checkpoints with their size and what they know of the run."""
    from dpo.run_folder import describe_checkpoint, run_checkpoints

    for path in run_checkpoints(run):
        click.echo(describe_checkpoint(path))


@checkpoint.command
@_RUN
def verify(run: Path) -> None:
    """Compare every byte of every checkpoint with its hash.

    Exit code 1 if one is damaged.
    """
    from dpo.files import verify_manifest
    from dpo.run_folder import run_checkpoints

    damaged = 0
    for path in run_checkpoints(run):
        faults = verify_manifest(path)
        damaged += bool(faults)
        click.echo("\n  ".join([f"{path.name}  {'damaged' if faults else 'sound'}", *faults]))
    if damaged:
        raise RunError(f"{run}: {damaged} checkpoints are damaged: dpo resume passes them over")


@checkpoint.command
@_RUN
@click.option(
    "--step", type=click.IntRange(0), help="Of the checkpoint.  [default: the newest sound one]"
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the model, to be made."
)
@click.option("--loss", help="Of a run with a loss of your own: its name again, to import it.")
def export(run: Path, step: int | None, out: Path, loss: str | None) -> None:
    """Write the model of a checkpoint, as the run writes its own at its end.

    Its data is not read; the model that it began with is.
    """
    from dpo.settings import Setting, resolve, settings_of_run
    from dpo.trained_model import export_checkpoint

    given = [] if loss is None else [Setting("loss.name", loss, "--loss", is_text=True)]
    config = resolve(settings_of_run(run), given).config
    exported = export_checkpoint(config, out, step=step)
    click.echo(f"step    {exported}\nmodel   {out}")
