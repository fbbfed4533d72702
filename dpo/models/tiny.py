"""A tiny language model from scratch, for texts that are short and regular."""

from __future__ import annotations

from dpo.models.config import parse_config
from dpo.models.decoder import Decoder
from dpo.models.weights import init_model
from dpo.tokenizer import Tokenizer


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
