"""The arithmetic of the comparison with TRL."""

import pytest

from dpo.bench.peers.compare import (
    CONTENDERS,
    Run,
    Summary,
    Work,
    best_peer,
    check_losses,
    parse,
    schedule,
    summarise,
    table,
)
from dpo.errors import InputError, RunError

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
    ours, precomputed, live = table(summaries).splitlines()[2:]
    assert ours.endswith("| 3.00 | 0.50 |")
    assert precomputed.endswith("| 1.00 | 1.00 |")
    assert live.endswith("| 0.50 | 0.80 |")


def test_without_peers_there_are_no_ratios() -> None:
    assert table({"ours": summary(6)}).endswith("|  |  |")


def test_every_contender_is_ours_or_trl() -> None:
    assert all(name.startswith(("ours", "trl")) for name in CONTENDERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "theirs"], "no contender 'theirs'; there are ours, "),
        (["--only", "trl, precomputed"], "one of ours must run"),
        (["--steps", "1"], "--steps must be at least 2"),
        (["--repeats", "0"], "--repeats at least 1"),
    ],
)
def test_comparisons_that_say_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(["--peers", "python", *words])
