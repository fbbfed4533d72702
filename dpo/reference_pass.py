"""The reference log-probs of a run: from the cache, and what is missing from the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.config import RunConfig
from dpo.device import choose_device
from dpo.fingerprint import weights_fingerprint
from dpo.hub import fetch_model
from dpo.inputs import Inputs, cache_folder, check_fit
from dpo.models import Decoder, load_model, read_config
from dpo.precision import PRECISIONS
from dpo.progress import Console
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

    pairs: ReferenceLogProbs | None
    eval_pairs: ReferenceLogProbs | None


def obtain_references(
    config: RunConfig, source: Path, policy: Decoder | None, inputs: Inputs, console: Console
) -> References:
    """Look the reference log-probs of ``inputs`` up, and compute those that the cache lacks.

    Args:
        config: the run.
        source: folder of the model that is trained.
        policy: that model before its first step, if it is loaded; it is its own reference unless
            ``config.reference`` names another, so no second model is needed.
        inputs: the pairs.
        console: shows progress.

    Raises:
        RunError: the cache holds other values than the reference model gives.
    """
    if config.reference is not None:
        source, policy = fetch_model(config.reference, config.reference_revision), None
    for pairs in (inputs.pairs, inputs.eval_pairs):
        if pairs is not None:
            check_fit(pairs, read_config(source), str(source), console)
    scorer = _Scorer(config, source, policy)
    cache = ReferenceCache(
        Path(config.reference_cache.dir or cache_folder("reference")),
        model=str(source),
        fingerprint=weights_fingerprint(source),
        numerics=numerics(precision=config.train.dtype, device=scorer.device.type),
    )
    for fault in cache.damaged:
        console.warn(fault)
    return References(
        scorer.obtain(inputs.pairs, cache, console, "reference"),
        None
        if inputs.eval_pairs is None
        else scorer.obtain(inputs.eval_pairs, cache, console, "reference, held out"),
    )


class _Scorer:
    """Scores pairs with the reference model, which is loaded when it is first needed."""

    def __init__(self, config: RunConfig, source: Path, policy: Decoder | None) -> None:
        self.config, self.source, self.model = config, source, policy
        self.precision = PRECISIONS[config.train.dtype]
        self.device = choose_device(config.train)

    def obtain(
        self, pairs: TokenizedPairs, cache: ReferenceCache, console: Console, label: str
    ) -> ReferenceLogProbs:
        """Complete the cache for ``pairs``, or check a sample of it if the model is at hand."""
        train = self.config.train
        batches = MicroBatches(
            pairs,
            micro_batch_size=train.micro_batch_size,
            tokens_per_micro_batch=train.tokens_per_micro_batch,
            share_prefix=train.share_prefix,
        )

        def score(rows: Sequence[int]) -> list[AnswerLogProbs]:
            scored = score_rows(
                self._model(), batches, rows, precision=self.precision, device=self.device
            )
            return answer_log_probs(scored)

        missing = cache.missing(pairs)
        if not missing:
            console.say(f"{label}: all {len(pairs):,} pairs are in the cache")
            if self.model is not None:
                verify_sample(cache, pairs, score, tolerance=self.precision.noise)
            return cache.lookup(pairs)
        with console.bar(label, unit="tokens") as bar:
            return compute_reference(
                score, pairs, cache, batches=batches.split_sorted, progress=bar.update
            )

    def _model(self) -> Decoder:
        if self.model is None:
            self.model = load_model(
                self.source, dtype=self.precision.parameters, device=self.device
            )
        return self.model
