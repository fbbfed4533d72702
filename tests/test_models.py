import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpo.batching import collate_answers
from dpo.decoding import GenerateOptions, decode
from dpo.errors import InputError
from dpo.log_probs import completion_log_probs
from dpo.models import (
    ARCHITECTURES,
    init_model,
    load_model,
    parse_config,
    read_config,
    save_model,
)
from dpo.models.experts import SparseMLP
from dpo.models.transforms import RECOMPUTED, compile_blocks, recompute
from dpo.tokenization import TokenizedPairs
from dpo.train_config import Recompute, TrainConfig
from dpo.trainer import Trainer
from tests.pages import blocks

hub: Any = transformers  # its configurations take more entries than they declare
README = (Path(__file__).parents[1] / "dpo/models/README.md").read_text(encoding="utf-8")
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 128,
}
ONE_KIND_OF_HEADS: dict[str, Any] = {
    key: value for key, value in SIZES.items() if key != "num_key_value_heads"
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
}
VARIANTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hub.LlamaConfig(**SIZES),
    "llama, tied, llama3 rope": lambda: hub.LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "llama, linear rope": lambda: hub.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama, biases": lambda: hub.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral, window": lambda: hub.MistralConfig(**SIZES, sliding_window=7),
    "qwen2": lambda: hub.Qwen2Config(**SIZES),
    "qwen2, window": lambda: hub.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: hub.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3, yarn rope": lambda: hub.Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN),
    "gemma2": lambda: hub.Gemma2Config(
        **SIZES,
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=3,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma2, no bounds": lambda: hub.Gemma2Config(
        **SIZES,
        head_dim=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
    ),
    "gemma3_text": lambda: hub.Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=3,
        final_logit_softcapping=3.0,
        sliding_window_pattern=2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "phi3": lambda: hub.Phi3Config(**SIZES, pad_token_id=0, sliding_window=7),
    "phi3, part of each head rotated": lambda: hub.Phi3Config(
        **SIZES, pad_token_id=0, tie_word_embeddings=True, partial_rotary_factor=0.75
    ),
    "phi3, longrope": lambda: hub.Phi3Config(
        **SIZES,
        pad_token_id=0,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    ),
    "olmo2": lambda: hub.Olmo2Config(**SIZES),
    "olmo3": lambda: hub.Olmo3Config(
        **SIZES,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
    ),
    "smollm3": lambda: hub.SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layer_interval=2),
    "smollm3, window": lambda: hub.SmolLM3Config(
        **SIZES,
        pad_token_id=0,
        no_rope_layers=[0, 1, 1],
        use_sliding_window=True,
        sliding_window=5,
        tie_word_embeddings=False,
    ),
    "granite": lambda: hub.GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.7,
        logits_scaling=2.5,
    ),
    "glm4": lambda: hub.Glm4Config(**SIZES, head_dim=16, pad_token_id=0),
    "cohere2": lambda: hub.Cohere2Config(
        **SIZES,
        logit_scale=0.3,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: hub.GPT2Config(**GPT2_SIZES),
    "gpt2, own inner size, no scale": lambda: hub.GPT2Config(
        **GPT2_SIZES, n_inner=40, scale_attn_weights=False, tie_word_embeddings=False
    ),
    "gpt_neox": lambda: hub.GPTNeoXConfig(**ONE_KIND_OF_HEADS),
    "gpt_neox, one after the other": lambda: hub.GPTNeoXConfig(
        **ONE_KIND_OF_HEADS,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        tie_word_embeddings=True,
    ),
    "mixtral": lambda: hub.MixtralConfig(**SIZES, num_local_experts=5, sliding_window=6),
    "qwen3_moe": lambda: hub.Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24
    ),
    "qwen3_moe, some layers plain": lambda: hub.Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=5,
    ),
}


def save_peer(variant: str, folder: Path) -> Any:
    """Make a tiny random transformers model and save it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(VARIANTS[variant]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros: make them tell
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:  # so that bounds, scales and positions tell
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


@pytest.fixture(params=VARIANTS, scope="module")
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random transformers model of each variant, saved to its ``name_or_path``."""
    return save_peer(request.param, tmp_path_factory.mktemp("peer"))


def trees(vocab_size: int = 97) -> list[tuple[Any, list[Any]]]:
    generator = np.random.default_rng(0)

    def text(longest: int) -> Any:
        return generator.integers(0, vocab_size, generator.integers(1, longest), dtype=np.int32)

    return [(text(12), [text(9), text(9), text(4)]) for _ in range(3)]


def peer_log_probs(peer: Any) -> Tensor:
    rows = []
    for prompt, answers in trees():
        for answer in answers:
            ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
            with torch.no_grad():
                log_probs = peer(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            rows.append(log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_log_probs_equal_those_of_transformers(peer: Any, share_prefix: bool) -> None:
    model = load_model(peer.name_or_path)
    texts = collate_answers(trees(), share_prefix=share_prefix)
    found = completion_log_probs(model, texts).log_probs
    torch.testing.assert_close(found, peer_log_probs(peer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_saved_model_has_the_same_logits_in_transformers(
    peer: Any, tmp_path: Path, max_shard_bytes: int
) -> None:
    save_model(load_model(peer.name_or_path), tmp_path, max_shard_bytes=max_shard_bytes)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, peer(ids).logits)


def test_decoding_with_the_cache_gives_the_log_probs_of_whole_texts(peer: Any) -> None:
    model = load_model(peer.name_or_path, dtype=torch.float64)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8, 2]]
    texts = decode(
        model,
        prompts,
        GenerateOptions(max_new_tokens=12),
        stop_ids=[frozenset()] * 3,
        uniforms=torch.zeros(3, 12),
    )
    trees = [
        (np.array(prompt, np.int32), [np.array(text.ids, np.int32)])
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    expected = completion_log_probs(model, collate_answers(trees))
    found = [log_prob for text in texts for log_prob in text.log_probs]
    assert found == pytest.approx(expected.log_probs.tolist(), rel=0, abs=1e-10)
    assert expected.is_top.all()


@pytest.mark.parametrize("part", RECOMPUTED)
def test_parts_that_are_computed_again_give_equal_gradients(peer: Any, part: Recompute) -> None:
    plain, saving = (load_model(peer.name_or_path) for _ in range(2))
    recompute(saving, part)
    for model in (plain, saving):
        completion_log_probs(model, collate_answers(trees())).log_probs.sum().backward()
    for name, parameter in plain.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        other = saving.get_parameter(name).grad
        assert other is not None, name
        assert torch.equal(gradient, other), name


def test_a_step_of_the_trainer_lowers_the_loss(
    peer: Any, make_pairs: Callable[..., TokenizedPairs]
) -> None:
    pairs = make_pairs(4)
    config = TrainConfig(batch_size=4, steps=2, learning_rate=1e-3, schedule="constant")
    first, second = Trainer(load_model(peer.name_or_path), pairs, config)
    assert first.metrics is not None
    assert second.metrics is not None
    assert first.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second.metrics["loss"] < first.metrics["loss"] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gpt_neox"])
def test_compiled_blocks_give_equal_log_probs(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()  # what was compiled before counts against the same limit
    save_peer(name, tmp_path)
    eager, compiled = load_model(tmp_path), load_model(tmp_path)
    compile_blocks(compiled)
    texts = collate_answers(trees())
    with torch.no_grad():
        expected = completion_log_probs(eager, texts).log_probs
        found = completion_log_probs(compiled, texts).log_probs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", [None, *RECOMPUTED])
def test_blocks_are_compiled_once_for_all_layers_and_streams(part: Recompute | None) -> None:
    graphs = set()
    for layers in (1, 3):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        model = init_model(parse_config(config | {"num_hidden_layers": layers}), seed=0)
        compile_blocks(model)
        if part is not None:
            recompute(model, part)
        for count in (3, 4, 7, 12, 19):
            prompt, *answers = (np.arange(count + more, dtype=np.int32) for more in range(3))
            texts = collate_answers([(prompt, answers)] * count, share_prefix=False)
            completion_log_probs(model, texts).log_probs.sum().backward()
            graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    assert graphs != {0}, "nothing was compiled"


def test_untrained_models_of_every_variant_save_and_load_again(peer: Any, tmp_path: Path) -> None:
    model = init_model(read_config(Path(peer.name_or_path)), seed=1)
    save_model(model, tmp_path, max_shard_bytes=20_000)
    again = load_model(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if name.endswith("bias"):
            assert not parameter.any()


def test_every_architecture_is_held_against_transformers() -> None:
    tested = {name.split(",")[0] for name in VARIANTS}
    assert tested == set(ARCHITECTURES)


def test_readme_lists_every_architecture() -> None:
    _, rows = README.split("|---|\n", maxsplit=1)
    listed = re.findall(r"^\| `(\w+)` \|", rows, flags=re.MULTILINE)
    assert sorted(listed) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("has_bias", [False, True])
def test_architecture_that_the_readme_adds_equals_that_of_transformers(
    has_bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub.Ernie4_5Config(**SIZES, head_dim=8, use_bias=has_bias)
    monkeypatch.setitem(VARIANTS, "ernie4_5", lambda: config)
    peer = save_peer("ernie4_5", tmp_path)
    (example,) = blocks("python", "dpo/models/README.md")
    monkeypatch.setitem(ARCHITECTURES, "ernie4_5", ARCHITECTURES["llama"])  # is taken out again
    exec(compile(example.text, str(example), "exec"), {})
    found = completion_log_probs(load_model(tmp_path), collate_answers(trees())).log_probs
    torch.testing.assert_close(found, peer_log_probs(peer), rtol=0, atol=1e-5)


def test_saved_shards_load_again(tmp_path: Path) -> None:
    model = init_model(parse_config(SIZES | {"model_type": "llama"}), seed=1)
    save_model(model, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load_model(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_loading_converts_and_keeps_tied_weights_one_tensor(tmp_path: Path) -> None:
    config = parse_config(SIZES | {"model_type": "llama", "tie_word_embeddings": True})
    save_model(init_model(config), tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_initialisation_is_a_function_of_the_seed() -> None:
    config = parse_config(SIZES | {"model_type": "llama"})
    first, second, other = (init_model(config, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# Checkpoints as they are found


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def test_gpt2_without_prefix_and_with_causal_masks_is_read(tmp_path: Path) -> None:
    """As openai-community/gpt2 is stored."""
    peer = save_peer("gpt2", tmp_path)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(3)}
    rewrite(
        tmp_path,
        lambda weights: (
            masks | {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        ),
    )
    found = completion_log_probs(load_model(tmp_path), collate_answers(trees())).log_probs
    torch.testing.assert_close(found, peer_log_probs(peer), rtol=0, atol=1e-5)


def test_gpt_neox_with_masks_and_angles_is_read(tmp_path: Path) -> None:
    """As EleutherAI/pythia-* are stored."""
    save_peer("gpt_neox", tmp_path)
    expected = load_model(tmp_path)
    computed = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    rewrite(tmp_path, lambda weights: weights | computed)
    assert torch.equal(load_model(tmp_path).lm_head.weight, expected.lm_head.weight)


OLDER_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "olmo3": {"rope_theta": 5e5, "rope_scaling": YARN},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "phi3, part of each head rotated": {"partial_rotary_factor": 0.75, "rope_scaling": None},
    "glm4": {"partial_rotary_factor": 0.5},
    "smollm3": {"rope_theta": 2e6},
}


@pytest.mark.parametrize("variant", OLDER_CONFIGS)
def test_config_from_before_transformers_5_means_the_same(variant: str, tmp_path: Path) -> None:
    save_peer(variant, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    expected = read_config(tmp_path)
    if variant == "gemma3_text":
        del config["layer_types"]
        config["sliding_window_pattern"] = 2
    assert parse_config(config | OLDER_CONFIGS[variant]) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_entries_that_are_left_out_are_those_of_transformers(name: str) -> None:
    sizes = {"gpt2": GPT2_SIZES, "gpt_neox": ONE_KIND_OF_HEADS}.get(name, SIZES)
    whole = transformers.AutoConfig.for_model(name, **sizes)
    assert parse_config({"model_type": name, **sizes}) == parse_config(whole.to_dict())


def test_names_of_experts_before_transformers_5_mean_the_same(tmp_path: Path) -> None:
    save_peer("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = parse_config(config)
    config["num_experts"] = config.pop("num_local_experts")
    assert parse_config(config) == expected


def test_rows_of_heads_are_interleaved_by_hand() -> None:
    """Two heads of one number: the file has query 0, key 0, value 0, query 1, key 1, value 1."""
    layout = ARCHITECTURES["gpt_neox"].layout
    parameters = {
        f"model.layers.0.self_attn.{name}_proj.bias": torch.tensor([10.0 * i, 10.0 * i + 1])
        for i, name in enumerate("qkv")
    }
    ((name, stored),) = layout.stored(parameters, heads=2).items()
    assert name == "gpt_neox.layers.0.attention.query_key_value.bias"
    joined = stored.join(parameters)
    assert joined.tolist() == [0, 10, 20, 1, 11, 21]
    for part, parameter in zip(stored.split(joined), parameters.values(), strict=True):
        assert torch.equal(part, parameter)


def test_weights_stay_in_the_memory_of_the_file_where_nothing_is_converted(tmp_path: Path) -> None:
    """Also the parts of a joined tensor: loading takes no second copy."""
    save_peer("phi3", tmp_path)
    attention = load_model(tmp_path).model.layers[0].get_submodule("self_attn")
    query, key = attention.get_parameter("q_proj.weight"), attention.get_parameter("k_proj.weight")
    assert key.data_ptr() - query.data_ptr() == query.nbytes


def test_experts_are_computed_for_the_tokens_that_take_them_alone() -> None:
    config = parse_config(
        SIZES | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    )
    mlp = init_model(config).model.layers[0].get_submodule("mlp")
    assert isinstance(mlp, SparseMLP)
    with FlopCounterMode(display=False) as counter:
        mlp(torch.randn(10, 32))
    router, of_one_token = 10 * 32 * 8, 3 * 32 * 48
    assert counter.get_total_flops() == 2 * (router + 10 * 2 * of_one_token)


# Refusals


@pytest.mark.parametrize(
    ("variant", "limit"), [("gpt2", 512), ("phi3, longrope", 32), ("llama", None)]
)
def test_texts_that_have_no_positions_are_refused(
    variant: str, limit: int | None, tmp_path: Path
) -> None:
    save_peer(variant, tmp_path)
    model = load_model(tmp_path)
    prompt, answer = np.zeros(limit or 512, np.int32), np.zeros(1, np.int32)
    completion_log_probs(model, collate_answers([(prompt[:-1], [answer])]))
    if limit is None:
        completion_log_probs(model, collate_answers([(prompt, [answer])]))
        return
    with pytest.raises(InputError, match=f"a text has {limit + 1} tokens, this model can read"):
        completion_log_probs(model, collate_answers([(prompt, [answer])]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(init_model(parse_config(SIZES | {"model_type": "llama"})), tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a model folder: config\.json is missing"):
        load_model(tmp_path)


def test_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        load_model(folder)


def test_config_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: expected a JSON object"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not supported; supported are .*llama, mistral"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": []}, r"model_type \[\] is not supported"),
        ({"quantization_config": {}}, "quantised weights cannot be trained"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported; expected 'silu', 'gelu'"),
        ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer, got 'big'"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        (
            {"num_key_value_heads": "two"},
            "num_key_value_heads must be a positive integer, got 'two'",
        ),
        ({"head_dim": -1}, "head_dim must be a positive integer, got -1"),
        (
            {"model_type": "qwen2", "max_window_layers": None},
            "max_window_layers must be an integer >= 0, got None",
        ),
        (
            {"model_type": "olmo3", "layer_types": ["full_attention"] * 2},
            "layer_types must be a list of 3 items, got",
        ),
        (
            {"model_type": "olmo3", "layer_types": ["chunked_attention"] * 3},
            "layer_types 'chunked_attention' is not supported; expected 'sliding_attention' or",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported; expected False",
        ),
        ({"model_type": "gpt2"}, "n_head must be a positive integer, got None"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, got 'small'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_scaling": {"rope_type": []}}, r"rope type \[\] is not supported"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            "factor must be a positive number, got 0",
        ),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs 'factor'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": 1}},
            "short_factor must be a list of numbers, got 1",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor has 1 numbers, expected 4",
        ),
        (
            {"partial_rotary_factor": 0.4},
            "partial_rotary_factor rotates 3 of the 8 numbers of a head; expected an even number",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor'"),
    ],
)
def test_unsupported_config_is_refused(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    change_config(folder, vocab_size=98)
    with pytest.raises(InputError, match=r"has shape \(97, 32\), config.json says \(98, 32\)"):
        load_model(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, path)
    with pytest.raises(
        InputError, match=r"model\.norm\.weight is stored as I8, expected one of F32"
    ):
        load_model(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)
    with pytest.raises(InputError, match=r"1 weights are missing: model\.norm\.weight"):
        load_model(folder)


def test_weights_without_a_place_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"1 weights have no place .*: model\.extra"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000])
def test_cut_off_weights_are_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or cut off"):
        load_model(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin are pickles, which are never opened"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "not a safetensors index"),
        ("{", "not valid JSON"),
        (
            '{"weight_map": {"a": "model-1.safetensors"}}',
            r"names absent files: model-1\.safetensors",
        ),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names '\.\./model\.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
        ('{"weight_map": {"a": ".."}}', r"names '\.\.'"),
        ('{"weight_map": {"a": 3}}', "names 3"),
    ],
)
def test_bad_index_is_refused(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        load_model(folder)
