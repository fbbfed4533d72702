"""Evaluate one policy on logged decisions.

Shapes: N examples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dpo.errors import InputError
from dpo.eval.bootstrap import DEFAULTS, BootstrapOptions, ConfidenceInterval, bootstrap
from dpo.eval.calibration import Calibration, calibrate
from dpo.eval.classification import Classification, ClassScores, classify
from dpo.eval.examples import EvaluationExample, as_examples
from dpo.eval.metrics import METRICS, Decided, decide_examples
from dpo.eval.off_policy import Arms, DecisionLog, OffPolicyValue, estimate_value, make_log
from dpo.eval.policies import Policy
from dpo.eval.rewards import (
    RewardDistribution,
    Trend,
    reward_by_class,
    reward_distribution,
    reward_trend,
)

FEW_GROUPS = 50  # below which intervals are noted to be too short


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How a policy is evaluated."""

    bootstrap: BootstrapOptions = DEFAULTS
    """How intervals are made."""
    by_session: bool = True
    """Draw whole sessions, whose decisions are not independent; false draws single examples."""
    stratify_by_class: bool = False
    """Hold the number of examples of each expected class fixed in the intervals of classification
    and calibration."""
    arms: Arms = "action"
    """What the off-policy value tells apart: "action" or "class" (see ``off_policy.make_log``)."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.stratify_by_class and self.by_session:
            raise InputError(
                "stratify_by_class needs by_session=False: a session holds decisions of several "
                "classes and cannot be drawn within one of them"
            )


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often the policy does what was logged, told apart by what that earned."""

    full_action: ConfidenceInterval
    """The whole action agrees (ids left out), not its class alone."""
    good: ConfidenceInterval
    """The class agrees, among examples with a reward above 0."""
    bad: ConfidenceInterval
    """The class agrees, among examples with a reward below 0: the lower, the better."""
    good_count: int
    bad_count: int


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Everything that is known about one policy on one set of examples."""

    policy: str
    kind: str
    examples: int
    groups: int
    """Independent units: sessions, or examples if ``by_session`` is false."""
    classification: Classification
    agreement: Agreement
    calibration: Calibration
    off_policy: OffPolicyValue
    logged_rewards: RewardDistribution
    logged_reward_by_class: Mapping[str, ConfidenceInterval]
    trend: Trend | None
    """None where examples carry no time, or all the same."""
    fallbacks: Mapping[str, int]
    """How often the rules answered instead of the policy, by the reason why."""
    options: EvaluationOptions
    notes: tuple[str, ...] = field(default=())
    """What a reader must know before believing the figures."""

    @property
    def accuracy(self) -> float:
        """Share of examples in which the policy's class is the logged one."""
        return self.classification.averages["accuracy"].mean

    @property
    def precision(self) -> float:
        """Precision, averaged over classes with their support as weights."""
        return self.classification.averages["precision"].mean

    @property
    def recall(self) -> float:
        """Recall, averaged like precision; equal to accuracy."""
        return self.classification.averages["recall"].mean

    @property
    def f1(self) -> float:
        """F1, averaged like precision."""
        return self.classification.averages["f1"].mean

    @property
    def avg_reward(self) -> float | None:
        """Mean reward of this policy, doubly robust; None where the log does not tell."""
        value = self.off_policy.doubly_robust
        return None if value is None else value.mean

    @property
    def reward_std_dev(self) -> float | None:
        """Standard deviation of the rewards under this policy; None where the log does not tell."""
        return self.off_policy.reward_std_dev

    @property
    def confusion_matrix(self) -> dict[str, dict[str, int]]:
        """Counts by expected class, then by predicted class."""
        names, rows = self.classification.classes, self.classification.confusion
        return {
            name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)
        }

    @property
    def per_class_metrics(self) -> Mapping[str, ClassScores]:
        """Precision, recall, F1 and support of each class."""
        return self.classification.per_class


def evaluate_policy(
    policy: Policy, test_data: Iterable[object], options: EvaluationOptions | None = None
) -> EvaluationResult:
    """Evaluate ``policy`` on logged decisions.

    Args:
        policy: decides every state; where it fails the rules answer, and that is counted.
        test_data: ``dpo.data`` examples, or mappings with state, expected_action and reward.
        options: None means the defaults.

    Raises:
        InputError: no examples, examples of another kind or out of range, fewer than two sessions,
            a policy that fails in every state.

    Example:
        >>> from dpo import build_extraction_dataset, evaluate_policy
        >>> from dpo.data.kinds.extraction import EXTRACTION
        >>> from dpo.eval.policies import RulesPolicy
        >>> dataset = build_extraction_dataset("feedback.db", split_by="group")
        >>> result = evaluate_policy(RulesPolicy(EXTRACTION), dataset.eval)
        >>> result.examples == len(dataset.eval)
        True
    """
    options = options or EvaluationOptions()
    examples = as_examples(test_data, policy.kind)
    log = prepare_log(policy, examples, options)
    return evaluate_decided(decide_examples(policy, examples, log), options)


def prepare_log(
    policy: Policy, examples: Sequence[EvaluationExample], options: EvaluationOptions
) -> DecisionLog:
    """Prepare what the evaluations of all policies on the same examples share.

    Raises:
        InputError: fewer than two sessions.
    """
    groups = group_keys(examples, options)
    if len(set(groups)) < 2:
        raise InputError(
            f"all {len(examples)} examples come from one session, so nothing tells how far results "
            "would vary; by_session=False takes every example as independent"
        )
    return make_log(examples, policy.kind, groups, arms=options.arms, seed=options.bootstrap.seed)


def group_keys(examples: Sequence[EvaluationExample], options: EvaluationOptions) -> list[str]:
    """Return a key for each example, equal where examples are drawn together."""
    if options.by_session:
        return [example.session_id for example in examples]
    return [str(index) for index in range(len(examples))]


def evaluate_decided(decided: Decided, options: EvaluationOptions) -> EvaluationResult:
    """Compute every figure of a policy from what it decided.

    Raises:
        InputError: as ``bootstrap``.
    """
    log, ways = decided.log, options.bootstrap
    strata = decided.expected if options.stratify_by_class else None
    groups = None if options.stratify_by_class else log.groups
    reasons = Counter(decision.fallback_reason for decision in decided.decisions)
    del reasons[None]
    return EvaluationResult(
        policy=decided.policy,
        kind=decided.kind.name,
        examples=len(decided.examples),
        groups=len(set(log.groups)),
        classification=classify(
            decided.expected, decided.predicted, ways, groups=groups, strata=strata
        ),
        agreement=_agreement(decided, ways),
        calibration=calibrate(
            decided.confidences, decided.is_right, ways, groups=groups, strata=strata
        ),
        off_policy=estimate_value(log, decided.chances, ways),
        logged_rewards=reward_distribution(log.rewards, ways, groups=log.groups),
        logged_reward_by_class=reward_by_class(
            log.rewards, decided.expected, ways, groups=log.groups
        ),
        trend=reward_trend(
            log.rewards, [each.decided_at for each in decided.examples], ways, groups=log.groups
        ),
        fallbacks={str(reason): count for reason, count in reasons.most_common()},
        options=options,
        notes=tuple(_notes(decided)),
    )


def _agreement(decided: Decided, options: BootstrapOptions) -> Agreement:
    full, good, bad = (
        bootstrap(
            METRICS[name].columns(decided),
            METRICS[name].statistic,
            options,
            groups=decided.log.groups,
        )[0]
        for name in ("full_action_agreement", "good_agreement", "bad_agreement")
    )
    rewards = decided.log.rewards
    return Agreement(full, good, bad, int((rewards > 0.0).sum()), int((rewards < 0.0).sum()))


def _notes(decided: Decided) -> list[str]:
    notes = []
    if len(set(decided.expected)) == 1:
        notes.append(
            f"every example has the class {decided.expected[0]!r}: a policy that always says so "
            "would have an accuracy of 100%"
        )
    groups = len(set(decided.log.groups))
    if groups < FEW_GROUPS:
        notes.append(
            f"with {groups} independent groups a bootstrap interval of 95% covers less than that "
            "(README.md has the measured rates)"
        )
    failed = sum(decision.fallback_reason is not None for decision in decided.decisions)
    if failed:
        notes.append(
            f"the policy failed in {failed} of {len(decided.decisions)} states, where the rules "
            "answered instead: these figures are of both together"
        )
    return notes
