import errno
import importlib.metadata
import json
import math
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from dpo.cli import COMMANDS, CommandTable, main
from dpo.cli.options import ConfigFlag
from dpo.errors import InputError, RunError
from dpo.settings import known_options

NEEDED = ("--model", "M", "--data", "pairs.jsonl", "--out", "RUN")


def dpo(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def printed(*arguments: str) -> dict[str, dict[str, object]]:
    """What ``dpo train --print-config`` prints, decoded."""
    result = dpo("train", *NEEDED, *arguments, "--print-config")
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.stdout)


def train_flags() -> dict[str, ConfigFlag]:
    command = main.get_command(click.Context(main), "train")
    assert command is not None
    return {flag.key: flag for flag in command.params if isinstance(flag, ConfigFlag)}


# --- help ---------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    result = dpo("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_line_in_the_table_is_the_first_of_the_commands_own_help(name: str) -> None:
    result = dpo(name, "--help")
    assert result.exit_code == 0
    first = " ".join(result.stdout.split("\n\n")[1].split())
    assert first == COMMANDS[name].help


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("dpo-engine") in dpo("--version").stdout


def test_every_option_of_the_config_has_a_flag_of_train() -> None:
    assert set(known_options()) <= set(train_flags())


@pytest.mark.parametrize(
    "flag",
    [
        "--model", "--data", "--eval-data", "--eval-split", "--out", "--reference", "--config",
        "--set", "--loss", "--beta", "--label-smoothing", "--learning-rate", "--batch-size",
        "--micro-batch-size", "--tokens-per-micro-batch", "--epochs", "--steps", "--warmup-steps",
        "--schedule", "--weight-decay", "--max-grad-norm", "--max-length", "--max-prompt-length",
        "--truncation", "--dtype", "--device", "--compile", "--recompute",
        "--no-prefix-sharing", "--reference-cache", "--save-every", "--eval-every", "--keep",
        "--resume", "--seed", "--threads", "--log-every", "--quiet", "--print-config",
        "--on-bad-row", "--on-nonfinite", "--columns",
    ],
)  # fmt: skip
def test_flag_that_scripts_rely_on_is_there(flag: str) -> None:
    assert flag in dpo("train", "--help").stdout.replace(",", " ").split()


# --- flags to config ----------------------------------------------------------------------------


LISTS = {"columns", "data", "mix.weights", "train.rates"}


SPANS = ("train.max_time", "train.save_before_end", "train.rank_timeout")  # of time


@pytest.mark.parametrize("key", [key for key in known_options() if key not in LISTS])
def test_flag_sets_its_key(key: str) -> None:
    """Give each flag a value other than the default and see it in the config."""
    option, flag = known_options()[key], train_flags()[key]
    table, _, name = key.rpartition(".")
    if option.kind is bool:
        arguments = [(flag.secondary_opts if option.default else flag.opts)[0]]
        value: object = not option.default
    else:
        others = [choice for choice in option.choices if choice != option.default]
        numbers = {int: "7", float: "0.25"}
        texts = {**dict.fromkeys(SPANS, "90m"), "train.track": "wandb"}
        text = others[0] if others else texts.get(key, numbers.get(option.kind, "text"))
        arguments = [flag.opts[0], text]
        value = text if option.kind not in numbers else float(text)
    needed = {
        "train.keep_best": ("--eval-split", "0.5", "--eval-every", "1"),
        "train.early_stopping": ("--eval-split", "0.5", "--eval-every", "1"),
        "train.samples": ("--eval-split", "0.5"),
        "train.decay_share": ("--schedule", "wsd"),
        "train.save_in_background": ("--save-every", "1"),
        "train.momentum": ("--optimizer", "muon"),
        "train.reference_sync_share": ("--reference-sync-every", "1"),
        "train.eval_every": ("--eval-split", "0.5"),
        "reference_revision": ("--reference", "R"),
        "eval_data_split": ("--eval-data", "E"),
        "eval_data_revision": ("--eval-data", "E"),
        "mix.temperature": ("--data", "other.jsonl"),
        "mix.rows": ("--data", "other.jsonl"),
        "loss.name": (),
        "train.stochastic_rounding": ("--dtype", "bfloat16"),
        **{f"adapter.{name}": ("--adapter", "lora") for name in ("rank", "alpha", "targets")},
        "adapter.rslora": ("--adapter", "lora"),
    }.get(key, ())
    if key == "loss.name":
        arguments, value = [flag.opts[0], "hinge"], "hinge"
    config = printed(*needed, *arguments)
    assert (config[table] if table else config)[name] == value


def test_several_data_sets_are_flags_or_a_list(tmp_path: Path) -> None:
    flags = ("--data", "other.jsonl", "--mix-weights", "2,1", "--print-config")
    said = dpo("train", *NEEDED, *flags).stdout
    assert 'data = ["pairs.jsonl", "other.jsonl"]' in said
    assert "weights = [2.0, 1.0]" in said
    assert 'data = "pairs.jsonl"' in dpo("train", *NEEDED, "--print-config").stdout
    path = tmp_path / "run.toml"
    path.write_text('model = "M"\nout = "RUN"\ndata = ["a", "b"]\n', encoding="utf-8")
    assert 'data = ["a", "b"]' in dpo("train", "--config", str(path), "--print-config").stdout


def test_flag_overrides_set_overrides_config_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nkeep = 3\nseed = 3\nbatch_size = 3\n[loss]\nbeta = 0.3\n")
    config = printed(
        "--config", str(path), "--set", "train.seed=4", "--set", "train.keep=4", "--keep", "5"
    )
    train = config["train"]
    assert (train["keep"], train["seed"], train["batch_size"]) == (5, 4, 3)
    assert config["loss"]["beta"] == 0.3


def test_printed_config_is_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    first = dpo("train", *NEEDED, "--steps", "3", "--beta", "0.5", "--print-config").stdout
    path.write_text(first, encoding="utf-8")
    second = dpo("train", "--config", str(path), "--print-config").stdout
    assert tomllib.loads(first) == tomllib.loads(second)
    assert str(path) in second


def test_switch_that_is_turned_off_is_named_as_it_was_given() -> None:
    result = dpo("train", *NEEDED, "--no-prefix-sharing", "--compile", "--print-config")
    origins = {line.split(" = ")[0]: line.rsplit("# ")[-1] for line in result.stdout.splitlines()}
    assert origins["share_prefix"] == "--no-prefix-sharing"
    assert origins["compile"] == "--compile"


def test_columns_are_given_as_pairs_of_names() -> None:
    assert printed("--columns", "prompt=question,chosen=a")["columns"] == {
        "prompt": "question",
        "chosen": "a",
    }


# --- refusals and exit codes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "No such command 'trian'. Did you mean 'train'?"),
        (("nonsense",), "No such command 'nonsense'."),
        (("train", "--learning-rat", "1"), "--learning-rate"),
        (("train", *NEEDED, "--batch-size", "x"), "--batch-size: train.batch_size must be an"),
        (("train", *NEEDED, "--set", "beta"), "--set beta: expected key=value"),
        (("train", *NEEDED, "--set", "train.sede=1"), "did you mean 'train.seed'?"),
        (("train", *NEEDED, "--config", "absent.toml"), "absent.toml: cannot read the config file"),
        (("train", *NEEDED, "--steps", "1", "--epochs", "1"), "train.epochs and train.steps"),
        (("train", "--print-config"), "model is missing: give --model"),
        (("score", "--model", "M"), "data is missing: give --data"),
        (("reference", "--model", "M"), "data is missing: give --data"),
        (("score", "--steps", "3"), "No such option"),
    ],
)
def test_wrong_input_exits_2_with_a_message_and_no_traceback(
    arguments: tuple[str, ...], message: str
) -> None:
    result = dpo(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def failing(error: BaseException) -> Result:
    """Run a command table whose one command raises."""

    def fail() -> None:
        raise error

    class Table(CommandTable):
        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            return "fail", click.Command("fail", callback=fail), args[1:]

    return CliRunner().invoke(Table("dpo"), ["fail"])


@pytest.mark.parametrize(
    ("error", "exit_code", "stderr"),
    [
        (InputError("pairs.jsonl:3: no prompt"), 2, "Error: pairs.jsonl:3: no prompt\n"),
        (RunError("the loss is not finite"), 1, "Error: the loss is not finite\n"),
        (OSError(errno.ENOSPC, "No space left on device", "RUN/model"), 1,
         "Error: RUN/model: No space left on device\n"),
        (OSError("the disk is gone"), 1, "Error: the disk is gone\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)  # fmt: skip
def test_error_becomes_one_message_and_its_exit_code(
    error: BaseException, exit_code: int, stderr: str
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stderr, result.stdout) == (exit_code, stderr, "")


def test_exit_code_of_a_stopped_run_is_kept() -> None:
    assert failing(SystemExit(143)).exit_code == 143


def test_defect_keeps_its_traceback() -> None:
    assert isinstance(failing(KeyError("defect")).exception, KeyError)


# --- real processes -----------------------------------------------------------------------------


def process(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dpo", *arguments], capture_output=True, text=True, check=False
    )


def test_module_runs_as_the_command() -> None:
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: dpo ")


def test_process_exits_2_on_wrong_input() -> None:
    done = process("train", "--set", "train.keep=0")
    assert done.returncode == 2
    assert "train.keep must be at least 1, got 0 (train.keep: --set train.keep)" in done.stderr
    assert "Traceback" not in done.stderr


# --- the engine through the command line --------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of bytes, as Hugging Face lays it out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from dpo.models import init_model, parse_config, save_model

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    save_model(init_model(parse_config(config), seed=0), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}", "chosen": " yes", "rejected": f" no {n}"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_run_leaves_metrics_config_model_and_report(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    run = tmp_path / "RUN"
    result = dpo(
        "train", "--model", str(model_folder), "--data", str(pairs_file), "--out", str(run),
        "--eval-split", "0.25", "--batch-size", "4", "--epochs", "2", "--learning-rate", "1e-2",
        "--schedule", "constant", "--threads", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = lines(run / "metrics.jsonl")
    losses = [line["loss"] for line in metrics if "loss" in line]
    evaluations = [line["eval/loss"] for line in metrics if "eval/loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluations[-1] < evaluations[0]
    assert f"model   {run / 'model'}" in result.stdout
    assert "rewards/accuracy" in result.stdout
    assert (run / "model" / "model.safetensors").exists()
    assert 'aria-label="Loss"' in (run / "report.html").read_text(encoding="utf-8")
    saved = dpo("train", "--config", str(run / "config.toml"), "--print-config")
    assert tomllib.loads(saved.stdout) == tomllib.loads((run / "config.toml").read_text("utf-8"))


def test_scores_are_the_rewards_of_the_same_model_at_zero(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    result = dpo(
        "score", "--model", str(model_folder), "--reference", str(model_folder),
        "--data", str(pairs_file), "--out", str(out),
        "--threads", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert [line["margin"] for line in lines(out)] == pytest.approx([0.0] * 12, abs=1e-5)


def test_reference_pass_is_not_repeated(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    arguments = (
        "reference", "--model", str(model_folder), "--data", str(pairs_file),
        "--threads", "1",
    )  # fmt: skip
    first, second = dpo(*arguments), dpo(*arguments)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert "all 12 pairs are in the cache" not in first.stderr
    assert "all 12 pairs are in the cache" in second.stderr


def test_quiet_run_says_nothing_but_results(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    result = dpo(
        "train", "--model", str(model_folder), "--data", str(pairs_file), "--steps", "1",
        "--out", str(tmp_path / "RUN"),
        "--threads", "1", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./absent"), "./absent: no such folder"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_absent_input_exits_2_and_is_named(
    tmp_path: Path,
    model_folder: Path,
    pairs_file: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    run = tmp_path / "RUN"
    needed = ("--model", str(model_folder), "--data", str(pairs_file), "--out", str(run))
    result = dpo("train", *needed, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (run / "model").exists()


def test_output_that_cannot_be_written_exits_1_in_one_line(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    run = tmp_path / "file" / "RUN"
    result = dpo(
        "train", "--model", str(model_folder), "--data", str(pairs_file), "--out", str(run)
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_terminated_run_exits_143_after_a_checkpoint(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    run = tmp_path / "RUN"
    command = [
        sys.executable, "-m", "dpo", "train", "--model", str(model_folder), "--data",
        str(pairs_file), "--out", str(run), "--batch-size", "1", "--threads", "1", "--quiet",
    ]  # fmt: skip
    started = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or "\n" not in (run / "metrics.jsonl").read_text():
        assert started.poll() is None
        time.sleep(0.05)
    started.terminate()
    _, stderr = started.communicate(timeout=60)
    assert started.returncode == 143
    assert "Traceback" not in stderr
    stopped_at = lines(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / f"step-{int(stopped_at):06d}").is_dir()
