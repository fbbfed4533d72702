"""``dpo weigh``."""

import click

from dpo.cli.options import config_flags, resolve_flags
from dpo.progress import Console


@click.command
@config_flags(
    "model", "revision", "data", "data_split", "data_revision", "columns", "answer_turns",
    "on_bad_row", "out", "tokenize.", "train.tokens_per_micro_batch", "train.dtype",
    "train.device", "train.threads", "adapter.base", "adapter.quantize",
)  # fmt: skip
@click.option("--min-ratio", default=0.5, show_default=True, help="Least factor on a weight, >= 0.")
@click.option(
    "--max-ratio", default=10.0, show_default=True, help="Largest factor, >= --min-ratio."
)
@click.pass_context
def weigh(
    context: click.Context,
    /,
    *,
    min_ratio: float,
    max_ratio: float,
    print_config: bool,
    quiet: bool,
    **_flags: object,
) -> None:
    """Weigh bad answers by how much likelier their prompts are among the good ones.

    For unpaired answers: writes the rows of --data to --out (.jsonl) with the density ratios of
    BCO's paper in their weights, which training then reads. Features of a prompt are the mean
    hidden states of --model.
    """
    resolved = resolve_flags(context)
    if print_config:
        click.echo(resolved.to_toml(), nl=False)
        return
    from dpo.density_ratio import weigh_file

    console = Console(quiet=quiet)
    click.echo(
        weigh_file(resolved.config, min_ratio=min_ratio, max_ratio=max_ratio, console=console)
    )
