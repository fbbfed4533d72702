"""Texts and conversations continued by a model: ``dpo generate``.

A prompt becomes the tokens that it has in training (see ``dpo.tokenization``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dpo.decoding import GenerateOptions, Writing, decode
from dpo.errors import InputError
from dpo.models import Decoder, ModelConfig
from dpo.pair import Message, Text
from dpo.templates import CHATML, ChatTemplate
from dpo.tokenizer import Tokenizer

__all__ = [
    "GenerateOptions",
    "Generation",
    "TextStream",
    "encode_prompts",
    "generate",
    "generate_from_ids",
]

OnText = Callable[[int, str], object]

_UNFINISHED = "\ufffd"  # what bytes are shown as that are no UTF-8, or not yet
_TURNS = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote after a prompt.

    Attributes:
        text: without special tokens.
        ids: the tokens, with the one that ended the text.
        log_probs: of each of them, in nats, under the model as it is, whatever drew them.
        is_finished: whether the model ended the text; False where ``max_new_tokens`` did.
    """

    text: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    is_finished: bool


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Text],
    options: GenerateOptions | None = None,
    *,
    on_text: OnText | None = None,
    tokens_per_batch: int = 16384,
) -> list[Generation]:
    """Continue each prompt until the model ends it.

    A text ends with one of the tokenizer's end tokens, a conversation also with the token that its
    template puts after an answer.

    Args:
        model: what continues.
        tokenizer: of the model.
        prompts: plain text, or conversations, which the tokenizer's chat template writes, or ChatML
            if it has none; one whose last message is the assistant's is continued inside it.
        options: the defaults if None: at most 256 tokens, the likeliest each time.
        on_text: called with the index of a prompt and what was added to its text, as it is written.
        tokens_per_batch: room for prompts and answers in one pass, which bounds the memory; how
            prompts are batched changes no draw.

    Raises:
        InputError: a prompt is empty, too long for the model or refused by its chat template, or
            the tokenizer belongs to another model.
    """
    options = options or GenerateOptions()
    encoded = encode_prompts(prompts, tokenizer)
    for index, ids in enumerate(encoded):
        _check_fit(ids, options.max_new_tokens, model.config, f"prompts[{index}]")
    return generate_from_ids(
        model,
        tokenizer,
        encoded,
        options,
        stop_ids=_stop_ids(prompts, tokenizer),
        on_text=on_text,
        tokens_per_batch=tokens_per_batch,
    )


def generate_from_ids(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    stop_ids: Sequence[frozenset[int]],
    on_text: OnText | None = None,
    tokens_per_batch: int = 16384,
) -> list[Generation]:
    """Continue tokens, as ``generate`` does, until one of the ``stop_ids`` of each.

    Each prompt has a token and, with all that may be written, room in the model.
    """
    generator = torch.Generator().manual_seed(options.seed or 0)
    size = (len(prompts), options.max_new_tokens)
    uniforms = torch.rand(size, generator=generator, dtype=torch.float64)
    generations: dict[int, Generation] = {}
    for rows in _batches([len(ids) + options.max_new_tokens for ids in prompts], tokens_per_batch):
        streams = [TextStream(tokenizer) for _ in rows]
        say = None if on_text is None else partial(_say, rows, streams, on_text)
        texts = decode(
            model,
            [prompts[row] for row in rows],
            options,
            stop_ids=[stop_ids[row] for row in rows],
            uniforms=uniforms[rows],
            on_token=say,
        )
        for row, stream, text in zip(rows, streams, texts, strict=True):
            rest = stream.finish()
            if on_text is not None and rest:
                on_text(row, rest)
            generations[row] = _generation(text, tokenizer)
    return [generations[row] for row in range(len(prompts))]


def encode_prompts(prompts: Sequence[Text], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of each prompt: those of ``tokenize_pairs`` for a pair with this prompt.

    Raises:
        InputError: a prompt is empty, or refused by its chat template.
    """
    encoded = tokenizer.encode_batch(_write_prompts(prompts, tokenizer))
    bos_id = tokenizer.bos_id if tokenizer.starts_with_bos else None
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        if isinstance(prompt, str) and bos_id is not None and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        if not ids:
            raise InputError(f"prompts[{index}] has no tokens: there is nothing to continue")
    return encoded


class TextStream:
    """Turns tokens into text as they come; the pieces together are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece's tokens, as context, and those not yet said
        self._context = 0

    def add(self, token: int) -> str:
        """Return what can be said after one more token: nothing while a character is incomplete."""
        self._ids.append(token)
        piece = self._unsaid()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        return piece

    def finish(self) -> str:
        """Return what is left; bytes that became no character are U+FFFD."""
        piece = self._unsaid()
        self._ids, self._context = [], 0
        return piece

    def _unsaid(self) -> str:
        """Decode behind some context: tokenizers write the first token of a text differently."""
        context = self._tokenizer.decode(self._ids[: self._context], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(context) :]


def _say(
    rows: Sequence[int], streams: Sequence[TextStream], on_text: OnText, index: int, token: int
) -> None:
    if piece := streams[index].add(token):
        on_text(rows[index], piece)


def _generation(text: Writing, tokenizer: Tokenizer) -> Generation:
    return Generation(
        text=tokenizer.decode(text.ids, skip_special_tokens=True),
        ids=tuple(text.ids),
        log_probs=tuple(text.log_probs),
        is_finished=text.is_finished,
    )


def _write_prompts(prompts: Sequence[Text], tokenizer: Tokenizer) -> list[str]:
    plain = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(plain) == len(prompts):
        return plain
    template = _chat_template(tokenizer)
    return [
        prompt if isinstance(prompt, str) else _write_conversation(prompt, template, index)
        for index, prompt in enumerate(prompts)
    ]


def _write_conversation(conversation: Sequence[Message], template: ChatTemplate, index: int) -> str:
    """Write a conversation up to where the model goes on."""
    if not conversation:
        raise InputError(f"prompts[{index}] has no messages: there is nothing to continue")
    if conversation[-1].get("role") == "assistant":
        return template.render_to_continue(conversation)
    return template.render(conversation, add_generation_prompt=True)


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(
        tokenizer.chat_template or CHATML,
        name=f"chat template of {tokenizer.name}" if tokenizer.chat_template else "ChatML",
        variables=tokenizer.special_tokens,
    )


def _stop_ids(prompts: Sequence[Text], tokenizer: Tokenizer) -> list[frozenset[int]]:
    """Return the tokens that end each text."""
    if all(isinstance(prompt, str) for prompt in prompts):
        return [tokenizer.eos_ids] * len(prompts)
    template = _chat_template(tokenizer)
    start = template.render_to_continue(_TURNS)
    after_answer = tokenizer.encode(template.render(_TURNS)[len(start) :])
    ends_of_turn = [token for token in after_answer if token in tokenizer.special_ids][:1]
    of_turns = tokenizer.eos_ids.union(ends_of_turn)
    return [tokenizer.eos_ids if isinstance(prompt, str) else of_turns for prompt in prompts]


def _check_fit(ids: Sequence[int], new_tokens: int, model: ModelConfig, name: str) -> None:
    if max(ids) >= model.vocab_size:
        raise InputError(
            f"{name}: the tokenizer makes token {max(ids)}, the model has embeddings for "
            f"{model.vocab_size}: they do not belong together"
        )
    if len(ids) + new_tokens > model.max_positions:
        raise InputError(
            f"{name}: {len(ids)} tokens and max_new_tokens {new_tokens} are more than the "
            f"{model.max_positions} that the model was made for"
        )


def _batches(sizes: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Divide items over batches of similar sizes, largest first, padded at most ``capacity``."""
    order = sorted(range(len(sizes)), key=lambda item: -sizes[item])
    while order:
        count = max(1, capacity // sizes[order[0]])
        yield order[:count]
        order = order[count:]
