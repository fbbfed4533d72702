"""What a run reads: models, pairs split and tokenized, and where caches lie."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpo.adapter_files import (
    AdapterFolder,
    adapter_weights,
    is_adapter,
    load_adapter,
    read_adapter,
)
from dpo.config import RunConfig
from dpo.errors import InputError
from dpo.fingerprint import adapter_fingerprint, weights_fingerprint
from dpo.hub import commit_of, fetch_model
from dpo.mismatch import mismatched_rows
from dpo.mixing import describe_share, mix, named, seeded_digest, set_names
from dpo.models import Decoder, ModelConfig, load_model, read_config
from dpo.models.weights import weight_files
from dpo.pair_rows import RANKED_LAYOUT, RankedPairs
from dpo.pair_view import PairNotes, PairView, Part
from dpo.preferences import FaultyRowsError, PairSource, PreferencePair, stream_pairs
from dpo.progress import Console
from dpo.ranks import Ranks
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import Tokenizer, load_tokenizer

GENERATION_CONFIG = "generation_config.json"

_NAMED_ROWS = 20
_ADVICE = (
    "--on-bad-row skip leaves them out and counts them; dpo data check FILE --policy CHECK=drop "
    "--clean FOLDER writes a file without them"
)
_NAME_BASE = "name it by adapter.base (of dpo merge: --model)"


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, in Hugging Face layout, with or without an adapter upon it.

    Attributes:
        path: the folder; that of the base if there is an adapter.
        commit: of a model or an adapter on the Hub; None for a local one.
        adapter: what is laid over the model, or None.
        quantize: the scheme in which its linear layers are held, or None.
    """

    path: Path
    commit: str | None
    adapter: AdapterFolder | None = None
    quantize: str | None = None

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return read_config(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and mathematics as they are on disk; reads the weights through."""
        base = weights_fingerprint(self.path)
        if self.adapter is None:
            return base
        weights = adapter_weights(self.adapter.path)
        return adapter_fingerprint(base, weights, asdict(self.adapter.adapter))

    @property
    def name(self) -> Path:
        """The folder that the model is known by."""
        return self.path if self.adapter is None else self.adapter.path

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer: the adapter's if it has one, else the base's."""
        has_own = (self.name / "tokenizer.json").exists()
        return load_tokenizer(self.name if has_own else self.path)

    def load(
        self, *, dtype: torch.dtype, device: torch.device, ranks: Ranks | None = None
    ) -> Decoder:
        """Load the model.

        Args:
            dtype: of the parameters in memory; those of an adapter are float32 at least.
            device: where they go.
            ranks: those that may hold a part of each; None for one that holds all.

        Raises:
            InputError: a file is missing, damaged, or does not fit the others.
        """
        model = load_model(
            self.path, dtype=dtype, device=device, quantize=self.quantize, ranks=ranks
        )
        if self.adapter is not None:
            load_adapter(model, self.adapter.path)
        return model


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        policy: what is trained or scored.
        reference: the same object unless the config names another.
        tokenizer: the policy's; the reference reads its tokens too.
    """

    policy: ModelFolder
    reference: ModelFolder
    tokenizer: Tokenizer

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints by role; reads the weights through once."""
        return {"model": self.policy.fingerprint, "reference": self.reference.fingerprint}


@dataclass(frozen=True)
class Inputs:
    """The data of a run.

    Attributes:
        pairs: what to train on or to score.
        eval_pairs: held-out pairs, or None.
        commit: of the pairs, if they are a data set on the Hub.
        eval_commit: of held-out pairs that are another one.
    """

    pairs: TokenizedPairs
    eval_pairs: TokenizedPairs | None = None
    commit: str | None = None
    eval_commit: str | None = None

    def mismatched(self, *, seed: int) -> Inputs:
        """Return the prompts of both with answers to other prompts (``mismatched_rows``)."""
        return Inputs(
            mismatched_rows(self.pairs, seed=seed),
            None if self.eval_pairs is None else mismatched_rows(self.eval_pairs, seed=seed),
        )


def find_models(config: RunConfig) -> Models:
    """Find the models of ``config``, and refuse before any work what can be seen without loading.

    Raises:
        InputError: a file is absent, the tokenizer makes tokens that a model has no embedding for,
            or the base of an adapter is given and there is no adapter.
    """
    adapter = config.adapter
    how = {"base": adapter.base, "quantize": adapter.quantize}
    policy = reference = find_model(config.model, config.revision, **how)
    if config.reference is not None:
        reference = find_model(config.reference, config.reference_revision, **how)
    if adapter.base is not None and policy.adapter is None and reference.adapter is None:
        raise InputError(f"adapter.base is {adapter.base}, but {policy.name} is no adapter")
    models = Models(policy, reference, policy.load_tokenizer())
    for folder in (models.policy, models.reference):
        weight_files(folder.path)
        if models.tokenizer.vocab_size > folder.config.vocab_size:
            raise InputError(
                f"{folder.path / 'config.json'}: vocab_size is {folder.config.vocab_size}, but the "
                f"tokenizer of {models.tokenizer.name} makes tokens up to "
                f"{models.tokenizer.vocab_size - 1}: they do not belong together"
            )
    return models


def find_model(
    name: str, revision: str | None, *, base: str | None = None, quantize: str | None = None
) -> ModelFolder:
    """Find a model, or an adapter and the base that it belongs to.

    Args:
        name: a folder, or an id on the Hub.
        revision: of a model on the Hub.
        base: the base of an adapter; None: the one that it names.
        quantize: scheme in which the linear layers are to be held.

    Raises:
        InputError: there is no such model, an adapter lacks a file, or its base is not found.
    """
    path = fetch_model(name, revision)
    commit = None if path == Path(name) else commit_of(path)
    if not is_adapter(path):
        return ModelFolder(path, commit, quantize=quantize)
    adapter = read_adapter(path)
    adapter_weights(path)
    if base is not None:
        adapter = replace(adapter, base=base, base_revision=None)
    if not adapter.base:
        raise InputError(f"{path} is an adapter and names no base: {_NAME_BASE}")
    try:
        base_path = fetch_model(adapter.base, adapter.base_revision)
    except InputError as error:
        raise InputError(f"the base of the adapter {path}: {error}; {_NAME_BASE}") from error
    return ModelFolder(base_path, commit, adapter, quantize)


def load_inputs(config: RunConfig, models: Models, console: Console) -> Inputs:
    """Read, split and tokenize the pairs of ``config``.

    Raises:
        InputError: a source is not readable or holds faulty rows, or nothing is left to train on.
    """
    data = _read_data(config, console)
    pairs, eval_commit = data.pairs, None
    held_out: PairView | None = None
    if config.eval_data is not None:
        eval_data = _read(
            config,
            config.eval_data,
            revision=config.eval_data_revision,
            split=config.eval_data_split,
            console=console,
        )
        held_out, eval_commit = PairView([eval_data.part]), eval_data.told.revision
    elif config.eval_split is not None:
        is_held_out = hold_out(data.prompts, config.eval_split)
        pairs, held_out = pairs.take(~is_held_out), pairs.take(is_held_out)
        console.say(f"{len(held_out):,} pairs held out, none shares its prompt with the others")
    if len(data.sets) > 1:
        pairs = _mix(config, data.sets, pairs, console)
    source = ", ".join(config.sources)
    return Inputs(
        _tokenize(config, source, pairs, models, console),
        None
        if held_out is None
        else _tokenize(config, config.eval_data or source, held_out, models, console),
        data.commit,
        eval_commit,
    )


def pin_revisions(config: RunConfig, models: Models, inputs: Inputs) -> RunConfig:
    """Name the commits of what came from the Hub, so that the config gives the same run later."""
    has_reference = config.reference is not None
    return replace(
        config,
        revision=models.policy.commit,
        reference_revision=models.reference.commit if has_reference else None,
        data_revision=inputs.commit,
        eval_data_revision=inputs.eval_commit,
    )


def load_all_pairs(config: RunConfig, models: Models, console: Console) -> Inputs:
    """Read and tokenize all of ``config.data``, each row once; nothing is held out.

    Raises:
        InputError: it is not readable or holds faulty rows, or no row is left.
    """
    pairs = _read_data(config, console).pairs
    return Inputs(_tokenize(config, ", ".join(config.sources), pairs, models, console))


def hold_out(prompts: NDArray[np.void], share: float) -> NDArray[np.bool_]:
    """Mark about ``share`` of the pairs to hold out: (P,).

    Pairs of one prompt stay together, so no held-out prompt is trained on. The choice depends on
    the prompts and the seed alone, not on the order of the rows.

    Args:
        prompts: (P,) the ``seeded_digest`` of each pair's prompt.
        share: of the pairs.

    Raises:
        InputError: one of the two parts would be empty.
    """
    _, groups, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    before = np.cumsum(sizes) - sizes
    held_out = int((before + sizes / 2 <= share * len(prompts)).sum())  # prompts
    taken = int(sizes[:held_out].sum())  # pairs
    if not 0 < taken < len(prompts):
        raise InputError(
            f"eval_split {share} of {len(prompts)} pairs with {len(sizes)} prompts leaves "
            f"{len(prompts) - taken} to train on and {taken} to hold out"
        )
    return groups < held_out


def cache_folder(kind: str) -> Path:
    """Return the user's folder for caches of one kind: under XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dpo-engine" / kind


@dataclass(frozen=True)
class _DataSet:
    """A source that has been gone through: all its rows, their prompts and what is to be told."""

    part: Part
    prompts: bytearray  # the digest of each; empty if nothing is to be held out
    told: PairSource


@dataclass(frozen=True)
class _Data:
    """The data sets of ``config.data`` by name, and the commit of a single one on the Hub."""

    sets: Mapping[str, _DataSet]
    commit: str | None = None

    @property
    def pairs(self) -> PairView:
        return PairView([each.part for each in self.sets.values()])

    @property
    def prompts(self) -> NDArray[np.void]:
        """(P,) the digests of the prompts of all pairs."""
        return np.frombuffer(b"".join(each.prompts for each in self.sets.values()), "V16")


def _read_data(config: RunConfig, console: Console) -> _Data:
    """Read the data sets; the rows of several are named by them."""
    names = set_names(config.sources)
    sets = {
        name: _read(
            config,
            source,
            revision=config.data_revision,
            split=config.data_split,
            console=console,
            name=name if len(names) > 1 else None,
        )
        for name, source in zip(names, config.sources, strict=True)
    }
    formats = [each.told.format for each in sets.values()]
    if config.ranked is not None and RANKED_LAYOUT not in formats:
        pairs = zip(config.sources, formats, strict=True)
        found = ", ".join(f"{source} holds {layout}" for source, layout in pairs)
        raise InputError(f"ranked has no effect: {found}")
    return _Data(sets, sets[names[0]].told.revision if len(names) == 1 else None)


def _mix(config: RunConfig, sets: Collection[str], pairs: PairView, console: Console) -> PairView:
    """Mix the rows of several data sets that are in ``pairs``, and tell how many of each."""
    part_by_set = dict(zip(sets, pairs.parts, strict=True))
    ids_by_set = {name: list(part.ids) for name, part in part_by_set.items()}
    parts = []
    for name, times in mix(ids_by_set, config.mix, seed=config.train.seed).items():
        part = part_by_set[name]
        console.say(describe_share(name, sum(map(len, times)), len(part.rows)))
        parts += [part._replace(rows=part.rows[rows], time=time) for time, rows in enumerate(times)]
    return PairView(parts)


def _read(
    config: RunConfig,
    source: str,
    *,
    revision: str | None,
    split: str | None,
    console: Console,
    name: str | None = None,
) -> _DataSet:
    """Go through a source, and tell what is left out of it; ``name`` goes before its ids."""
    rename = partial(named, name) if name is not None else lambda pair: pair
    notes, prompts = PairNotes(), bytearray()

    def visit(pair: PreferencePair) -> None:
        notes.add(rename(pair))
        if config.eval_split is not None:
            prompts.extend(seeded_digest(pair.prompt, config.train.seed))

    try:
        stream = stream_pairs(
            source,
            columns=config.columns,
            revision=revision,
            split=split,
            on_bad_row=config.on_bad_row,
            ranked=_ranked(config),
            answer_turns=config.answer_turns,
            visit=visit,
        )
    except FaultyRowsError as error:
        raise InputError(f"{error}\n{_ADVICE}") from error
    _tell(console, source, notes, stream)
    part = Part(lambda rows: map(rename, stream.read(rows)), notes, np.arange(len(notes)))
    is_local = Path(source).exists()
    return _DataSet(part, prompts, replace(stream, revision=None) if is_local else stream)


def _tell(console: Console, source: str, notes: PairNotes, told: PairSource) -> None:
    console.say(f"{source}: {_counted(notes)}, {told.format}")
    tell_left_out(console, source, told)


def tell_left_out(console: Console, source: str, told: PairSource) -> None:
    """Tell which columns of a source are not read, and which rows are left out."""
    if told.ignored_columns:
        console.say(f"{source}: columns that are not read: {', '.join(told.ignored_columns)}")
    if told.skipped:
        console.warn(f"{source}: {len(told.skipped):,} faulty rows left out")
        for fault in told.skipped[:_NAMED_ROWS]:
            console.warn(f"  {fault}")


def _ranked(config: RunConfig) -> RankedPairs:
    """Return how rows that rank answers become pairs: as the loss reads them.

    Raises:
        InputError: the loss reads lists, and other pairs are asked for.
    """
    if not config.loss.build().sees_chains:
        return config.ranked or "all"
    if config.ranked not in (None, "list"):
        raise InputError(
            f"ranked = {config.ranked} makes pairs of which {config.loss.name} sees no list: give "
            "--ranked list"
        )
    return "list"


def _counted(notes: PairNotes) -> str:
    """Count the rows in words."""
    if not notes.chosen_alone + notes.rejected_alone:
        return f"{len(notes):,} pairs"
    return (
        f"{len(notes):,} answers, {notes.chosen_alone:,} chosen and {notes.rejected_alone:,} "
        "rejected"
    )


def _tokenize(
    config: RunConfig,
    source: str,
    pairs: PairView,
    models: Models,
    console: Console,
) -> TokenizedPairs:
    """Tokenize pairs of a source, and tell what became of them."""
    with console.bar("tokenize", len(pairs), unit="pairs") as bar:
        result = tokenize_pairs(
            pairs,
            models.tokenizer,
            config.tokenize,
            source=source,
            on_bad_row=config.on_bad_row,
            cache_dir=cache_folder("tokens"),
            progress=bar.update,
        )
        bar.update(len(pairs))  # tokens from the cache are done too
    summary, *notes = result.report.describe()
    console.say(summary)
    for note in notes:
        console.warn(note)
    lengths = result.pairs.lengths()
    longest = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())
    limit = min(models.policy.config.max_positions, models.reference.config.max_positions)
    if longest > limit:
        console.warn(
            f"the longest row has {longest:,} tokens, the model was made for {limit:,}; "
            f"--max-length {limit} refuses such rows, and --truncation drops or cuts them"
        )
    return result.pairs
