"""What the engine knows of other processes that train the same model.

A process that is alone has a ``Ranks`` too, whose methods do nothing: what is written for several
ranks is right for one. All ranks call the same methods in the same order. Needs no torch.

Shapes: n rows of a rank, any number of them, also none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a piece of a tensor lies in it: from ``starts`` on, in a whole of ``shape``."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor.

    Attributes:
        part: these numbers, which share its memory; maybe none.
        place: of the part in the tensor.
        is_divided: whether others hold other parts; else every rank holds all of it.
        copy: which of the ranks that hold the same part this is, from 0.
        copies: how many ranks those are.
    """

    part: Tensor
    place: Place
    is_divided: bool = False
    copy: int = 0
    copies: int = 1


class Ranks:
    """A process that is alone: the first rank, and the last.

    Attributes:
        rank: which part of the pairs this process has, from 0.
        count: of these parts.
        process: which of all processes this is, from 0.
        processes: that there are in all.
    """

    rank = 0
    count = 1
    process = 0
    processes = 1
    in_step = False  # whether all ranks must run the model equally often

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what there is once: files, metrics, messages."""
        return self.rank == 0

    @property
    def is_first_of_pairs(self) -> bool:
        """Whether of the ranks that score the same pairs this is the one that keeps the result."""
        return True

    def any(self, flag: bool) -> bool:
        """Say whether the flag of a rank is set."""
        return self.max(flag) > 0

    def max(self, value: float) -> float:
        """Return the greatest value of all ranks."""
        return value

    def gather(self, part: Tensor | None) -> Tensor | None:
        """Join the (n, ...) tensors of all ranks, in the order of the ranks.

        Args:
            part: float64, float32 or int64; None on a rank that has nothing, where the shape of a
                row is not known. Several ranks get the result on the host.

        Returns:
            The rows of all ranks; None if no rank has a tensor.
        """
        return part

    def extra_passes(self, own: int) -> int:
        """Return how often this rank must run the model beside its ``own`` passes, for nothing.

        All ask before they run it: what puts the model together counts as a call of its own.
        """
        return int(self.max(own)) - own if self.in_step else 0

    def prepare(self, model: nn.Module) -> None:
        """Let ``model``, whose parameters have no numbers yet, hold this rank's parts of them."""

    def divide(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a whole tensor in parts, divided over the ranks as ``like`` is."""
        return value

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the part of a divided tensor that this rank holds, which shares its memory."""
        return tensor

    def piece(self, tensor: Tensor, name: str) -> Piece:
        """Return what this rank holds of a tensor, and where in it that lies.

        Args:
            tensor: a parameter or a state of an optimizer.
            name: of the parameter.
        """
        return Piece(tensor, Place((0,) * tensor.dim(), tuple(tensor.shape)))

    def joint_norm(self, norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of all ``tensors``, (), from the (n,) of what this rank holds of each."""
        norm: Tensor = norms.norm()
        return norm

    def take_apart(self, model: nn.Module) -> None:
        """Let ``model`` have the optimizer's parameters, if it still holds whole ones."""

    def whole(self, tensor: Tensor, name: str) -> Tensor:
        """Return a tensor of which ranks may hold parts whole, on the first rank.

        Args:
            tensor: a parameter or a state of an optimizer.
            name: of the parameter.
        """
        return tensor

    def first(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers that the first rank has."""
        return list(numbers)

    def first_text(self, text: str) -> str:
        """Return the text that the first rank has."""
        return bytes(self.first(list(text.encode()))).decode()

    def texts(self, text: str) -> list[str]:
        """Return the text of each process, in their order."""
        return [text]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradient of each parameter over the ranks, in place.

        One that has no gradient on any rank still has none afterwards.
        """

    def share_weights(self, weights: Iterable[Tensor]) -> None:
        """Give all ranks the weights of the first, in place."""

    def check_same(self, what: str, text: str) -> None:
        """Compare a text with that of the first rank.

        Raises:
            InputError: it is another one.
        """

    def one_before_others(self, work: Callable[[], T]) -> T:
        """Do ``work`` on one rank of each machine, then on the others, which find its caches."""
        return work()

    def wait(self) -> None:
        """Wait until all ranks are here."""
