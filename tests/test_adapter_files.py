"""Adapters on disk: PEFT reads what is written, and what PEFT writes is read; logits are equal."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.adapter_files import CONFIG, WEIGHTS, is_adapter, load_adapter, read_adapter, save_adapter
from dpo.adapters import Adapter, adapted_layers, add_adapter
from dpo.batching import collate_answers
from dpo.errors import InputError
from dpo.log_probs import completion_log_probs
from dpo.models import Decoder, load_model, save_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

IDS = np.arange(3, 25, dtype=np.int32)
PROMPT, ANSWER = IDS[:2], IDS[2:]

# what peft.LoraConfig is given: our form of it and targets
CASES: dict[str, tuple[dict[str, Any], Adapter, str | None]] = {
    "lora": ({}, Adapter(4, 8.0), None),
    "rslora": ({"use_rslora": True}, Adapter(4, 8.0, is_rslora=True), None),
    "dora": ({"use_dora": True}, Adapter(4, 8.0, is_dora=True), None),
    "names": ({}, Adapter(4, 8.0), "q_proj,mlp.down_proj"),
    "one layer of many": ({}, Adapter(4, 8.0), r".*layers\.1\.self_attn\.v_proj"),
    "output": ({}, Adapter(4, 8.0), "q_proj,lm_head"),
    "output, dora": ({"use_dora": True}, Adapter(4, 8.0, is_dora=True), "v_proj,lm_head"),
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(
    request: pytest.FixtureRequest, make_model: Callable[..., Decoder], tmp_path: Path
) -> Path:
    """A tiny model with biases in its attention."""
    model = make_model(attention_bias=True, tie_word_embeddings=request.param)
    (tmp_path / "base").mkdir()
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


def our_log_probs(model: Decoder) -> Tensor:
    with torch.no_grad():
        return completion_log_probs(model, collate_answers([(PROMPT, [ANSWER])])).log_probs


def peer_log_probs(model: Any) -> Tensor:
    with torch.no_grad():
        log_probs = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].log_softmax(-1)
    targets = torch.from_numpy(ANSWER.astype(np.int64))
    chosen: Tensor = log_probs[len(PROMPT) - 1 : -1].gather(1, targets[:, None])[:, 0]
    return chosen


def stir(parameters: dict[str, Tensor]) -> None:
    """Give updates that count: B away from zero, magnitudes away from the lengths of W."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            if name.endswith(("up", "lora_B.default.weight")):
                parameter.normal_(0, 0.3, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(len(parameter), generator=generator))


def trained_by_us(base: Path, adapter: Adapter, targets: str | None = None) -> Decoder:
    model = load_model(base)
    add_adapter(model, adapter, targets=targets)
    stir(dict(model.named_parameters()))
    return model


def saved_by_us(base: Path, adapter: Adapter, targets: str | None = None) -> Path:
    folder = base.parent / "adapter"
    folder.mkdir()
    save_adapter(trained_by_us(base, adapter, targets), folder, base=str(base))
    return folder


def saved_by_peft(base: Path, **options: Any) -> tuple[Path, Tensor]:
    """Save an adapter of PEFT; return its folder and the log-probs of its model."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(**given | options)).eval()
    stir(dict(model.named_parameters()))
    model.save_pretrained(str(base.parent / "adapter"))
    return base.parent / "adapter", peer_log_probs(model)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 of several nats


@pytest.mark.parametrize(("_options", "adapter", "targets"), CASES.values(), ids=CASES)
def test_peft_gives_the_same_log_probs_for_what_we_save(
    base: Path, _options: object, adapter: Adapter, targets: str | None
) -> None:
    folder = saved_by_us(base, adapter, targets)
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        peer = peft.PeftModel.from_pretrained(peer, folder).eval()
    expected = our_log_probs(trained_by_us(base, adapter, targets))
    close(peer_log_probs(peer), expected)
    assert not torch.allclose(expected, our_log_probs(load_model(base)), atol=1e-2)


@pytest.mark.parametrize(("options", "adapter", "targets"), CASES.values(), ids=CASES)
def test_we_give_the_same_log_probs_for_what_peft_saves(
    base: Path, options: dict[str, Any], adapter: Adapter, targets: str | None
) -> None:
    if targets is not None:
        options = options | {"target_modules": targets if "*" in targets else targets.split(",")}
    folder, expected = saved_by_peft(base, **options)
    model = load_model(base)
    load_adapter(model, folder)
    close(our_log_probs(model), expected)
    assert read_adapter(folder).adapter == adapter


def test_targets_are_written_as_ends_of_names_where_these_say_enough(base: Path) -> None:
    model = trained_by_us(base, Adapter(2), r".*(q_proj|down_proj)")
    save_adapter(model, base, base="B", base_revision="abc")
    config = json.loads((base / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("B", "abc")
    save_adapter(trained_by_us(base, Adapter(2), r".*\.1\..*q_proj"), base, base="B")
    config = json.loads((base / CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_adapter_folder_is_told_from_a_model_folder(base: Path) -> None:
    folder = saved_by_us(base, Adapter(4))
    assert is_adapter(folder)
    assert not is_adapter(base)
    (base / CONFIG).write_text((folder / CONFIG).read_text())
    assert not is_adapter(base)


def test_saved_adapter_loads_to_the_same_weights(base: Path) -> None:
    adapter = Adapter(3, 2.5, is_rslora=True, is_dora=True)
    saved, read = trained_by_us(base, adapter, "lm_head,q_proj"), load_model(base)
    load_adapter(read, saved_by_us(base, adapter, "lm_head,q_proj"))
    assert {name: layer.adapter for name, layer in adapted_layers(read).items()} == dict.fromkeys(
        adapted_layers(saved), adapter
    )
    for name, parameter in saved.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter)
        assert read.get_parameter(name).requires_grad == parameter.requires_grad


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, r'peft_type = "IA3" is not supported, expected "LORA"'),
        ({"bias": "all"}, r'bias = "all" is not supported, expected "none"'),
        ({"modules_to_save": ["norm"]}, r'modules_to_save = \["norm"\] is not supported'),
        ({"rank_pattern": {"q_proj": 2}}, r'rank_pattern = {"q_proj": 2} is not supported'),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern = .* expected nothing"),
        ({"init_lora_weights": "pissa"}, r'init_lora_weights = "pissa" is not supported'),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out = true is not supported"),
        ({"something_later": 1}, r"something_later = 1 is not supported"),
        ({"r": "4"}, r"r must be a positive integer, got '4'"),
        ({"r": True, "lora_alpha": -1}, r"r must be .* got True; lora_alpha must be a positive n"),
        ({"base_model_name_or_path": 3}, r"base_model_name_or_path must be a text, got 3"),
        ({"lora_dropout": "much"}, r"lora_dropout must be a number, got 'much'"),
    ],
)
def test_adapter_of_another_kind_is_refused(
    tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / CONFIG).write_text(json.dumps(plain | entries))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not an adapter: adapter_config\.json is missing"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json: expected a JSON object"):
        read_adapter(tmp_path)


def test_weights_that_are_missing_or_damaged_are_refused(base: Path) -> None:
    folder = saved_by_us(base, Adapter(4))
    (folder / WEIGHTS).write_bytes(b"short")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: damaged or cut off"):
        load_adapter(load_model(base), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no weights of an adapter: adapter_model\.safetensors"):
        load_adapter(load_model(base), folder)


UP = "base_model.model.model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{UP}lora_A.weight", torch.ones(5, 16), r"shape \(5, 16\), expected \(4, 16\)"),
        (f"{UP}lora_B.weight", None, r"up_proj\.lora_B\.weight has shape None, expected \(24, 4\)"),
        (f"{UP}lora_magnitude_vector", torch.ones(24), r"shape \(24,\), expected None"),
        (f"{UP}base_layer.weight", torch.ones(24, 16), r"up_proj\.weight is neither an update nor"),
        ("base_model.model.other", torch.ones(2), r"other is neither an update nor equal to the"),
        (
            "base_model.model.norm.lora_A.weight",
            torch.ones(4, 2),
            r"model has no linear layer norm",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    base: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    folder = saved_by_us(base, Adapter(4), "up_proj")
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / WEIGHTS)
    model = load_model(base)
    with pytest.raises(InputError, match=message):
        load_adapter(model, folder)
    assert adapted_layers(model) == {}


def test_adapter_without_updates_is_refused(base: Path) -> None:
    folder = saved_by_us(base, Adapter(4))
    save_file({}, folder / WEIGHTS)
    with pytest.raises(InputError, match="there are no updates in it"):
        load_adapter(load_model(base), folder)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "phi3",
            r"self_attn\.q_proj of a phi3 is .*qkv_proj.*Give --adapter-targets down_proj,o_proj",
        ),
        ("gpt2", r"of a gpt2 is .*c_attn.*Train all weights"),
    ],
)
def test_layers_that_the_bases_files_do_not_name_are_refused(
    tmp_path: Path, make_model: Callable[..., Decoder], architecture: str, message: str
) -> None:
    changes: dict[str, object] = {"model_type": architecture}
    if architecture == "gpt2":
        changes |= {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24}
    model = make_model(**changes)
    add_adapter(model, Adapter(2, 4.0))
    with pytest.raises(InputError, match=message):
        save_adapter(model, tmp_path, base="base")
