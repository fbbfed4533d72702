"""``dpo data``: what the commands do, print and refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dpo.data.cli import cli
from dpo.data.doctor_checks import CHECKS
from dpo.data.export import EXPORTERS
from dpo.data.kinds import KINDS
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.preferences import read_pairs

Run = Callable[..., Result]


def run(*arguments: object) -> Result:
    """Call ``dpo data`` and let exceptions through."""
    return CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "feedback.db"
    result = run("simulate", "extraction", "--out", path, "--decisions", 400, "--situations", 20)
    assert result.exit_code == 0
    return path


@pytest.fixture(scope="module")
def dataset(feedback: Path) -> Path:
    folder = feedback.with_name("dataset")
    options = ["--split-by", "group", "--min-pairs", 10]
    assert (
        run("build", "extraction", "--feedback", feedback, "--out", folder, *options).exit_code == 0
    )
    return folder


# --- build ---------------------------------------------------------------------------------------


def test_build_writes_pairs_and_tells_every_count(feedback: Path, tmp_path: Path) -> None:
    options = [
        "--split-by",
        "group",
        "--min-pairs",
        1,
        "--strategy",
        "all",
        "--min-confidence",
        0.6,
    ]
    result = run("build", "extraction", "--feedback", feedback, "--out", tmp_path / "out", *options)
    metadata = json.loads((tmp_path / "out/extraction_metadata.json").read_text("utf-8"))
    pairs = read_pairs(tmp_path / "out/extraction_dpo_train.jsonl")
    assert len(pairs) == metadata["trainPairs"]
    assert result.stdout.startswith("SIMULATION: ")
    for figure in (
        f"{metadata['dataset']['filters']['minConfidence']:,}  left by min_confidence",
        f"{metadata['dataset']['trainExamples']:,}  for training",
        f"{metadata['dataset']['split']['crossingSessions']:,}  their session",
    ):
        assert figure in result.output
    assert f"unique pairs{metadata['trainPairs']:>32,}{metadata['evalPairs']:>12,}" in result.output


def test_build_takes_every_filter(feedback: Path, tmp_path: Path) -> None:
    result = run(
        *("build", "extraction", "--feedback", feedback, "--out", tmp_path / "out"),
        *("--start-date", "2024-01-01", "--end-date", "2024-06-30", "--entry-type", "tool"),
        *("--entry-type", "knowledge", "--max-examples", 100, "--seed", 3, "--split-by", "group"),
        *("--min-pairs", 1, "--weight", "margin", "--created-at", "2030-01-01", "--margin", 0.2),
    )
    assert result.exit_code == 0
    metadata = json.loads((tmp_path / "out/extraction_metadata.json").read_text("utf-8"))
    assert metadata["config"]["entryTypes"] == ["tool", "knowledge"]
    assert metadata["dataset"]["filters"]["maxExamples"] <= 100
    assert metadata["dataset"]["dateRange"]["end"] < "2024-07"
    assert metadata["pairConfig"]["weight"] == "margin"
    pairs = (tmp_path / "out/extraction_dpo_train.jsonl").read_text("utf-8").splitlines()
    assert all("weight" in json.loads(line) for line in pairs)


def test_build_that_would_leave_nothing_says_what_to_choose(feedback: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none would be left.*--split-by group"):
        run("build", "extraction", "--feedback", feedback, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_pairs_name_the_option(feedback: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pairs: \d+ formed, \d+ of them unique.*--min-pairs"):
        run(
            *("build", "extraction", "--feedback", feedback, "--out", tmp_path / "out"),
            *("--split-by", "group", "--min-pairs", 10_000),
        )


def test_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        run("build", "extraction", "--feedback", tmp_path / "none.db", "--out", tmp_path / "out")


def test_unfinished_last_line_of_a_log_is_told(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    run("simulate", "retrieval", "--out", path, "--decisions", 1)
    path.write_bytes(path.read_bytes()[:-50])
    result = CliRunner().invoke(
        cli, ["build", "retrieval", "--feedback", str(path), "--out", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, InputError)
    assert "\nNote: " in result.stderr


def test_unknown_policy_is_refused(tmp_path: Path) -> None:
    result = run("build", "chess", "--feedback", "x.db", "--out", tmp_path)
    assert result.exit_code == 2
    assert all(kind in result.output for kind in KINDS)


# --- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", EXPORTERS)
def test_export_writes_every_format(format_name: str, dataset: Path, tmp_path: Path) -> None:
    result = run("export", dataset, "--format", format_name, "--out", tmp_path / "out")
    assert f"Written to {tmp_path / 'out'}" in result.output
    assert "README.md" in result.output
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_export_help_names_every_format() -> None:
    help_text = " ".join(run("export", "--help").output.split())
    assert all(name in help_text for name in EXPORTERS)


# --- check ---------------------------------------------------------------------------------------


@pytest.fixture
def odd_file(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "one", "chosen": "a", "rejected": "b"},
        {"prompt": "two", "chosen": "", "rejected": "b"},
        {"prompt": "one", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def test_check_of_good_files_passes(dataset: Path) -> None:
    files = [dataset / f"extraction_dpo_{side}.jsonl" for side in ("train", "eval")]
    result = run("check", *files)
    assert result.exit_code == 0
    assert all(name in result.output for name, check in CHECKS.items() if not check.needs_model)


def test_check_refuses_what_training_would_refuse(odd_file: Path) -> None:
    with pytest.raises(
        InputError, match=r"are errors: empty; --policy empty=drop --clean FOLDER writes the file"
    ):
        run("check", odd_file)


def test_check_writes_findings_page_and_cleaned_file(odd_file: Path, tmp_path: Path) -> None:
    result = run(
        *("check", odd_file, "--policy", "all=drop", "--policy", "typed-token=warn"),
        *("--out", tmp_path / "found.jsonl", "--html", tmp_path / "page.html"),
        *("--clean", tmp_path / "clean"),
    )
    assert f"1 rows left in {tmp_path / 'clean' / 'pairs.jsonl'}" in result.output
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(each["check"], each["row"], each["policy"]) for each in found] == [
        ("empty", 1, "drop"),
        ("duplicate", 2, "drop"),
    ]
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
    assert [pair.prompt for pair in read_pairs(tmp_path / "clean/pairs.jsonl")] == ["one"]


def test_findings_are_written_even_when_the_check_fails(odd_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are errors: empty"):
        run("check", odd_file, "--out", tmp_path / "found.jsonl")
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "empty"], "--policy expects NAME=VALUE, got 'empty'"),
        (["--columns", "prompt"], "--columns expects NAME=VALUE, got 'prompt'"),
        (["--policy", "empty=drop"], "--clean and a --policy CHECK=drop need each other"),
        (["--clean", "out"], "--clean and a --policy CHECK=drop need each other"),
        (["--policy", "emty=warn"], "there is no check 'emty'"),
    ],
)
def test_check_refuses_wrong_options(options: list[str], message: str, odd_file: Path) -> None:
    with pytest.raises(InputError, match=message):
        run("check", odd_file, *options)


def test_check_reads_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n', "utf-8")
    assert run("check", path, "--columns", "prompt=question").exit_code == 0


# --- feedback stores -----------------------------------------------------------------------------


def test_simulation_says_so_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    outputs = [
        run("simulate", "retrieval", "--out", path, "--decisions", 10).stdout for _ in range(2)
    ]
    assert outputs[0].startswith("SIMULATION: 10 decisions of retrieval")
    assert outputs[1].startswith("SIMULATION: 0 decisions of retrieval")  # they are there already
    with open_store(path) as store:
        assert store.count() == 10


def test_stats_count_one_policy_and_range(feedback: Path) -> None:
    assert "extraction: 400 decisions" in run("stats", feedback).output
    assert "No decisions." in run("stats", feedback, "--policy", "retrieval").output
    assert "No decisions." in run("stats", feedback, "--end-date", "2020-01-01").output


def test_import_refuses_another_database(feedback: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run("import", feedback, "--out", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()


def test_replacing_a_data_set_never_removes_other_files(feedback: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.db").write_text("mine")
    with pytest.raises(InputError, match=r"holds mine\.db, which is not in its manifest"):
        run("build", "extraction", "--feedback", feedback, "--out", out, "--min-pairs", "1",
            "--split-by", "group", "--replace")  # fmt: skip
    assert (out / "mine.db").read_text() == "mine"


def test_help_of_every_command_needs_no_files() -> None:
    for name in cli.commands:
        assert run(name, "--help").exit_code == 0


def test_progress_goes_to_stderr_and_can_be_switched_off(tmp_path: Path) -> None:
    feedback, dataset = tmp_path / "feedback.db", tmp_path / "dataset"
    pairs = dataset / "extraction_dpo_train.jsonl"
    calls: dict[str, tuple[object, ...]] = {
        "simulate 100% 400/400 [": ("simulate", "extraction", "--out", feedback),
        "read 100% 400/400 [": ("build", "extraction", "--feedback", feedback, "--out", dataset),
        "check ": ("check", pairs),
    }
    further: dict[str, tuple[object, ...]] = {
        "simulate": ("--decisions", 400, "--situations", 20),
        "build": ("--split-by", "group", "--min-pairs", 1, "--replace"),
    }
    for shown, (name, *arguments) in calls.items():
        words = (name, *arguments, *further.get(str(name), ()))
        assert run(*words).stderr.startswith(shown)
        assert run(*words, "--quiet").stderr == ""
