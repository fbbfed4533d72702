import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dpo.cli import main
from dpo.errors import InputError
from dpo.report import interval, write_comparison, write_report
from dpo.report.several_runs import differing
from dpo.svg import (
    MAX_POINTS,
    Bars,
    Dot,
    Line,
    Point,
    histogram,
    line_chart,
    moving_average,
    scatter,
    tick_step,
)


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


def write_eval_pairs(run: Path, margins: list[float], *, before: float | None = 0.0) -> None:
    rows = [
        {
            "id": f"row-{row}", "step": 7, "chosen_tokens": 10 + row, "rejected_tokens": 12,
            "margin": margin, "margin_before": before,
        }
        for row, margin in enumerate(margins)
    ]  # fmt: skip
    (run / "eval_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SIDE = {
    "pairs": 3,
    "tokens": 60,
    "edges": [0, 5, 10],
    "counts": {"prompt": [1, 2], "chosen": [3, 0], "rejected": [0, 3]},
    "lengths": {part: [1, 2.5, 9, 10] for part in ("prompt", "chosen", "rejected")},
}
SAMPLE = {"id": "row-4", "prompt": "<b>2 + 2 =", "chosen": " 4", "before": " 5", "after": " 4 &"}


def test_interval_of_an_evaluation_stands_beside_it(tmp_path: Path) -> None:
    first: dict[str, object] = {
        "step": 0,
        "eval/rewards/accuracy": 0.5,
        "eval/rewards/accuracy_se": 0.0,
    }
    last: dict[str, object] = {
        "step": 2,
        "eval/rewards/accuracy": 0.75,
        "eval/rewards/accuracy_se": 0.05,
    }
    write_metrics(tmp_path, [first, *steps(2), last])
    text = page(tmp_path)
    assert "<th>reward accuracy</th><td>0.5</td><td>0.75 [0.652, 0.848]</td>" in text
    assert text.count('class="band"') == 1


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("rewards/accuracy", 0.9, "[0.704, 1]"),
        ("eval/rewards/accuracy", 0.1, "[0, 0.296]"),
        ("rewards/margin", 0.1, "[-0.096, 0.296]"),
    ],
)
def test_interval_of_a_share_stays_within_what_shares_are(
    name: str, value: float, shown: str
) -> None:
    assert interval({name: value, f"{name}_se": 0.1}, name) == shown


def test_margins_are_counted_on_both_sides_of_zero(tmp_path: Path) -> None:
    write_eval_pairs(tmp_path, [-0.5, 0.25, 0.0, 1.0])
    text = page(tmp_path)
    counts = re.findall(r"<title>[^<]*: (\d) (below|above) 0", text)
    assert sum(int(count) for count, side in counts if side == "below") == 1
    assert sum(int(count) for count, side in counts if side == "above") == 3
    assert "4 pairs at the evaluation of step 7; before the first step every margin is 0." in text
    assert "row-2: 12 and 12 tokens, margin 0" in text


def test_margins_before_are_drawn_where_they_differ(tmp_path: Path) -> None:
    write_eval_pairs(tmp_path, [-0.5, 0.25])
    with (tmp_path / "eval_pairs.jsonl").open("a") as file:
        row = {"id": "a", "step": 7, "chosen_tokens": 1, "rejected_tokens": 1, "margin": 1.0}
        file.write(json.dumps(row | {"margin_before": 0.5}) + "\n")
    assert ">before</span>" in page(tmp_path)


def test_data_is_told_with_its_lengths(tmp_path: Path) -> None:
    data = {"train": SIDE, "held out": None, "told": ["3 rows dropped: a <b>, b, c"]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    text = page(tmp_path)
    assert "<li>3 rows dropped: a &lt;b&gt;, b, c</li>" in text
    assert "<th>Trained on, prompt</th><td>3</td><td>1</td><td>2.5</td><td>9</td>" in text
    assert "5 to 10: 2 prompt" in text


def test_samples_are_shown_escaped(tmp_path: Path) -> None:
    lines = [SAMPLE, SAMPLE | {"after": None}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(tmp_path)
    assert "<dd>&lt;b&gt;2 + 2 =</dd>" in text
    assert "<dd> 4 &amp;</dd>" in text
    assert "<dt>after</dt><dd>\N{EN DASH}</dd>" in text


@pytest.mark.parametrize("name", ["data.json", "eval_pairs.jsonl", "samples.jsonl", "config.toml"])
@pytest.mark.parametrize(
    "content", ["", "null", "[]", "{", '{"id": 1}', '{"train": {"edges": [1, 0]}}', "\x00", "[[1]]"]
)
def test_damaged_file_is_left_out(tmp_path: Path, name: str, content: str) -> None:
    write_metrics(tmp_path, steps(2))
    (tmp_path / name).write_text(content)
    text = page(tmp_path)
    assert "Optimizer steps 1 to 2" in text
    assert "The held-out pairs" not in text


# --- several runs -------------------------------------------------------------------------------


def make_run(folder: Path, beta: float, *, accuracy: float = 0.6, kl: float = 0.1) -> Path:
    folder.mkdir(parents=True)
    ends: dict[str, object] = {"eval/loss": 0.6, "eval/rewards/accuracy": accuracy}
    last = ends | {"step": 3, "eval/kl/k3_tok": kl, "eval/rewards/accuracy_se": 0.01}
    write_metrics(folder, [*steps(3), last])
    text = f'out = "{folder}"\nmodel = "M"\n[loss]\nname = "sigmoid"\nbeta = {beta}\n'
    (folder / "config.toml").write_text(text)
    return folder


def comparison(tmp_path: Path, runs: list[Path]) -> str:
    text = write_comparison(runs, tmp_path / "compare.html").read_text("utf-8")
    assert_balanced(text)
    return text


def test_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{beta}", beta, kl=1 - beta) for beta in (0.1, 0.5)]
    text = comparison(tmp_path, runs)
    assert "2 runs, which differ in loss.beta." in text
    assert "<th>run</th><th>loss.beta</th><th>steps</th><th>loss</th><th>accuracy</th>" in text
    row = "<th>run-0.1</th><td>0.1</td><td>3</td><td>0.6</td><td>0.6 [0.58, 0.62]</td>"
    assert row in text
    (frontier,) = re.findall(r'<svg[^>]*aria-label="Held-out accuracy against KL.*?</svg>', text)
    assert re.findall(r'<text class="label c\d"[^>]*>([^<]*)<', frontier) == ["0.1", "0.5"]
    assert '<span class="legend">beta</span>' in text
    assert frontier.count('class="line whisker"') == 2


def test_every_curve_has_a_line_of_each_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{beta}", beta) for beta in (0.1, 0.2, 0.5)]
    (loss,) = re.findall(r'<svg[^>]*aria-label="Loss".*?</svg>', comparison(tmp_path, runs))
    assert re.findall(r'<g class="(c\d)"', loss) == ["c0", "c0", "c1", "c1", "c2", "c2"]
    assert 'class="line raw' not in loss


@pytest.mark.parametrize(("keeps_best", "accuracy"), [("true", "0.7"), ("false", "0.4")])
def test_run_ends_at_the_model_that_it_saved(
    tmp_path: Path, keeps_best: str, accuracy: str
) -> None:
    run = make_run(tmp_path / "run", 0.1)
    evaluations: list[dict[str, object]] = [
        {"step": step, "eval/loss": loss, "eval/rewards/accuracy": accuracy}
        for step, loss, accuracy in ((0, 0.1, 0.5), (1, 0.6, 0.6), (2, 0.5, 0.7), (3, 0.8, 0.4))
    ]
    write_metrics(run, [*steps(3), *evaluations])
    with (run / "config.toml").open("a") as file:
        file.write(f"[train]\nkeep_best = {keeps_best}\n")
    assert f"<th>reward accuracy</th><td>0.5</td><td>{accuracy}</td>" in page(run)
    assert f"<td>{accuracy}</td>" in comparison(tmp_path, [run, make_run(tmp_path / "b", 0.5)])


def test_runs_of_one_config_have_the_names_of_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0.1) for name in ("a", "b")]
    text = comparison(tmp_path, runs)
    assert "2 runs, whose configs do not differ." in text
    assert "</i>a</span>" in text


def test_page_of_runs_without_evaluations_has_no_frontier(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{beta}", beta) for beta in (0.1, 0.5)]
    for run in runs:
        write_metrics(run, steps(2))
    assert "Held-out accuracy against" not in comparison(tmp_path, runs)


def test_keys_differ_where_one_config_lacks_them() -> None:
    configs = [{"a": 1, "b": 2, "out": "x"}, {"a": 1, "out": "y", "c": 3}]
    assert differing(configs) == ["b", "c"]


def test_folder_of_no_run_and_a_run_given_twice_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.1)
    with pytest.raises(InputError, match=r"is no folder of a run: neither config\.toml nor"):
        write_comparison([run, tmp_path], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"a run is given twice"):
        write_comparison([run, tmp_path / "run" / ".." / "run"], tmp_path / "page.html")


def test_command_writes_the_page_and_says_where(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / name, 0.1)) for name in ("a", "b")]
    dpo = CliRunner().invoke
    assert dpo(main, ["report", runs[0]]).output == f"{runs[0]}/report.html\n"
    refused = dpo(main, ["report", *runs])
    assert refused.exit_code == 2
    assert "--out is missing: name the page about 2 runs" in refused.output
    out = str(tmp_path / "compare.html")
    assert dpo(main, ["report", *runs, "--out", out]).output == f"{out}\n"
    assert dpo(main, ["report", str(tmp_path)]).exit_code == 2


PROBE = """<!DOCTYPE html><title>waiting</title>
<iframe style="width:{width}px;height:3000px;border:0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
  const texts = [...inner.querySelectorAll("svg text")].map((text) => [text, text.getBBox()]);
  document.title = JSON.stringify({{
    background: getComputedStyle(inner.body).backgroundColor,
    overflow: root.scrollWidth - root.clientWidth,
    charts: [...inner.querySelectorAll("svg")].filter((svg) => svg.clientHeight > 50).length,
    drawn: [...inner.querySelectorAll("svg .line, svg .bar, svg .dot")]
      .filter((shape) => getComputedStyle(shape).stroke + getComputedStyle(shape).fill).length,
    outside: texts.filter(([_, box]) => box.x < 0 || box.x + box.width > 440)
      .map(([text, _]) => text.textContent),
  }});
}})</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize(
    ("scheme", "background"), [(0, "rgb(20, 24, 31)"), (1, "rgb(255, 255, 255)")]
)
def test_pages_fit_a_wide_and_a_narrow_browser(
    tmp_path: Path, width: int, scheme: int, background: str
) -> None:
    runs = [make_run(tmp_path / f"run-{beta}", beta, kl=beta) for beta in (0.1, 0.5)]
    run = runs[0]
    rates = [step | {"learning_rate": 1e-6 / (n + 1)} for n, step in enumerate(steps(40))]
    write_metrics(run, [*rates, {"step": 3, "eval/rewards/accuracy": 0.5, "eval/kl/k3_tok": 9e-4}])
    write_eval_pairs(run, [-0.5, 0.25, 0.0, 1.0])
    data = {"train": SIDE, "held out": SIDE, "told": ["row " * 200, "x" * 500]}
    (run / "data.json").write_text(json.dumps(data))
    (run / "samples.jsonl").write_text(json.dumps(SAMPLE | {"prompt": "y" * 3000}))
    for text, charts in ((page(run), 8), (comparison(tmp_path, runs), 6)):
        seen = probed(text, tmp_path, width=width, scheme=scheme)
        assert seen["background"] == background
        assert seen["overflow"] == 0
        assert seen["charts"] == text.count("<svg")
        assert text.count("<svg") >= charts
        assert isinstance(seen["drawn"], int)
        assert seen["drawn"] > charts
        assert seen["outside"] == []


def probed(text: str, folder: Path, *, width: int, scheme: int) -> dict[str, object]:
    """What a browser says of a page in a frame of some width."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.fail("no Chromium on this machine: apt-get install chromium")
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(text)), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found: dict[str, object] = json.loads(html.unescape(title.group(1)))
    return found


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


def test_ticks_of_small_numbers_have_a_power_of_ten() -> None:
    svg = line_chart([Line("a", points(0.0, 2e-6))], title="t", x_label="x")
    texts = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert texts == ["0.0", "0.5e-6", "1.0e-6", "1.5e-6", "2.0e-6"]


def test_moving_average_is_over_a_tenth_of_the_points_and_keeps_gaps() -> None:
    values = [float(n) for n in range(20)]
    values[10] = float("nan")
    averaged = moving_average(points(*values))
    assert [point.value for point in averaged[:3]] == [0.5, 1.0, 2.0]  # ends have one side
    assert averaged[9].value == (8 + 9) / 2
    assert averaged[10].value != averaged[10].value
    assert averaged[19].value == 18.5


def test_averaged_line_lies_over_a_faint_one() -> None:
    svg = line_chart([Line("a", points(*range(40)), is_averaged=True)], title="t", x_label="x")
    assert re.findall(r'class="line([^"]*)"', svg) == [" raw", ""]


def test_hidden_line_does_not_widen_the_axes() -> None:
    values = [0.0] * 20 + [100.0] + [0.0] * 19
    line = Line("a", points(*values), is_averaged=True, is_hidden=True)
    svg = line_chart([line], title="t", x_label="x")
    ticks = [float(text) for text in re.findall(r'text-anchor="end">([^<]*)<', svg)]
    assert max(ticks) <= 100 / 5 * 1.05  # the mean of five points
    assert re.findall(r'class="line([^"]*)"', svg) == [""]


def test_bars_are_as_high_as_their_counts() -> None:
    svg = histogram([Bars("texts", [0, 1, 2, 3], [1, 0, 4])], title="t", x_label="x")
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', svg)]
    assert heights[1] / heights[0] == pytest.approx(4, rel=0.01)
    assert len(heights) == 2  # an empty bin has no bar


def test_texts_of_close_dots_do_not_cover_each_other() -> None:
    dots = [Dot(1.0, 1.0 + n / 1000, "t", text="a label") for n in range(5)]
    svg = scatter([*dots, Dot(2.0, 2.0, "t")], title="t", x_label="x")
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)">a label', svg))
    assert all(below - above > 12 for above, below in pairwise(heights))


def test_text_does_not_cover_another_dot() -> None:
    dots = [Dot(0, 1, "t", text="a long label"), Dot(0.1, 1, "t"), Dot(1, 1, "t")]
    svg = scatter(dots, title="t", x_label="x")
    (dot, *_), (text,) = re.findall(r'cy="([\d.]+)"', svg), re.findall(r'y="([\d.]+)">a long', svg)
    assert float(text) - float(dot) > 12


def test_text_at_the_right_edge_stands_to_the_left_of_its_dot() -> None:
    svg = scatter(
        [Dot(0, 0, "t", text="left"), Dot(1, 1, "t", text="right")], title="t", x_label=""
    )
    assert re.findall(r'text-anchor="end" y="[\d.]+">(left|right)<', svg) == ["right"]


def test_title_of_a_dot_is_escaped() -> None:
    assert "<title>&lt;script&gt;" in scatter([Dot(0, 0, "<script>")], title="t", x_label="x")
