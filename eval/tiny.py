"""A tiny tokenizer, for policies whose texts are short and regular."""

from __future__ import annotations

from collections.abc import Iterable

from dpo.tokenizer import Tokenizer, train_bpe

VOCABULARY = 600  # the 256 bytes, the special tokens and the words of one kind's texts


def make_tiny_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn a small byte-level BPE from the texts that the model will read and write."""
    return train_bpe(texts, VOCABULARY, chat_template=None)
