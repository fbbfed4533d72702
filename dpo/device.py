"""Where a run computes, and what it says when the memory there is full."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dpo.errors import InputError, RunError
from dpo.launch import Launch
from dpo.precision import PRECISIONS
from dpo.train_config import TrainConfig


def choose_device(config: TrainConfig) -> torch.device:
    """Set the CPU threads and the float32 products of this process; return a run's device.

    Of several processes on a machine each takes the GPU of its number there.

    Raises:
        InputError: the device is not there, or it cannot do the dtype.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise InputError("train.device is cuda, but torch sees no GPU; give cpu or auto")
    device = _own_gpu() if has_gpu and config.device != "cpu" else torch.device("cpu")
    if PRECISIONS[config.dtype].scales_loss and device.type == "cpu":
        raise InputError(f"train.dtype = {config.dtype} needs a GPU; on a CPU take bf16-mixed")
    if config.offload_activations and device.type == "cpu":
        raise InputError("train.offload_activations needs a GPU: on a CPU they are on the host")
    if config.tf32 and not _has_tf32(device):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise InputError(f"train.tf32 needs a GPU of compute capability >= 8.0, found {found}")
    # Not torch.backends.cuda.matmul.fp32_precision: torch 2.13 then refuses to be asked by the
    # older names, which its compiler still does.
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    return device


def describe_device(device: torch.device, *, count: int = 1) -> str:
    """Say what a device is, without naming the machine.

    Args:
        device: one of ``count`` that train together.
        count: processes, each with a device of its own.
    """
    name = f"a CPU ({platform.machine()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return name if count == 1 else f"{name}, {count} processes"


def _own_gpu() -> torch.device:
    """Return the GPU of this process, and make it the one that torch takes for "cuda"."""
    launch = Launch.of_environment()
    if launch.count == 1:
        return torch.device("cuda")
    if launch.local_count > torch.cuda.device_count():
        raise InputError(
            f"{launch.local_count} processes were started on this machine, but torch sees "
            f"{torch.cuda.device_count()} GPUs: give torchrun --nproc-per-node that many"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be had: free ones of a GPU, or those the host can free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(min(_available_on_host(), _available_in_container()))


def _available_on_host() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _available_in_container() -> float:
    """Return what a container's limit leaves; infinity without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) - used


def is_lack_of_memory(error: BaseException) -> bool:
    """Say whether ``error`` is an allocator's that found no memory, on a GPU or on a CPU."""
    of_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return of_cpu or isinstance(error, torch.OutOfMemoryError)


@contextmanager
def explained_lack_of_memory() -> Iterator[None]:
    """Say what helps when the device's memory is full.

    Raises:
        RunError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        raise RunError(
            f"{str(error).splitlines()[0]} Less memory is needed with a smaller "
            "--tokens-per-micro-batch or --micro-batch-size, a smaller --max-length, or "
            "--recompute layer"
        ) from error
