"""A simulated agent whose right answers are known, to try the whole chain on.

Nothing it yields was observed: session and decision ids begin with ``simulated-``. The agent meets
a fixed pool of situations again and again, some of them more and more often and others less
(drift), in sessions whose luck is shared. It follows the rules of the kind, or explores every
action, and logs with which propensity. What an action brings is drawn from the chances of
``simulated_worlds``, so every action's expected reward, and with it the best one, is known exactly.
"""

import bisect
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from dpo.data.records import SIMULATED_PREFIX, Decision
from dpo.data.simulated_worlds import WORLDS, AnyWorld
from dpo.errors import InputError
from dpo.files import JSON

SITUATIONS = 300
MAX_SITUATIONS = 5000
MAX_DRIFT = 50  # the frequency of a situation then changes by a factor of e ** 50

_SESSION_LENGTH = 6  # decisions, on average
_PERIODS = 50  # the frequencies of situations drift in this many steps
_START = datetime(2024, 1, 1, tzinfo=UTC)


def simulate(
    kind_name: str,
    decisions: int,
    seed: int,
    *,
    situations: int = SITUATIONS,
    exploration: float = 0.5,
    drift: float = 1.0,
    session_correlation: float = 0.2,
    start: datetime = _START,
    days: float = 365,
) -> Iterator[Decision]:
    """Yield the decisions of one simulated agent, in the order of its sessions.

    The same arguments give the same decisions. All agents of a kind meet the same situations, so a
    second seed is fresh data about the same world. Memory does not grow with ``decisions``.

    Args:
        kind_name: one of ``WORLDS``.
        decisions: how many, at least 1.
        seed: of everything that is drawn.
        situations: size of the pool of states.
        exploration: share of decisions in which the action is drawn uniformly from all actions, in
            [0, 1]; in the others the agent follows the kind's rules.
        drift: how far the frequencies of situations change: over the whole time each grows or
            falls by a factor between 1 and e ** drift. Within MAX_DRIFT of 0.
        session_correlation: of the luck of two decisions in one session, in [0, 1]. It does not
            change the expected rewards.
        start: time of the first session.
        days: time from the first to the last session.

    Raises:
        InputError: an unknown kind, or a number out of its range.
    """
    world = _world(kind_name)
    for name, value in {
        "exploration": exploration,
        "session_correlation": session_correlation,
    }.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} must be in [0, 1], got {value}")
    if decisions < 1 or days <= 0 or not abs(drift) <= MAX_DRIFT:
        raise InputError(
            f"decisions must be at least 1, days above 0 and drift within {MAX_DRIFT} of 0, "
            f"got {decisions}, {days} and {drift}"
        )
    scenes = [
        _Scene(world, state, exploration) for state in simulated_situations(kind_name, situations)
    ]
    frequencies = [_cumulative(weights) for weights in _drifting_weights(len(scenes), drift)]
    return _play(
        scenes,
        frequencies,
        _Plan(
            kind_name=kind_name,
            seed=seed,
            decisions=decisions,
            exploration=exploration,
            session_correlation=session_correlation,
            start=start,
            duration=timedelta(days=days),
        ),
    )


def simulated_situations(kind_name: str, count: int = SITUATIONS) -> tuple[Any, ...]:
    """Return the pool of states: always the same, each with a prompt of its own.

    Raises:
        InputError: an unknown kind, or a count that is not in [1, ``MAX_SITUATIONS``].
    """
    if not 1 <= count <= MAX_SITUATIONS:
        raise InputError(f"situations must be in [1, {MAX_SITUATIONS}], got {count}")
    return _pool(_world(kind_name).kind.name, count)


def true_reward(kind_name: str, state: Any, action: Any) -> float:
    """Return the expected reward of an action: the sum over its chances."""
    world = _world(kind_name)
    return sum(
        chance.probability * world.kind.reward(chance.outcome, action).value
        for chance in world.chances(state, action)
    )


def best_action(kind_name: str, state: Any) -> Any:
    """Return the action of the highest true reward, the first of them if there are several."""
    return max(
        _world(kind_name).kind.actions(), key=lambda action: true_reward(kind_name, state, action)
    )


def true_value(
    kind_name: str,
    choose: Callable[[Any], Any],
    *,
    situations: int = SITUATIONS,
    drift: float = 1.0,
) -> float:
    """Return the mean true reward of a policy over the situations as often as they occur.

    Args:
        kind_name: one of ``WORLDS``.
        choose: the policy: an action for each state.
        situations: as given to ``simulate``.
        drift: as given to ``simulate``.
    """
    states = simulated_situations(kind_name, situations)
    rewards = [true_reward(kind_name, state, choose(state)) for state in states]
    means = [
        sum(weight * reward for weight, reward in zip(weights, rewards, strict=True)) / sum(weights)
        for weights in _drifting_weights(len(states), drift)
    ]
    return sum(means) / len(means)


def _world(kind_name: str) -> AnyWorld:
    if kind_name not in WORLDS:
        raise InputError(f"there is no simulated world for {kind_name!r}, only {', '.join(WORLDS)}")
    return WORLDS[kind_name]


@functools.lru_cache(maxsize=8)
def _pool(kind_name: str, count: int) -> tuple[Any, ...]:
    world, rng = WORLDS[kind_name], random.Random(f"{kind_name} situations")
    states: dict[str, Any] = {}  # by prompt: what it does not show must have no effect
    while len(states) < count:
        state = world.draw_state(rng)
        states.setdefault(world.kind.render_prompt(state), state)
    return tuple(states.values())


def _drifting_weights(situations: int, drift: float) -> Iterator[list[float]]:
    """Yield the frequencies of the situations in each period: some wax, some wane."""
    rng = random.Random("frequencies")
    traits = [(rng.uniform(0.5, 1.5), rng.uniform(-drift, drift)) for _ in range(situations)]
    for period in range(_PERIODS):
        time = period / (_PERIODS - 1) - 0.5
        yield [weight * math.exp(trend * time) for weight, trend in traits]


def _cumulative(weights: Sequence[float]) -> list[float]:
    """Return the shares of the weights, added up; the last is exactly 1."""
    totals = list(itertools.accumulate(weights))
    return [total / totals[-1] for total in totals]


@dataclass(frozen=True, slots=True)
class _Move:
    """An action in one situation, ready to be drawn: its outcomes from the worst to the best."""

    action: Mapping[str, JSON]
    propensity: float
    cumulative: Sequence[float]
    outcomes: Sequence[Mapping[str, JSON]]
    rewards: Sequence[float]


class _Scene:
    """One situation, and the moves that the agent may make in it."""

    def __init__(self, world: AnyWorld, state: Any, exploration: float) -> None:
        self._world, self._state, self._exploration = world, state, exploration
        self.state = world.kind.state_to_json(state)
        self.actions = world.kind.actions()
        self.baseline = world.kind.baseline(state)
        self.move = functools.cache(self._move)

    def _move(self, action: Any) -> _Move:
        kind = self._world.kind
        outcomes = [
            (kind.reward(chance.outcome, action).value, chance.probability, chance.outcome)
            for chance in self._world.chances(self._state, action)
            if chance.probability > 0
        ]
        outcomes.sort(key=lambda outcome: outcome[0])
        explored = self._exploration / len(self.actions) if action in self.actions else 0.0
        followed = 1 - self._exploration if action == self.baseline.action else 0.0
        return _Move(
            action=kind.action_to_json(action),
            propensity=explored + followed,
            cumulative=_cumulative([probability for _, probability, _ in outcomes]),
            outcomes=[outcome for _, _, outcome in outcomes],
            rewards=[reward for reward, _, _ in outcomes],
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    kind_name: str
    seed: int
    decisions: int
    exploration: float
    session_correlation: float
    start: datetime
    duration: timedelta


@dataclass(frozen=True, slots=True)
class _Session:
    id: str
    start: datetime
    luck: float  # standard normal


def _play(
    scenes: Sequence[_Scene],
    frequencies: Sequence[Sequence[float]],
    plan: _Plan,
) -> Iterator[Decision]:
    rng = random.Random(f"{plan.kind_name} {plan.seed}")
    for index, (session, turn) in enumerate(_turns(plan, rng)):
        frequency = frequencies[index * len(frequencies) // plan.decisions]
        scene = scenes[bisect.bisect_right(frequency, rng.random())]
        if rng.random() < plan.exploration:
            move = scene.move(rng.choice(scene.actions))
            confidence = rng.uniform(0.4, 0.95)
        else:
            move = scene.move(scene.baseline.action)
            confidence = min(scene.baseline.confidence + rng.uniform(-0.1, 0.1), 0.99)
        drawn = bisect.bisect_right(move.cumulative, _luck(session, plan.session_correlation, rng))
        yield Decision(
            id=f"{SIMULATED_PREFIX}{plan.kind_name}-{plan.seed}-{index:08d}",
            policy=plan.kind_name,
            session_id=session.id,
            decided_at=session.start + turn * timedelta(seconds=90),
            state=scene.state,
            action=move.action,
            confidence=round(confidence, 2),
            propensity=move.propensity,
            reward=move.rewards[drawn],
            outcome=move.outcomes[drawn],
        )


def _turns(plan: _Plan, rng: random.Random) -> Iterator[tuple[_Session, int]]:
    """Yield the session and the turn in it for each of the plan's decisions."""
    made = 0
    for number in itertools.count():
        since_start = plan.duration * (made / plan.decisions)
        session = _Session(
            id=f"{SIMULATED_PREFIX}{plan.kind_name}-{plan.seed}-session-{number:07d}",
            start=plan.start + timedelta(milliseconds=since_start // timedelta(milliseconds=1)),
            luck=rng.gauss(0.0, 1.0),
        )
        length = 1 + int(rng.expovariate(1 / (_SESSION_LENGTH - 0.5)))
        for turn in range(min(length, plan.decisions - made)):
            yield session, turn
        made += length
        if made >= plan.decisions:
            return


def _luck(session: _Session, correlation: float, rng: random.Random) -> float:
    """Draw from [0, 1) uniformly, yet correlated within the session: a Gaussian copula."""
    own = rng.gauss(0.0, 1.0)
    normal = math.sqrt(correlation) * session.luck + math.sqrt(1 - correlation) * own
    return min(0.5 * math.erfc(-normal / math.sqrt(2)), math.nextafter(1.0, 0.0))
