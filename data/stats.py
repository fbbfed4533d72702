"""What a feedback store holds, counted in one pass.

Memory grows with the number of sessions (their ids are kept to be told apart), not of decisions.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from dpo.data.kinds import KINDS
from dpo.data.records import Decision, format_time, is_simulated


@dataclass(frozen=True, slots=True)
class NumberSummary:
    """How some numbers lie; ``deviation`` is the population's, of the numbers that are there."""

    count: int
    mean: float
    deviation: float
    smallest: float
    largest: float


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """What is known of one policy's decisions.

    Attributes:
        policy: its name.
        decisions: how many there are.
        sessions: in how many sessions they were made.
        simulated: decisions of the simulator, which nobody observed.
        first: time of the oldest.
        last: time of the newest.
        classes: decisions by class of their action; a class that never occurs counts 0. Empty for a
            policy that is not one of ``KINDS``.
        with_outcome: decisions with an outcome or a reward.
        rewards: of the decisions with a reward; None if there are none.
        zero_rewards: how many rewards are exactly 0.
        confidences: of the decisions with a confidence; None if there are none.
        propensities: of the decisions with a propensity; None if there are none.
    """

    policy: str
    decisions: int
    sessions: int
    simulated: int
    first: datetime
    last: datetime
    classes: dict[str, int]
    with_outcome: int
    rewards: NumberSummary | None
    zero_rewards: int
    confidences: NumberSummary | None
    propensities: NumberSummary | None

    def lines(self) -> Iterator[str]:
        """Yield the numbers as text."""
        yield f"{self.policy}: {self.decisions} decisions in {self.sessions} sessions"
        if self.simulated:
            simulated = _share(self.simulated, self.decisions)
            yield f"  SIMULATION: {simulated} were simulated, not observed"
        yield f"  from {format_time(self.first)} to {format_time(self.last)}"
        yield f"  with an outcome: {_share(self.with_outcome, self.decisions)}"
        summaries = {
            "reward": self.rewards,
            "confidence": self.confidences,
            "propensity": self.propensities,
        }
        for name, summary in summaries.items():
            yield f"  with a {name}: {_described(summary, self.decisions)}"
        if self.zero_rewards:
            yield f"  rewards of exactly 0: {self.zero_rewards}"
        for name, count in self.classes.items():
            yield f"  action {name}: {_share(count, self.decisions)}"


def feedback_stats(decisions: Iterable[Decision]) -> tuple[PolicyStats, ...]:
    """Count decisions by policy, the policies in the order of their names.

    Raises:
        InputError: an action is not one of its kind; the message names the decision.
    """
    tallies: dict[str, _Tally] = {}
    for decision in decisions:
        if decision.policy not in tallies:
            tallies[decision.policy] = _Tally(decision)
        tallies[decision.policy].add(decision)
    return tuple(tallies[policy].stats() for policy in sorted(tallies))


class _Tally:
    """Counts of one policy's decisions as they come by."""

    def __init__(self, decision: Decision) -> None:
        self._policy = decision.policy
        self._kind = KINDS.get(decision.policy)
        self._first = self._last = decision.decided_at
        self._decisions = self._simulated = self._with_outcome = self._zero_rewards = 0
        self._sessions: set[str] = set()
        self._classes = Counter[str](dict.fromkeys(self._kind.classes if self._kind else (), 0))
        self._rewards, self._confidences, self._propensities = _Numbers(), _Numbers(), _Numbers()

    def add(self, decision: Decision) -> None:
        self._decisions += 1
        self._first = min(self._first, decision.decided_at)
        self._last = max(self._last, decision.decided_at)
        self._sessions.add(decision.session_id)
        self._simulated += is_simulated(decision.session_id)
        self._with_outcome += decision.has_outcome
        self._zero_rewards += decision.reward == 0
        self._rewards.add(decision.reward)
        self._confidences.add(decision.confidence)
        self._propensities.add(decision.propensity)
        if self._kind:
            action = self._kind.parse_action(decision.action, f"decision {decision.id!r}: action")
            self._classes[self._kind.action_class(action)] += 1

    def stats(self) -> PolicyStats:
        return PolicyStats(
            policy=self._policy,
            decisions=self._decisions,
            sessions=len(self._sessions),
            simulated=self._simulated,
            first=self._first,
            last=self._last,
            classes=dict(self._classes),
            with_outcome=self._with_outcome,
            rewards=self._rewards.summary(),
            zero_rewards=self._zero_rewards,
            confidences=self._confidences.summary(),
            propensities=self._propensities.summary(),
        )


class _Numbers:
    """Mean and spread of numbers that come one by one (Welford 1962)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = 0.0
        self._smallest, self._largest = math.inf, -math.inf

    def add(self, value: float | None) -> None:
        if value is None:
            return
        self._count += 1
        distance = value - self._mean
        self._mean += distance / self._count
        self._squares += distance * (value - self._mean)
        self._smallest, self._largest = min(self._smallest, value), max(self._largest, value)

    def summary(self) -> NumberSummary | None:
        if not self._count:
            return None
        deviation = math.sqrt(self._squares / self._count)
        return NumberSummary(self._count, self._mean, deviation, self._smallest, self._largest)


def _described(summary: NumberSummary | None, of: int) -> str:
    if summary is None:
        return "none"
    return (
        f"{_share(summary.count, of)}, mean {summary.mean:.4f} "
        f"(deviation {summary.deviation:.4f}), from {summary.smallest:.4f} to {summary.largest:.4f}"
    )


def _share(count: int, of: int) -> str:
    return f"{count} ({count / of:.1%})"
