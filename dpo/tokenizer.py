"""Tokenizers: text to ids and back, from the files of a Hugging Face model folder.

``tokenizer.json`` says how text is cut; ``tokenizer_config.json``, ``special_tokens_map.json``,
``generation_config.json`` and ``config.json`` say which tokens begin and end texts;
``chat_template.jinja``, or the config, holds the chat template. ``tokenizer.model``, the same in
sentencepiece's format, is not read, but saved again: other programs ask for it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dpo.errors import InputError
from dpo.files import JSON, atomic_write
from dpo.hub import fetch_model
from dpo.templates import CHATML

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
SENTENCEPIECE = "tokenizer.model"
_OWN_FILES = (TOKENIZER, CONFIG, SPECIAL_TOKENS, TEMPLATE, SENTENCEPIECE)
_READ_ELSEWHERE = (TOKENIZER, TEMPLATE, SENTENCEPIECE)
_MODEL_FILES = ("generation_config.json", "config.json")
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MOST_IDS = 2**24  # some work is done for each id up to the largest
_LOOKED_AT = 2000  # characters from the end of a text
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_ACROSS_WORDS = re.compile(r"[A-Za-z][ Ġ▁][A-Za-z]")  # a space in a text, as vocabularies write it
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class Tokenizer:
    """Text to ids and back.

    Special tokens that are written out in a text are taken for what they say, as transformers does:
    chat templates write them out.

    Args:
        files: content of the files by name; of these ``tokenizer.json`` is needed.
        name: what to call them in messages.

    Attributes:
        special_tokens: the tokens that have a name: ``bos_token`` and so on.
        special_ids: ids that stand for no text.
        bos_id: the token that begins a text.
        starts_with_bos: whether plain text begins with it.
        eos_id: the token that ends an answer.
        eos_ids: every token at which generation stops: ``eos_id`` and those the model's files name.
        pad_id: may be ``eos_id``.
        chat_template: source of the template, if there is one.
        vocab_size: the largest id + 1: the embedding needs as many rows.
        fingerprint: hash of all that decides on ids.

    Raises:
        InputError: a file is absent, damaged, or names a token that there is not.
    """

    def __init__(self, files: Mapping[str, bytes], *, name: str) -> None:
        self.name = name
        with _explained(name):
            self._load(files, name)

    def _load(self, files: Mapping[str, bytes], name: str) -> None:
        self._files = {file: files[file] for file in _OWN_FILES if file in files}
        read_here = (file for file in files if file not in _READ_ELSEWHERE)
        contents = {file: _read_object(files, file, name) for file in read_here}
        self._backend = _backend(files, contents.get(CONFIG, {}), name)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if not 0 < len(vocabulary) <= 1 + max(vocabulary.values()) <= _MOST_IDS:
            raise InputError(f"{name}/{TOKENIZER}: no ids, or some beyond {_MOST_IDS - 1}")
        self.special_tokens = _special_tokens(contents)
        ids = {key: self._id_of(key, token) for key, token in self.special_tokens.items()}
        stops = _stop_ids(contents, name)
        self.bos_id = ids.get("bos_token")
        self.eos_id = ids.get("eos_token", stops[0] if stops else None)
        self.pad_id = ids.get("pad_token")
        self.eos_ids = frozenset(stops if self.eos_id is None else [self.eos_id, *stops])
        added = self._backend.get_added_tokens_decoder()
        specials = {id_: token.content for id_, token in added.items() if token.special}
        self.special_ids = frozenset([*specials, *ids.values()])
        self._special = re.compile("|".join(map(re.escape, specials.values())) or "(?!)")
        self.starts_with_bos = self.bos_id is not None and self.bos_id in self._begin()
        self.chat_template = _chat_template(files, contents.get(CONFIG, {}), name)
        self.vocab_size = 1 + max(vocabulary.values())
        self._is_separable = not _ACROSS_WORDS.search("\n".join(vocabulary)) and (
            self.encode("a") + self.encode(" b") == self.encode("a b")
        )
        self.fingerprint = self._fingerprint()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; nothing is put before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as ``encode``, but on all processors."""
        with _explained(self.name):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_after(self, text: str) -> list[int]:
        """Return the ids of a text that goes on after another, without merging with it.

        Equals ``encode`` where text can begin anywhere; tokenizers of the SentencePiece family
        put a space before a text, which is left out here.
        """
        for before in ("\n", "a"):
            start, whole = self.encode_batch([before, before + text])
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self.encode(text)

    def last_cut(self, text: str) -> int:
        """Return the last place where a text can be cut in two that give the same ids apart.

        That is between two words, if no token of the vocabulary reaches from one into the next; the
        start of the text if there is no such place.
        """
        places = [match.start() for match in _BETWEEN_WORDS.finditer(text[-_LOOKED_AT:])]
        if not self._is_separable or not places:
            return 0
        return max(0, len(text) - _LOOKED_AT) + places[-1]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        with _explained(self.name):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def has_special(self, text: str) -> bool:
        """Tell whether a special token is written out in a text."""
        return self._special.search(text) is not None

    def save(self, folder: Path) -> None:
        """Write the files from which transformers' AutoTokenizer makes the same tokenizer.

        What the tokenizer was made of is written again as it was.
        """
        for file, content in self._files.items():
            atomic_write(folder / file, content)

    def _id_of(self, key: str, token: str) -> int:
        id_ = self._backend.token_to_id(token)
        if id_ is None:
            raise InputError(
                f"{self.name}: {key} {token!r} is not in the vocabulary of {TOKENIZER}"
            )
        return id_

    def _begin(self) -> list[int]:
        """Return the ids that the tokenizer's own rule puts before a text."""
        return self._backend.encode("").ids[:1]

    def _fingerprint(self) -> str:
        parts = [self._backend.to_str(), self.special_tokens, self.eos_id, self.chat_template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder or of a model on the Hub.

    Raises:
        InputError: there is none, or its files are damaged.
        RunError: the Hub answered with an error of its own.

    Example:
        >>> from dpo import load_tokenizer
        >>> tokenizer = load_tokenizer("model")
        >>> tokenizer.decode(tokenizer.encode("2 + 2"))
        '2 + 2'
    """
    folder = fetch_model(path_or_id, revision)
    paths = [folder / file for file in (*_OWN_FILES, *_MODEL_FILES)]
    return Tokenizer(
        {path.name: path.read_bytes() for path in paths if path.is_file()}, name=str(folder)
    )


def byte_tokenizer(
    specials: Sequence[str] = _CHATML_TOKENS,
    *,
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = None,
    chat_template: str | None = CHATML,
) -> Tokenizer:
    """Make a tokenizer of bytes: id = byte, and the special tokens from 256 on.

    Args:
        specials: the special tokens in the order of their ids; must hold the three below.
        bos: token that begins every plain text.
        eos: token that ends an answer.
        pad: token for padding, ``eos`` if None.
        chat_template: its source; None for none.

    Raises:
        InputError: a token is not among ``specials``.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _made(backend, specials, bos=bos, eos=eos, pad=pad, chat_template=chat_template)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    specials: Sequence[str] = _CHATML_TOKENS,
    *,
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = None,
    chat_template: str | None = CHATML,
) -> Tokenizer:
    """Make a byte-level BPE tokenizer from texts; the special tokens come last.

    Args:
        texts: what to learn from; the same texts give the same tokenizer.
        vocab_size: ids in all, at most; at least 256 and one for each special token.
        specials: the special tokens in the order of their ids; must hold the three below.
        bos: token that begins every plain text.
        eos: token that ends an answer.
        pad: token for padding, ``eos`` if None.
        chat_template: its source; None for none.

    Raises:
        InputError: ``vocab_size`` is too small, or a token is not among ``specials``.
    """
    if vocab_size < 256 + len(specials):
        raise InputError(f"vocab_size must be at least {256 + len(specials)}, got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _made(backend, specials, bos=bos, eos=eos, pad=pad, chat_template=chat_template)


def _made(
    backend: tokenizers.Tokenizer,
    specials: Sequence[str],
    *,
    bos: str | None,
    eos: str,
    pad: str | None,
    chat_template: str | None,
) -> Tokenizer:
    """Finish a byte-level tokenizer and write its files."""
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if bos is not None and bos in specials:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad or eos}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in named.items() if token is not None},
    }
    files = {TOKENIZER: backend.to_str(pretty=True), CONFIG: json.dumps(config, indent=2) + "\n"}
    if chat_template is not None:
        files[TEMPLATE] = chat_template
    return Tokenizer({file: text.encode() for file, text in files.items()}, name="new tokenizer")


def _byte_characters() -> list[str]:
    """Return the character by which byte-level tokenizers write each byte.

    Bytes that are visible in Latin-1 stand for themselves, the others for U+0100 onwards, in turn.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever tokenizers raises of its file into an ``InputError``.

    A plain ``Exception``, or, where its Rust code panics, a ``BaseException``.
    """
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{name}/{TOKENIZER}: not a tokenizer: {error}") from error


def _read_object(files: Mapping[str, bytes], file: str, name: str) -> Mapping[str, JSON]:
    try:
        content = json.loads(files[file])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}/{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name}/{file}: expected a JSON object")
    return content


def _backend(
    files: Mapping[str, bytes], config: Mapping[str, JSON], name: str
) -> tokenizers.Tokenizer:
    """Make the tokenizer of ``tokenizer.json`` with the tokens that only the config adds."""
    if TOKENIZER not in files:
        raise InputError(
            f"{name}: no {TOKENIZER}; transformers can write it: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    backend = tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
    backend.no_truncation()
    backend.no_padding()
    added = config.get("added_tokens_decoder")
    for key, token in added.items() if isinstance(added, Mapping) else ():
        content = _content(token)
        if content is None or backend.token_to_id(content) is not None:
            continue
        special = isinstance(token, Mapping) and bool(token.get("special", False))
        backend.add_tokens([AddedToken(content, special=special, normalized=False)])
        if str(backend.token_to_id(content)) != key:
            raise InputError(
                f"{name}/{CONFIG}: added token {content!r} should have id {key}, but the next free "
                f"one is {backend.token_to_id(content)}"
            )
    return backend


def _content(token: JSON) -> str | None:
    """Return the text of a token, which may be written with its properties."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _special_tokens(contents: Mapping[str, Mapping[str, JSON]]) -> dict[str, str]:
    """Return the named tokens; what the config says, even null, goes before the older map."""
    named = {**contents.get(SPECIAL_TOKENS, {}), **contents.get(CONFIG, {})}
    tokens = {f"{name}_token": _content(named.get(f"{name}_token")) for name in _NAMED_TOKENS}
    return {key: token for key, token in tokens.items() if token is not None}


def _stop_ids(contents: Mapping[str, Mapping[str, JSON]], name: str) -> list[int]:
    """Return the tokens at which the model's files say that generation stops."""
    for file in _MODEL_FILES:
        value = contents.get(file, {}).get("eos_token_id")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            ids = [id_ for id_ in values if isinstance(id_, int) and not isinstance(id_, bool)]
            if len(ids) < len(values):
                raise InputError(f"{name}/{file}: eos_token_id must be ids, found {value}")
            return ids
    return []


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, JSON], name: str) -> str | None:
    """Return the template's source: of its own file, or else of the config, maybe under a name."""
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}/{TEMPLATE}: not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        items = [item for item in template if isinstance(item, Mapping)]
        defaults = [item.get("template") for item in items if item.get("name") == "default"]
        template = defaults[0] if defaults else template
    if template is not None and not isinstance(template, str):
        raise InputError(f"{name}/{CONFIG}: chat_template must be text or a list with a 'default'")
    return template
