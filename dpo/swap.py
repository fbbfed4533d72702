"""Other values in a model's parameters for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def swapped_in(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let each parameter hold the values beside it; when the block ends it has its own, unmoved.

    Args:
        values: parameters, and what they are to hold: of the same shape, dtype and device.
    """
    swaps = [(parameter, parameter.data, value) for parameter, value in values]
    try:
        for parameter, _, value in swaps:
            parameter.data = value
        yield
    finally:
        for parameter, own, _ in swaps:
            parameter.data = own
