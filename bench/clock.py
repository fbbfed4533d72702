"""Times of work on a processor, its best rate of matrix products, and its name."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Final

import torch

from dpo.bench.machine import cpu_model
from dpo.precision import Precision

PRODUCT_SIZES: Final = (1024, 2048, 4096, 8192)  # of the square products whose best rate counts
PRODUCT_SECONDS: Final = 0.25  # a size whose product takes longer is the last that is tried


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Do ``work`` so many times, one after the other, and return the seconds of each.

    On a GPU they lie between CUDA events, for which the host does not wait: it hands out the next
    work while the last is done, as in training.
    """
    synchronize(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(times):
            work()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(events)]


def matrix_rate(
    precision: Precision, device: torch.device, sizes: Sequence[int] | None = None
) -> float:
    """Return the best rate of square matrix products in these numerics, in operations per second.

    The median of five of each size, so that one lucky or disturbed product does not count.

    Args:
        precision: gives the dtype.
        device: where.
        sizes: of the matrices; ``PRODUCT_SIZES`` if None.
    """
    dtype = precision.autocast or precision.parameters
    best = 0.0
    for size in sizes or PRODUCT_SIZES:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        _, *seconds = seconds_of(partial(torch.mm, left, right), 6, device)  # the first warms up
        median = statistics.median(seconds)
        best = max(best, 2 * size**3 / median)
        if median > PRODUCT_SECONDS:
            break
    return best


def device_name(device: torch.device) -> str:
    """Return what the processor calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
