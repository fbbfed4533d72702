"""From preference pairs to token ids.

A prompt becomes exactly the tokens that the model sees at inference, and an answer the tokens that
follow them:

- *Plain text* is taken as it is. The tokenizer's begin token goes before it, if the tokenizer uses
  one; the end token goes after the answer, unless the text ends with it already.
- *Conversations* are written out by the chat template. The prompt ends with what makes the model
  begin its answer; the answer is all that the template writes after that, the end of the turn
  included. If the template marks no end, the end token is added.
- *Token ids* are taken as they are.

Where prompt and answer written together would merge into a token across their boundary, the answer
is tokenized by itself, as the model would have to write it; such rows are reported. So is every row
that is dropped or cut, has a special token written out in its text, or got its end token added.

Rows over a limit are dropped, refused, or cut:

- ``keep-start`` cuts the ends of prompts, then those of answers. A cut answer has no end token, so
  the model does not learn to stop there.
- ``keep-end`` cuts the starts of prompts, though not the begin token, and never an answer.

A row that cannot be cut to fit is dropped.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo import token_cache
from dpo.errors import InputError
from dpo.pair import PreferencePair, Tokens
from dpo.pair_texts import Answer, PairTexts, write_pair, written_texts
from dpo.pair_view import PairView, view_of
from dpo.preferences import list_faults
from dpo.templates import CHATML, ChatTemplate
from dpo.tokenize_config import TokenizeOptions
from dpo.tokenized_pairs import (
    RowNote,
    Tokenization,
    TokenizationReport,
    TokenizedPair,
    TokenizedPairs,
    as_context,
    columns_of,
)
from dpo.tokenizer import Tokenizer

__all__ = [
    "Tokenization",
    "TokenizationReport",
    "TokenizeOptions",
    "TokenizedPair",
    "TokenizedPairs",
    "columns_of",
    "tokenize_pairs",
]

_CHUNK = 512  # pairs that are tokenized at once, on all processors


def tokenize_pairs(
    pairs: Sequence[PreferencePair] | PairView,
    tokenizer: Tokenizer,
    options: TokenizeOptions | None = None,
    *,
    source: str = "tokens",
    on_bad_row: str = "error",
    cache_dir: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tokenization:
    """Turn pairs into token ids.

    Args:
        pairs: those without an id are named by their row: ``row-1`` and so on. Of a view no more
            than a chunk is in memory at once, nor are their tokens if there is a ``cache_dir``.
        tokenizer: of the model that is to read them.
        options: the defaults if None.
        source: where the pairs are from, for messages about them.
        on_bad_row: at rows that the template refuses, or over a limit with truncation "error":
            "error" refuses the pairs, "skip" drops such rows.
        cache_dir: where tokens are kept between runs; None keeps none.
        progress: called with the number of pairs done and of all.

    Raises:
        InputError: rows are refused, or none is left; the first 20 are listed with the reason.

    Example:
        >>> from dpo import load_tokenizer, read_pairs, tokenize_pairs
        >>> tokenized = tokenize_pairs(read_pairs("pairs.jsonl"), load_tokenizer("model"))
        >>> len(tokenized.pairs), len(tokenized.pairs[0].prompt_ids)
        (16, 7)
    """
    options = options or TokenizeOptions()
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")
    view = pairs if isinstance(pairs, PairView) else view_of(pairs)
    if (names := len(set(view.ids))) < len(view):
        raise InputError(f"{len(view)} pairs have only {names} different ids")
    if cache_dir is None:
        rows: list[TokenizedPair] = []
        report = _tokenize(view, tokenizer, options, source, on_bad_row, progress, keep=rows.extend)
        return Tokenization(columns_of(rows), report)
    settings = json.dumps([asdict(options), on_bad_row, sorted(tokenizer.eos_ids)])
    token_cache.tidy(Path(cache_dir))
    entry = Path(cache_dir) / token_cache.content_key(view, tokenizer.fingerprint, settings)
    faults = token_cache.faults_of(entry) if entry.exists() else []
    if entry.exists() and not faults:
        return token_cache.load(entry)
    with token_cache.new_entry(entry) as new:
        report = _tokenize(view, tokenizer, options, source, on_bad_row, progress, keep=new.add)
        new.finish(report)
    told = f"made again: {faults[0]}" if faults else "stored"
    return Tokenization(token_cache.load(entry).pairs, replace(report, cache=told))


class _Ids(NamedTuple):
    """A pair in tokens; a missing answer has none."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class _UnfitError(Exception):
    """A row cannot be used under the limits; says why."""


@dataclass
class _Notes:
    """What is to be reported, as it is found."""

    faults: list[RowNote] = field(default_factory=list)
    dropped: list[RowNote] = field(default_factory=list)
    cut: list[RowNote] = field(default_factory=list)
    boundary_merges: list[str] = field(default_factory=list)
    special_in_text: list[str] = field(default_factory=list)
    end_tokens_added: list[str] = field(default_factory=list)


def _tokenize(
    view: PairView,
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    source: str,
    on_bad_row: str,
    progress: Callable[[int, int], object] | None,
    *,
    keep: Callable[[Sequence[TokenizedPair]], object],
) -> TokenizationReport:
    """Hand the tokens of some pairs after the others to ``keep``, and report on all of them."""
    template = _chat_template(view, tokenizer, options)
    work = _Tokenizing(tokenizer, options, template)
    items, done, kept = zip(view.ids, view, strict=True), 0, 0
    while chunk := dict(islice(items, _CHUNK)):
        rows = list(work.add(chunk))
        keep(rows)
        kept += len(rows)
        done += len(chunk)
        if progress is not None:
            progress(done, len(view))
    notes = work.notes
    if notes.faults and on_bad_row == "error":
        raise InputError(list_faults(source, [": ".join(note) for note in notes.faults]))
    dropped = (*notes.dropped, *notes.faults)
    if not kept:
        reasons = [": ".join(note) for note in dropped]
        raise InputError(list_faults(f"{source}: no row is left", reasons))
    is_dated = template is not None and "strftime_now" in template.source
    return TokenizationReport(
        rows=len(view),
        kept=kept,
        dropped=dropped,
        cut=tuple(notes.cut),
        boundary_merges=tuple(notes.boundary_merges),
        special_in_text=tuple(notes.special_in_text),
        end_tokens_added=tuple(notes.end_tokens_added),
        template_date=date.today().isoformat() if is_dated else None,
    )


def _chat_template(
    pairs: PairView, tokenizer: Tokenizer, options: TokenizeOptions
) -> ChatTemplate | None:
    """Choose the template; None if no conversation is to be written."""
    if not pairs.has_conversations:
        if options.template == "chatml":
            raise InputError("tokenize.template is chatml, but no row is a conversation")
        return None
    if options.template == "none":
        raise InputError("tokenize.template is none, but rows are conversations")
    if options.template == "auto" and tokenizer.chat_template is not None:
        name, source = f"chat template of {tokenizer.name}", tokenizer.chat_template
    else:
        name, source = "ChatML", CHATML
    return ChatTemplate(source, name=name, variables=tokenizer.special_tokens)


class _Tokenizing:
    """The work on one list of pairs; ``notes`` grows as it goes on."""

    def __init__(
        self, tokenizer: Tokenizer, options: TokenizeOptions, template: ChatTemplate | None
    ) -> None:
        self.notes = _Notes()
        self._tokenizer = tokenizer
        self._options = options
        self._template = template
        self._is_blank: dict[int, bool] = {}

    def add(self, pair_by_id: dict[str, PreferencePair]) -> Iterator[TokenizedPair]:
        """Yield the tokens of those pairs that can be used."""
        row_by_id: dict[str, _Ids] = {}
        text_by_id: dict[str, PairTexts] = {}
        for name, pair in pair_by_id.items():
            try:
                if isinstance(pair.prompt, Tokens):
                    row_by_id[name] = self._given(pair)
                else:
                    text_by_id[name] = write_pair(pair, self._template)
            except InputError as error:
                self.notes.faults.append(RowNote(name, str(error)))
        row_by_id |= self._encoded(pair_by_id, text_by_id)
        for name, pair in pair_by_id.items():
            if name not in row_by_id:
                continue
            try:
                fitted, cuts = _fit(row_by_id[name], self._options, self._tokenizer.bos_id)
            except _UnfitError as reason:
                is_fault = self._options.truncation == "error"
                notes = self.notes.faults if is_fault else self.notes.dropped
                notes.append(RowNote(name, str(reason)))
                continue
            if cuts:
                self.notes.cut.append(RowNote(name, cuts))
            yield _tokenized(name, pair, fitted)

    def _given(self, pair: PreferencePair) -> _Ids:
        """Return the token ids that a pair holds already."""
        ids = []
        for name in ("prompt", "chosen", "rejected"):
            part = getattr(pair, name)
            ids.append(list(part.ids) if isinstance(part, Tokens) else [])
            if max(ids[-1], default=0) >= self._tokenizer.vocab_size:
                raise InputError(
                    f"{name} has the token {max(ids[-1])}, but those of {self._tokenizer.name} go "
                    f"up to {self._tokenizer.vocab_size - 1}"
                )
        return _Ids(*ids)

    def _encoded(
        self, pair_by_id: dict[str, PreferencePair], text_by_id: dict[str, PairTexts]
    ) -> dict[str, _Ids]:
        """Tokenize texts, all at once."""
        ids = self._tokenizer.encode_batch(
            [part for texts in text_by_id.values() for part in self._parts(texts)]
        )
        return {
            name: self._join(name, pair_by_id[name], texts, *ids[4 * index : 4 * index + 4])
            for index, (name, texts) in enumerate(text_by_id.items())
        }

    def _parts(self, texts: PairTexts) -> list[str]:
        """Return the start of the prompt, its last words, and these with each of the answers."""
        cut = self._tokenizer.last_cut(texts.prompt)
        words = texts.prompt[cut:]
        answers = (answer[0].text if answer else "" for answer in (texts.chosen, texts.rejected))
        return [texts.prompt[:cut], words, *(words + answer for answer in answers)]

    def _join(
        self,
        name: str,
        pair: PreferencePair,
        texts: PairTexts,
        start: list[int],
        words: list[int],
        with_chosen: list[int],
        with_rejected: list[int],
    ) -> _Ids:
        """Set the answers' tokens apart from the prompt's, and see to the begin and the end."""
        prompt, size, is_plain = start + words, len(words), isinstance(pair.prompt, str)

        def apart(whole: list[int], answer: Answer | None) -> list[int]:
            if answer is None:
                return []
            if whole[:size] == words:
                first = whole[size:]
            else:
                first = self._tokenizer.encode_after(answer[0].text)
                if name not in self.notes.boundary_merges[-1:]:
                    self.notes.boundary_merges.append(name)
            pieces = [first, *(self._tokenizer.encode_after(piece.text) for piece in answer[1:])]
            pieces[-1] = self._closed(name, pieces[-1], is_plain)
            return [
                id_ if piece.is_scored else as_context(id_)
                for piece, ids in zip(answer, pieces, strict=True)
                for id_ in ids
            ]

        chosen, rejected = apart(with_chosen, texts.chosen), apart(with_rejected, texts.rejected)
        if any(map(self._tokenizer.has_special, written_texts(pair))):
            self.notes.special_in_text.append(name)
        bos_id = self._tokenizer.bos_id
        if is_plain and self._tokenizer.starts_with_bos and prompt[:1] != [bos_id]:
            assert bos_id is not None
            prompt = [bos_id, *prompt]
        return _Ids(prompt, chosen, rejected)

    def _closed(self, name: str, ids: list[int], is_plain: bool) -> list[int]:
        """Return an answer that holds one token that ends it; blanks may follow that.

        What ends a turn in a conversation is the template's affair: any special token is taken.
        """
        end = len(ids)
        while end and self._blank(ids[end - 1]):
            end -= 1
        closers = self._tokenizer.eos_ids if is_plain else self._tokenizer.special_ids
        if end and ids[end - 1] in closers:
            first = end - 1
            while first and ids[first - 1] == ids[end - 1]:
                first -= 1
            return [*ids[:first], *ids[end - 1 :]]
        if self._tokenizer.eos_id is None:
            raise InputError(f"{self._tokenizer.name}: no eos_token, so no answer can be ended")
        if not is_plain and name not in self.notes.end_tokens_added[-1:]:
            self.notes.end_tokens_added.append(name)
        return [*ids, self._tokenizer.eos_id]

    def _blank(self, id_: int) -> bool:
        """Tell whether a token is nothing but space, such as the line's end after a turn."""
        if id_ not in self._is_blank:
            self._is_blank[id_] = self._tokenizer.decode([id_]).isspace()
        return self._is_blank[id_]


class _Fitted(NamedTuple):
    ids: _Ids
    cuts: str  # what was cut, empty if nothing was


def _fit(ids: _Ids, options: TokenizeOptions, bos_id: int | None) -> _Fitted:
    """Bring a row within the limits."""
    if not ids.prompt:
        raise _UnfitError("the prompt has no tokens")
    fitted = _cut(ids, options, bos_id)
    if fitted.chosen == fitted.rejected:
        raise _UnfitError("chosen and rejected are the same tokens")
    for answer in (fitted.chosen, fitted.rejected):
        if answer and all(id_ < 0 for id_ in answer):
            raise _UnfitError("nothing that is trained on is left of an answer that is cut")
    cuts = [
        f"{name} {len(before)} to {len(after)} tokens"
        for name, before, after in zip(ids._fields, ids, fitted, strict=True)
        if len(after) < len(before)
    ]
    return _Fitted(fitted, ", ".join(cuts))


def _cut(ids: _Ids, options: TokenizeOptions, bos_id: int | None) -> _Ids:
    """Cut a row to the limits, or say that it is over them."""
    prompt, chosen, rejected = ids
    longest_answer = max(len(chosen), len(rejected))
    prompt_limit = options.max_prompt_length or len(prompt)
    limit = options.max_length or len(prompt) + longest_answer
    if len(prompt) <= prompt_limit and len(prompt) + longest_answer <= limit:
        return ids
    if options.truncation in ("drop", "error"):
        if len(prompt) > prompt_limit:
            raise _UnfitError(f"prompt of {len(prompt)} tokens, max_prompt_length {prompt_limit}")
        raise _UnfitError(f"{len(prompt) + longest_answer} tokens, max_length {limit}")
    if options.truncation == "keep-start":
        prompt = prompt[:prompt_limit]
        room = limit - len(prompt)
        if room < 1:
            raise _UnfitError(f"prompt of {len(prompt)} tokens leaves no room, max_length {limit}")
        return _Ids(prompt, chosen[:room], rejected[:room])
    room = min(prompt_limit, limit - longest_answer)
    if room < 1:
        raise _UnfitError(f"answer of {longest_answer} tokens leaves no room, max_length {limit}")
    if len(prompt) > room:
        begin = prompt[:1] if prompt[0] == bos_id and room > 1 else []
        prompt = begin + prompt[len(prompt) - room + len(begin) :]
    return _Ids(prompt, chosen, rejected)


def _tokenized(name: str, pair: PreferencePair, ids: _Ids) -> TokenizedPair:
    prompt, chosen, rejected = (np.array(text, dtype=np.int32) for text in ids)
    return TokenizedPair(
        prompt,
        chosen,
        rejected,
        weight=pair.weight,
        margin=pair.margin,
        label_prob=pair.label_prob,
        id=name,
        source=pair.source,
    )
