"""The arithmetic of the comparison with TRL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.bench.peers.compare import parse, run_contender, schedule
from dpo.bench.peers.contenders import CONTENDERS
from dpo.bench.peers.summary import (
    Run,
    Summary,
    Work,
    best_peer,
    check_losses,
    summarise,
    table,
)
from dpo.bench.peers.work import model_folder, write_pairs
from dpo.bench.scenarios import PROFILES
from dpo.errors import InputError, RunError
from dpo.preferences import read_pairs
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import load_tokenizer

WORK = Work(pairs=[8, 8, 4], useful_tokens=[999, 400, 200])


def run(*step_seconds: float, peak: float = 100.0, reference: float | None = None) -> Run:
    return Run([0.69, 0.68, 0.67], list(step_seconds), peak, reference, {})


def summary(pairs_per_s: float, peak_mib: float = 100.0, loss: float = 0.6) -> Summary:
    return Summary(1.0, 0.0, pairs_per_s, 10.0, peak_mib, None, [loss])


def test_summary_takes_the_median_run_without_its_first_step() -> None:
    # means of the counted steps: 2, 3 and 10 seconds
    found = summarise(
        [run(99, 1, 3, peak=5, reference=7), run(99, 3, 3, peak=6), run(99, 10, 10, peak=9)], WORK
    )
    assert found.step_seconds == 3
    assert found.spread == pytest.approx(8 / 3)
    assert found.pairs_per_s == 6 / 3  # (8 + 4) / 2 pairs in a step
    assert found.useful_tokens_per_s == 300 / 3
    assert (found.peak_mib, found.reference_seconds) == (6, 7)


def test_second_repeat_runs_backwards() -> None:
    assert schedule(["a", "b", "c"], 3) == list("abccbaabc")


def test_losses_within_the_tolerance_pass() -> None:
    check_losses({"ours": summary(2, loss=0.6), "trl": summary(1, loss=0.6009)}, tolerance=1e-3)


@pytest.mark.parametrize("loss", [0.602, float("nan")])
def test_losses_that_differ_are_refused(loss: float) -> None:
    summaries = {"ours": summary(2, loss=0.6), "trl": summary(1, loss=loss)}
    with pytest.raises(RunError, match=r"the loss of step 1 is 0\.600000 with 'ours' and .*'trl'"):
        check_losses(summaries, tolerance=1e-3)


def test_ratios_are_to_the_fastest_peer() -> None:
    summaries = {
        "ours": summary(6, peak_mib=50),
        "trl, precomputed": summary(2, peak_mib=100),
        "trl, live reference": summary(1, peak_mib=80),
    }
    assert best_peer(summaries) is summaries["trl, precomputed"]
    assert ratios(summaries) == [["3.00", "0.50"], ["1.00", "1.00"], ["0.50", "0.80"]]


def ratios(summaries: dict[str, Summary]) -> list[list[str]]:
    lines = table(summaries).splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[-3:-1]] for line in lines]


def test_without_peers_there_are_no_ratios() -> None:
    assert ratios({"ours": summary(6)}) == [["", ""]]


def test_all_steps_that_warm_up_are_not_counted() -> None:
    found = summarise([run(99, 50, 2)], WORK, warm_up=2)
    assert (found.step_seconds, found.pairs_per_s) == (2, 4 / 2)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if "kept heap" in name])
def test_allocator_of_a_contender_reaches_its_process(name: str, tmp_path: Path) -> None:
    shell = 'echo "{\\"threads\\": $OMP_NUM_THREADS, \\"maps\\": $MALLOC_MMAP_MAX_}"'
    command = ["/bin/sh", "-c", shell, "sh", "--threads", "3"]
    found = run_contender(command, CONTENDERS[name], compiled=tmp_path)
    assert found == {"threads": 3, "maps": 0}


@pytest.mark.slow
def test_contenders_of_both_do_the_same_on_pairs_of_a_profile(
    peers_python: Path, tmp_path: Path
) -> None:
    """Which the comparison itself checks, by the losses of each step."""
    names = ("ours", "ours, no sharing", "trl, precomputed, micro-batch 1/2, kept heap")
    words = ["--model", "tiny", "--profile", "agent", "--activation-checkpointing"]
    words += ["--steps", "3", "--repeats", "1", "--batch-size", "4", "--only", *names]
    words += ["--peers", str(peers_python), "--out", str(tmp_path / "out.json")]
    subprocess.run([sys.executable, "-m", "dpo.bench.peers.compare", *words], check=True)
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(result["summaries"]) == set(names)


def test_pairs_of_a_profile_have_its_lengths_in_tokens(tmp_path: Path) -> None:
    folder = model_folder("tiny", tmp_path)
    pairs = read_pairs(write_pairs("agent", 40, tmp_path))
    lengths = tokenize_pairs(pairs, load_tokenizer(folder)).pairs.lengths()
    for column, bounds in zip(
        lengths.T, (PROFILES["agent"].prompt, *[PROFILES["agent"].answer] * 2), strict=True
    ):
        assert bounds[0] <= column.min() <= column.max() <= bounds[1]
    assert len(set(map(tuple, lengths.tolist()))) > 30


def test_every_contender_is_ours_or_trl() -> None:
    assert all(name.startswith(("ours", "trl")) for name in CONTENDERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "theirs"], "no contender 'theirs'; there are ours, "),
        (["--only", "trl, precomputed"], "one of ours must run"),
        (["--steps", "1"], "--warm-up must be at least 1, and --steps more"),
        (["--warm-up", "0"], "--warm-up must be at least 1"),
        (["--profile", "agent"], "needs a model of random weights, whose tokens are letters"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--data", "absent.jsonl"], r"--data: no file .*absent\.jsonl"),
        (["--peers", "absent/python"], "--peers: no program absent/python"),
    ],
)
def test_comparisons_that_say_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(["--peers", "python", *words])


def test_what_is_wrong_is_told_in_a_line() -> None:
    words = ["-m", "dpo.bench.peers.compare", "--peers", "absent/python"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "--peers: no program absent/python: README.md says how to make one\n"
