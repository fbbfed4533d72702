"""``dpo push``."""

from pathlib import Path

import click


@click.command
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("hub_id")
@click.option("--private", "is_private", is_flag=True, help="Make it for its owner alone.")
@click.option("--revision", help="Branch, made if it is not there  [default: the main one].")
def push(source: Path, hub_id: str, is_private: bool, revision: str | None) -> None:
    """Push the model of a run to the Hugging Face Hub, with its card.

    SOURCE is the folder of a run, a model or an adapter; HUB_ID is OWNER/NAME, which is made if it
    is not there. All files are one commit. The token is HF_TOKEN, or what hf auth login has stored.
    """
    from dpo.hub import Destination
    from dpo.push import push as push_model

    click.echo(push_model(source, Destination(hub_id, is_private, revision)))
