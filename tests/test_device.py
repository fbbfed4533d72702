from collections.abc import Iterator

import pytest
import torch

from dpo.device import choose_device, explained_lack_of_memory
from dpo.errors import InputError, RunError
from dpo.train_config import TrainConfig


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def test_lack_of_memory_is_explained_and_other_errors_pass() -> None:
    message = "^out of memory Less memory is needed with a smaller --tokens-per-micro-batch"
    with pytest.raises(RunError, match=message), explained_lack_of_memory():
        raise torch.OutOfMemoryError("out of memory\nfurther lines")
    with pytest.raises(KeyError), explained_lack_of_memory():
        raise KeyError
