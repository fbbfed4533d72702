"""``dpo demo``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.eval.bootstrap import ConfidenceInterval


@click.command
@click.option("--out", default="dpo-demo", show_default=True, help="Folder for everything.")
@click.option("--seed", default=0, show_default=True, help="Seed of every random draw.")
@click.option(
    "--decisions", default=12_000, show_default=True, help="Decisions the agent's log holds."
)
@click.option("--quiet", is_flag=True, help="Show nothing but the result.")
def demo(out: str, seed: int, decisions: int, quiet: bool) -> None:
    """Show the whole way on a simulated agent: feedback, pairs, SFT, DPO, evaluation.

    Needs no network. The agent decides what to store in its memory; its true rewards are known, so
    the last lines say what DPO was really worth.
    """
    from dpo.eval.demo import run_demo

    result = run_demo(Path(out), seed=seed, decisions=decisions, console=Console(quiet=quiet))
    click.echo(f"\n{result.held_out_pairs} held-out pairs, 95 % bootstrap intervals")
    click.echo(f"{'':<18}{'before DPO':>28}{'after DPO':>28}")
    for name, held in result.held_out.items():
        click.echo(f"{name:<18}{_shown(held.before):>28}{_shown(held.after):>28}")
    click.echo("\ntrue reward per decision in held-out situations (known, as it is a simulation)")
    for name, reward in result.true_rewards.items():
        click.echo(f"{name:<18}{_shown(reward):>28}")
    click.echo(f"{'DPO - rules':<18}{_shown(result.gain_over_rules):>28}")
    click.echo(f"\n{result.verdict()}\n")
    click.echo(f"model   {result.folder / 'run' / 'model'}")
    click.echo(f"report  {result.folder / 'run' / 'report.html'}")
    click.echo(f"data    {result.folder / 'dataset'}")
    click.echo("next    dpo train --model MODEL --data PAIRS.jsonl --eval-split 0.1 --out RUN")


def _shown(interval: "ConfidenceInterval") -> str:
    if not interval.is_defined:
        return f"{interval.mean:.4f}"
    return f"{interval.mean:.4f} [{interval.lower:.4f}, {interval.upper:.4f}]"
