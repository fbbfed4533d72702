import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpo.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    prune,
    restore_optimizer,
    save_checkpoint,
    set_aside_later,
)
from dpo.errors import InputError, RunError
from dpo.files import read_json, sha256_file, write_json, write_manifest


def save(folder: Path, step: int) -> Path:
    model = {"a.weight": torch.full((3, 2), float(step)), "b": torch.tensor(step)}
    return save_checkpoint(folder, step, {"model": model}, {"row": step, "loss": 0.1})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and every bit agree."""
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.flatten().contiguous().view(torch.uint8), b.flatten().contiguous().view(torch.uint8)
        )
        for a, b in ((left[name], right[name]) for name in left)
    )


def flip_byte(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 0x10
    path.write_bytes(data)


def test_checkpoint_is_read_as_saved(tmp_path: Path) -> None:
    tensors = {
        "model": {
            "bf16": torch.randn(5, 3).bfloat16(),
            "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
            "scalar": torch.tensor(7.0),
            "transposed": torch.randn(4, 2).T,
            "empty": torch.zeros(0, 3),
        },
        "random": {"cpu": torch.get_rng_state(), "step": torch.tensor(2**40)},
    }
    state = {"row": 3, "loss": 0.1 + 0.2, "best": None, "names": ["ä"]}

    path = save_checkpoint(tmp_path, 100, tensors, state)
    found = load_checkpoint(path)

    assert path == tmp_path / "step-000100"
    assert names(path) == [
        "manifest.json",
        "model.safetensors",
        "random.safetensors",
        "state.json",
    ]
    assert (found.step, found.state) == (100, state)
    assert all(same(found.tensors[stem], tensors[stem]) for stem in tensors)
    assert found.tensors.keys() == tensors.keys()


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert (path / "model.safetensors").stat().st_mode == (path / "state.json").stat().st_mode


def test_loaded_tensors_can_be_written_to_without_changing_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    load_checkpoint(path).tensors["model"]["a.weight"].zero_()
    assert load_checkpoint(path).tensors["model"]["a.weight"].eq(1).all()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"model": {"x": torch.ones(1)}}, {})

    assert list(load_checkpoint(tmp_path / "step-000005").tensors["model"]) == ["x"]
    assert names(tmp_path) == ["step-000005"]


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    for step in (1000000, 999999, 7):
        save(tmp_path, step)
    found = latest_checkpoint(tmp_path)

    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.damaged) == (1000000, ())


def test_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    (tmp_path / "step-000009.tmp-1-ab").mkdir()
    (tmp_path / "step-000009.aside").mkdir()
    assert latest_checkpoint(tmp_path).checkpoint is None
    assert latest_checkpoint(tmp_path / "missing").checkpoint is None


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json"])
def test_any_flipped_byte_is_detected_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / name
    for index in range(0, damaged.stat().st_size, 5):
        flip_byte(damaged, index)
        found = latest_checkpoint(tmp_path)
        flip_byte(damaged, index)

        assert found.checkpoint is not None
        assert found.checkpoint.step == 1
        assert len(found.damaged) == 1
        assert str(damaged.parent) in found.damaged[0]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json"])
def test_cut_or_missing_file_is_detected_and_the_one_before_is_used(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / name
    os.truncate(damaged, damaged.stat().st_size - 1)
    cut = latest_checkpoint(tmp_path)
    damaged.unlink()
    missing = latest_checkpoint(tmp_path)

    assert cut.checkpoint is not None
    assert missing.checkpoint is not None
    assert (cut.checkpoint.step, missing.checkpoint.step) == (1, 1)
    assert f"{damaged}: missing" in missing.damaged[0]


def test_all_damaged_are_reported_newest_first(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip_byte(save(tmp_path, step) / "model.safetensors", -1)
    found = latest_checkpoint(tmp_path)

    assert found.checkpoint is None
    assert [report.split(" is damaged")[0][-6:] for report in found.damaged] == [
        "000003",
        "000002",
        "000001",
    ]


def test_damaged_checkpoint_is_refused_with_file_and_both_hashes(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "model.safetensors"
    before = sha256_file(file)
    flip_byte(file, -1)

    with pytest.raises(RunError) as refusal:
        load_checkpoint(path)

    assert str(refusal.value) == (
        f"checkpoint {path} is damaged:\n"
        f"  {file}: damaged: sha256 {sha256_file(file)}, the manifest says {before}"
    )


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step-000001: no such checkpoint folder"):
        load_checkpoint(tmp_path / "step-000001")


def test_later_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    write_json(path / "state.json", read_json(path / "state.json") | {"format": 2})
    write_manifest(path)
    with pytest.raises(InputError, match="step-000001: checkpoint format 2, expected 1"):
        latest_checkpoint(tmp_path)


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    removed = prune(tmp_path, keep=2, best=2)

    assert [path.name for path in removed] == ["step-000001", "step-000003"]
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]


def test_prune_refuses_to_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep must be at least 1 checkpoint, got 0"):
        prune(tmp_path, keep=0)


def test_later_checkpoints_are_set_aside_and_not_found_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    set_aside_later(tmp_path, 2)
    save(tmp_path, 3)
    moved = set_aside_later(tmp_path, 2)
    found = latest_checkpoint(tmp_path)

    assert moved == [tmp_path / "step-000003.aside"]
    assert found.checkpoint is not None
    assert found.checkpoint.step == 2


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("weights", "text"), [(50_000, ""), (1, "x" * 200_000)])
def test_full_disk_is_an_os_error_and_harms_nothing(
    tmp_path: Path,
    step: int,
    weights: int,
    text: str,
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    save(tmp_path, 1)
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, step, {"model": {"a": torch.ones(weights)}}, {"text": text})

    assert names(tmp_path) == ["step-000001"]
    assert load_checkpoint(tmp_path / "step-000001").state["row"] == 1


# Each forked child saves again over sound checkpoints, and kills itself at the n-th thing it asks
# of the system: a file opened, a folder made, a name changed, a file forced to the disk.
KILLED_AT_EVERY_INSTANT = """
import itertools, os, shutil, signal, sys, torch
from pathlib import Path
from dpo.checkpoint import latest_checkpoint, prune, save_checkpoint

def save(folder, step, value):
    save_checkpoint(folder, step, {"model": {"a": torch.full((9,), value)}}, {"value": value})

def work(folder, instant):
    count = itertools.count()
    def die(*_):
        if next(count) == instant:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = die
    watched = ("open", "os", "shutil")
    sys.addaudithook(lambda event, _: die() if event.split(".")[0] in watched else None)
    save(folder, 2, 2.0)
    save(folder, 3, 3.0)
    prune(folder, keep=1)
    os._exit(0)

folder = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # what a killed process has written stays without it
for instant in itertools.count(step=int(sys.argv[2])):
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 1, 1.0)
    save(folder, 2, 0.5)
    child = os.fork()
    if child == 0:
        work(folder, instant)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    found = latest_checkpoint(folder)
    assert not found.damaged, found.damaged
    step, value = found.checkpoint.step, found.checkpoint.state["value"]
    assert (step, value) in ((1, 1.0), (2, 0.5), (2, 2.0), (3, 3.0)), (step, value)
    assert found.checkpoint.tensors["model"]["a"].eq(value).all()
    save(folder, 4, 4.0)
    assert not list(folder.glob("*.tmp-*")), list(folder.glob("*.tmp-*"))
    if not killed:
        print(instant)
        break
"""


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_any_instant_leaves_a_sound_checkpoint(tmp_path: Path, stride: int) -> None:
    folder = str(tmp_path / "checkpoints")
    command = [sys.executable, "-c", KILLED_AT_EVERY_INSTANT, folder, str(stride)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert int(result.stdout) > 80  # instants in all


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    embedding, head = model[0], model[2]
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    head.weight = embedding.weight
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([step, step + 1])).logsumexp(-1).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit_after_a_round_trip(
    tmp_path: Path, fused: bool, dtype: torch.dtype
) -> None:
    model, resumed = tied_model().to(dtype), tied_model().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    train(model, optimizer, 2)
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
    found = load_checkpoint(save_checkpoint(tmp_path, 2, tensors, {}))
    train(model, optimizer, 3)

    # The other order of parameters shows that names count, not positions.
    again = torch.optim.AdamW(reversed(list(resumed.parameters())), lr=0.01, fused=fused)
    resumed.load_state_dict(found.tensors["model"])
    restore_optimizer(again, resumed, found.tensors["optimizer"])
    train(resumed, again, 3)

    assert same(resumed.state_dict(), model.state_dict())
    assert same(optimizer_tensors(again, resumed), optimizer_tensors(optimizer, model))


def test_restored_state_shares_no_memory_with_the_tensors_given() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = {"weight/exp_avg": torch.zeros(2, 2)}
    restore_optimizer(optimizer, model, tensors)
    optimizer.state[model.weight]["exp_avg"].add_(1)
    assert tensors["weight/exp_avg"].eq(0).all()


@pytest.mark.parametrize(("fused", "device"), [(False, "cpu"), (True, "meta")])
def test_step_count_goes_where_the_update_runs(fused: bool, device: str) -> None:
    model = nn.Linear(2, 2, device="meta")  # stands for an accelerator
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["fused"] = fused
    counts = {f"weight/{name}": torch.tensor(3.0) for name in ("step", "weight_sum")}
    restore_optimizer(optimizer, model, {"weight/exp_avg": torch.zeros(2, 2), **counts})

    state = optimizer.state[model.weight]
    assert state["exp_avg"].device.type == "meta"
    assert {state["step"].device.type, state["weight_sum"].device.type} == {device}


def test_state_of_an_untrained_parameter_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([model.weight])
    with pytest.raises(InputError, match=r"state 'bias/step', but no parameter 'bias' is trained"):
        restore_optimizer(optimizer, model, {"bias/step": torch.tensor(1.0)})


def test_optimizer_of_another_model_is_refused() -> None:
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(other.parameters())
    other(torch.ones(2)).sum().backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"parameter of shape \(3, 2\) that the model has not"):
        optimizer_tensors(optimizer, model)


def test_optimizer_state_that_is_no_tensor_is_refused() -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight]["momentum"] = 0.5
    with pytest.raises(InputError, match="'momentum' of weight is float, expected a tensor"):
        optimizer_tensors(optimizer, model)
