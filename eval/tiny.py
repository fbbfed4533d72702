"""A tiny language model from scratch, for policies whose texts are short and regular."""

from __future__ import annotations

from collections.abc import Iterable

from dpo.models import Decoder, init_model, parse_config
from dpo.tokenizer import Tokenizer, train_bpe

VOCABULARY = 600  # the 256 bytes, the special tokens and the words of one kind's texts


def make_tiny_model(tokenizer: Tokenizer, *, seed: int) -> Decoder:
    """Make an untrained Llama of 250,000 parameters, more or less, for a tokenizer's ids."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return init_model(parse_config(config), seed=seed)


def make_tiny_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn a small byte-level BPE from the texts that the model will read and write."""
    return train_bpe(texts, VOCABULARY, chat_template=None)
