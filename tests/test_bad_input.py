"""Bad input of every kind, through the command line: an exit code, one message, nothing harmed."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from dpo.cli import main
from dpo.models import load_model, save_model
from dpo.tokenizer import byte_tokenizer

GOOD = {"prompt": "say it", "chosen": " yes", "rejected": " no"}
OTHERS = [{"prompt": f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(6)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "pairs.jsonl", *OTHERS)


def write_lines(path: Path, *rows: object) -> Path:
    """Write rows as JSON Lines; bytes and texts as they are."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    content = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
    path.write_bytes(content)
    return path


def dpo_train(model: Path, data: Path, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        main,
        [
            *("train", "--model", str(model), "--data", str(data), "--out", str(out)),
            *("--threads", "1", "--device", "cpu", "--steps", "1", "--quiet", *arguments),
        ],
    )


def assert_refused(result: Result, *parts: str, exit_code: int = 2) -> None:
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


# --- rows ---------------------------------------------------------------------------------------

PROMPT = [{"role": "user", "content": "hi"}]
ANSWER = [{"role": "assistant", "content": "hello"}]
OTHER = [{"role": "assistant", "content": "bye"}]
NULL = [{"role": "assistant", "content": None}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "chosen": "b", ', "malformed JSON: "),
        ("[1, 2]", "expected a JSON object, found a list"),
        ({"prompt": "a", "chosen": "b"}, "missing rejected; the row has prompt, chosen"),
        ({**GOOD, "chosen": ""}, "chosen is empty"),
        ({**GOOD, "prompt": "  "}, "prompt is empty"),
        ({**GOOD, "chosen": True}, "chosen must be text or a list of messages, found a boolean"),
        ({**GOOD, "rejected": None}, "rejected must be text or a list of messages, found null"),
        ({**GOOD, "rejected": 3}, "rejected must be text or a list of messages, found a number"),
        ({**GOOD, "rejected": " yes"}, "chosen and rejected are identical"),
        ({**GOOD, "weight": -1}, "weight must be a finite number >= 0, found -1"),
        ({**GOOD, "label_prob": "high"}, "label_prob must be a number, found text"),
        (
            {"prompt": PROMPT, "chosen": ANSWER, "rejected": OTHER},
            "layout 'prompt and answers as messages', but the rows before: ",
        ),
        (
            {
                "prompt": PROMPT,
                "chosen": [{"role": "assistant", "content": None}],
                "rejected": OTHER,
            },
            "chosen[0].content is null",
        ),
        ({**GOOD, "id": "row-1"}, "id 'row-1' is already that of "),
        ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "one key twice"),
        (b'{"prompt": "\xff\xfe", "chosen": "b", "rejected": "c"}', "not UTF-8: "),
        ('{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', "half of a surrogate pair"),
    ],
)
def test_faulty_row_is_refused_by_line_or_skipped_and_counted(
    tmp_path: Path, model_folder: Path, row: object, message: str
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", *OTHERS, row)
    result = dpo_train(model_folder, data, tmp_path / "RUN")
    assert_refused(result, f"{data}:7: ", message, "--on-bad-row skip")

    result = dpo_train(model_folder, data, tmp_path / "RUN", "--on-bad-row", "skip")
    assert result.exit_code == 0, result.output
    assert f"{data}: 1 faulty rows left out\n  {data}:7: " in result.stderr
    assert message in result.stderr


def test_all_faulty_rows_are_reported_together(tmp_path: Path, model_folder: Path) -> None:
    bad = [{**GOOD, "chosen": n} for n in range(25)]
    data = write_lines(tmp_path / "pairs.jsonl", GOOD, *bad)
    result = dpo_train(model_folder, data, tmp_path / "RUN")
    assert_refused(result, f"{data}: 25 faulty rows\n", f"{data}:21: ", "\nand 5 more\n")
    assert f"{data}:22: " not in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", b"", "no rows; expected at least one preference pair"),
        ("pairs.jsonl", b"\n\n", "no rows; expected at least one preference pair"),
        ("pairs.json", b"[", "malformed JSON: "),
        ("pairs.json", b"[]", "no rows; expected at least one preference pair"),
        ("pairs.jsonl.gz", b"not gzip", "damaged gzip file"),
        ("pairs.parquet", b"not parquet", "damaged Parquet file"),
        ("pairs.csv", b"a,b", "unknown type of file; known are .jsonl"),
    ],
)
def test_faulty_file_is_refused_by_name(
    tmp_path: Path, model_folder: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = dpo_train(model_folder, tmp_path / name, tmp_path / "RUN")
    assert_refused(result, f"{tmp_path / name}: ", message)


def test_absent_file_is_refused_by_name(tmp_path: Path, model_folder: Path) -> None:
    result = dpo_train(model_folder, tmp_path / "absent.jsonl", tmp_path / "RUN")
    assert_refused(result, f"{tmp_path / 'absent.jsonl'}: no such file")


LONG = {"id": "the long one", "prompt": "say " * 5, "chosen": " yes" * 5, "rejected": " no"}


@pytest.mark.parametrize(
    ("truncation", "message"),
    [
        ("drop", "1 rows dropped: the long one (41 tokens, max_length 30)"),
        ("keep-start", "1 rows cut: the long one (chosen 21 to 10 tokens)"),
        ("keep-end", "1 rows cut: the long one (prompt 20 to 9 tokens)"),
    ],
)
def test_row_longer_than_max_length_is_dropped_or_cut_and_told(
    tmp_path: Path, model_folder: Path, truncation: str, message: str
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", *OTHERS, LONG)
    options = ("--max-length", "30", "--truncation", truncation)
    result = dpo_train(model_folder, data, tmp_path / "RUN", *options)
    assert result.exit_code == 0, result.output
    assert message in result.stderr


def test_row_longer_than_max_length_is_refused_or_skipped_and_counted(
    tmp_path: Path, model_folder: Path
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", *OTHERS, LONG)
    options = ("--max-length", "30")
    result = dpo_train(model_folder, data, tmp_path / "RUN", *options)
    assert_refused(result, f"{data}: 1 faulty row\nthe long one: 41 tokens, max_length 30")

    result = dpo_train(model_folder, data, tmp_path / "RUN", *options, "--on-bad-row", "skip")
    assert result.exit_code == 0, result.output
    assert result.stderr == "1 rows dropped: the long one (41 tokens, max_length 30)\n"


def test_long_rows_are_refused_together(tmp_path: Path, model_folder: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", *OTHERS, *[{**LONG, "id": n} for n in range(25)])
    result = dpo_train(model_folder, data, tmp_path / "RUN", "--max-length", "30")
    assert_refused(result, f"{data}: 25 faulty rows\n", "\n19: 41 tokens", "\nand 5 more\n")


def test_data_of_long_rows_alone_is_refused(tmp_path: Path, model_folder: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", LONG)
    options = ("--max-length", "30", "--truncation", "drop")
    result = dpo_train(model_folder, data, tmp_path / "RUN", *options)
    assert_refused(result, f"{data}: no row is left", "the long one: 41 tokens, max_length 30")


# --- models -------------------------------------------------------------------------------------


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'{"', b"{{", 1))


def shard(folder: Path) -> Path:
    """Write the weights again in a shard for each, and return the index."""
    save_model(load_model(folder), folder, max_shard_bytes=1)
    (folder / "model.safetensors").unlink()
    return folder / "model.safetensors.index.json"


def remove_shard(folder: Path) -> None:
    shard(folder)
    next(folder.glob("model-00002-of-*")).unlink()


def point_outside(folder: Path) -> None:
    index = shard(folder)
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))


def cut_shard(folder: Path) -> None:
    shard(folder)
    path = next(folder.glob("model-00002-of-*"))
    path.write_bytes(path.read_bytes()[:-3])


def name_number_in_index(folder: Path) -> None:
    index = shard(folder)
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = 3
    index.write_text(json.dumps(content))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights, whose names have underscores for dots; None removes one."""
    path = folder / "model.safetensors"
    new = {name.replace("_", "."): weight for name, weight in changes.items()}
    weights = {**load_file(path), **new}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path)


def leave_pickles_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path)


FAULTS: Mapping[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("{}: no weights: expected model.safetensors or model.safetensors.index.json",),
    ),
    "cut off": (cut_off, ("{}/model.safetensors: damaged or cut off: ",)),
    "empty": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ("{}/model.safetensors: damaged or cut off: ",),
    ),
    "scrambled": (scramble_header, ("{}/model.safetensors: damaged or cut off: ",)),
    "pickles alone": (
        leave_pickles_alone,
        ("{}: no weights: ", "(pytorch_model.bin are pickles, which are never opened)"),
    ),
    "missing weight": (
        lambda folder: change_weights(folder, model_norm_weight=None),
        ("{}: 1 weights are missing: model.norm.weight",),
    ),
    "foreign weight": (
        lambda folder: change_weights(folder, model_extra=torch.zeros(1)),
        ("{}/model.safetensors: 1 weights have no place in this architecture: model.extra",),
    ),
    "whole numbers": (
        lambda folder: change_weights(folder, model_norm_weight=torch.ones(16).int()),
        ("{}/model.safetensors: 1 weights do not fit: model.norm.weight is stored as I32",),
    ),
    "cut shard": (cut_shard, ("{}/model-00002-of-", "damaged or cut off: ")),
    "index of numbers": (
        name_number_in_index,
        ("{}/model.safetensors.index.json: not a safetensors index",),
    ),
    "absent shard": (
        remove_shard,
        ("{}/model.safetensors.index.json: weight_map names absent files: model-00002-of-",),
    ),
    "shard outside": (
        point_outside,
        ("{}/model.safetensors.index.json: weight_map names '../model-00002-of-", "not in this"),
    ),
    "other shapes": (
        lambda folder: change_config(folder, intermediate_size=32),
        (
            "{}/model.safetensors: 6 weights do not fit: ",
            "model.layers.0.mlp.gate_proj.weight has shape (24, 16), config.json says (32, 16)",
        ),
    ),
    "small vocabulary": (
        lambda folder: change_config(folder, vocab_size=200),
        ("{}/config.json: vocab_size is 200, but the tokenizer", "makes tokens up to 257"),
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        ("{}: not a model folder: config.json is missing",),
    ),
    "config of text": (
        lambda folder: (folder / "config.json").write_text("llama"),
        ("{}/config.json: not valid JSON",),
    ),
    "config of a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ("{}/config.json: expected a JSON object",),
    ),
    "unknown architecture": (
        lambda folder: change_config(folder, model_type="t5"),
        ("{}/config.json: model_type 't5' is not supported; supported are ",),
    ),
    "wrong type": (
        lambda folder: change_config(folder, num_key_value_heads="two"),
        ("{}/config.json: num_key_value_heads must be a positive integer, got 'two'",),
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ("{}: no tokenizer.json",),
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ("{}/tokenizer.json: not a tokenizer: ",),
    ),
}


@pytest.fixture
def bad_folder(tmp_path: Path, make_model_folder: Callable[..., Path]) -> Path:
    """A model of its own, to be spoilt."""
    return make_model_folder(tmp_path / "bad")


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_model_is_refused_by_file(
    tmp_path: Path, bad_folder: Path, data: Path, fault: str
) -> None:
    spoil, parts = FAULTS[fault]
    spoil(bad_folder)
    result = dpo_train(bad_folder, data, tmp_path / "RUN")
    assert_refused(result, *(part.format(bad_folder) for part in parts))
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "RUN" / "model").exists()


def test_tokenizer_beyond_the_embedding_is_refused_for_every_loss(
    tmp_path: Path, bad_folder: Path, data: Path
) -> None:
    specials = [f"<|{n}|>" for n in range(9)]
    byte_tokenizer(specials, eos="<|0|>", chat_template=None).save(bad_folder)
    for options in ((), ("--loss", "sft")):
        result = dpo_train(bad_folder, data, tmp_path / "RUN", *options)
        assert_refused(result, "vocab_size is 258, but the tokenizer", "makes tokens up to 264")


@pytest.mark.parametrize("role", ["--model", "--reference"])
def test_smaller_embedding_is_refused_in_policy_and_reference(
    tmp_path: Path, model_folder: Path, bad_folder: Path, data: Path, role: str
) -> None:
    change_config(bad_folder, vocab_size=257)
    options = ("--reference", str(model_folder), role, str(bad_folder))
    result = dpo_train(model_folder, data, tmp_path / "RUN", *options)
    assert_refused(result, f"{bad_folder}/config.json: vocab_size is 257, but the tokenizer")


def test_weights_that_are_not_numbers_end_the_run(
    tmp_path: Path, bad_folder: Path, data: Path
) -> None:
    spoil_weight(bad_folder)
    result = dpo_train(bad_folder, data, tmp_path / "RUN")
    assert_refused(result, "pair 'row-", "the model's weights are damaged", exit_code=1)


@pytest.mark.parametrize("name", ["./absent", "/absent/model"])
def test_absent_model_is_refused(tmp_path: Path, data: Path, name: str) -> None:
    result = CliRunner().invoke(
        main, ["train", "--model", name, "--data", str(data), "--out", str(tmp_path / "RUN")]
    )
    assert_refused(result, f"{name}: no such folder")


# --- options and the place to write to ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning-rte", "1"), "No such option '--learning-rte'."),
        (
            ("--set", "train.learnig_rate=1"),
            "'train.learnig_rate'; did you mean 'train.learning_rate'?",
        ),
        (("--loss", "sigmod"), "unknown loss 'sigmod'; did you mean 'sigmoid'?"),
        (("--loss", "hinge", "--label-smoothing", "0.1"), "has no option 'label_smoothing'"),
        (("--eval-every", "2"), "train.eval_every needs held-out pairs"),
        (("--dtype", "fp16-mixed"), "fp16-mixed needs a GPU"),
        (
            ("--eval-split", "0.01"),
            "eval_split 0.01 of 6 pairs with 6 prompts leaves 6 to train on",
        ),
    ],
)
def test_faulty_option_is_refused_by_name(
    tmp_path: Path, model_folder: Path, data: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = dpo_train(model_folder, data, tmp_path / "RUN", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_file_in_the_place_of_the_folder_is_refused(
    tmp_path: Path, model_folder: Path, data: Path
) -> None:
    out = write_lines(tmp_path / "file", "in the way")
    result = dpo_train(model_folder, data, out)
    assert_refused(result, f"{out} is a file: --out of dpo train is the folder of the run")
    assert out.read_text(encoding="utf-8") == "in the way\n"


@pytest.mark.parametrize("out", ["file/RUN", "/proc/RUN"])
def test_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, model_folder: Path, data: Path, out: str
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    result = dpo_train(model_folder, data, tmp_path / out)
    assert_refused(result, str(tmp_path / out), exit_code=1)
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("size", [500, 5_000, 50_000])
def test_full_disk_ends_the_run_and_harms_nothing(
    tmp_path: Path,
    model_folder: Path,
    data: Path,
    size: int,
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    """Tokens, weights or optimizer states find no room."""
    out = tmp_path / "RUN"
    constant = ("--schedule", "constant")
    assert dpo_train(model_folder, data, out, *constant).exit_code == 0
    before = files(out)
    further = write_lines(tmp_path / "further.jsonl", *OTHERS[1:])
    longer = (*constant, "--steps", "3", "--resume", "auto")
    with full_disk(size):
        new = dpo_train(model_folder, further, tmp_path / "NEW")
        resumed = dpo_train(model_folder, data, out, *longer)
    for result in (new, resumed):
        assert_refused(result, f"Error: {tmp_path}", "File too large", exit_code=1)
        assert result.stderr.count("\n") == 1
    after = files(out)
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert (before | {"config.toml": after["config.toml"]}).items() <= after.items()
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_full_disk_ends_scoring_in_one_line(
    tmp_path: Path,
    model_folder: Path,
    data: Path,
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    out = write_lines(tmp_path / "scores.jsonl", "what was there")
    model = str(model_folder)
    score = ["score", "--model", model, "--reference", model, "--data", str(data), "--quiet"]
    score += ["--threads", "1", "--device", "cpu", "--out"]
    assert CliRunner().invoke(main, [*score, str(tmp_path / "other.jsonl")]).exit_code == 0
    with full_disk(100):
        result = CliRunner().invoke(main, [*score, str(out)])
    assert_refused(result, f"Error: {tmp_path}", "File too large", exit_code=1)
    assert out.read_text() == "what was there\n"


@pytest.mark.slow
def test_real_process_refuses_in_one_line(tmp_path: Path, model_folder: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", GOOD, "{")
    arguments = ["--model", model_folder, "--data", data, "--out", tmp_path / "RUN"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {data}: 1 faulty row\n{data}:2: malformed JSON: ")
    assert "Traceback" not in done.stderr
