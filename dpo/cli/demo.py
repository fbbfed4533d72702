"""``dpo demo``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpo.cli.train_policy import describe
from dpo.data.kinds import KINDS
from dpo.progress import Console

if TYPE_CHECKING:
    from dpo.eval.demo import DemoResult


@click.command
@click.option("--out", default="dpo-demo", show_default=True, help="Folder for everything.")
@click.option(
    "--policy",
    type=click.Choice(list(KINDS)),
    default="extraction",
    show_default=True,
    help="What the agent decides: what to store, what to recall, or what to merge.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of every random draw.")
@click.option(
    "--decisions", default=40_000, show_default=True, help="Decisions the agent's log holds."
)
@click.option("--quiet", is_flag=True, help="Show nothing but the result.")
def demo(out: str, policy: str, seed: int, decisions: int, quiet: bool) -> None:
    """Show the whole way on a simulated agent: feedback, pairs, SFT, DPO, evaluation.

    Needs no network. Of a simulated agent the true rewards are known, so the last lines say what
    DPO was really worth.
    """
    from dpo.eval.demo import run_demo

    console = Console(quiet=quiet)
    result = run_demo(Path(out), KINDS[policy], seed=seed, decisions=decisions, console=console)
    click.echo(f"\n{describe(result.training)}\n\n{_rewards(result)}\n")
    click.echo(f"{result.verdict()}\n")
    for name, page in result.pages.items():
        click.echo(f"page    {page}  (DPO against {name})")
    click.echo(f"data    {result.folder / 'dataset'}")
    click.echo("next    dpo train --model MODEL --data PAIRS.jsonl --eval-split 0.1 --out RUN")


def _rewards(result: "DemoResult") -> str:
    """Lay out the rewards that the log tells beside the true ones."""
    from dpo.eval.report_text import number

    lines = [
        f"reward per decision on {result.decisions:,} held-out decisions of {result.situations:,} "
        "situations",
        f"{'':<18}{'as the log tells':>30}{'true (simulated)':>30}",
    ]
    for name, true in result.true_rewards.items():
        told = result.logged_rewards.get(name)
        unknown = "not estimable" if name in result.logged_rewards else ""
        lines.append(f"{name:<18}{number(told) if told else unknown:>30}{number(true):>30}")
    return "\n".join(lines)
