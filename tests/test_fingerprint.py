import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.fingerprint import module_fingerprint, weights_fingerprint

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.arange(6.0),
    "c": torch.tensor(2.5),
}
CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "torch_dtype": "bfloat16"}


def write(
    folder: Path, *shards: Mapping[str, Tensor], config: Mapping[str, object] = CONFIG
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        save_file(dict(shard), folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{number}.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def test_fingerprint_does_not_depend_on_shards_place_and_other_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", WEIGHTS)
    cut = write(tmp_path / "cut", {"c": WEIGHTS["c"]}, {"b": WEIGHTS["b"], "a": WEIGHTS["a"]})
    (cut / "README.md").touch()
    assert weights_fingerprint(whole) == weights_fingerprint(cut)


def test_fingerprint_ignores_config_keys_that_change_no_number(tmp_path: Path) -> None:
    one = write(tmp_path / "one", WEIGHTS)
    other = write(tmp_path / "two", WEIGHTS, config=CONFIG | {"torch_dtype": "float32"})
    assert weights_fingerprint(one) == weights_fingerprint(other)


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        ({"a": WEIGHTS["a"] + 1}, {}),
        ({"b": WEIGHTS["b"].view(torch.int32)}, {}),
        ({"a": WEIGHTS["a"].view(3, 2)}, {}),
        ({"d": torch.zeros(1)}, {}),
        ({"b": WEIGHTS["b"].clone().index_fill_(0, torch.tensor([0]), -0.0)}, {}),
        ({}, {"rope_theta": 20000.0}),
        ({}, {"unheard_of": 1}),
    ],
)
def test_fingerprint_changes_with_weights_and_mathematics(
    tmp_path: Path, weights: dict[str, Tensor], config: dict[str, object]
) -> None:
    before = write(tmp_path / "before", WEIGHTS)
    after = write(tmp_path / "after", WEIGHTS | weights, config=CONFIG | config)
    assert weights_fingerprint(before) != weights_fingerprint(after)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", WEIGHTS)
    (folder / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(InputError, match=r"one/model\.safetensors: damaged or cut off: "):
        weights_fingerprint(folder)


def test_module_fingerprint_is_of_content() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    second.load_state_dict(first.state_dict())
    same = module_fingerprint(second, {"n": 1})
    with torch.no_grad():
        second.weight[1, 1] += 1

    assert module_fingerprint(first, {"n": 1}) == same
    assert module_fingerprint(first, {"n": 2}) != same
    assert module_fingerprint(second, {"n": 1}) != same
