"""Which actions were tried in which context, what they earned, and which two make a pair.

A context is a set of examples that may be compared: one prompt, or one grouping key. An arm is one
action in one context; its reward is the mean over its examples. A draft is two arms of one context,
of which the first earned more.

Shapes: N examples, A arms. To add a way to choose drafts, add it to ``STRATEGIES``.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Draft(NamedTuple):
    """Two arms of one context: the chosen and the rejected."""

    chosen: int
    rejected: int


class Arms(NamedTuple):
    """Columns of shape (A,), sorted by context.

    Arm ``a`` has the examples ``rows[starts[a] : starts[a + 1]]``, the best first.
    """

    rows: NDArray[np.int64]  # (N,)
    starts: NDArray[np.int64]  # (A + 1,)
    context: NDArray[np.int64]
    action: NDArray[np.int64]
    reward: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    best_row: NDArray[np.int64]  # the first example with the highest reward

    def rows_of(self, arms: Iterable[int]) -> list[int]:
        """Return the examples of ``arms`` in their original order."""
        return sorted(
            int(row) for arm in arms for row in self.rows[self.starts[arm] : self.starts[arm + 1]]
        )

    def count(self, arms: Iterable[int]) -> int:
        """Count the examples of ``arms``."""
        return sum(int(self.starts[arm + 1] - self.starts[arm]) for arm in arms)

    def margin(self, draft: Draft) -> float:
        """Return by how much the chosen arm earned more."""
        return float(self.reward[draft.chosen] - self.reward[draft.rejected])


def number_by_appearance(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Replace keys (N,) by 0, 1, 2, ... in the order in which each first appears.

    ``[7, 3, 7, 5]`` becomes ``[0, 1, 0, 2]``.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def find_arms(
    contexts: NDArray[np.int64], actions: NDArray[np.int64], rewards: NDArray[np.float64]
) -> Arms:
    """Take together the examples with one action in one context; all arguments are (N,)."""
    rows = np.lexsort((-rewards, actions, contexts))  # stable: the best first, then as they came
    context, action = contexts[rows], actions[rows]
    is_first = np.ones(len(rows), dtype=np.bool_)
    is_first[1:] = (context[1:] != context[:-1]) | (action[1:] != action[:-1])
    first = np.flatnonzero(is_first)  # (A,)
    starts = np.append(first, len(rows))
    sums = np.add.reduceat(rewards[rows], first) if len(first) else np.zeros(0)
    return Arms(
        rows=rows,
        starts=starts,
        context=context[first],
        action=action[first],
        reward=sums / np.diff(starts),
        lowest=rewards[rows[starts[1:] - 1]],
        highest=rewards[rows[first]],
        best_row=rows[first],
    )


def _best_worst(arms: int) -> Iterable[tuple[int, int]]:
    return [(0, arms - 1)]


def _all(arms: int) -> Iterable[tuple[int, int]]:
    return itertools.combinations(range(arms), 2)


def _adjacent(arms: int) -> Iterable[tuple[int, int]]:
    return itertools.pairwise(range(arms))


STRATEGIES: dict[str, Callable[[int], Iterable[tuple[int, int]]]] = {
    "best-worst": _best_worst,
    "all": _all,
    "adjacent": _adjacent,
}
"""Number of arms in a context -> the couples of ranks to consider; rank 0 earned most."""


def find_drafts(
    arms: Arms, action_texts: Sequence[str], *, strategy: str, margin: float, limit: int | None
) -> list[Draft]:
    """Choose the drafts of every context: by strategy, above the margin, the widest first.

    Args:
        arms: all arms.
        action_texts: text of each action; it ranks arms that earned the same.
        strategy: one of ``STRATEGIES``.
        margin: a draft's margin must exceed it.
        limit: most drafts of one context; None is no bound.
    """
    drafts: list[Draft] = []
    for context in _contexts_with_a_choice(arms.context):
        ranked = sorted(
            context, key=lambda arm: (-arms.reward[arm], action_texts[int(arms.action[arm])])
        )
        couples = (Draft(ranked[a], ranked[b]) for a, b in STRATEGIES[strategy](len(ranked)))
        wide = [draft for draft in couples if arms.margin(draft) > margin]
        wide.sort(key=arms.margin, reverse=True)
        drafts += wide[:limit]
    return drafts


class Resolution(NamedTuple):
    """The drafts that are left, and how many were taken out."""

    kept: list[Draft]
    duplicates: int
    contradictions: int


def resolve(drafts: Iterable[Draft], arms: Arms, prompts: NDArray[np.int64]) -> Resolution:
    """Keep one draft for each prompt and couple of actions: in the direction with more examples.

    If both directions rest on equally many, neither is kept. Only grouping keys give work here: one
    prompt text can lie under two of them, because a prompt shows rounded numbers.

    Args:
        drafts: in the order in which they are to be kept.
        arms: all arms.
        prompts: (N,) index of each example's prompt.
    """
    alike: dict[tuple[int, frozenset[int]], list[Draft]] = defaultdict(list)
    for draft in drafts:
        prompt = int(prompts[arms.best_row[draft.chosen]])
        alike[prompt, frozenset(int(arms.action[arm]) for arm in draft)].append(draft)
    kept: list[Draft] = []
    duplicates = contradictions = 0
    for group in alike.values():
        winners = _stronger_direction(group, arms)
        kept += winners[:1]
        duplicates += len(winners[1:])
        contradictions += len(group) - len(winners)
    return Resolution(kept, duplicates, contradictions)


def _stronger_direction(drafts: list[Draft], arms: Arms) -> list[Draft]:
    """Return the drafts that prefer the same action, of those that rest on more examples."""
    directions: dict[int, list[Draft]] = defaultdict(list)
    for draft in drafts:
        directions[int(arms.action[draft.chosen])].append(draft)
    by_evidence = sorted(
        directions.values(), key=lambda side: arms.count(itertools.chain(*side)), reverse=True
    )
    evidence = [arms.count(itertools.chain(*side)) for side in by_evidence]
    if len(evidence) == 2 and evidence[0] == evidence[1]:
        return []
    return sorted(by_evidence[0], key=arms.count, reverse=True)


def _contexts_with_a_choice(context: NDArray[np.int64]) -> Iterator[range]:
    """Yield the arms of each context that has at least two."""
    bounds = np.flatnonzero(np.diff(context, prepend=-1, append=-1))
    for start, end in itertools.pairwise(bounds.tolist()):
        if end - start > 1:
            yield range(start, end)
