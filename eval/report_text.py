"""Reports for the terminal, in the shape of the document that this package implements."""

import math
from collections.abc import Iterable, Mapping, Sequence

from dpo.eval.bootstrap import BootstrapOptions, ConfidenceInterval
from dpo.eval.classification import Classification
from dpo.eval.comparison import Difference, PolicyComparison
from dpo.eval.evaluation import EvaluationResult
from dpo.eval.off_policy import OffPolicyValue
from dpo.eval.preference_pairs import PairComparison, PairEvaluation
from dpo.eval.ranking import ABTest, Ranking

RULE = "=" * 50
SHARES = {
    "accuracy", "f1", "macro_f1", "full_action_agreement", "good_agreement", "bad_agreement",
    "reward_accuracy", "length_controlled_accuracy", "chosen_likelier",
}  # fmt: skip
"""Metrics that are printed as percentages."""
TITLES = {
    "avg_reward": "Avg reward",
    "accuracy": "Accuracy",
    "f1": "F1 score",
    "macro_f1": "Macro F1",
    "full_action_agreement": "Full action agrees",
    "good_agreement": "Agrees with rewarded actions",
    "bad_agreement": "Agrees with punished actions",
    "calibration_error": "Calibration error",
    "brier": "Brier score",
    "reward_accuracy": "Reward accuracy",
    "margin": "Reward margin",
    "length_controlled_accuracy": "Length-controlled accuracy",
    "chosen_likelier": "Chosen is likelier",
    "log_loss": "Log loss",
}


def format_evaluation_report(result: EvaluationResult) -> str:
    """Describe one policy; ends with a newline.

    Example:
        >>> from dpo import build_extraction_dataset, evaluate_policy, format_evaluation_report
        >>> from dpo.data.kinds.extraction import EXTRACTION
        >>> from dpo.eval.policies import RulesPolicy
        >>> dataset = build_extraction_dataset("feedback.db", split_by="group")
        >>> result = evaluate_policy(RulesPolicy(EXTRACTION), dataset.eval)
        >>> "Confusion Matrix:" in format_evaluation_report(result)
        True
    """
    averages = result.classification.averages
    agreement, calibration = result.agreement, result.calibration
    sections = [
        _head("Policy Evaluation Report"),
        [
            f"Policy: {result.policy} ({result.kind}), {result.examples} examples in "
            f"{result.groups} independent groups",
            describe_intervals(result.options.bootstrap),
        ],
        [
            "Overall Metrics:",
            f"  Accuracy:  {share(averages['accuracy'])}",
            f"  Precision: {share(averages['precision'])}",
            f"  Recall:    {share(averages['recall'])}",
            f"  F1 Score:  {share(averages['f1'])}",
            f"  Macro F1:  {share(averages['macro_f1'])}",
        ],
        ["Reward Statistics:", *_value_lines(result.off_policy), *_logged_lines(result)],
        [
            "Agreement:",
            f"  Whole action:     {share(agreement.full_action)}",
            f"  Rewarded actions: {share(agreement.good)}  ({agreement.good_count} examples)",
            f"  Punished actions: {share(agreement.bad)}  ({agreement.bad_count} examples)",
        ],
        [
            "Calibration:",
            f"  Expected error: {number(calibration.expected_error)}",
            f"  Brier score:    {number(calibration.brier)}",
        ],
        ["Per-Class Metrics:", *_class_lines(result.classification)],
        ["Confusion Matrix:", *_confusion_lines(result.classification)],
        [f"Note: {note}" for note in result.notes],
    ]
    return _joined(sections)


def format_comparison_report(
    comparison: PolicyComparison, name_a: str | None = None, name_b: str | None = None
) -> str:
    """Describe two policies on the same examples; names default to the policies' own.

    Example:
        >>> from dpo import build_extraction_dataset, compare_policies, format_comparison_report
        >>> from dpo.data.kinds.extraction import EXTRACTION
        >>> from dpo.eval.policies import RulesPolicy, UniformPolicy
        >>> dataset = build_extraction_dataset("feedback.db", split_by="group")
        >>> chance, rules = UniformPolicy(EXTRACTION), RulesPolicy(EXTRACTION)
        >>> found = compare_policies(chance, rules, dataset.eval)
        >>> "Winner:" in format_comparison_report(found, "chance", "rules")
        True
    """
    a, b = comparison.policy_a, comparison.policy_b
    names = {"A": name_a or a.policy, "B": name_b or b.policy, "tie": "Tie"}
    improvements = comparison.improvements
    sections = [
        _head("Policy Comparison Report"),
        [
            f"{names['A']} vs {names['B']}",
            f"Winner: {names[comparison.winner]}",
            f"  {comparison.verdict}",
            describe_intervals(a.options.bootstrap),
        ],
        [
            "Improvements (B - A):",
            f"  Accuracy:   {improvements.accuracy:+.2%}",
            f"  Avg Reward: {_or_unknown(improvements.avg_reward, '+.4f')}",
            f"  F1 Score:   {improvements.f1:+.2%}",
        ],
        ["Differences (B - A):", *_difference_lines(comparison.differences)],
        [
            f"McNemar on accuracy: A alone right {comparison.mcnemar.only_a}, B alone right "
            f"{comparison.mcnemar.only_b}, p = {chance(comparison.mcnemar.p_value)}"
        ],
        _policy_lines(names["A"], a),
        _policy_lines(names["B"], b),
        [f"The actions differ on {comparison.disagreement_count} of {a.examples} examples."],
        [f"Note: {note}" for note in dict.fromkeys([*a.notes, *b.notes])],
    ]
    return _joined(sections)


def format_ranking(ranking: Ranking) -> str:
    """Describe several policies, the best first."""
    rows = [["", "Policy", title(ranking.metric), "Behind the best", "p (Holm)"]]
    for place, each in enumerate(ranking.policies, start=1):
        gap = each.behind_best
        tied = " (tie)" if each.is_tied_with_best and gap else ""
        rows.append(
            [
                f"{place}.",
                each.policy,
                figure(ranking.metric, each.estimate) if each.estimate else "not estimable",
                f"{signed_figure(ranking.metric, gap.interval)}{tied}" if gap else "",
                chance(gap.adjusted_p_value) if gap else "",
            ]
        )
    refusals = [f"{each.policy}: {each.refusal}" for each in ranking.policies if each.refusal]
    head = [*_head("Policy Ranking"), f"{ranking.examples} examples, by {title(ranking.metric)}"]
    return _joined([head, _aligned(rows), refusals])


def format_ab_test_report(test: ABTest, name_a: str = "Policy A", name_b: str = "Policy B") -> str:
    """Describe an A/B test."""
    names = {"A": name_a, "B": name_b, "tie": "No clear winner"}
    effect = "unknown" if test.effect_size is None else f"{test.effect_size:.3f} (Cohen's d)"
    return _joined(
        [
            _head("A/B Test Report"),
            [
                f"{name_a}: {test.examples_a} examples, {figure(test.metric, test.a)}",
                f"{name_b}: {test.examples_b} examples, {figure(test.metric, test.b)}",
                f"Winner: {names[test.winner]}",
                f"P-value: {chance(test.p_value)}",
            ],
            [
                "Performance Differences (B - A):",
                f"  {title(test.metric)}: {signed_figure(test.metric, test.difference)}",
                f"  Effect Size: {effect}",
            ],
            [f"Recommendation: {_recommendation(test, names[test.winner])}"],
        ]
    )


def format_pair_report(result: PairEvaluation) -> str:
    """Describe a model's agreement with preference pairs."""
    ties = f", {result.ties} with equal rewards" if result.ties else ""
    longer = (
        []
        if result.chosen_is_longer is None
        else [f"The chosen answer is the longer one in {result.chosen_is_longer:.1%} of the pairs."]
    )
    rows = [["  " + title(name) + ":", figure(name, each)] for name, each in result.metrics.items()]
    return _joined(
        [
            _head("Preference Pair Report"),
            [f"{result.pairs} pairs{ties}", describe_intervals(result.options)],
            [*_aligned(rows), *longer],
        ]
    )


def format_pair_comparison(comparison: PairComparison, name_a: str = "A", name_b: str = "B") -> str:
    """Describe two models on the same pairs."""
    names = {"A": name_a, "B": name_b, "tie": "Tie"}
    rows = [["", name_a, name_b]]
    rows += [
        [f"  {title(name)}:", figure(name, each), figure(name, comparison.b.metrics[name])]
        for name, each in comparison.a.metrics.items()
    ]
    return _joined(
        [
            _head("Preference Pair Comparison"),
            [
                f"{name_a} vs {name_b}, {comparison.a.pairs} pairs",
                f"Winner: {names[comparison.winner]}",
                f"  {comparison.verdict}",
                describe_intervals(comparison.a.options),
            ],
            _aligned(rows),
            ["Differences (B - A):", *_difference_lines(comparison.differences)],
        ]
    )


def describe_intervals(options: BootstrapOptions) -> str:
    """Say how the intervals were made."""
    return (
        f"{100 * options.confidence:.4g}% intervals: {options.method} bootstrap, "
        f"{options.resamples} resamples, seed {options.seed}"
    )


def title(metric: str) -> str:
    """Return a metric's name for people."""
    return TITLES[metric]


def share(interval: ConfidenceInterval) -> str:
    """Write a share and its interval as percentages."""
    return _with_ends(interval, ".2%")


def number(interval: ConfidenceInterval) -> str:
    """Write a figure and its interval with four decimals."""
    return _with_ends(interval, ".4f")


def chance(p_value: float) -> str:
    """Write a p-value with four decimals."""
    return "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def figure(metric: str, interval: ConfidenceInterval) -> str:
    """Write a metric and its interval, shares as percentages."""
    return share(interval) if metric in SHARES else number(interval)


def signed_figure(metric: str, interval: ConfidenceInterval) -> str:
    """Write a difference of a metric and its interval, with signs."""
    return _with_ends(interval, "+.2%" if metric in SHARES else "+.4f")


def _with_ends(interval: ConfidenceInterval, form: str) -> str:
    if math.isnan(interval.mean):
        return "undefined"
    if not interval.is_defined:
        return f"{interval.mean:{form}}  (no interval)"
    return f"{interval.mean:{form}}  [{interval.lower:{form}}, {interval.upper:{form}}]"


def _or_unknown(value: float | None, form: str) -> str:
    return "not estimable" if value is None else f"{value:{form}}"


def _head(text: str) -> list[str]:
    return [text, RULE]


def _value_lines(value: OffPolicyValue) -> list[str]:
    basis = (
        f"  Basis:   effective sample size {value.effective_sample_size:.0f}, coverage "
        f"{value.coverage:.0%}, propensities {value.propensity_source}, largest weight "
        f"{value.largest_weight:.1f}, {value.cut_share:.1%} cut"
    )
    if value.doubly_robust is None:
        return [f"  Mean:    not estimable: {value.refusal}", basis]
    return [
        f"  Mean:    {number(value.doubly_robust)}  (of this policy, doubly robust)",
        f"  Std Dev: {_or_unknown(value.reward_std_dev, '.4f')}",
        f"  Direct:  {_or_unknown(value.direct, '.4f')}",
        f"  IPS:     {_or_not(value.ips)}",
        f"  SNIPS:   {_or_not(value.snips)}",
        basis,
    ]


def _or_not(interval: ConfidenceInterval | None) -> str:
    return number(interval) if interval else "not given: the propensities are estimated"


def _logged_lines(result: EvaluationResult) -> list[str]:
    rewards, trend = result.logged_rewards, result.trend
    lines = [
        f"  Logged:  {number(rewards.mean)}, std dev {rewards.std_dev:.4f}, quartiles "
        f"{rewards.q1:.4f} {rewards.median:.4f} {rewards.q3:.4f}"
    ]
    if trend is not None:
        lines.append(f"  Trend:   {trend.direction}, {_with_ends(trend.slope, '+.4f')} in 30 days")
    return lines


def _class_lines(classification: Classification) -> list[str]:
    lines = []
    for name, scores in classification.per_class.items():
        lines += [
            f"  {name}:",
            f"    Precision: {share(scores.precision)}",
            f"    Recall:    {share(scores.recall)}",
            f"    F1:        {share(scores.f1)}",
            f"    Support:   {scores.support}",
        ]
    return lines


def _confusion_lines(classification: Classification) -> list[str]:
    names = classification.classes
    rows = [["  actual \\ predicted", *names]]
    rows += [
        [f"  {name}", *map(str, row)]
        for name, row in zip(names, classification.confusion, strict=True)
    ]
    return _aligned(rows, is_numeric=True)


def _difference_lines(differences: Mapping[str, Difference]) -> list[str]:
    rows = [["  metric", "difference", "p", "p (Holm)", "detectable"]]
    rows += [
        [
            f"  {title(name)}",
            signed_figure(name, each.interval),
            chance(each.p_value),
            chance(each.adjusted_p_value),
            f"{each.smallest_detectable:{'.2%' if name in SHARES else '.4f'}}",
        ]
        for name, each in differences.items()
    ]
    return _aligned(rows)


def _policy_lines(name: str, result: EvaluationResult) -> list[str]:
    value = result.off_policy.doubly_robust
    return [
        f"{name}:",
        f"  Accuracy:   {share(result.classification.averages['accuracy'])}",
        f"  Avg Reward: {'not estimable' if value is None else number(value)}",
        f"  F1 Score:   {share(result.classification.averages['f1'])}",
    ]


def _recommendation(test: ABTest, winner: str) -> str:
    if test.winner == "tie":
        return "keep what is in use: the difference could be chance; more sessions would tell"
    small = test.effect_size is not None and abs(test.effect_size) < 0.2
    return f"use {winner}" + (", though the effect is small" if small else "")


def _aligned(rows: Sequence[Sequence[str]], *, is_numeric: bool = False) -> list[str]:
    """Pad cells to columns; all but the first are flush right if numeric."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [
            cell.rjust(width) if is_numeric else cell.ljust(width)
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _joined(sections: Iterable[Sequence[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
