"""What a run leaves in its folder for its page beside the metrics: files of bounded size.

``dpo.report.record`` says what they hold. Each is replaced whole and depends on the run alone, so a
resumed run leaves those of an unbroken one. None takes a pass of the model but ``samples.jsonl``,
which is written with ``train.samples`` and touches neither the weights nor the random state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from dpo.decoding import GenerateOptions
from dpo.errors import InputError
from dpo.files import JSON, atomic_write, write_json
from dpo.generate import generate_from_ids
from dpo.inputs import Inputs
from dpo.models import Decoder
from dpo.report.record import (
    DATA,
    EVAL_PAIRS,
    PARTS,
    SAMPLES,
    EvalPair,
    Sample,
    eval_pair,
    read_rows,
    sample,
)
from dpo.svg import tick_step
from dpo.tokenized_pairs import TokenizedPair, TokenizedPairs, model_ids
from dpo.tokenizer import Tokenizer
from dpo.trainer import Trainer

MOST_PAIRS = 2_000  # in eval_pairs.jsonl
NEW_TOKENS = 128  # written to a held-out prompt, at most
_MOST_CHARACTERS = 4_000  # of a text in samples.jsonl
_BINS = 30  # of lengths, about


def write_data(folder: Path, inputs: Inputs, told: Sequence[str]) -> None:
    """Write ``data.json``.

    Args:
        folder: of the run.
        inputs: its data.
        told: what was said while the data was read and tokenized.
    """
    sides: dict[str, JSON] = {
        "train": _side(inputs.pairs),
        "held out": None if inputs.eval_pairs is None else _side(inputs.eval_pairs),
    }
    # whether tokens came from the cache is not about the data
    write_json(folder / DATA, sides | {"told": [line.partition("; cache ")[0] for line in told]})


def _side(pairs: TokenizedPairs) -> Mapping[str, JSON]:
    """Return the fields of a ``DataSide``."""
    lengths = pairs.lengths()  # (P, 3)
    width = max(math.ceil(tick_step(0, max(int(lengths.max()), 1), count=_BINS)), 1)
    edges = np.arange(0, lengths.max() + width + 1, width)
    counts: dict[str, JSON] = {}
    levels: dict[str, JSON] = {}
    for part, of_part in zip(PARTS, lengths.T, strict=True):
        present = of_part[of_part > 0]
        counts[part] = np.histogram(present, edges)[0].tolist()
        levels[part] = np.quantile(present, [0, 0.5, 0.95, 1]).tolist() if len(present) else [0] * 4
    return {
        "pairs": len(pairs),
        "tokens": int(lengths.sum()),
        "edges": edges.tolist(),
        "counts": counts,
        "lengths": levels,
    }


class EvalPairsLog:
    """A callback that writes ``eval_pairs.jsonl`` at each evaluation of a model that may be saved.

    At most ``MOST_PAIRS`` of the pairs with two answers, evenly over the data.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVAL_PAIRS

    def __call__(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Replace the file, if this is an evaluation; the margins of the first one are kept."""
        if "eval/loss" not in metrics or trainer.evaluated is None or trainer.eval_batches is None:
            return
        if trainer.config.keep_best and trainer.step and trainer.best.step != trainer.step:
            return
        first: dict[str, float | None] = {}
        if trainer.step:
            first = {pair.id: pair.margin_before for pair in read_rows(self._path, eval_pair)}
        gaps, pairs = trainer.evaluated.gaps(), trainer.eval_batches.pairs
        rows = []
        for row in _evenly(sorted(gaps), MOST_PAIRS):
            name, (chosen, rejected) = pairs.ids[row], pairs.scored_lengths[row].tolist()
            before = first.get(name) if trainer.step else gaps[row]
            rows.append(EvalPair(name, trainer.step, chosen, rejected, gaps[row], before))
        if rows:
            atomic_write(self._path, _lines(rows))


class Samples:
    """What a model writes to some held-out prompts, before and after the training.

    Args:
        folder: of the run.
        pairs: the held-out ones.
        tokenizer: of the model.
        count: of the prompts.
        most_positions: of the model; prompts without room for an answer are passed over.

    Raises:
        InputError: no prompt leaves room.
    """

    def __init__(
        self,
        folder: Path,
        pairs: TokenizedPairs,
        tokenizer: Tokenizer,
        *,
        count: int,
        most_positions: int,
    ) -> None:
        self._path, self._tokenizer = folder / SAMPLES, tokenizer
        _, first_rows = np.unique(pairs.prompt_groups, return_index=True)
        has_room = pairs.lengths()[first_rows, 0] + NEW_TOKENS <= most_positions
        if not has_room.any():
            raise InputError(
                f"train.samples: no held-out prompt leaves room for {NEW_TOKENS} tokens among the "
                f"{most_positions} that the model was made for"
            )
        self._pairs = [pairs[row] for row in _evenly(first_rows[has_room].tolist(), count)]

    def write_before(self, model: Decoder) -> None:
        """Write the file, with what the model writes before; if it is there it stays."""
        written = list(read_rows(self._path, sample))
        if [row.id for row in written] == [pair.id for pair in self._pairs]:
            return
        texts = self._texts(model)
        rows = [
            Sample(
                pair.id,
                _cut(self._tokenizer.decode(pair.prompt_ids.tolist())),
                _cut(
                    self._tokenizer.decode(
                        model_ids(pair.chosen_ids).tolist(), skip_special_tokens=True
                    )
                ),
                text,
            )
            for pair, text in zip(self._pairs, texts, strict=True)
        ]
        atomic_write(self._path, _lines(rows))

    def write_after(self, model: Decoder) -> None:
        """Add what the model writes after."""
        before = list(read_rows(self._path, sample))
        rows = [
            replace(row, after=text) for row, text in zip(before, self._texts(model), strict=True)
        ]
        atomic_write(self._path, _lines(rows))

    def _texts(self, model: Decoder) -> list[str]:
        """Let the model answer all prompts, as it is: without compiling and in its own dtype."""
        is_training = model.training
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            found = generate_from_ids(
                model,
                self._tokenizer,
                [pair.prompt_ids.tolist() for pair in self._pairs],
                GenerateOptions(max_new_tokens=NEW_TOKENS),
                stop_ids=[self._stop_ids(pair) for pair in self._pairs],
            )
        model.train(is_training)
        return [_cut(each.text) for each in found]

    def _stop_ids(self, pair: TokenizedPair) -> frozenset[int]:
        """Return the tokens that end a text, and the one that ends the answers of this pair."""
        ids = pair.chosen_ids if len(pair.chosen_ids) else pair.rejected_ids
        return self._tokenizer.eos_ids.union({int(ids[-1])} & self._tokenizer.special_ids)


def _evenly(rows: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the rows, in their order, evenly over all of them."""
    count = min(len(rows), most)
    return [rows[index * len(rows) // count] for index in range(count)]


def _cut(text: str) -> str:
    """Leave the middle out of a long text."""
    half = _MOST_CHARACTERS // 2
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"


def _lines(rows: Iterable[EvalPair | Sample]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
