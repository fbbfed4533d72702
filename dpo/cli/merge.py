"""``dpo merge``."""

from pathlib import Path
from typing import get_args

import click

from dpo.adapter_config import Quantization


@click.command
@click.option("--adapter", required=True, help="Adapter: a folder, or an id of the Hub.")
@click.option("--model", help="Base of the adapter [default: the one that it names].")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the model, to be made."
)
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantization)),
    help="What the base was held in while the adapter was trained: merges exactly what was trained "
    "[default: merge onto the base as it is].",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Numbers on disk; bfloat16 rounds small updates away.",
)
def merge(adapter: str, model: str | None, out: Path, quantize: str | None, dtype: str) -> None:
    """Write the plain model that an adapter makes of its base.

    The folder has the layout of a model on the Hub, with the adapter's tokenizer: for programs that
    read no adapters.
    """
    from dpo.merge import merge_folders
    from dpo.precision import PRECISIONS

    numbers = PRECISIONS[dtype].parameters
    merge_folders(adapter, out, base=model, quantize=quantize, dtype=numbers)
    click.echo(out)
