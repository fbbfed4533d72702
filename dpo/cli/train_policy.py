"""``dpo train-policy``."""

from typing import TYPE_CHECKING

import click

from dpo.data.kinds import KINDS
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.eval.policy_training import PolicyTrainingResult


@click.command("train-policy")
@click.argument("policy", type=click.Choice(list(KINDS)))
@click.option("--dataset", required=True, help="Folder that dpo data build made.")
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="What to start from: tiny, a small Llama from scratch; a folder; an id of the Hub.",
)
@click.option("--out", required=True, help="Folder for everything.")
@click.option("--epochs", default=10, show_default=True, help="Passes of DPO over the pairs.")
@click.option("--batch-size", default=32, show_default=True, help="Pairs per optimizer step.")
@click.option(
    "--learning-rate",
    default=1e-5,
    show_default=True,
    help="Peak learning rate of DPO; a tiny model wants 1e-3.",
)
@click.option("--beta", default=0.1, show_default=True, help="How strongly DPO holds to its start.")
@click.option(
    "--sft-epochs",
    type=int,
    help="Passes of the warm start over what the log shows.  [default: 300 steps for tiny, else 0]",
)
@click.option("--sft-learning-rate", type=float, help="Peak of the warm start.  [default: 0.003]")
@click.option("--min-pairs", default=100, show_default=True, help="Least unique training pairs.")
@click.option("--seed", default=0, show_default=True, help="Of the weights and of the order.")
@click.option("--resume", is_flag=True, help="Go on in --out where the same training was stopped.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set another key of dpo train, as in train.dtype=bf16-mixed; loss.* is for DPO alone.",
)
@click.option("--quiet", is_flag=True, help="Show nothing but the result.")
def train_policy(
    policy: str,
    dataset: str,
    model: str,
    out: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    beta: float,
    sft_epochs: int | None,
    sft_learning_rate: float | None,
    min_pairs: int,
    seed: int,
    resume: bool,
    settings: tuple[str, ...],
    quiet: bool,
) -> None:
    """Train a POLICY that decides: an SFT warm start, then DPO on the pairs of a data set.

    The policy is written to OUT/dpo/model; dpo eval and dpo compare take that folder.
    """
    from dpo.eval.policy_pairs import read_policy_pairs
    from dpo.eval.policy_training import PolicyTrainingConfig
    from dpo.eval.policy_training import train_policy as train

    config = PolicyTrainingConfig(
        output_path=out,
        model_name=model,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        beta=beta,
        sft_epochs=sft_epochs,
        sft_learning_rate=sft_learning_rate,
        min_pairs=min_pairs,
        seed=seed,
        resume=resume,
        settings=settings,
    )
    pairs = read_policy_pairs(dataset, KINDS[policy])
    click.echo(describe(train(pairs, config, console=Console(quiet=quiet))))


def describe(result: "PolicyTrainingResult") -> str:
    """Say what a training brought."""
    from dpo.eval.held_out import HELD_OUT
    from dpo.eval.report_text import number

    assert result.metrics is not None
    before, after = result.metrics.before, result.metrics.after
    interval, loss = result.metrics.train_interval, result.metrics.train_loss
    told = number(interval) if interval else f"{loss:.4f}"
    lines = [f"training loss     {told} in the last epoch"]
    if before is not None and after is not None:
        lines.append(f"{'held out':<18}{'before DPO':>30}{'after DPO':>30}")
        lines += [
            f"{label:<18}{number(getattr(before, name)):>30}{number(getattr(after, name)):>30}"
            for name, label in HELD_OUT.items()
        ]
    if result.decided is not None:
        classes = list(next(iter(result.decided.values())))
        lines += ["", f"{'decides, held out':<18}" + "".join(f"{name:>12}" for name in classes)]
        lines += [
            f"{name:<18}" + "".join(f"{counts[each]:>12,}" for each in classes)
            for name, counts in result.decided.items()
        ]
    lines += [f"note    {note}" for note in result.notes]
    lines += [f"model   {result.model_path}", f"report  {result.report_path}"]
    return "\n".join(lines)
