import errno
import importlib.metadata
import subprocess
import sys
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
        "--truncation", "--dtype", "--device", "--compile", "--activation-checkpointing",
        "--no-prefix-sharing", "--reference-cache", "--save-every", "--eval-every", "--keep",
        "--resume", "--seed", "--threads", "--log-every", "--quiet", "--print-config",
        "--on-bad-row", "--on-nonfinite", "--columns",
    ],
)  # fmt: skip
def test_flag_that_scripts_rely_on_is_there(flag: str) -> None:
    assert flag in dpo("train", "--help").stdout.replace(",", " ").split()


# --- flags to config ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in known_options() if key not in {"columns"}])
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
        text = others[0] if others else numbers.get(option.kind, "text")
        arguments = [flag.opts[0], text]
        value = text if option.kind not in numbers else float(text)
    needed = {
        "train.keep_best": ("--eval-split", "0.5", "--eval-every", "1"),
        "train.early_stopping": ("--eval-split", "0.5", "--eval-every", "1"),
        "train.eval_every": ("--eval-split", "0.5"),
        "reference_revision": ("--reference", "R"),
        "eval_data_split": ("--eval-data", "E"),
        "eval_data_revision": ("--eval-data", "E"),
        "loss.name": (),
    }.get(key, ())
    if key == "loss.name":
        arguments, value = [flag.opts[0], "hinge"], "hinge"
    config = printed(*needed, *arguments)
    assert (config[table] if table else config)[name] == value


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
