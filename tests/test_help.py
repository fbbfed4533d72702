"""What the command line tells and completes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner

from dpo.cli import COMMANDS, main
from dpo.cli.completion import SHELLS, names_in_table
from dpo.cli.help import EXAMPLES, TOPICS
from dpo.losses import LOSSES
from tests.pages import commands, understand

PROGRAM = [sys.executable, "-c", "from dpo.cli import main; main(prog_name='dpo')"]
LINES = [line for lines in EXAMPLES.values() for line in lines]


def completions(*words: str) -> list[str]:
    """What the last word is completed to."""
    completer = ShellComplete(main, {}, "dpo", "_DPO_COMPLETE")
    return [found.value for found in completer.get_completions(list(words[:-1]), words[-1])]


def test_every_command_has_a_topic_and_examples_of_its_own() -> None:
    assert sorted(name for names in TOPICS.values() for name in names) == sorted(COMMANDS)
    assert sorted(EXAMPLES) == sorted(["", *COMMANDS])
    wrong = [
        name for name, lines in EXAMPLES.items() if not any(f"dpo {name}" in line for line in lines)
    ]
    assert wrong == []


@pytest.mark.parametrize("line", LINES)
def test_example_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (*_, command) = commands(line)
    understand(command.words[command.words.index("dpo") :])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples_as_they_are(name: str) -> None:
    for _ in range(2):
        result = CliRunner().invoke(main, [name, "--help"])
        for line in EXAMPLES[name]:
            assert result.stdout.count(f"    {line}\n") == 1


def test_help_of_every_command_needs_no_torch() -> None:
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from dpo.cli import COMMANDS, main\n"
        "run = CliRunner().invoke\n"
        "codes = {name: run(main, [name, '--help']).exit_code for name in COMMANDS}\n"
        "heavy = {'torch', 'transformers', 'yaml', 'huggingface_hub', 'pyarrow'}\n"
        "print(json.dumps([sorted(set(codes.values())), sorted(heavy & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [[0], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_little_time(name: str) -> None:
    """At most 0.26 s on the machine it was written on."""

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PROGRAM, name, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train", "train-policy"]),
        (["data", "b"], ["build"]),
        (["train", "--learning"], ["--learning-rate"]),
        (["train", "--loss", "sim"], ["simpo", "simper"]),
        (["train", "--dtype", "bf"], ["bfloat16", "bf16-mixed"]),
        (["train", "--optimizer", "ada"], ["adamw", "adamw8bit", "adafactor"]),
        (["train", "--adapter", ""], ["lora", "dora"]),
        (["train", "--set", "loss.n"], ["loss.name="]),
        (["train", "--set", "loss.name=ipo"], ["loss.name=ipo", "loss.name=ipo_sum"]),
        (["train", "--set", "train.compile="], ["train.compile=true", "train.compile=false"]),
        (["train", "--set", "nothing=x"], []),
        (["completion", ""], list(SHELLS)),
        (["data", "build", "r"], ["retrieval"]),
    ],
)  # fmt: skip
def test_word_is_completed(words: list[str], expected: list[str]) -> None:
    assert completions(*words) == expected


@pytest.mark.parametrize(("flag", "kind"), [("--data", "file"), ("--model", "dir")])
def test_paths_are_completed_by_the_shell(flag: str, kind: str) -> None:
    completer = ShellComplete(main, {}, "dpo", "_DPO_COMPLETE")
    (found,) = completer.get_completions(["train", flag], "pa")
    assert (found.type, found.value) == (kind, "pa")


def test_names_of_losses_are_read_without_torch() -> None:
    assert names_in_table("dpo.losses", "LOSSES") == list(LOSSES)


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_that_of_the_shell(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_DPO_COMPLETE" in result.stdout
    kind = get_completion_class(shell)
    assert kind is not None
    assert result.stdout == kind(main, {}, "dpo", "_DPO_COMPLETE").source() + "\n"


def test_bash_takes_the_script_and_completes() -> None:
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    said = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p dpo"], check=True, capture_output=True, text=True
    ).stdout
    assert "_dpo_completion dpo" in said
    asked = {"_DPO_COMPLETE": "bash_complete", "COMP_WORDS": "dpo che", "COMP_CWORD": "1"}
    done = subprocess.run(PROGRAM, env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout == "plain,checkpoint\n"
