"""``dpo score``."""

import click

from dpo.cli.options import config_flags, resolve_flags
from dpo.progress import Console


@click.command
@config_flags(
    "model", "revision", "reference", "reference_revision", "reference_cache.",
    "data", "data_split", "data_revision", "columns", "ranked", "answer_turns", "on_bad_row", "out",
    "tokenize.", "loss.", "train.micro_batch_size", "train.tokens_per_micro_batch",
    "train.dtype", "train.tf32", "train.device", "train.threads", "train.share_prefix",
    "adapter.quantize", "adapter.base",
)  # fmt: skip
@click.pass_context
def score(context: click.Context, /, *, print_config: bool, quiet: bool, **_flags: object) -> None:
    """Write log-probs, implicit rewards and margin of every pair.

    The rewards are those that training logs for the same pairs with the same loss.
    """
    resolved = resolve_flags(context)
    if print_config:
        click.echo(resolved.to_toml(), nl=False)
        return
    from dpo.score import score_file

    click.echo(score_file(resolved.config, console=Console(quiet=quiet)))
