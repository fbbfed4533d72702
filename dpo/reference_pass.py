"""The reference log-probs of a run: from the cache, and what is missing from the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo.config import RunConfig
from dpo.files import JSON
from dpo.inputs import Inputs, ModelFolder, Models, cache_folder
from dpo.models import Decoder
from dpo.precision import precision_of
from dpo.progress import Console
from dpo.ranks import Ranks
from dpo.reference import (
    AnswerLogProbs,
    ReferenceCache,
    ReferenceLogProbs,
    compute_reference,
    numerics,
    verify_sample,
)
from dpo.scoring import MicroBatches, answer_log_probs, score_rows
from dpo.tokenization import TokenizedPairs


@dataclass(frozen=True)
class References:
    """Reference log-probs of the pairs of a run and of its held-out pairs, where there are any."""

    pairs: ReferenceLogProbs | None = None
    eval_pairs: ReferenceLogProbs | None = None


def obtain_references(
    config: RunConfig,
    models: Models,
    inputs: Inputs,
    console: Console,
    *,
    device: torch.device,
    model: Decoder | None = None,
    ranks: Ranks | None = None,
    compares_later: bool = False,
) -> References:
    """Look the reference log-probs of ``inputs`` up, and compute those that the cache lacks.

    A sample of those from the cache is computed again and compared, unless the cache has everything
    and ``model`` is None or is compared with it later.

    Args:
        config: the run.
        models: of which the reference is used.
        inputs: the pairs.
        console: shows progress.
        device: where to compute.
        model: the reference model as it is on disk, if it is loaded; else it is loaded when first
            needed, and never if the cache has everything.
        ranks: among which what is to be computed is divided; all must see the folder of the cache.
        compares_later: the log-probs of ``inputs.pairs`` are compared with the model's when
            training begins.

    Raises:
        RunError: the cache holds other values than the model gives, or one is not finite.
    """
    switches: dict[str, JSON] = {"tf32": True} if config.train.tf32 else {}
    if models.reference.quantize is not None:
        switches["quantization"] = models.reference.quantize
    cache = ReferenceCache(
        Path(config.reference_cache.dir or cache_folder("reference")),
        model=str(models.reference.name),
        fingerprint=models.reference.fingerprint,
        numerics=numerics(precision=config.train.dtype, device=device.type, **switches),
    )
    scorer = _Scorer(config, models.reference, device, model, ranks or Ranks())
    pairs = scorer.obtain(inputs.pairs, cache, console, "reference", compares_later=compares_later)
    if inputs.eval_pairs is None:
        return References(pairs)
    return References(
        pairs, scorer.obtain(inputs.eval_pairs, cache, console, "reference, held out")
    )


class _Scorer:
    """Scores pairs with the reference model, which is loaded when it is first needed."""

    def __init__(
        self,
        config: RunConfig,
        folder: ModelFolder,
        device: torch.device,
        model: Decoder | None,
        ranks: Ranks,
    ) -> None:
        self.train, self.folder, self.device, self.model = config.train, folder, device, model
        self.precision, self.ranks = precision_of(config.train), ranks

    def obtain(
        self,
        pairs: TokenizedPairs,
        cache: ReferenceCache,
        console: Console,
        label: str,
        *,
        compares_later: bool = False,
    ) -> ReferenceLogProbs:
        """Complete the cache for ``pairs``, and check a sample of it if a model is loaded."""
        batches = MicroBatches.of_run(self.train, pairs)

        def score(rows: Sequence[int]) -> list[AnswerLogProbs]:
            scored = score_rows(
                self._loaded(), batches, rows, precision=self.precision, device=self.device
            )
            return answer_log_probs(scored)

        def own(rows: Sequence[int]) -> list[list[int]]:
            part = batches.divide(rows, self.ranks.count)[self.ranks.rank]
            return batches.split_sorted(part)

        missing = self.ranks.first(cache.missing(pairs))
        _tell_damage(cache, console)
        if missing:
            with console.bar(label, unit="tokens") as bar:
                compute_reference(
                    score, pairs, cache, batches=own, progress=bar.update, ranks=self.ranks
                )
        else:
            console.say(f"{label}: all {len(pairs):,} pairs are in the cache")
        is_compared = compares_later and not missing
        if len(missing) < len(pairs) and self.model is not None and not is_compared:
            verify_sample(cache, pairs, score, tolerance=self.precision.noise)
        found = cache.lookup(pairs)
        _tell_damage(cache, console)
        return found

    def _loaded(self) -> Decoder:
        if self.model is None:
            dtype = self.precision.parameters
            self.model = self.folder.load(dtype=dtype, device=self.device, ranks=self.ranks)
        return self.model


def _tell_damage(cache: ReferenceCache, console: Console) -> None:
    """Warn of each damaged file once."""
    while cache.damaged:
        console.warn(cache.damaged.pop(0))
