"""What decides: the rules, a constant, a uniform draw, or anything with a ``decide``.

A policy of your own needs a ``name``, the ``kind`` whose states it reads, and ``decide``; if it
can do many states at once faster, a ``decide_batch`` as well. It then works with everything here.
"""

import importlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from dpo.data.kinds import PolicyKind
from dpo.errors import InputError
from dpo.progress import Console

State: TypeAlias = Any  # the state dataclass of the policy's kind
Action: TypeAlias = Any  # the action dataclass of the policy's kind


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """What a policy answers in one state."""

    action: Action
    """An action of the policy's kind."""
    confidence: float
    """How sure the policy is that this is right, in [0, 1]."""
    probabilities: tuple[float, ...] | None = None
    """Chance with which this policy takes each of ``kind.actions()`` here, in that order, when it
    draws its action at random; None when it always takes ``action`` (a greedy model included)."""
    beliefs: tuple[float, ...] | None = None
    """How likely a model holds each of ``kind.actions()``, whether or not it draws; None where a
    policy has no such distribution."""
    reason: str | None = None
    """Why, in a word: the name of a rule."""
    fallback_reason: str | None = None
    """Why the policy itself did not answer; None when it did."""


class Policy(Protocol):
    """Decides one state at a time."""

    @property
    def name(self) -> str:
        """The name in reports."""
        ...

    @property
    def kind(self) -> PolicyKind:
        """The kind whose states it reads and whose actions it takes."""
        ...

    def decide(self, state: State) -> PolicyDecision:
        """Choose an action; raise anything to let the fallback answer."""
        ...


@runtime_checkable
class BatchPolicy(Protocol):
    """Decides many states at once."""

    def decide_batch(self, states: Sequence[State]) -> Sequence[PolicyDecision]:
        """Choose an action for each state, as ``decide`` would."""
        ...


@dataclass(frozen=True, slots=True)
class RulesPolicy:
    """The hand-written rules of a kind: the baseline, and what answers when a model cannot."""

    kind: PolicyKind
    name: str = "rules"

    def decide(self, state: State) -> PolicyDecision:
        """Apply the first rule that matches."""
        answer = self.kind.baseline(state)
        return PolicyDecision(answer.action, answer.confidence, reason=answer.reason)


@dataclass(frozen=True, slots=True)
class ConstantPolicy:
    """Always the same action, with confidence 1."""

    kind: PolicyKind
    action: Action
    name: str = "constant"

    def decide(self, state: State) -> PolicyDecision:
        """Take the action."""
        return PolicyDecision(self.action, 1.0)


class UniformPolicy:
    """Draws one of the kind's actions, each with the same chance; draws depend on the seed only."""

    def __init__(self, kind: PolicyKind, *, seed: int = 0, name: str = "uniform") -> None:
        self.kind = kind
        self.name = name
        self._actions = kind.actions()
        self._random = random.Random(seed)

    def decide(self, state: State) -> PolicyDecision:
        """Draw an action."""
        chance = 1.0 / len(self._actions)
        probabilities = (chance,) * len(self._actions)
        return PolicyDecision(self._random.choice(self._actions), chance, probabilities)


def decide_with_fallback(
    policy: Policy, state: State, *, fallback: Policy | None = None
) -> PolicyDecision:
    """Decide, and let the rules answer where the policy fails, whatever went wrong.

    Args:
        policy: the policy to ask first.
        state: of the policy's kind.
        fallback: asked instead; None means the rules of the policy's kind.
    """
    try:
        decision = policy.decide(state)
        check_decision(policy, decision)
    except Exception as error:
        instead = RulesPolicy(policy.kind) if fallback is None else fallback
        return replace(instead.decide(state), fallback_reason=f"{type(error).__name__}: {error}")
    return decision


def decide_all(policy: Policy, states: Sequence[State]) -> list[PolicyDecision]:
    """Decide every state, in one batch where the policy can, with the rules where it fails.

    Raises:
        InputError: the policy failed in every state: what follows would be about the rules.
    """
    decisions = _batch(policy, states)
    if decisions is None:
        decisions = [decide_with_fallback(policy, state) for state in states]
    failures = Counter(decision.fallback_reason for decision in decisions)
    if decisions and failures[None] == 0:
        reason, count = failures.most_common(1)[0]
        raise InputError(
            f"policy {policy.name!r} failed in all {len(states)} states, {count} times by {reason}"
        )
    return decisions


def _batch(policy: Policy, states: Sequence[State]) -> list[PolicyDecision] | None:
    """Decide in one batch; None if there is no such method, or if one state spoils the batch."""
    if not isinstance(policy, BatchPolicy):
        return None
    try:
        decisions = list(policy.decide_batch(states))
        for decision in decisions:
            check_decision(policy, decision)
    except Exception:  # decided again one by one, which finds and counts what failed
        return None
    return decisions if len(decisions) == len(states) else None


def check_decision(policy: Policy, decision: PolicyDecision) -> None:
    """Refuse a decision whose figures cannot be probabilities.

    Raises:
        InputError: a confidence outside [0, 1], or probabilities that do not fit the actions.
    """
    if not 0.0 <= decision.confidence <= 1.0:
        raise InputError(
            f"policy {policy.name!r}: confidence must be in [0, 1], got {decision.confidence}"
        )
    chances = decision.probabilities
    if chances is None:
        return
    count = len(policy.kind.actions())
    if len(chances) != count or min(chances) < 0.0 or abs(sum(chances) - 1.0) > 1e-4:
        raise InputError(
            f"policy {policy.name!r}: probabilities must be {count} shares that add up to 1, "
            f"got {len(chances)} that add up to {sum(chances):.6g}"
        )


def load_policy(text: str, kind: PolicyKind, *, console: Console | None = None) -> Policy:
    """Return the policy that a command line names, for data of ``kind``.

    ``rules``, ``uniform``, ``constant:CLASS`` (the kind's first action of that class), or the
    folder of a trained policy, which takes the likeliest action; ``draw:FOLDER`` draws one with its
    chance, ``free:FOLDER`` lets the model write its answer freely (see ``FreePolicy``). Models show
    their progress on ``console``.

    Raises:
        InputError: another name, a class that the kind lacks, a folder that holds no policy of this
            kind.
    """
    if text == "rules":
        return RulesPolicy(kind)
    if text == "uniform":
        return UniformPolicy(kind)
    if text.startswith("constant:"):
        return _constant(text.removeprefix("constant:"), kind)
    how, _, folder = text.rpartition(":") if text.startswith(("draw:", "free:")) else ("", "", text)
    if not Path(folder).is_dir():
        raise InputError(
            f"{text!r} is no policy: expected rules, uniform, constant:CLASS with CLASS one of "
            f"{', '.join(kind.classes)}, the folder of a trained policy, draw:FOLDER or free:FOLDER"
        )
    # by name: it needs torch, and it builds on this module
    home = importlib.import_module("dpo.eval.language_model")

    seed = 0 if how == "draw" else None
    policy: Policy = home.LanguageModelPolicy.load(folder, seed=seed, console=console)
    if how == "free":
        policy = home.FreePolicy(policy)
    if policy.kind.name != kind.name:
        raise InputError(
            f"{text} holds a policy of kind {policy.kind.name}, the data are of kind {kind.name}"
        )
    return policy


def _constant(action_class: str, kind: PolicyKind) -> ConstantPolicy:
    actions: Mapping[str, Action] = {
        kind.action_class(action): action for action in reversed(kind.actions())
    }
    if action_class not in actions:
        raise InputError(
            f"constant:{action_class}: {kind.name} has no class {action_class!r}, "
            f"expected one of {', '.join(kind.classes)}"
        )
    return ConstantPolicy(kind, actions[action_class], f"constant:{action_class}")
