"""``dpo eval`` and ``dpo compare`` from the command line, and every refusal with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dpo import cli
from dpo.data.kinds import KINDS
from dpo.data.simulate import simulate, simulated_situations
from dpo.eval.bootstrap import METHODS
from dpo.eval.cli import compare, evaluate
from dpo.eval.off_policy import ARMS
from dpo.eval.tiny import make_tiny_tokenizer
from dpo.models import save_model
from dpo.models.tiny import make_tiny_model


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Write 250 logged decisions as the dataset builder does."""
    return str(_write(tmp_path / "examples.jsonl", _rows("extraction", 250)))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Save an untrained language model as a policy."""
    folder = tmp_path / "policy"
    folder.mkdir()
    kind = KINDS["extraction"]
    texts = [kind.render_prompt(state) for state in simulated_situations("extraction", 5)]
    texts += [kind.render_action(action) for action in kind.actions()]
    tokenizer = make_tiny_tokenizer(texts)
    tokenizer.save(folder)
    save_model(make_tiny_model(tokenizer, seed=0), folder)
    (folder / "extraction_metadata.json").write_text('{"policy": "extraction"}')
    return folder


def _rows(kind: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "state": each.state,
            "action": each.action,
            "reward": each.reward,
            "metadata": {
                "id": each.id,
                "sessionId": each.session_id,
                "decidedAt": each.decided_at.isoformat(),
                "confidence": each.confidence,
                "propensity": each.propensity,
            },
        }
        for each in simulate(kind, count, 0)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _scores(path: Path, shift: float) -> str:
    rows = [
        {
            "id": f"p{index}",
            "chosen_reward": (index * 7 % 10) / 10 - 0.5 + shift,
            "rejected_reward": 0.0,
            "chosen_tokens": index % 5,
            "rejected_tokens": 2,
        }
        for index in range(60)
    ]
    return str(_write(path, rows))


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, [*arguments, "--resamples", "100"])


def test_eval_prints_the_report(data: str) -> None:
    result = _run("eval", "rules", "--data", data)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Policy Evaluation Report\n")
    assert "Policy: rules (extraction), 250 examples" in result.output


def test_eval_prints_json(data: str) -> None:
    result = _run("eval", "constant:skip", "--data", data, "--json", "--confidence", "0.9")
    report = json.loads(result.output)
    assert report["policy"] == "constant:skip"
    assert report["detail"]["options"]["bootstrap"]["confidence"] == 0.9


def test_eval_writes_a_page(data: str, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    result = _run("eval", "rules", "--data", data, "--html", str(page))
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("<!doctype html>")


def test_options_reach_the_evaluation(data: str) -> None:
    result = _run(
        "eval", "rules", "--data", data, "--json", "--method", "percentile", "--seed", "3",
        "--independent", "--stratify", "--arms", "class",
    )  # fmt: skip
    options = json.loads(result.output)["detail"]["options"]
    assert options == {
        "bootstrap": {"confidence": 0.95, "method": "percentile", "resamples": 100, "seed": 3},
        "bySession": False,
        "stratifyByClass": True,
        "arms": "class",
    }


def test_choices_are_those_of_the_library() -> None:
    types = {each.name: each.type for each in evaluate.params}
    for name, expected in {"method": METHODS, "arms": ARMS}.items():
        choice = types[name]
        assert isinstance(choice, click.Choice)
        assert tuple(choice.choices) == expected


def test_compare_names_the_winner(data: str) -> None:
    result = _run("compare", "rules", "constant:skip", "--data", data, "--metric", "accuracy")
    assert result.exit_code == 0, result.output
    assert "rules vs constant:skip\nWinner: rules\n" in result.output


def test_compare_of_three_ranks(data: str) -> None:
    result = _run(
        "compare", "rules", "uniform", "constant:skip", "--data", data, "--metric", "accuracy"
    )
    assert result.output.startswith("Policy Ranking\n")
    assert "1.  rules" in result.output


def test_compare_can_split(data: str) -> None:
    result = _run(
        "compare", "rules", "uniform", "--data", data, "--ab-split", "0.5", "--metric", "accuracy"
    )
    assert result.output.startswith("A/B Test Report\n")


def test_a_saved_language_model_is_compared_with_the_rules(
    tmp_path: Path, model_folder: Path
) -> None:
    data = str(_write(tmp_path / "few.jsonl", _rows("extraction", 30)))
    result = _run("compare", "rules", str(model_folder), "--data", data, "--metric", "accuracy")
    assert result.exit_code == 0, result.output
    assert f"rules vs {model_folder}\n" in result.output


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no trained policy: expected a model folder with one <policy>_metadata.json"),
        ('{"policy": "magic"}', "policy 'magic' is of no known kind"),
        (
            '{"policy": "retrieval"}',
            "holds a policy of kind retrieval, the data are of kind extraction",
        ),
    ],
)
def test_a_folder_that_is_no_policy_for_the_data_is_refused(
    data: str, model_folder: Path, metadata: str | None, message: str
) -> None:
    (model_folder / "extraction_metadata.json").unlink()
    if metadata is not None:
        (model_folder / "x_metadata.json").write_text(metadata)
    result = _run("eval", str(model_folder), "--data", data)
    assert result.exit_code == 2
    assert message in result.output


def test_scored_pairs_are_evaluated_and_compared(tmp_path: Path) -> None:
    before = _scores(tmp_path / "before.jsonl", 0.0)
    after = _scores(tmp_path / "after.jsonl", 0.3)
    alone = _run("eval", before)
    assert alone.output.startswith("Preference Pair Report\n")
    page = tmp_path / "page.html"
    both = _run("compare", before, after, "--html", str(page))
    assert f"Winner: {after}" in both.output
    assert "Two models on the same preference pairs" in page.read_text()


def test_commands_import_numpy_only_when_they_run() -> None:
    code = "import sys, dpo.eval.cli; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "rules"], "--data is missing: the examples to evaluate on"),
        (["eval", "magic", "--data", "DATA"], "'magic' is no policy: expected rules, uniform"),
        (["eval", "constant:burn", "--data", "DATA"], "extraction has no class 'burn'"),
        (["eval", "rules", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["eval", "rules", "--data", "DATA", "--confidence", "1"], "confidence must be between 0"),
        (["eval", "rules", "--data", "DATA", "--stratify"], "stratify_by_class needs by_session="),
        (["eval", "none.jsonl"], "none.jsonl: no such file; expected the scores"),
        (["eval", "S.jsonl", "--data", "DATA"], "--data: of no use with a scored file"),
        (["compare", "rules", "--data", "DATA"], "compare needs at least two policies"),
        (["compare", "rules", "uniform", "--data", "DATA", "--metric", "x"], "metric must be one"),
        (["compare", "a.jsonl", "b.jsonl", "--ab-split", "0.5"], "two at a time and without --ab"),
        (
            ["compare", "rules", "uniform", "rules", "--data", "DATA", "--ab-split", "0.5"],
            "--ab-split takes two policies, got 3",
        ),
        (
            ["compare", "rules", "uniform", "--data", "DATA", "--ab-split", "0.5", "--metric",
             "accuracy", "--html", "p.html"],
            "--html: there is no page for an A/B test",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_in_one_line_with_code_2(
    data: str, arguments: list[str], message: str
) -> None:
    result = _run(*(data if each == "DATA" else each for each in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, "250 of 250 lines are no extraction examples"),
        ({"action": {"decision": "skip"}}, "all 250 examples have the action class 'skip'"),
        ({"metadata": {"propensity": 2}}, "propensity must be a number in (0, 1], got 2"),
    ],
)
def test_wrong_data_are_refused_with_code_2(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rows = [row | changes for row in _rows("extraction", 250)]
    result = _run("eval", "rules", "--data", str(_write(tmp_path / "bad.jsonl", rows)))
    assert result.exit_code == 2
    assert message in result.output


def test_a_mixed_call_of_policies_and_scores_is_refused(data: str, tmp_path: Path) -> None:
    scores = _scores(tmp_path / "s.jsonl", 0.0)
    result = _run("compare", "rules", scores, "--data", data)
    assert result.exit_code == 2
    assert "is no policy" in result.output


def test_help_explains_what_a_policy_is() -> None:
    of_compare, of_evaluate = (
        str(command.epilog).partition("Examples:")[0] for command in (compare, evaluate)
    )
    assert of_compare == of_evaluate
    assert "constant:CLASS" in of_evaluate
