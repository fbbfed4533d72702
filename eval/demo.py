"""``dpo demo``: the whole way on a simulated agent, offline, in three minutes on two cores.

A simulator whose true rewards are known fills a feedback store; the builder makes preference pairs
of it; a tiny model from scratch is warmed up on what the log speaks for (SFT) and then trained by
DPO; and the policy is compared with its start and with the agent's rules, in what the log tells
about its reward and in its true reward.

Rewards of single decisions are mostly luck, so pairs weigh as much as their two rewards differ.
Then the loss prefers the action of the higher *mean* reward; pairs that weigh the same prefer the
one that is better more often (``dpo.data.pairs``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.builder import build_dataset
from dpo.data.dataset import BuildOptions, Dataset
from dpo.data.dataset_files import write_dataset
from dpo.data.examples import Example
from dpo.data.kinds import PolicyKind
from dpo.data.pairs import PairOptions
from dpo.data.simulate import MAX_SITUATIONS, best_action, simulate, true_reward
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.eval.bootstrap import ConfidenceInterval, compute_confidence_interval
from dpo.eval.comparison import compare_policies
from dpo.eval.language_model import LanguageModelPolicy
from dpo.eval.policies import Policy, PolicyDecision, RulesPolicy
from dpo.eval.policy_pairs import read_policy_pairs
from dpo.eval.policy_training import PolicyTrainingConfig, PolicyTrainingResult, train_policy
from dpo.eval.report_html import comparison_page
from dpo.eval.report_json import to_json
from dpo.eval.resampling import Floats
from dpo.files import JSON, atomic_write, write_json
from dpo.progress import Console

DECISIONS_PER_SITUATION = 8
EVAL_SPLIT = 0.2
PAIRS = PairOptions(strategy="all", max_pairs_per_context=3, margin=0.0, weight="margin")
BATCH_SIZE = 16
SFT_EPOCHS = 1
EPOCHS = 2
LEARNING_RATE = 1e-3
BEST = "best possible"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found.

    Attributes:
        folder: where everything lies.
        decisions: on the held-out side of the log.
        situations: different ones among them.
        training: of the policy, with what its held-out pairs say.
        logged_rewards: mean reward per decision by policy, as estimated from the log (doubly
            robust); None where the log does not tell.
        true_rewards: mean true reward per held-out decision, by policy.
        gains: true reward of DPO less that of another policy, on the same decisions.
        pages: the comparison of DPO with each other policy.
    """

    folder: Path
    decisions: int
    situations: int
    training: PolicyTrainingResult
    logged_rewards: Mapping[str, ConfidenceInterval | None]
    true_rewards: Mapping[str, ConfidenceInterval]
    gains: Mapping[str, ConfidenceInterval]
    pages: Mapping[str, Path]

    def verdict(self) -> str:
        """Say in plain words whether DPO helped."""
        return " ".join(_judge(name, gain) for name, gain in self.gains.items())


def _judge(name: str, gain: ConfidenceInterval) -> str:
    found = f"by {gain.mean:+.3f} [{gain.lower:+.3f}, {gain.upper:+.3f}] in true reward"
    if gain.lower > 0:
        return f"DPO is better than {name}, {found}."
    if gain.upper < 0:
        return f"DPO is worse than {name}, {found}."
    return f"DPO and {name} cannot be told apart: {found}."


def run_demo(
    folder: Path, kind: PolicyKind, *, seed: int, decisions: int, console: Console
) -> DemoResult:
    """Simulate, build, train, compare; everything is left in ``folder``.

    Raises:
        InputError: the folder is not empty, or there are too few decisions for 100 pairs.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another --out, or remove it")
    dataset = _build(folder, kind, seed, decisions, console)
    training = train_policy(
        read_policy_pairs(folder / "dataset", kind),
        PolicyTrainingConfig(
            output_path=str(folder / "policy"),
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            sft_epochs=SFT_EPOCHS,
            seed=seed,
        ),
        console=console,
    )
    console.say("comparing the policies on held-out decisions")
    result = _evaluate(folder, kind, dataset.eval, training)
    write_json(folder / "result.json", _as_json(result, kind, seed))
    return result


def _evaluate(
    folder: Path,
    kind: PolicyKind,
    examples: Sequence[Example[Any, Any]],
    training: PolicyTrainingResult,
) -> DemoResult:
    """Compare DPO with its start and with the rules; situations are resampled whole."""
    assert training.model_path is not None
    assert training.start_path is not None
    dpo = _Remembering(LanguageModelPolicy.load(training.model_path), "DPO")
    sft = _Remembering(LanguageModelPolicy.load(training.start_path), "SFT")
    others: tuple[Policy, ...] = (sft, RulesPolicy(kind))
    comparisons = {other.name: compare_policies(other, dpo, examples) for other in others}
    pages = {name: folder / f"dpo-against-{name}.html" for name in comparisons}
    for name, page in pages.items():
        atomic_write(page, comparison_page(comparisons[name]))
    evaluations = [each.policy_a for each in comparisons.values()]
    evaluations.append(comparisons[sft.name].policy_b)
    states = [example.state for example in examples]
    situations = [kind.render_prompt(state) for state in states]
    rewards = _true_rewards(kind, [*others, dpo], states)

    def interval(values: Floats) -> ConfidenceInterval:
        return compute_confidence_interval(values, groups=situations)

    return DemoResult(
        folder=folder,
        decisions=len(states),
        situations=len(set(situations)),
        training=training,
        logged_rewards={each.policy: each.off_policy.doubly_robust for each in evaluations},
        true_rewards={name: interval(values) for name, values in rewards.items()},
        gains={other.name: interval(rewards[dpo.name] - rewards[other.name]) for other in others},
        pages=pages,
    )


def _as_json(result: DemoResult, kind: PolicyKind, seed: int) -> JSON:
    return {
        "policy": kind.name,
        "seed": seed,
        "decisions": result.decisions,
        "situations": result.situations,
        "loggedRewards": to_json(result.logged_rewards),
        "trueRewards": to_json(result.true_rewards),
        "gains": to_json(result.gains),
    }


def _build(
    folder: Path, kind: PolicyKind, seed: int, decisions: int, console: Console
) -> Dataset[Any, Any]:
    """Fill the store and build the data set from it."""
    folder.mkdir(parents=True, exist_ok=True)
    situations = min(max(1, decisions // DECISIONS_PER_SITUATION), MAX_SITUATIONS)
    log = simulate(kind.name, decisions, seed, situations=situations)
    with open_store(folder / "feedback.sqlite", create=True) as store:
        store.record_decisions(log)
        console.say(f"SIMULATION: {decisions:,} decisions of an agent in {folder}/feedback.sqlite")
        options = BuildOptions(split_by="group", eval_split=EVAL_SPLIT, seed=seed)
        dataset = build_dataset(store, kind, options)
    write_dataset(dataset, folder / "dataset", pair_options=PAIRS)
    return dataset


class _Remembering:
    """A language model that is asked only once about a state."""

    def __init__(self, policy: LanguageModelPolicy, name: str) -> None:
        self.policy, self.name, self.kind = policy, name, policy.kind
        self._decisions: dict[Any, PolicyDecision] = {}

    def decide(self, state: Any) -> PolicyDecision:
        return self.decide_batch([state])[0]

    def decide_batch(self, states: Sequence[Any]) -> list[PolicyDecision]:
        new = [state for state in dict.fromkeys(states) if state not in self._decisions]
        self._decisions.update(zip(new, self.policy.decide_batch(new), strict=True))
        return [self._decisions[state] for state in states]


def _true_rewards(
    kind: PolicyKind, policies: Iterable[Policy], states: Sequence[Any]
) -> dict[str, Floats]:
    """Return what each policy's action truly earns in each of N states: (N,) by policy."""
    different = list(dict.fromkeys(states))
    chosen = {each.name: [each.decide(state).action for state in different] for each in policies}
    chosen[BEST] = [best_action(kind.name, state) for state in different]
    place = {state: row for row, state in enumerate(different)}
    rows = [place[state] for state in states]
    return {
        name: np.array(
            [true_reward(kind.name, *each) for each in zip(different, actions, strict=True)]
        )[rows]
        for name, actions in chosen.items()
    }
