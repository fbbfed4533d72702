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
from torch import Tensor

from dpo.adapter_files import CONFIG, load_adapter, read_adapter, save_adapter
from dpo.adapters import Adapter, add_adapter
from dpo.batching import collate_answers
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
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def changed(folder: Path, **entries: object) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | entries))
    return folder


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
