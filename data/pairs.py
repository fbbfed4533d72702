"""Preference pairs from examples: two actions in one context, one of which earned more.

A context is one prompt, or all states with one grouping key. Within a context the decisions for one
action are taken together, so that the noise of single rewards averages out: an action's reward is
the mean over its decisions. A pair is two actions whose rewards differ by more than the margin.
Where a context shows one action only nothing is invented; such decisions stay for the unpaired
losses.

Shapes: N examples, A arms (``dpo.data.arms``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from dpo.data.arms import (
    STRATEGIES,
    Arms,
    Draft,
    find_arms,
    find_drafts,
    number_by_appearance,
    resolve,
)
from dpo.data.examples import Example, Examples
from dpo.data.kinds.base import Action, GroupKey, State, TypedKind
from dpo.data.kinds.schema import Count, Range
from dpo.errors import InputError
from dpo.pair import PreferencePair

Match = Literal["prompt", "group"]
Weight = Literal["none", "margin", "confidence", "margin-confidence"]
UnpairedReason = Literal["one_action", "within_margin", "not_selected", "dropped"]
_REASONS: tuple[UnpairedReason, ...] = get_args(UnpairedReason)


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How pairs are formed.

    Attributes:
        match: what makes two decisions comparable: "prompt", exactly the same prompt text, or
            "group", the kind's grouping key; then a pair's prompt is that of the chosen action's
            best decision.
        margin: two actions make a pair if their rewards differ by more than this, in reward units.
        tolerance: added to the margin, so that 0.6 - 0.5 does not exceed 0.1 by round-off.
        strategy: which pairs of a context: "best-worst", one; "all" above the margin, widest first;
            "adjacent", neighbours in the ranking.
        max_pairs_per_context: upper bound for "all" and "adjacent"; None is no bound.
        weight: a pair's weight in training: "none" is 1 for all; "margin" the difference in reward;
            "confidence" the mean confidence of the decisions on both sides; "margin-confidence"
            their product. Where single rewards are noisy, "margin" is what makes the loss prefer
            the action of the higher mean reward: a comparison then counts by what it is about.
            Unweighted pairs prefer the action that is better more often.
    """

    match: Match = "prompt"
    margin: Annotated[float, Range(0, 2)] = 0.1
    tolerance: Annotated[float, Range(0, 1e-3)] = 1e-9
    strategy: str = "best-worst"
    max_pairs_per_context: Count | None = None
    weight: Weight = "none"

    def __post_init__(self) -> None:
        _check_choice("match", self.match, get_args(Match))
        _check_choice("strategy", self.strategy, tuple(STRATEGIES))
        _check_choice("weight", self.weight, get_args(Weight))
        if not 0 <= self.margin < 2:
            raise InputError(
                f"margin must be in [0, 2), the width of the rewards, got {self.margin}"
            )
        if not 0 <= self.tolerance <= 1e-3:
            raise InputError(f"tolerance must be in [0, 0.001], got {self.tolerance}")
        if self.max_pairs_per_context is not None:
            if self.strategy == "best-worst":
                raise InputError("max_pairs_per_context has no effect: best-worst forms one pair")
            if self.max_pairs_per_context < 1:
                raise InputError(
                    f"max_pairs_per_context must be >= 1, got {self.max_pairs_per_context}"
                )

    @property
    def threshold(self) -> float:
        """What a difference in reward must exceed."""
        return self.margin + self.tolerance


@dataclass(frozen=True, slots=True)
class PairEvidence:
    """What a pair rests on; it stands in the sidecar, beside the pair.

    Attributes:
        chosen_reward: mean reward of the chosen action's decisions.
        rejected_reward: mean reward of the rejected action's decisions.
        margin: their difference.
        group_key: the kind's grouping key of the prompt's state.
        chosen_ids: ids of the decisions for the chosen action in this context.
        rejected_ids: ids of the decisions for the rejected action in this context.
        is_contradicted: whether some single decisions rank the two actions the other way round by
            more than the margin; the means decided.
    """

    chosen_reward: float
    rejected_reward: float
    margin: float
    group_key: GroupKey
    chosen_ids: tuple[str, ...]
    rejected_ids: tuple[str, ...]
    is_contradicted: bool


@dataclass(frozen=True, slots=True)
class UnpairedExample:
    """A decision that is in no pair, for losses that need none.

    Attributes:
        prompt: the state as text.
        completion: the action as text.
        label: whether the reward is above zero; None for a reward of zero, which says neither.
        reward: in [-1, 1].
        id: of the decision.
        reason: why it is in no pair: "one_action", its context shows no other; "within_margin", no
            other action's reward is far enough; "not_selected", the strategy chose other pairs;
            "dropped", its pairs were duplicates or contradicted by others.
    """

    prompt: str
    completion: str
    label: bool | None
    reward: float
    id: str
    reason: UnpairedReason


@dataclass(frozen=True, slots=True)
class UnpairedCounts:
    """Decisions in no pair, by reason."""

    one_action: Count
    within_margin: Count
    not_selected: Count
    dropped: Count


@dataclass(frozen=True, slots=True)
class PairReport:
    """What became of the examples.

    Attributes:
        examples: decisions looked at.
        contexts: different prompts, or grouping keys.
        formed: pairs found by the strategy.
        duplicates: pairs dropped because another context gave the same one.
        contradictions: pairs dropped because another context prefers the other action under the
            same prompt, and rests on more decisions; on a tie both are dropped.
        unique: pairs left.
        contradicted_by_single_decisions: pairs left whose ``is_contradicted`` is true.
        beyond_actions: pairs left with an answer that is not among the kind's ``actions()``, such
            as another priority: a policy that chooses among those never gives it.
        paired_examples: decisions that at least one pair rests on.
        unpaired_examples: the others, by reason.
        unlabelled_examples: unpaired decisions with a reward of zero, which are good for no label.
    """

    examples: Count
    contexts: Count
    formed: Count
    duplicates: Count
    contradictions: Count
    unique: Count
    contradicted_by_single_decisions: Count
    beyond_actions: Count
    paired_examples: Count
    unpaired_examples: UnpairedCounts
    unlabelled_examples: Count


class UnpairedExamples(Sequence[UnpairedExample], Generic[State, Action]):
    """The unpaired rows of some examples; each is read when it is asked for."""

    def __init__(
        self, examples: Examples[State, Action], rows: NDArray[np.int64], reasons: NDArray[np.int64]
    ) -> None:
        self._examples, self._rows, self._reasons = examples, rows, reasons
        self._rewards = examples.columns().rewards[rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> UnpairedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[UnpairedExample]: ...
    def __getitem__(self, index: int | slice) -> UnpairedExample | Sequence[UnpairedExample]:
        if isinstance(index, slice):
            return UnpairedExamples(self._examples, self._rows[index], self._reasons[index])
        row, reward = int(self._rows[index]), float(self._rewards[index])
        return UnpairedExample(
            prompt=self._examples.prompt(row),
            completion=self._examples.response(row),
            label=reward > 0 if reward else None,
            reward=reward,
            id=self._examples.id(row),
            reason=_REASONS[self._reasons[index]],
        )

    def count_by_reason(self) -> UnpairedCounts:
        """Return how many rows there are for each reason."""
        counts = np.bincount(self._reasons, minlength=len(_REASONS)).tolist()
        return UnpairedCounts(**dict(zip(_REASONS, counts, strict=True)))

    def count_unlabelled(self) -> int:
        """Return how many rows have a reward of zero."""
        return int(np.sum(self._rewards == 0))


@dataclass(frozen=True, slots=True)
class PairFormation:
    """The pairs, what each rests on (in that order), the decisions in no pair, and the counts."""

    pairs: Sequence[PreferencePair]
    evidence: Sequence[PairEvidence]
    unpaired: Sequence[UnpairedExample]
    report: PairReport


def form_pairs(
    examples: Sequence[Example[State, Action]],
    kind: TypedKind[State, Action],
    options: PairOptions | None = None,
) -> PairFormation:
    """Form the preference pairs of one side of a split.

    Contexts come in order of their first example, within a context the widest margin first.

    Raises:
        InputError: ``options.weight`` needs a confidence that a paired decision lacks.
    """
    options = options or PairOptions()
    table = Examples.of(examples, kind)
    columns = table.columns()
    contexts = columns.prompts if options.match == "prompt" else columns.groups
    arms = find_arms(number_by_appearance(contexts), columns.actions, columns.rewards)
    drafts = find_drafts(
        arms,
        table.table.responses,
        strategy=options.strategy,
        margin=options.threshold,
        limit=options.max_pairs_per_context,
    )
    kept, duplicates, contradictions = resolve(drafts, arms, columns.prompts)
    evidence = [_evidence(draft, arms, table, options.threshold) for draft in kept]
    unpaired = _unpaired(drafts, kept, arms, table, options.threshold)
    pairs = _pairs(kept, arms, table, options.weight)
    report = PairReport(
        examples=len(table),
        contexts=len(np.unique(contexts)),
        formed=len(drafts),
        duplicates=duplicates,
        contradictions=contradictions,
        unique=len(kept),
        contradicted_by_single_decisions=sum(each.is_contradicted for each in evidence),
        beyond_actions=_count_beyond_actions(pairs, kind),
        paired_examples=len(table) - len(unpaired),
        unpaired_examples=unpaired.count_by_reason(),
        unlabelled_examples=unpaired.count_unlabelled(),
    )
    return PairFormation(pairs, evidence, unpaired, report)


def _count_beyond_actions(pairs: Sequence[PreferencePair], kind: TypedKind[State, Action]) -> int:
    """Count the pairs with an answer that the kind does not list; a kind may list none."""
    listed = {kind.render_action(action) for action in kind.actions()}
    if not listed:
        return 0
    return sum(pair.chosen not in listed or pair.rejected not in listed for pair in pairs)


def _pairs(
    drafts: Sequence[Draft], arms: Arms, examples: Examples[State, Action], weight: Weight
) -> list[PreferencePair]:
    weights = _weights(drafts, arms, examples.columns().confidences, weight)
    return [
        PreferencePair(
            prompt=examples.prompt(int(arms.best_row[draft.chosen])),
            chosen=examples.response(int(arms.best_row[draft.chosen])),
            rejected=examples.response(int(arms.best_row[draft.rejected])),
            weight=weight,
        )
        for draft, weight in zip(drafts, weights, strict=True)
    ]


def _weights(
    drafts: Sequence[Draft], arms: Arms, confidences: NDArray[np.float64], weight: Weight
) -> list[float]:
    """Return each pair's weight in training."""
    weights = [arms.margin(draft) if "margin" in weight else 1.0 for draft in drafts]
    if "confidence" not in weight:
        return weights
    means = [float(confidences[arms.rows_of(draft)].mean()) for draft in drafts]
    missing = int(np.isnan(means).sum())
    if missing:
        raise InputError(
            f"weight {weight!r} needs the confidence of every decision, but in {missing} of "
            f"{len(drafts)} pairs one is missing; use weight 'none' or 'margin'"
        )
    return [weight * mean for weight, mean in zip(weights, means, strict=True)]


def _evidence(
    draft: Draft, arms: Arms, examples: Examples[State, Action], threshold: float
) -> PairEvidence:
    chosen, rejected = draft
    return PairEvidence(
        chosen_reward=float(arms.reward[chosen]),
        rejected_reward=float(arms.reward[rejected]),
        margin=arms.margin(draft),
        group_key=examples.group(int(arms.best_row[chosen])),
        chosen_ids=tuple(examples.id(row) for row in arms.rows_of([chosen])),
        rejected_ids=tuple(examples.id(row) for row in arms.rows_of([rejected])),
        is_contradicted=bool(arms.highest[rejected] - arms.lowest[chosen] > threshold),
    )


def _unpaired(
    drafts: Sequence[Draft],
    kept: Sequence[Draft],
    arms: Arms,
    examples: Examples[State, Action],
    threshold: float,
) -> UnpairedExamples[State, Action]:
    """Find the examples on which no pair rests, and why."""
    _, context, context_size = np.unique(arms.context, return_inverse=True, return_counts=True)
    best = np.full(len(context_size), -np.inf)
    worst = np.full(len(context_size), np.inf)
    np.maximum.at(best, context, arms.reward)
    np.minimum.at(worst, context, arms.reward)
    widest = np.maximum(best[context] - arms.reward, arms.reward - worst[context])  # (A,)
    is_drafted, is_paired = (_is_among(each, len(context)) for each in (drafts, kept))
    reason = np.select(
        [context_size[context] == 1, widest <= threshold, is_drafted],
        [_REASONS.index("one_action"), _REASONS.index("within_margin"), _REASONS.index("dropped")],
        default=_REASONS.index("not_selected"),
    )
    per_arm = np.diff(arms.starts)
    is_left = np.repeat(~is_paired, per_arm)
    rows, reasons = arms.rows[is_left], np.repeat(reason, per_arm)[is_left]
    in_order = np.argsort(rows)
    return UnpairedExamples(examples, rows[in_order], reasons[in_order])


def _is_among(drafts: Sequence[Draft], arms: int) -> NDArray[np.bool_]:
    """Mark the arms (A,) that one of the drafts holds."""
    mask = np.zeros(arms, dtype=np.bool_)
    mask[[arm for draft in drafts for arm in draft]] = True
    return mask


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
