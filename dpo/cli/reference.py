"""``dpo reference``."""

import click

from dpo.cli.options import config_flags, resolve_flags
from dpo.progress import Console
from dpo.settings import Setting

_NO_OUTPUT = Setting("out", "nothing but the cache", "dpo reference")


@click.command
@config_flags(
    "model", "revision", "reference", "reference_revision", "reference_cache.",
    "data", "mix.", "data_split", "data_revision",
    "eval_data", "eval_data_split", "eval_data_revision", "eval_split",
    "columns", "ranked", "answer_turns", "on_bad_row", "tokenize.", "train.seed",
    "train.micro_batch_size", "train.tokens_per_micro_batch", "train.dtype", "train.tf32",
    "train.device", "train.threads", "train.share_prefix",
    "adapter.quantize", "adapter.base",
)  # fmt: skip
@click.pass_context
def reference(
    context: click.Context, /, *, print_config: bool, quiet: bool, **_flags: object
) -> None:
    """Compute the reference log-probs of a data set and keep them for later runs.

    A run of dpo train over the same pairs and the same reference then computes none of them.
    """
    resolved = resolve_flags(context, below=[_NO_OUTPUT])
    if print_config:
        click.echo(resolved.to_toml(), nl=False)
        return
    from dpo.run import compute_reference_only

    compute_reference_only(resolved.config, console=Console(quiet=quiet))
