"""``dpo convert-config``."""

from pathlib import Path

import click

from dpo.convert_config import PEERS


@click.command("convert-config")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--from", "peer", type=click.Choice(list(PEERS)), help="Whose it is  [default: by its options]."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="That it is meant for, each with its own batch.",
)
def convert_config(config: Path, peer: str | None, processes: int) -> None:
    """Translate a DPO configuration of TRL or LLaMA-Factory, YAML or JSON, to our TOML.

    The TOML goes to stdout, with what each value comes from; what could not be translated stands
    at its head with the reason, and on stderr.
    """
    from dpo.convert_config import convert_config as convert

    made = convert(config, peer, processes=processes)
    for note in made.notes:
        click.echo(f"not translated: {note}", err=True)
    click.echo(made.to_toml(), nl=False)
