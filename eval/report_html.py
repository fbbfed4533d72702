"""One self-contained HTML page for an evaluation or a comparison: no script, no network.

Every text from the data passes through ``escape``.
"""

import json
from collections.abc import Iterable, Mapping

from dpo.eval.bootstrap import ConfidenceInterval
from dpo.eval.comparison import Difference, Disagreement, PolicyComparison
from dpo.eval.evaluation import EvaluationResult
from dpo.eval.off_policy import OffPolicyValue
from dpo.eval.plots import (
    Bar,
    confusion_table,
    escape,
    histogram,
    interval_plot,
    reliability_plot,
    time_plot,
)
from dpo.eval.preference_pairs import PairComparison, PairEvaluation
from dpo.eval.ranking import Ranking
from dpo.eval.report_text import (
    chance,
    describe_intervals,
    figure,
    number,
    share,
    signed_figure,
    title,
)

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#59636e;--rule:#d1d9e0;
--a:#0b62c4;--b:#b45309;--tint:11,98,196}
@media(prefers-color-scheme:dark){:root{--page:#0f1318;--ink:#e6edf3;--soft:#9aa6b2;--rule:#2f3742;
--a:#6cb0ff;--b:#f2a65a;--tint:108,176,255}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:68rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}
.soft,caption,figcaption,.axis{color:var(--soft);font-size:.875rem}
.winner{font-size:1.15rem;font-weight:600}
.note{border-left:3px solid var(--b);padding-left:.7rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 2rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.25rem .6rem .25rem 0;text-align:left;vertical-align:top;font-weight:400}
thead th{color:var(--soft);font-size:.875rem;border-bottom:1px solid var(--rule)}
.figure{white-space:nowrap;font-variant-numeric:tabular-nums}
.intervals{table-layout:auto}
.intervals .plot{width:45%;padding-right:0;vertical-align:middle}
.intervals svg{display:block;width:100%;height:20px}
.axis{display:flex;justify-content:space-between;padding-right:0}
.confusion{width:auto}
.confusion td,.confusion th{padding:.35rem .7rem;text-align:right}
.confusion tbody td{background:rgba(var(--tint),calc(var(--share)*.45));
font-variant-numeric:tabular-nums}
figure{margin:.5rem 0}
figure svg{display:block;width:100%;overflow:visible}
line,polyline{stroke:currentColor;fill:none;stroke-width:1.5}
line.a,polyline.a{stroke:var(--a)}line.b{stroke:var(--b)}
line.a,line.b{stroke-width:2}line.thick{stroke-width:4}
line.faint{stroke:var(--soft);stroke-dasharray:3 3;stroke-width:1}
line.axis{stroke:var(--rule)}
circle.a,rect.a{fill:var(--a)}
text{fill:var(--soft);font-size:12px}
code{font-size:.85rem;overflow-wrap:anywhere}
.examples{min-width:46rem}
.examples td{border-bottom:1px solid var(--rule)}
details summary{cursor:pointer;color:var(--soft);font-size:.875rem}
@media(max-width:40rem){.intervals tr,.intervals th,.intervals td{display:block;padding:0}
.intervals .figure{white-space:normal;color:var(--soft)}
.intervals .plot{width:auto;padding-bottom:.5rem}
.intervals .axis{display:flex}.intervals tfoot td:not(.axis){display:none}}
"""


def evaluation_page(result: EvaluationResult) -> str:
    """Show one policy."""
    return _page(
        f"Evaluation of {result.policy}",
        _summary(result),
        _notes(result.notes),
        *_evaluation_sections(result),
    )


def comparison_page(comparison: PolicyComparison) -> str:
    """Show two policies on the same examples, and where they differ."""
    a, b = comparison.policy_a, comparison.policy_b
    names = {"A": f"A: {a.policy}", "B": f"B: {b.policy}", "tie": "Tie"}
    return _page(
        f"{a.policy} against {b.policy}",
        f"<p class=winner>Winner: {escape(names[comparison.winner])}</p>"
        f"<p>{escape(comparison.verdict)}</p>",
        _summary(b),
        _notes(dict.fromkeys([*a.notes, *b.notes])),
        _section("Differences, B minus A", _difference_plot(comparison.differences)),
        _section("Both policies", _both_plot(a, b)),
        _section(
            "Where they differ",
            f"<p>The actions differ on {comparison.disagreement_count} of {a.examples} examples, "
            f"of which the first {len(comparison.disagreements)} are shown. "
            f"A alone names the logged class on {comparison.mcnemar.only_a} of them, B alone on "
            f"{comparison.mcnemar.only_b} (McNemar p {chance(comparison.mcnemar.p_value)}).</p>"
            + _disagreement_table(comparison.disagreements)
            if comparison.disagreement_count
            else f"<p>Both take the same action on all {a.examples} examples.</p>",
        ),
        f"<h1>A: {escape(a.policy)}</h1>",
        *_evaluation_sections(a),
        f"<h1>B: {escape(b.policy)}</h1>",
        *_evaluation_sections(b),
    )


def ranking_page(ranking: Ranking) -> str:
    """Show several policies, the best first."""
    bars = [
        Bar(
            f"{place}. {each.policy}"
            + (" (tie)" if each.behind_best and each.is_tied_with_best else ""),
            each.estimate,
            figure(ranking.metric, each.estimate) if each.estimate else f"{each.refusal}",
        )
        for place, each in enumerate(ranking.policies, start=1)
    ]
    return _page(
        f"Ranking by {title(ranking.metric)}",
        f"<p class=soft>{ranking.examples} examples; a tie could be the best as well.</p>",
        interval_plot(bars),
    )


def pair_page(result: PairEvaluation) -> str:
    """Show one model's agreement with preference pairs."""
    bars = [Bar(title(name), each, figure(name, each)) for name, each in result.metrics.items()]
    return _page(
        "Reward accuracy on preference pairs",
        f"<p class=soft>{result.pairs} pairs, {result.ties} ties. "
        f"{escape(describe_intervals(result.options))}.</p>",
        _section("Metrics", interval_plot(bars)),
        _section("Calibration", reliability_plot(result.calibration.bins)),
    )


def pair_comparison_page(comparison: PairComparison, name_a: str = "A", name_b: str = "B") -> str:
    """Show two models on the same preference pairs."""
    bars = [
        bar
        for name, each in comparison.a.metrics.items()
        for bar in _two_bars(name, each, comparison.b.metrics[name])
    ]
    names = {"A": name_a, "B": name_b, "tie": "Tie"}
    return _page(
        "Two models on the same preference pairs",
        f"<p>A: {escape(name_a)}<br>B: {escape(name_b)}</p>"
        f"<p class=winner>Winner: {escape(names[comparison.winner])}</p>"
        f"<p>{escape(comparison.verdict)}</p>"
        f"<p class=soft>{comparison.a.pairs} pairs. "
        f"{escape(describe_intervals(comparison.a.options))}.</p>",
        _section("Differences, B minus A", _difference_plot(comparison.differences)),
        _section("Both models", interval_plot(bars)),
        _section(
            "Calibration",
            "<div class=pair><div><h3>A</h3>"
            f"{reliability_plot(comparison.a.calibration.bins)}</div><div><h3>B</h3>"
            f"{reliability_plot(comparison.b.calibration.bins)}</div></div>",
        ),
    )


def _page(heading: str, *parts: str) -> str:
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(heading)}</h1>{''.join(parts)}</main></body></html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _summary(result: EvaluationResult) -> str:
    return (
        f"<p class=soft>{escape(result.kind)}, {result.examples} examples in {result.groups} "
        f"independent groups. {escape(describe_intervals(result.options.bootstrap))}.</p>"
    )


def _notes(notes: Iterable[str]) -> str:
    return "".join(f"<p class=note>{escape(note)}</p>" for note in notes)


def _evaluation_sections(result: EvaluationResult) -> list[str]:
    averages, agreement = result.classification.averages, result.agreement
    shares = [
        Bar(name, each, share(each))
        for name, each in [
            ("Accuracy", averages["accuracy"]),
            ("Precision", averages["precision"]),
            ("Recall", averages["recall"]),
            ("F1 score", averages["f1"]),
            ("Macro F1", averages["macro_f1"]),
            ("Whole action agrees", agreement.full_action),
            (f"Agrees with {agreement.good_count} rewarded actions", agreement.good),
            (f"Agrees with {agreement.bad_count} punished actions", agreement.bad),
        ]
    ]
    classes = [
        Bar(f"{name} ({scores.support})", scores.f1, share(scores.f1))
        for name, scores in result.classification.per_class.items()
    ]
    by_class = [
        Bar(name, each, number(each)) for name, each in result.logged_reward_by_class.items()
    ]
    calibration = result.calibration
    over_time = (
        "<p class=soft>The examples carry no times.</p>"
        if result.trend is None
        else time_plot(result.trend.windows)
        + f"<p>{escape(result.trend.direction)}: {number(result.trend.slope)} in 30 days</p>"
    )
    return [
        _section("Agreement with the log", interval_plot(shares)),
        _section("Reward of this policy", _value(result.off_policy)),
        _section(
            "Classes",
            "<div class=pair><div class=scroll>"
            + confusion_table(result.classification.classes, result.classification.confusion)
            + "</div><div><p class=soft>F1 score of each class (number of examples)</p>"
            + f"{interval_plot(classes)}</div></div>",
        ),
        _section(
            "Calibration",
            f"<p>Expected error {number(calibration.expected_error)}, Brier score "
            f"{number(calibration.brier)}</p>{reliability_plot(calibration.bins)}",
        ),
        _section(
            "What the logged actions earned",
            f"<h3>By class</h3>{interval_plot(by_class, zero=0.0)}"
            f"<div class=pair><div>{histogram(result.logged_rewards.histogram)}</div>"
            f"<div>{over_time}</div></div>",
        ),
    ]


def _value(value: OffPolicyValue) -> str:
    basis = (
        f"<p class=soft>Effective sample size {value.effective_sample_size:.0f}, coverage "
        f"{value.coverage:.0%}, propensities {value.propensity_source}, largest weight "
        f"{value.largest_weight:.1f}, {value.cut_share:.1%} of the weights cut.</p>"
    )
    if value.refusal is not None:
        return f"<p class=note>Not estimable: {escape(value.refusal)}</p>{basis}"
    estimates = [
        ("Doubly robust", value.doubly_robust),
        ("IPS", value.ips),
        ("SNIPS", value.snips),
    ]
    bars = [Bar(name, each, number(each)) for name, each in estimates if each is not None]
    direct = f"<p>Direct method: {value.direct:.4f}</p>" if value.direct is not None else ""
    return interval_plot(bars, zero=0.0) + direct + basis


def _difference_plot(differences: Mapping[str, Difference]) -> str:
    bars = [
        Bar(
            title(name) + ("" if each.is_better_higher else " (lower is better)"),
            each.interval,
            f"{signed_figure(name, each.interval)}, p {chance(each.adjusted_p_value)}",
        )
        for name, each in differences.items()
    ]
    return interval_plot(bars, zero=0.0) + "<p class=soft>p-values after Holm's correction.</p>"


def _both_plot(a: EvaluationResult, b: EvaluationResult) -> str:
    bars: list[Bar] = []
    for name in ("accuracy", "f1", "macro_f1"):
        bars += _two_bars(name, a.classification.averages[name], b.classification.averages[name])
    bars += _two_bars("good_agreement", a.agreement.good, b.agreement.good)
    bars += _two_bars("bad_agreement", a.agreement.bad, b.agreement.bad)
    value_a, value_b = a.off_policy.doubly_robust, b.off_policy.doubly_robust
    if value_a is not None and value_b is not None:
        bars += _two_bars("avg_reward", value_a, value_b)
    return interval_plot(bars)


def _two_bars(metric: str, a: ConfidenceInterval, b: ConfidenceInterval) -> list[Bar]:
    return [
        Bar(f"{title(metric)}, A", a, figure(metric, a), "a"),
        Bar(f"{title(metric)}, B", b, figure(metric, b), "b"),
    ]


def _disagreement_table(disagreements: Iterable[Disagreement]) -> str:
    rows = "".join(
        f"<tr><td><details><summary>{escape(each.id)}</summary><code>"
        f"{escape(json.dumps(each.state, ensure_ascii=False))}</code></details></td>"
        f"<td><code>{escape(each.action_a)}</code></td><td><code>{escape(each.action_b)}</code></td>"
        f"<td><code>{escape(each.logged_action)}</code></td>"
        f"<td class=figure>{each.reward:+.2f}</td></tr>"
        for each in disagreements
    )
    head = "".join(
        f"<th scope=col>{name}</th>" for name in ("Example", "A", "B", "Logged", "Reward")
    )
    return (
        f"<div class=scroll><table class=examples><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
