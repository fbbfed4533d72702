"""The reference model as a column of the data: a cache of per-token log-probs.

One folder holds what one model in one kind of arithmetic says about any number of answers. An
answer is found by the hash of the ids of its prompt and of itself, so data sets, pairings and runs
share it; beta, loss, learning rate and output folder are not part of any key. Shards are only ever
added: a killed pass goes on where it was, and processes that compute into one folder do not meet.

Shapes: P pairs, A answers in a shard, T tokens of these answers.
"""

import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dpo.errors import RunError
from dpo.files import JSON, atomic_write, remove_leftovers, write_json
from dpo.ranks import Ranks
from dpo.tokenized_pairs import TokenIds, TokenizedPair, TokenizedPairs

Floats: TypeAlias = NDArray[np.float32]
AnswerLogProbs: TypeAlias = tuple[Floats, Floats]  # of the chosen and of the rejected tokens
Score: TypeAlias = Callable[[Sequence[int]], Sequence[AnswerLogProbs]]  # of the pairs in some rows
Batches: TypeAlias = Callable[[Sequence[int]], Iterable[Sequence[int]]]  # cuts rows into batches
Progress: TypeAlias = Callable[[int, int], None]  # tokens done, tokens in all

ENGINE_NUMERICS = 1  # raised when the engine's log-probs change by more than round-off
KEY_BYTES = 16  # a billion answers collide with a chance of 1e-21

# A shard is written when the last one is older than both: a kill costs at most 5 % of a long pass,
# and the longest pass makes some hundred shards.
FLUSH_SECONDS = 30.0
FLUSH_SHARE = 0.05
FLUSH_TOKENS = 2**26  # 256 MiB

_ABANDONED_SECONDS = 3600.0  # no shard takes an hour to write


class _Sliceable(Protocol):
    """Float32 numbers in memory or in a file."""

    def __getitem__(self, key: slice, /) -> Floats: ...


class ReferenceLogProbs(Sequence[AnswerLogProbs]):
    """Reference log-probs aligned with P pairs: ``[i]`` is those of pair i, read when asked for.

    Args:
        values: arrays of log-probs, in memory or mapped.
        places: (2 P, 3) int64, chosen and rejected answer of each pair in turn: which array, and
            where in it the answer begins and ends, which are the same if it is missing.
    """

    def __init__(self, values: Sequence[_Sliceable], places: NDArray[np.int64]) -> None:
        self._values = values
        self._places = places

    def __len__(self) -> int:
        return len(self._places) // 2

    @overload
    def __getitem__(self, index: int) -> AnswerLogProbs: ...
    @overload
    def __getitem__(self, index: slice) -> "ReferenceLogProbs": ...
    def __getitem__(self, index: int | slice) -> "AnswerLogProbs | ReferenceLogProbs":
        """Return (chosen,) and (rejected,) float32 of one pair, or some of the pairs."""
        if isinstance(index, slice):
            pairs = self._places.reshape(-1, 6)[index]
            return ReferenceLogProbs(self._values, pairs.reshape(-1, 3))
        chosen = 2 * range(len(self))[index]
        return self._answer(chosen), self._answer(chosen + 1)

    def _answer(self, answer: int) -> Floats:
        array, begin, end = map(int, self._places[answer])
        return self._values[array][begin:end]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file of the cache: keys (A, 16) uint8, offsets (A + 1,) int64, log_probs (T,) float32."""

    path: Path
    keys: list[bytes]
    offsets: NDArray[np.int64]
    log_probs: _Sliceable
    log_probs_sha256: str


class ReferenceCache:
    """What one reference model says about answers, kept in ``directory``.

    Args:
        directory: holds caches of any number of models.
        model: what the model is called; for people.
        fingerprint: of its weights and configuration, from ``dpo.fingerprint``.
        numerics: how it is computed (``numerics``).

    Attributes:
        folder: the part of ``directory`` that belongs to this model and numerics.
        damaged: what was wrong with shards that are not used, and now called ``<name>.damaged``.

    Example:
        >>> from pathlib import Path
        >>> from dpo import ReferenceCache, load_model, load_tokenizer, read_pairs
        >>> from dpo import reference_log_probs, tokenize_pairs
        >>> from dpo.fingerprint import weights_fingerprint
        >>> from dpo.reference import numerics
        >>> pairs = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model")).pairs
        >>> cache = ReferenceCache(
        ...     Path("cache"),
        ...     model="model",
        ...     fingerprint=weights_fingerprint(Path("model")),
        ...     numerics=numerics(precision="float32", device="cpu"),
        ... )
        >>> reference = reference_log_probs(load_model("model"), pairs, cache)
        >>> cache.missing(pairs)
        []
    """

    def __init__(
        self, directory: Path, *, model: str, fingerprint: str, numerics: Mapping[str, JSON]
    ) -> None:
        key = json.dumps([fingerprint, numerics], sort_keys=True)
        self.folder = directory / hashlib.sha256(key.encode()).hexdigest()
        self.damaged: list[str] = []
        self._shards: list[_Shard] = []
        self._sound: set[Path] = set()
        self._unusable: set[Path] = set()
        self._answers: dict[bytes, int] = {}  # key -> row of _places
        self._places = np.empty((0, 3), np.int64)
        self._waiting: dict[bytes, Floats] = {}
        self._waiting_tokens = 0
        self._opened = self._flushed = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, older_than_seconds=_ABANDONED_SECONDS)
        if not (self.folder / "info.json").exists():
            write_json(
                self.folder / "info.json",
                {"model": model, "fingerprint": fingerprint, "numerics": numerics},
            )
        self._read_new_shards()

    def __len__(self) -> int:
        """Count the answers on disk."""
        return len(self._answers)

    def missing(self, pairs: TokenizedPairs) -> list[int]:
        """Return rows whose answers, once appended, complete the cache for all of ``pairs``."""
        keys = answer_keys(pairs)
        self._find(keys)
        known = set(self._answers)
        rows: list[int] = []
        for row, key in zip(_answer_rows(pairs), keys, strict=True):
            if key not in known:
                known.add(key)
                if rows[-1:] != [row]:
                    rows.append(row)
        return rows

    def append(self, pair: TokenizedPair, log_probs: AnswerLogProbs) -> None:
        """Add the log-probs of a pair's answers; they are on disk after ``flush``, or earlier.

        Raises:
            RunError: a log-prob is not finite.
            ValueError: there is not one log-prob for each token of each answer.
        """
        for answer_ids, values in zip((pair.chosen_ids, pair.rejected_ids), log_probs, strict=True):
            _check(pair, answer_ids, values)
            key = _answer_key(pair.prompt_ids, answer_ids)
            if len(answer_ids) and key not in self._answers and key not in self._waiting:
                self._waiting[key] = values.astype(np.float32)
                self._waiting_tokens += len(values)
        now = time.monotonic()
        patience = max(FLUSH_SECONDS, FLUSH_SHARE * (now - self._opened))
        if now - self._flushed > patience or self._waiting_tokens >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard."""
        if self._waiting:
            path = self._claim_shard()
            try:
                atomic_write(path, _shard_bytes(self._waiting))
            except BaseException:
                path.unlink()
                raise
        self._waiting, self._waiting_tokens = {}, 0
        self._flushed = time.monotonic()

    def lookup(self, pairs: TokenizedPairs) -> ReferenceLogProbs:
        """Return the log-probs of ``pairs``; the first that were written if there are several.

        Raises:
            RunError: an answer is not in the cache.
        """
        self.flush()
        answers = self._find(answer_keys(pairs))
        rows = _answer_rows(pairs)
        absent = [row for row, answer in zip(rows, answers, strict=True) if answer is None]
        if absent:
            raise RunError(
                f"{self.folder}: {len(absent)} answers have no reference log-probs, the first of "
                f"pair {pairs[absent[0]].id!r} (row {absent[0]}): compute them before the lookup"
            )
        places = np.zeros((2 * len(pairs), 3), np.int64)
        places[_has_answer(pairs).ravel()] = self._places[np.array(answers, dtype=np.int64)]
        return ReferenceLogProbs([shard.log_probs for shard in self._shards], places)

    def _find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the row of ``_places`` for each key, having checked every shard they point to."""
        while True:
            self._read_new_shards()
            answers = [self._answers.get(key) for key in keys]
            found = [answer for answer in answers if answer is not None]
            used = np.unique(self._places[found, 0]).tolist()
            if not [index for index in used if not self._has_sound_values(self._shards[index])]:
                return answers
            self._shards, self._answers, self._places = [], {}, np.empty((0, 3), np.int64)

    def _read_new_shards(self) -> None:
        """Read the key tables of shards not seen so far; an answer's earliest shard counts."""
        seen = {shard.path for shard in self._shards} | self._unusable
        for path in sorted(set(self.folder.glob("shard-*.safetensors")) - seen):
            with suppress(FileNotFoundError):  # another process has just set it aside
                if path.stat().st_size > 0:  # an empty one is claimed, and still to be written
                    self._read_shard(path)

    def _read_shard(self, path: Path) -> None:
        try:
            shard = _open_shard(path)
        except (SafetensorError, ValueError) as error:
            self._set_aside(path, str(error))
            return
        for row, key in enumerate(shard.keys, start=len(self._places)):
            self._answers.setdefault(key, row)
        number = np.full(len(shard.keys), len(self._shards))
        places = np.stack([number, shard.offsets[:-1], shard.offsets[1:]], axis=1)  # (A, 3)
        self._places = np.concatenate([self._places, places])
        self._shards.append(shard)

    def _has_sound_values(self, shard: _Shard) -> bool:
        """Say whether the log-probs are those that were written; if not, set the shard aside."""
        if shard.path not in self._sound:
            found = _sha256(shard.log_probs[:])
            if found != shard.log_probs_sha256:
                expected = shard.log_probs_sha256
                self._set_aside(shard.path, f"log-probs have sha256 {found}, expected {expected}")
                return False
            self._sound.add(shard.path)
        return True

    def _set_aside(self, path: Path, fault: str) -> None:
        self.damaged.append(f"{path}: damaged: {fault}; its answers have to be computed again")
        self._unusable.add(path)
        with suppress(OSError):  # in a folder that cannot be written to it stays, unused
            path.rename(path.with_name(f"{path.name}.damaged"))

    def _claim_shard(self) -> Path:
        """Make an empty file under the first number after all that were ever used."""
        names = (re.match(r"shard-(\d+)", path.name) for path in self.folder.iterdir())
        used = max((int(name[1]) for name in names if name), default=0)
        for number in itertools.count(used + 1):
            path = self.folder / f"shard-{number:06d}.safetensors"
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        raise AssertionError


def numerics(*, precision: str, device: str, **switches: JSON) -> dict[str, JSON]:
    """Describe the arithmetic that log-probs come from, for the key of a cache.

    Args:
        precision: name of the dtypes, such as "bf16-mixed".
        device: kind of device, such as "cpu" or "cuda".
        switches: whatever else changes results by more than round-off, such as ``tf32=True``.
    """
    return {"engine": ENGINE_NUMERICS, "precision": precision, "device": device, **switches}


def compute_reference(
    score: Score,
    pairs: TokenizedPairs,
    cache: ReferenceCache,
    *,
    batches: Batches,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> ReferenceLogProbs:
    """Compute what the cache lacks, and return the log-probs of all ``pairs``.

    What is computed when an exception or a kill ends the pass is kept, but for the last seconds.

    Args:
        score: gives (chosen tokens,) and (rejected tokens,) float32 log-probs of each pair in some
            rows.
        pairs: the data.
        cache: where results are looked for and kept.
        batches: cuts the missing rows into those scored together; longest first makes the progress
            honest and a lack of memory plain at once. One of several ranks cuts its part of them.
        progress: is called with the tokens done and those to do.
        ranks: that all compute into the folder of the cache.

    Raises:
        RunError: a log-prob is not finite.
    """
    ranks = ranks or Ranks()
    missing = ranks.first(cache.missing(pairs))
    own = list(batches(missing))
    extra = ranks.extra_passes(len(own))
    tokens = pairs.lengths().sum(axis=1)  # (P,)
    done, total = 0, sum(int(tokens[list(batch)].sum()) for batch in own)
    try:
        for batch in own:
            for row, log_probs in zip(batch, score(batch), strict=True):
                if ranks.is_first_of_pairs:
                    cache.append(pairs[row], log_probs)
                done += int(tokens[row])
            if progress:
                progress(done, total)
        for _ in range(extra):
            score([missing[0]])
    finally:
        cache.flush()
    ranks.wait()  # for what the others add
    return cache.lookup(pairs)


def reference_in_memory(
    score: Score, pairs: TokenizedPairs, *, batches: Batches
) -> ReferenceLogProbs:
    """Compute the log-probs of all ``pairs`` as ``compute_reference`` does, and keep no file.

    Raises:
        RunError: a log-prob is not finite.
    """
    values: list[Floats] = [np.empty(0, np.float32)] * (2 * len(pairs))
    for batch in batches(range(len(pairs))):
        for row, log_probs in zip(batch, score(batch), strict=True):
            pair = pairs[row]
            for side, answer_ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
                _check(pair, answer_ids, log_probs[side])
                values[2 * row + side] = log_probs[side]
    places = [(answer, 0, len(value)) for answer, value in enumerate(values)]
    return ReferenceLogProbs(values, np.array(places, np.int64).reshape(-1, 3))


def verify_sample(
    cache: ReferenceCache,
    pairs: TokenizedPairs,
    score: Score,
    *,
    tolerance: float,
    rows: int = 2,
    seed: int = 0,
) -> None:
    """Compute some cached answers again and compare.

    Args:
        cache: has the log-probs of all ``pairs``.
        pairs: the data.
        score: as in ``compute_reference``.
        tolerance: by what one token's log-prob may differ, in nats; the sum over an answer of n
            tokens may differ by sqrt(n) times that, as round-off does.
        rows: pairs to compute, the shortest of some that are drawn; few, since another model
            differs in each, and damaged files are found by their hashes.
        seed: of what is drawn.

    Raises:
        RunError: an answer differs by more.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(pairs), size=min(8 * rows, len(pairs)), replace=False)
    by_length = np.argsort(pairs.lengths()[drawn].sum(axis=1), kind="stable")
    shortest = sorted(drawn[by_length[:rows]].tolist())
    found = zip(shortest, cache.lookup(pairs.take(shortest)), score(shortest), strict=True)
    for row, cached, computed in found:
        for side, old, new in zip(("chosen", "rejected"), cached, computed, strict=True):
            old_sum, new_sum = float(old.sum(dtype=np.float64)), float(new.sum(dtype=np.float64))
            allowed = tolerance * math.sqrt(len(old))
            if not abs(old_sum - new_sum) <= allowed:
                raise RunError(
                    f"the reference cache does not fit the reference model: the log-prob of the "
                    f"{side} answer of pair {pairs.ids[row]!r} (row {row}, {len(old)} tokens) is "
                    f"{old_sum:.6g} in {cache.folder} and {new_sum:.6g} computed again; at most "
                    f"{allowed:.3g} apart is round-off. Remove that folder to compute it anew"
                )


def answer_keys(pairs: TokenizedPairs) -> list[bytes]:
    """Return the key of each answer that there is: the chosen, then the rejected one of each pair.

    Those are 2 P keys, or one of an unpaired row.
    """
    tokens = np.asarray(pairs.tokens)  # a view that is cheaper to slice than a memory map
    texts = [tokens[begin:end] for begin, end in itertools.pairwise(pairs.offsets.tolist())]
    return [
        _answer_key(texts[prompt], texts[prompt + answer])
        for prompt in range(0, len(texts), 3)
        for answer in (1, 2)
        if len(texts[prompt + answer])
    ]


def _has_answer(pairs: TokenizedPairs) -> NDArray[np.bool_]:
    """Tell which answers there are: (P, 2), chosen and rejected."""
    return np.stack([pairs.has_chosen, pairs.has_rejected], axis=1)


def _answer_rows(pairs: TokenizedPairs) -> list[int]:
    """Return the pair of each of ``answer_keys``."""
    rows: list[int] = np.nonzero(_has_answer(pairs))[0].tolist()
    return rows


def _answer_key(prompt_ids: TokenIds, answer_ids: TokenIds) -> bytes:
    # The prompt's length keeps apart the same ids cut into prompt and answer elsewhere.
    content = len(prompt_ids).to_bytes(8, "little") + prompt_ids.tobytes() + answer_ids.tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def _check(pair: TokenizedPair, answer_ids: TokenIds, log_probs: Floats) -> None:
    """Refuse log-probs that cannot be those of an answer of ``pair``."""
    scored = int((answer_ids >= 0).sum())
    if log_probs.shape != (scored,):
        raise ValueError(f"pair {pair.id!r}: {log_probs.shape} log-probs for {scored} tokens")
    bad = np.flatnonzero(~np.isfinite(log_probs))
    if len(bad):
        raise RunError(
            f"pair {pair.id!r}: the reference log-prob of answer token {bad[0]} is "
            f"{log_probs[bad[0]]}: the model's weights are damaged or its dtype overflows "
            "(try float32)"
        )


def _shard_bytes(answers: Mapping[bytes, Floats]) -> bytes:
    keys = np.frombuffer(b"".join(answers), np.uint8).reshape(-1, KEY_BYTES)  # (A, 16)
    offsets = np.array([0, *itertools.accumulate(map(len, answers.values()))])  # (A + 1,)
    log_probs = np.concatenate(list(answers.values()))  # (T,)
    hashes = {"index_sha256": _sha256(keys, offsets), "log_probs_sha256": _sha256(log_probs)}
    return save({"keys": keys, "offsets": offsets, "log_probs": log_probs}, hashes)


def _open_shard(path: Path) -> _Shard:
    """Read the key table of a shard and map its log-probs.

    Raises:
        SafetensorError: it is cut off, or its header is damaged.
        ValueError: the key table is damaged.
    """
    with safe_open(path, "numpy") as file:
        hashes = file.metadata() or {}
        keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets")
        log_probs = file.get_slice("log_probs")  # reads from the mapped file, after this block too
    found, expected = _sha256(keys, offsets), hashes.get("index_sha256")
    if found != expected:
        raise ValueError(f"the key table has sha256 {found}, expected {expected}")
    content = keys.tobytes()
    return _Shard(
        path,
        keys=[content[at : at + KEY_BYTES] for at in range(0, len(content), KEY_BYTES)],
        offsets=offsets,
        log_probs=log_probs,
        log_probs_sha256=hashes.get("log_probs_sha256", "none"),
    )


def _sha256(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
