import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.report import write_report
from dpo.svg import MAX_POINTS, Line, Point, line_chart, tick_step


def write_metrics(run: Path, records: list[dict[str, object]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines, encoding="utf-8")


def page(run: Path) -> str:
    text = write_report(run).read_text(encoding="utf-8")
    assert_balanced(text)
    return text


def assert_balanced(text: str) -> None:
    """Check that every element is closed in order."""
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in {"meta"}:
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert open_tags == []


def steps(count: int) -> list[dict[str, object]]:
    return [
        {"step": step, "loss": 0.7 - step / 1e6, "rewards/margin": step / 1e6, "grad_norm": 2.0}
        for step in range(1, count + 1)
    ]


# --- page ---------------------------------------------------------------------------------------


def test_page_of_an_empty_folder_says_that_nothing_is_recorded(tmp_path: Path) -> None:
    assert "No optimizer step is recorded." in page(tmp_path)


def test_page_has_a_chart_for_each_recorded_metric(tmp_path: Path) -> None:
    write_metrics(tmp_path, [*steps(3), {"step": 3, "eval/loss": 0.6}])
    text = page(tmp_path)
    assert re.findall(r'aria-label="([^"]*)"', text) == ["Loss", "Reward margin", "Gradient norm"]
    assert "loss, held out" in text
    assert "margin, held out" not in text


def test_table_holds_first_and_last_values(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"step": 0, "eval/loss": 0.6931},
        {"step": 1, "loss": 0.7, "kl": 0.25},
        {"step": 2, "loss": 0.5, "kl": 1234567.0},
        {"step": 2, "eval/loss": 0.4},
    ]
    write_metrics(tmp_path, records)
    text = page(tmp_path)
    assert "<th>loss</th><td>0.7</td><td>0.5</td><td>0.6931</td><td>0.4</td>" in text
    dash = "\N{EN DASH}"
    assert f"<th>kl</th><td>0.25</td><td>1,234,567</td><td>{dash}</td><td>{dash}</td>" in text


def test_one_step_is_a_dot(tmp_path: Path) -> None:
    write_metrics(tmp_path, steps(1))
    assert page(tmp_path).count("<circle") == 3


def test_long_run_makes_a_small_page(tmp_path: Path) -> None:
    write_metrics(tmp_path, steps(20_000))
    text = page(tmp_path)
    assert len(text) < 100_000
    assert "Optimizer steps 1 to 20000, 20000 recorded." in text
    assert "bands go from least to greatest" in text


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        [
            {"step": 1, "loss": float("nan")},
            {"step": 2, "loss": None},
            {"step": 3, "loss": float("inf")},
            {"step": 4, "loss": 0.5},
        ],
    )
    text = page(tmp_path)
    assert "Steps whose loss is not finite: 3." in text
    assert not re.search(r'd="[^"]*(nan|inf)', text)


def test_step_that_was_run_again_counts_once(tmp_path: Path) -> None:
    write_metrics(tmp_path, [*steps(3), *steps(3)])
    assert "Optimizer steps 1 to 3, 3 recorded." in page(tmp_path)


def test_half_a_last_line_is_counted_and_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, steps(2))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert "Lines of metrics.jsonl that cannot be read: 1." in page(tmp_path)


def test_line_without_a_step_is_counted_and_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [*steps(2), {"loss": 0.5}])
    assert "Lines of metrics.jsonl that cannot be read: 1." in page(tmp_path)


def test_text_is_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<img src=x>"
    run.mkdir()
    write_metrics(run, [{"step": 1, "loss": 0.5, "<script>": 1.0}])
    (run / "config.toml").write_text('model = "</pre><script>"\n', encoding="utf-8")
    (run / "summary.json").write_text('{"<b>": {"before": {"value": 1}}}', encoding="utf-8")
    text = page(run)
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>&" not in text


def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    write_metrics(tmp_path, steps(3))
    assert not re.search(r"https?:|url\(|@import|<script|<link", page(tmp_path))


def test_summary_shows_estimates_with_their_intervals(tmp_path: Path) -> None:
    summary = {
        "reward accuracy": {
            "before": {"value": 0.5},
            "after": {"value": 0.8125, "low": 0.75, "high": 0.875},
        },
        "margin": {"after": {"value": 1.5}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = page(tmp_path)
    assert "<th>reward accuracy</th><td>0.5</td><td>0.8125 [0.75, 0.875]</td>" in text
    assert "<th>margin</th><td>\N{EN DASH}</td><td>1.5</td>" in text


# --- charts -------------------------------------------------------------------------------------


def points(*values: float) -> list[Point]:
    return [Point(step, value) for step, value in enumerate(values)]


def test_gap_cuts_the_line() -> None:
    svg = line_chart([Line("a", points(1, 2, float("nan"), 3, 4))], title="t", x_label="x")
    assert svg.count('class="line"') == 2


def test_many_points_are_drawn_as_means_within_a_band() -> None:
    line = Line("a", points(*[0.0, 1.0] * (MAX_POINTS * 2)))
    svg = line_chart([line], title="t", x_label="x")
    path = re.findall(r'class="line" d="M([^"]*)"', svg)[0].split("L")
    heights = {point.split(" ")[1] for point in path}
    assert len(path) == MAX_POINTS
    assert heights == {"97.0"}  # the middle of the plot, from 10 to 184
    assert svg.count('class="band"') == 1


def test_bucket_with_some_values_is_their_mean() -> None:
    values = [2.0, float("nan")] * MAX_POINTS
    svg = line_chart([Line("a", points(*values))], title="t", x_label="x")
    assert svg.count('class="line"') == 1


@given(
    st.lists(
        st.one_of(
            st.floats(-1e38, 1e38), st.just(float("nan")), st.just(float("inf")), st.just(0.0)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_any_series_stays_within_the_picture(values: list[float]) -> None:
    svg = line_chart([Line("a", points(*values))], title="t", x_label="x")
    numbers = [
        float(number) for d in re.findall(r' d="([^"]*)"', svg) for number in NUMBER.findall(d)
    ]
    assert all(0 <= number <= 440 for number in numbers)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?|nan|inf")


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0, 1, 0.2), (0, 100, 20), (0.693, 0.694, 0.0002), (-3, 4, 2)]
)
def test_ticks_are_one_two_or_five_times_a_power_of_ten(
    low: float, high: float, step: float
) -> None:
    assert tick_step(low, high) == pytest.approx(step)


def test_close_ticks_have_different_texts() -> None:
    svg = line_chart([Line("a", points(0.69314, 0.69315))], title="t", x_label="x")
    texts = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len(texts) == len(set(texts)) > 2


def test_ticks_of_steps_are_whole_and_short() -> None:
    svg = line_chart([Line("a", [Point(0, 1.0), Point(100_000, 1.0)])], title="t", x_label="x")
    assert re.findall(r'text-anchor="middle">([^<]*)<', svg) == [
        "0", "20k", "40k", "60k", "80k", "100k", "x",
    ]  # fmt: skip
