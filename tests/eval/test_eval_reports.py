"""Reports: text in the document's shape, JSON, and pages that are safe and whole."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dpo.data.kinds import KINDS
from dpo.data.simulate import simulate
from dpo.eval.bootstrap import BootstrapOptions
from dpo.eval.comparison import PolicyComparison, compare_policies
from dpo.eval.evaluation import EvaluationOptions
from dpo.eval.examples import EvaluationExample, as_examples
from dpo.eval.policies import ConstantPolicy, Policy, RulesPolicy, UniformPolicy
from dpo.eval.preference_pairs import ScoredPairs, compare_pairs, evaluate_pairs
from dpo.eval.ranking import rank_policies
from dpo.eval.report_html import (
    comparison_page,
    evaluation_page,
    pair_comparison_page,
    pair_page,
    ranking_page,
)
from dpo.eval.report_json import comparison_to_json, evaluation_to_json, to_json
from dpo.eval.report_text import format_comparison_report, format_evaluation_report

KIND = KINDS["extraction"]
FEW = EvaluationOptions(bootstrap=BootstrapOptions(resamples=100))
WICKED = "<script>alert('&')</script>"


def _examples(count: int = 250) -> list[EvaluationExample]:
    examples = as_examples(simulate("extraction", count, 0), KIND)
    return [replace(each, id=f"{WICKED}{each.id}") for each in examples]


@pytest.fixture(scope="module")
def comparison() -> PolicyComparison:
    """Compare the rules with a policy of a wicked name that the log does not cover."""
    action = replace(KIND.actions()[2], priority=99)
    return compare_policies(
        RulesPolicy(KIND), ConstantPolicy(KIND, action, WICKED), _examples(), FEW
    )


@pytest.fixture(scope="module")
def pages(comparison: PolicyComparison) -> dict[str, str]:
    """Make one page of each type."""
    generator = np.random.default_rng(0)
    before, after = (
        ScoredPairs(
            tuple(map(str, range(60))),
            np.array(generator.normal(gap, 1, 60)),
            np.array(generator.integers(0, 2, 60), dtype=np.float64),
            np.array(generator.integers(0, 2, 60), dtype=np.float64),
            tuple(map(str, range(60))),
        )
        for gap in (0.0, 1.0)
    )
    policies: list[Policy] = [
        RulesPolicy(KIND),
        UniformPolicy(KIND),
        replace(RulesPolicy(KIND), name=WICKED),
    ]
    return {
        "evaluation": evaluation_page(comparison.policy_a),
        "comparison": comparison_page(comparison),
        "ranking": ranking_page(rank_policies(policies, _examples(), FEW)),
        "pairs": pair_page(evaluate_pairs(before, FEW.bootstrap)),
        "pair comparison": pair_comparison_page(
            compare_pairs(before, after, FEW.bootstrap), WICKED, "after"
        ),
    }


def test_the_evaluation_report_has_the_documents_shape(comparison: PolicyComparison) -> None:
    lines = format_evaluation_report(comparison.policy_a).splitlines()
    assert lines[:3] == ["Policy Evaluation Report", "=" * 50, ""]
    order = [
        "Overall Metrics:", "Reward Statistics:", "Per-Class Metrics:", "Confusion Matrix:",
    ]  # fmt: skip
    places = [lines.index(heading) for heading in order]
    assert places == sorted(places)
    overall = lines[places[0] + 1 : places[0] + 5]
    for line, name in zip(
        overall, ["Accuracy: ", "Precision:", "Recall:   ", "F1 Score: "], strict=True
    ):
        assert re.match(rf"  {name} \d+\.\d\d%  \[\d+\.\d\d%, \d+\.\d\d%\]$", line)
    assert re.match(r"  Mean:    -?\d\.\d{4}", lines[places[1] + 1])
    assert re.match(r"  Std Dev: \d\.\d{4}", lines[places[1] + 2])
    assert "  store:" in lines[places[2] :]
    assert re.match(r"    Support:   \d+$", lines[lines.index("  store:") + 4])


def test_the_confusion_matrix_has_a_column_for_every_class(comparison: PolicyComparison) -> None:
    text = format_evaluation_report(comparison.policy_b)
    header = next(line for line in text.splitlines() if "actual \\ predicted" in line)
    assert header.split()[3:] == ["defer", "skip", "store"]
    rows = text[text.index(header) :].splitlines()[1:4]
    assert [[int(cell) for cell in row.split()[1:]] for row in rows] == [
        list(row) for row in comparison.policy_b.classification.confusion
    ]


def test_a_reward_that_is_unknown_is_not_printed_as_a_number(comparison: PolicyComparison) -> None:
    text = format_evaluation_report(comparison.policy_b)
    assert "  Mean:    not estimable: the log rarely took the actions that the policy" in text


def test_the_comparison_report_has_signed_differences(comparison: PolicyComparison) -> None:
    report = format_comparison_report(comparison, "Baseline", "New Model")
    assert report.startswith("Policy Comparison Report\n" + "=" * 50)
    assert "Baseline vs New Model" in report
    assert "Winner: Tie" in report
    assert re.search(r"Improvements \(B - A\):\n  Accuracy:   [+-]\d+\.\d\d%", report)
    assert "  Avg Reward: not estimable" in report
    assert re.search(r"  F1 Score:   [+-]\d+\.\d\d%", report)


def test_json_has_the_documents_names(comparison: PolicyComparison) -> None:
    data = json.loads(json.dumps(evaluation_to_json(comparison.policy_a), allow_nan=False))
    assert data["accuracy"] == comparison.policy_a.accuracy
    assert data["avgReward"] == comparison.policy_a.avg_reward
    assert set(data["perClassMetrics"]["store"]) == {"precision", "recall", "f1", "support"}
    assert data["confusionMatrix"] == comparison.policy_a.confusion_matrix
    interval = data["detail"]["classification"]["averages"]["accuracy"]
    assert interval["lower"] < data["accuracy"] < interval["upper"]


def test_json_of_a_comparison_has_null_for_what_is_unknown(comparison: PolicyComparison) -> None:
    data = json.loads(json.dumps(comparison_to_json(comparison), allow_nan=False))
    assert data["winner"] == "tie"
    assert data["improvements"]["avgReward"] is None
    assert data["improvements"]["accuracy"] == comparison.improvements.accuracy
    assert data["policyB"]["avgReward"] is None
    assert data["policyB"]["detail"]["offPolicy"]["refusal"].startswith("the log rarely")


def test_json_writes_nan_as_null() -> None:
    assert to_json({"x": float("nan"), "y": [1.5, float("inf")]}) == {"x": None, "y": [1.5, None]}


class _Outline(HTMLParser):
    """Checks that tags are balanced and collects what is there."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


NAMES = ["evaluation", "comparison", "ranking", "pairs", "pair comparison"]


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_balanced_and_run_nothing(pages: dict[str, str], name: str) -> None:
    outline = _Outline()
    outline.feed(pages[name])
    assert outline.open == []
    assert "svg" in outline.seen
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.seen)
    assert not {"src", "href", "onload", "onclick"} & set(outline.attributes)


@pytest.mark.parametrize("name", NAMES)
def test_pages_need_no_network(pages: dict[str, str], name: str) -> None:
    assert "http" not in pages[name]
    assert "url(" not in pages[name]
    assert "@import" not in pages[name]


@pytest.mark.parametrize("name", ["comparison", "ranking", "pair comparison"])
def test_texts_from_the_data_are_escaped(pages: dict[str, str], name: str) -> None:
    assert WICKED not in pages[name]
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in pages[name]


def test_the_comparison_page_shows_where_the_policies_differ(
    pages: dict[str, str], comparison: PolicyComparison
) -> None:
    page = pages["comparison"]
    assert page.count("<details>") == len(comparison.disagreements)
    assert f"{comparison.disagreement_count} of 250 examples" in page
    for heading in ("Differences, B minus A", "Calibration", "Classes", "Reward of this policy"):
        assert heading in page


PROBE = """<script>
const boxes=[...document.querySelectorAll('svg')].map(each=>each.getBoundingClientRect());
parent.document.title=JSON.stringify({width:innerWidth,
overflow:document.documentElement.scrollWidth-document.documentElement.clientWidth,
plots:boxes.length,empty:boxes.filter(each=>each.width<20||each.height<10).length,
ground:getComputedStyle(document.body).backgroundColor});</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("scheme", "ground"), [(0, "rgb(15, 19, 24)"), (1, "rgb(255, 255, 255)")])
def test_pages_fit_the_window_in_a_browser(
    pages: dict[str, str], tmp_path: Path, name: str, width: int, scheme: int, ground: str
) -> None:
    inside = html.escape(pages[name].replace("</body>", PROBE + "</body>"))
    page = tmp_path / "page.html"  # in a frame, since a window is never narrower than 500
    page.write_text(
        f'<!doctype html><title></title><iframe srcdoc="{inside}" '
        f'style="width:{width}px;height:900px;border:0"></iframe>'
    )
    found = json.loads(_title(page, scheme))
    assert found["width"] == width
    assert found["overflow"] == 0
    assert found["plots"] > 0
    assert found["empty"] == 0
    assert found["ground"] == ground


def _title(page: Path, scheme: int) -> str:
    """Open a page in Chromium and return the title that its probe has set."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.fail("no Chromium on this machine: apt-get install chromium")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=os.environ
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    return html.unescape(title.group(1))
