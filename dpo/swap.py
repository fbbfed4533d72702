"""Other values in a model's parameters for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def swapped_in(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let each parameter hold the values beside it; when the block ends it has its own, unmoved.

    A part of a parameter that is divided over ranks is copied there and back, for FSDP reads the
    memory that it knows.

    Args:
        values: parameters, and what they are to hold: of the same shape, dtype and device, and
            divided alike.
    """
    swaps, copies = [], []
    for parameter, value in values:
        if (part := getattr(parameter, "_local_tensor", None)) is None:
            swaps.append((parameter, parameter.data, value))
        else:
            copies.append((part.detach(), part.detach().clone(), value.to_local()))  # type: ignore[attr-defined]
    try:
        for parameter, _, value in swaps:
            parameter.data = value
        for part, _, value in copies:
            part.copy_(value)
        yield
    finally:
        for parameter, own, _ in swaps:
            parameter.data = own
        for part, own, _ in copies:
            part.copy_(own)
