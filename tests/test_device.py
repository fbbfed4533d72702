from collections.abc import Callable, Iterator

import pytest
import torch

from dpo.device import choose_device, explained_lack_of_memory
from dpo.errors import InputError, RunError
from dpo.precision import PRECISIONS, precision_of
from dpo.train_config import TrainConfig


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_threads_are_set_if_they_are_given() -> None:
    choose_device(TrainConfig(device="cpu", threads=3))
    choose_device(TrainConfig(device="cpu"))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("has_gpu", [False, True])
def test_auto_takes_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(TrainConfig()).type == ("cuda" if has_gpu else "cpu")
    assert choose_device(TrainConfig(device="cpu")).type == "cpu"


def test_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"train\.device is cuda, but torch sees no GPU"):
        choose_device(TrainConfig(device="cuda"))
    with pytest.raises(InputError, match="fp16-mixed needs a GPU; on a CPU take bf16-mixed"):
        choose_device(TrainConfig(dtype="fp16-mixed"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let torch see a GPU of a generation."""

    def see(generation: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"GPU {generation}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (generation, 0))

    return see


def test_tf32_is_switched_on_and_off(gpu: Callable[[int], None]) -> None:
    gpu(9)
    choose_device(TrainConfig(tf32=True))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32  # what parts of torch still ask
    choose_device(TrainConfig())
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_tf32_is_refused_where_it_would_be_ignored(
    monkeypatch: pytest.MonkeyPatch, gpu: Callable[[int], None]
) -> None:
    gpu(7)
    with pytest.raises(InputError, match=r"compute capability >= 8\.0, found GPU 7"):
        choose_device(TrainConfig(tf32=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"train\.tf32 needs a GPU .*, found a CPU"):
        choose_device(TrainConfig(tf32=True))


def test_tf32_has_the_noise_of_its_ten_bits() -> None:
    assert precision_of(TrainConfig(tf32=True)).noise == PRECISIONS["fp16-mixed"].noise
    assert precision_of(TrainConfig(tf32=True)).parameters == torch.float32
    assert precision_of(TrainConfig()) is PRECISIONS["float32"]


def test_lack_of_memory_is_explained_and_other_errors_pass() -> None:
    message = "^out of memory Less memory is needed with a smaller --tokens-per-micro-batch"
    with pytest.raises(RunError, match=message), explained_lack_of_memory():
        raise torch.OutOfMemoryError("out of memory\nfurther lines")
    with pytest.raises(KeyError), explained_lack_of_memory():
        raise KeyError
