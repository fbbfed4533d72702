"""What a run reads: pairs, split and tokenized, and where caches of it lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.config import RunConfig
from dpo.errors import InputError
from dpo.models import ModelConfig
from dpo.preferences import PreferencePair, Text, load_pairs
from dpo.progress import Console
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import Tokenizer

_NAMED_ROWS = 20


@dataclass(frozen=True)
class Inputs:
    """The data of a run.

    Attributes:
        pairs: what to train on or to score.
        eval_pairs: held-out pairs, or None.
    """

    pairs: TokenizedPairs
    eval_pairs: TokenizedPairs | None


def load_inputs(config: RunConfig, tokenizer: Tokenizer, console: Console) -> Inputs:
    """Read, split and tokenize the pairs of ``config``.

    Raises:
        InputError: a source is not readable or holds faulty rows, or nothing is left to train on.
    """
    pairs = _load(
        config, config.data, revision=config.data_revision, split=config.data_split, console=console
    )
    held_out: list[PreferencePair] | None = None
    if config.eval_data is not None:
        held_out = _load(
            config,
            config.eval_data,
            revision=config.eval_data_revision,
            split=config.eval_data_split,
            console=console,
        )
    elif config.eval_split is not None:
        pairs, held_out = split_pairs(pairs, config.eval_split, seed=config.train.seed)
        console.say(f"{len(held_out):,} pairs held out, none shares its prompt with the others")
    return Inputs(
        _tokenize(config, pairs, tokenizer, console),
        None if held_out is None else _tokenize(config, held_out, tokenizer, console),
    )


def _load(
    config: RunConfig, source: str, *, revision: str | None, split: str | None, console: Console
) -> list[PreferencePair]:
    loaded = load_pairs(
        source,
        columns=config.columns,
        revision=revision,
        split=split,
        on_bad_row=config.on_bad_row,
    )
    console.say(f"{source}: {len(loaded.pairs):,} pairs, {loaded.format}")
    if loaded.skipped:
        console.warn(f"{source}: {len(loaded.skipped):,} faulty rows left out")
        for fault in loaded.skipped[:_NAMED_ROWS]:
            console.warn(f"  {fault}")
    return loaded.pairs


def split_pairs(
    pairs: Sequence[PreferencePair], share: float, *, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Divide pairs into those to train on and ``share`` of them to hold out, in their order.

    Pairs of one prompt stay together, so no held-out prompt is trained on. The choice depends on
    the prompts and the seed alone, not on the order of the rows.

    Raises:
        InputError: one of the two parts would be empty.
    """
    prompts = [_digest(pair.prompt, seed) for pair in pairs]
    sizes: dict[bytes, int] = {}
    for prompt in prompts:
        sizes[prompt] = sizes.get(prompt, 0) + 1
    wanted, taken = share * len(pairs), 0
    held_out: set[bytes] = set()
    for prompt in sorted(sizes):
        if taken + sizes[prompt] / 2 > wanted:
            break
        held_out.add(prompt)
        taken += sizes[prompt]
    if not 0 < taken < len(pairs):
        raise InputError(
            f"eval_split {share} of {len(pairs)} pairs with {len(sizes)} prompts leaves "
            f"{len(pairs) - taken} to train on and {taken} to hold out"
        )
    rows = list(zip(pairs, prompts, strict=True))
    return (
        [pair for pair, prompt in rows if prompt not in held_out],
        [pair for pair, prompt in rows if prompt in held_out],
    )


def _digest(prompt: Text, seed: int) -> bytes:
    return hashlib.blake2b(repr((seed, prompt)).encode(), digest_size=16).digest()


def _tokenize(
    config: RunConfig, pairs: Sequence[PreferencePair], tokenizer: Tokenizer, console: Console
) -> TokenizedPairs:
    with console.bar("tokenize", len(pairs), unit="pairs") as bar:
        result = tokenize_pairs(
            pairs,
            tokenizer,
            config.tokenize,
            on_bad_row=config.on_bad_row,
            cache_dir=cache_folder("tokens"),
            progress=bar.update,
        )
    for line in result.report.describe():
        console.say(line)
    if not len(result.pairs):
        raise InputError("no pairs are left after tokenizing: see the rows dropped above")
    return result.pairs


def check_fit(pairs: TokenizedPairs, model: ModelConfig, name: str, console: Console) -> None:
    """Compare the tokens of ``pairs`` with what a model can read.

    Raises:
        InputError: a token has no embedding.
    """
    largest = int(pairs.tokens.max())
    if largest >= model.vocab_size:
        raise InputError(
            f"{name}: the tokenizer makes token {largest}, the model has embeddings for "
            f"{model.vocab_size}: they do not belong together"
        )
    lengths = pairs.lengths()
    longest = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())
    if longest > model.max_positions:
        console.warn(
            f"{name}: the longest row has {longest:,} tokens, the model was made for "
            f"{model.max_positions:,}; --max-length {model.max_positions} would drop such rows"
        )


def cache_folder(kind: str) -> Path:
    """Return the user's folder for caches of one kind: under XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dpo-engine" / kind
