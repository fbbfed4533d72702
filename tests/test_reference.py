import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo.reference
from dpo.errors import RunError
from dpo.files import read_json
from dpo.reference import (
    AnswerLogProbs,
    Floats,
    ReferenceCache,
    answer_keys,
    compute_reference,
    numerics,
    reference_in_memory,
    verify_sample,
)
from dpo.tokenized_pairs import TokenIds, TokenizedPair, TokenizedPairs, columns_of

Triple = tuple[list[int], list[int], list[int]]

ids = st.lists(st.integers(0, 3), min_size=1, max_size=4)
some: st.SearchStrategy[list[int]] = ids | st.just([])  # an unpaired row has one answer alone
triples = st.lists(
    st.tuples(ids, some, some).filter(lambda row: bool(row[1] or row[2])), min_size=1, max_size=12
)


def pairs_of(rows: Iterable[Triple]) -> TokenizedPairs:
    pairs = []
    for number, row in enumerate(rows):
        prompt, chosen, rejected = (np.array(text, np.int32) for text in row)
        pairs.append(TokenizedPair(prompt, chosen, rejected, id=f"p{number}"))
    return columns_of(pairs)


def log_probs_of(pair: TokenizedPair, scale: float = 1.0) -> AnswerLogProbs:
    """What a model could say: a function of the prompt and the answer alone."""
    prompt = int(pair.prompt_ids.astype(np.int64) @ 5 ** np.arange(len(pair.prompt_ids)))

    def answer(answer_ids: TokenIds) -> Floats:
        return (-scale * (np.cumsum(answer_ids + 1) + prompt / 7)).astype(np.float32)

    return answer(pair.chosen_ids), answer(pair.rejected_ids)


class Scorer:
    """Scores rows of ``pairs`` and remembers which."""

    def __init__(self, pairs: TokenizedPairs, scale: float = 1.0) -> None:
        self.pairs = pairs
        self.scale = scale
        self.rows: list[int] = []

    def __call__(self, rows: Sequence[int]) -> list[AnswerLogProbs]:
        self.rows += rows
        return [log_probs_of(self.pairs[row], self.scale) for row in rows]


def two_by_two(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[first : first + 2] for first in range(0, len(rows), 2)]


def open_cache(directory: Path, **changes: str) -> ReferenceCache:
    arithmetic = numerics(precision=changes.get("precision", "float32"), device="cpu")
    return ReferenceCache(
        directory,
        model=changes.get("model", "tiny"),
        fingerprint=changes.get("fingerprint", "f1"),
        numerics=arithmetic,
    )


def fill(directory: Path, pairs: TokenizedPairs) -> Path:
    """Put ``pairs`` into a cache as one shard, and return it."""
    cache = open_cache(directory)
    compute_reference(Scorer(pairs), pairs, cache, batches=two_by_two)
    return max(cache.folder.glob("shard-*.safetensors"))


def equal(found: AnswerLogProbs, expected: AnswerLogProbs) -> bool:
    return all(
        a.dtype == b.dtype and a.tolist() == b.tolist()
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def _unforced_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the disk: what a process has written is there for the next one without fsync too."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


PAIRS = pairs_of([([1, 2], [3], [0, 1]), ([2], [2, 2], [1]), ([3, 3, 3], [1], [2, 0, 1])])


@settings(max_examples=60, deadline=None)
@given(rows=triples, flush_tokens=st.integers(1, 30), data=st.data())
def test_lookup_gives_what_was_appended_in_any_order_and_shards(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Triple],
    flush_tokens: int,
    data: st.DataObject,
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    pairs = pairs_of(rows)
    order = data.draw(st.permutations(range(len(pairs))))
    cache = open_cache(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo.reference, "FLUSH_TOKENS", flush_tokens)
        for row in order:
            cache.append(pairs[row], log_probs_of(pairs[row]))
    cache.flush()

    for opened in (cache, open_cache(directory)):
        found = opened.lookup(pairs)
        assert len(found) == len(pairs)
        assert all(equal(found[row], log_probs_of(pairs[row])) for row in range(len(pairs)))
        assert opened.missing(pairs) == []


@given(row=st.tuples(ids, ids, ids), data=st.data())
def test_changing_a_token_changes_the_key(row: Triple, data: st.DataObject) -> None:
    text = data.draw(st.integers(0, 2))
    token = data.draw(st.integers(0, len(row[text]) - 1))
    prompt, chosen, rejected = changed = [list(part) for part in row]
    changed[text][token] += data.draw(st.integers(1, 50_000))

    before = answer_keys(pairs_of([row]))
    after = answer_keys(pairs_of([(prompt, chosen, rejected)]))

    changes = [old != new for old, new in zip(before, after, strict=True)]
    assert changes == [text in (0, 1), text in (0, 2)]


def test_same_ids_cut_elsewhere_have_another_key() -> None:
    keys = answer_keys(pairs_of([([1, 2], [3], [3, 4]), ([1], [2, 3], [2, 3, 4])]))
    assert len(set(keys)) == 4


def test_weights_and_numerics_have_folders_of_their_own(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS)
    assert open_cache(tmp_path, fingerprint="f2").missing(PAIRS) == [0, 1, 2]
    assert open_cache(tmp_path, precision="bfloat16").missing(PAIRS) == [0, 1, 2]
    assert open_cache(tmp_path, model="renamed").missing(PAIRS) == []


def test_folder_says_what_it_is_of(tmp_path: Path) -> None:
    assert read_json(open_cache(tmp_path).folder / "info.json") == {
        "model": "tiny",
        "fingerprint": "f1",
        "numerics": {"engine": 1, "precision": "float32", "device": "cpu"},
    }


def test_answers_are_shared_by_pairings_and_data_sets(tmp_path: Path) -> None:
    fill(tmp_path, pairs_of([([1], [2], [3])]))
    swapped = pairs_of([([1], [3], [2]), ([1], [2], [4])])

    cache = open_cache(tmp_path)

    assert cache.missing(swapped) == [1]
    assert cache.missing(swapped[:1]) == []
    assert equal(cache.lookup(swapped[:1])[0], log_probs_of(swapped[0]))


def test_answers_of_several_rows_are_computed_once(tmp_path: Path) -> None:
    # Three answers to one prompt in all pairings: two pairs have them all.
    pairs = pairs_of([([1], [2], [3]), ([1], [2], [4]), ([1], [3], [4]), ([1], [2], [3])])
    scorer = Scorer(pairs)
    cache = open_cache(tmp_path)
    compute_reference(scorer, pairs, cache, batches=two_by_two)

    assert scorer.rows == [0, 1]
    assert len(cache) == 3


UNPAIRED = pairs_of([([1, 2], [3], []), ([1, 2], [], [0, 1]), ([4], [], [5])])


def test_answers_of_pairs_and_unpaired_rows_are_shared(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS)
    cache = open_cache(tmp_path)
    assert len(answer_keys(UNPAIRED)) == 3
    assert cache.missing(UNPAIRED) == [2]
    assert equal(cache.lookup(UNPAIRED[:2])[1], log_probs_of(UNPAIRED[1]))
    with pytest.raises(RunError, match=r"1 answers have no .* of pair 'p2' \(row 2\)"):
        cache.lookup(UNPAIRED)


def test_missing_answers_have_no_log_probs(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cached = compute_reference(Scorer(UNPAIRED), UNPAIRED, cache, batches=two_by_two)
    in_memory = reference_in_memory(Scorer(UNPAIRED), UNPAIRED, batches=two_by_two)
    verify_sample(cache, UNPAIRED, Scorer(UNPAIRED), tolerance=0.0)
    assert len(cache) == 3
    for row, pair in enumerate(UNPAIRED):
        assert equal(cached[row], log_probs_of(pair))
        assert equal(in_memory[row], log_probs_of(pair))
    assert [len(cached[row][row == 0]) for row in range(3)] == [0, 0, 0]


def test_full_hit_computes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS)
    scorer = Scorer(PAIRS)
    found = compute_reference(scorer, PAIRS, open_cache(tmp_path), batches=two_by_two)

    assert scorer.rows == []
    assert equal(found[2], log_probs_of(PAIRS[2]))


def test_first_of_several_values_stays(tmp_path: Path) -> None:
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    for cache, scale in ((first, 1.0), (second, 2.0), (first, 3.0)):
        for row, log_probs in enumerate(Scorer(PAIRS, scale)([0, 1, 2])):
            cache.append(PAIRS[row], log_probs)
        cache.flush()

    for cache in (first, second, open_cache(tmp_path)):
        assert equal(cache.lookup(PAIRS)[1], log_probs_of(PAIRS[1], 1.0))


def test_slice_of_the_log_probs_is_that_of_the_pairs(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS)
    found = open_cache(tmp_path).lookup(PAIRS)
    assert [len(part) for part in (found[1:], found[:0])] == [2, 0]
    assert equal(found[1:][1], found[-1])
    with pytest.raises(IndexError):
        found[3]


def test_progress_counts_tokens_to_be_computed(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS[:1])
    calls: list[list[int]] = []
    compute_reference(
        Scorer(PAIRS),
        PAIRS,
        open_cache(tmp_path),
        batches=lambda rows: [[row] for row in rows],
        progress=lambda *counts: calls.append(list(counts)),
    )
    assert calls == [[4, 11], [11, 11]]


def test_in_memory_equals_the_cache(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS)
    cached = open_cache(tmp_path).lookup(PAIRS)
    found = reference_in_memory(Scorer(PAIRS), PAIRS, batches=two_by_two)
    assert [equal(found[row], cached[row]) for row in range(3)] == [True] * 3


def test_interrupted_pass_keeps_its_work(tmp_path: Path) -> None:
    def interrupted(rows: Sequence[int]) -> list[AnswerLogProbs]:
        if 2 in rows:
            raise KeyboardInterrupt
        return Scorer(PAIRS)(rows)

    with pytest.raises(KeyboardInterrupt):
        compute_reference(interrupted, PAIRS, open_cache(tmp_path), batches=two_by_two)

    assert open_cache(tmp_path).missing(PAIRS) == [2]


def test_long_pass_writes_shards_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 10**9, 7))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    rows = [([row % 50, row // 50], [1], [2]) for row in range(500)]
    cache = open_cache(tmp_path)
    shards = []
    for pair in pairs_of(rows):
        cache.append(pair, log_probs_of(pair))
        shards.append(len(list(cache.folder.glob("shard-*"))))

    assert shards[10] > 0  # the first after half a minute
    assert 20 < shards[-1] < 50  # an hour's pass: 5 % each


@pytest.mark.parametrize("change", ["flip", "cut", "empty header"])
def test_damaged_shard_is_set_aside_and_computed_again(tmp_path: Path, change: str) -> None:
    shard = fill(tmp_path, PAIRS)
    sound = shard.read_bytes()
    for index in range(0, len(sound), 5):
        damaged = bytearray(sound)
        if change == "flip":
            damaged[index] ^= 0x0F
        else:
            damaged = damaged[: index + 1] if change == "cut" else damaged[:8] + bytes(index)
        shard.write_bytes(damaged)

        cache, scorer = open_cache(tmp_path), Scorer(PAIRS)
        found = compute_reference(scorer, PAIRS, cache, batches=two_by_two)

        assert [equal(found[row], log_probs_of(PAIRS[row])) for row in range(3)] == [True] * 3
        assert len(cache.damaged) == (1 if scorer.rows else 0)
        for path in cache.folder.glob("shard-*"):
            path.unlink()
        shard.write_bytes(sound)


def test_damage_is_reported_by_file_and_the_file_is_kept_aside(tmp_path: Path) -> None:
    shard = fill(tmp_path, PAIRS)
    content = bytearray(shard.read_bytes())
    content[-len(answer_keys(PAIRS)) * 16 - 1] ^= 1  # the last byte before the keys: a log-prob
    shard.write_bytes(content)

    cache = open_cache(tmp_path)
    assert cache.damaged == []
    assert cache.missing(PAIRS) == [0, 1, 2]

    (report,) = cache.damaged
    assert re.fullmatch(
        rf"{shard}: damaged: log-probs have sha256 \w{{64}}, expected \w{{64}}; .* again", report
    )
    assert shard.with_name(f"{shard.name}.damaged").read_bytes() == content


def test_changed_dtype_of_unchanged_bytes_is_damage(tmp_path: Path) -> None:
    shard = fill(tmp_path, PAIRS)
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"'))
    assert open_cache(tmp_path).missing(PAIRS) == [0, 1, 2]


def test_damaged_shard_in_a_folder_without_write_access_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = fill(tmp_path, PAIRS)
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"'))

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    cache = open_cache(tmp_path)

    assert cache.missing(PAIRS) == [0, 1, 2]
    assert cache.missing(PAIRS) == [0, 1, 2]
    assert len(cache.damaged) == 1


def test_damage_in_one_shard_spares_the_others(tmp_path: Path) -> None:
    damaged = fill(tmp_path, PAIRS[:1])
    fill(tmp_path, PAIRS[1:])
    damaged.write_bytes(b"\0" * 100)

    cache = open_cache(tmp_path)

    assert cache.missing(PAIRS) == [0]
    assert equal(cache.lookup(PAIRS[1:])[0], log_probs_of(PAIRS[1]))


def test_number_of_a_shard_set_aside_is_not_used_again(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS).write_bytes(b"\0" * 100)
    assert fill(tmp_path, PAIRS).name == "shard-000002.safetensors"


def test_claimed_shard_that_was_never_written_is_passed_over(tmp_path: Path) -> None:
    (open_cache(tmp_path).folder / "shard-000001.safetensors").touch()
    assert fill(tmp_path, PAIRS).name == "shard-000002.safetensors"
    assert open_cache(tmp_path).missing(PAIRS) == []


def test_failed_write_leaves_no_shard_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path)
    cache.append(PAIRS[0], log_probs_of(PAIRS[0]))

    def fill_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_disk)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert [path.name for path in cache.folder.iterdir()] == ["info.json"]

    cache.flush()
    assert open_cache(tmp_path).missing(PAIRS) == [1, 2]


def test_lookup_of_an_absent_answer_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS[:1])
    with pytest.raises(RunError, match=r"4 answers have no .* the first of pair 'p1' \(row 1\)"):
        open_cache(tmp_path).lookup(PAIRS)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_log_prob_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    chosen, rejected = log_probs_of(PAIRS[2])
    rejected[1] = value
    expected = (
        f"pair 'p2': the reference log-prob of answer token 1 is {value}: the model's weights"
    )
    with pytest.raises(RunError, match=expected):
        open_cache(tmp_path).append(PAIRS[2], (chosen, rejected))


def test_log_probs_of_another_length_are_refused(tmp_path: Path) -> None:
    chosen, rejected = log_probs_of(PAIRS[0])
    with pytest.raises(ValueError, match=r"pair 'p0': \(1,\) log-probs for 2 tokens"):
        open_cache(tmp_path).append(PAIRS[0], (chosen, rejected[:1]))


def test_sound_sample_is_accepted(tmp_path: Path) -> None:
    fill(tmp_path, PAIRS)
    scorer = Scorer(PAIRS, scale=1.0001)
    verify_sample(open_cache(tmp_path), PAIRS, scorer, tolerance=0.01, rows=2)
    assert len(scorer.rows) == 2


@pytest.mark.parametrize("scale", [1.1, float("nan")])
def test_sample_that_differs_is_refused(tmp_path: Path, scale: float) -> None:
    pairs = pairs_of([([0], [2, 2], [0])])
    fill(tmp_path, pairs)
    # -(3 + 6) in the cache, and 1.1 times that again; sqrt(2) * 0.01 is allowed.
    again = f"{-9 * scale:.6g}"
    with pytest.raises(RunError) as refusal:
        verify_sample(open_cache(tmp_path), pairs, Scorer(pairs, scale), tolerance=0.01)
    assert f"chosen answer of pair 'p0' (row 0, 2 tokens) is -9 in {tmp_path}" in str(refusal.value)
    assert f"and {again} computed again; at most 0.0141 apart" in str(refusal.value)


KILLED = """
import os, sys, time
from pathlib import Path
import numpy as np
import dpo.reference
from dpo.reference import *
from dpo.tokenized_pairs import TokenizedPair, columns_of

os.fsync = lambda descriptor: None
dpo.reference.FLUSH_TOKENS = 20
answers = [np.array([row, 7], np.int32) for row in range(1000)]
pairs = columns_of([TokenizedPair(a[:1], a, a[1:], id="") for a in answers])

def score(rows):
    time.sleep(float(sys.argv[2]))
    return [(np.full(2, -row, np.float32), np.full(1, -row, np.float32)) for row in rows]

cache = ReferenceCache(Path(sys.argv[1]), model="m", fingerprint="f", numerics={})
missing = len(cache.missing(pairs))
print(missing, flush=True)
found = compute_reference(
    score, pairs, cache, batches=lambda rows: [rows[i : i + 10] for i in range(0, len(rows), 10)],
    progress=lambda done, total: print("done", done, flush=True),
)
assert all(found[i][0].tolist() == [-i, -i] and found[i][1].tolist() == [-i] for i in range(1000))
assert not cache.damaged
"""


def start_pass(directory: Path, seconds_per_batch: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", KILLED, str(directory), str(seconds_per_batch)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_pass_goes_on_where_it_was(tmp_path: Path) -> None:
    missing = [1000]
    for _ in range(2):
        with start_pass(tmp_path, 0.005) as process:
            assert process.stdout is not None
            missing.append(int(process.stdout.readline()))
            for _ in range(20):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    with start_pass(tmp_path, 0.0) as process:
        assert process.stdout is not None
        missing.append(int(process.stdout.readline()))
        process.stdout.read()

    assert process.returncode == 0
    assert missing[1] == 1000
    # 200 rows were done each time; a shard takes 7 rows, and the last 6 may be lost.
    assert missing[2] <= 806
    assert missing[3] <= missing[2] - 194


def test_processes_share_a_folder(tmp_path: Path) -> None:
    processes = [start_pass(tmp_path, 0.001) for _ in range(2)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]


def test_reference_module_does_not_import_torch() -> None:
    code = "import sys, dpo.reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
