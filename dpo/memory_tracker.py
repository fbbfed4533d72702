"""Bytes that a piece of work holds at its peak, by what they are for, on tensors without memory.

Works under torch's ``FakeTensorMode``, where an operation gives a tensor of the right shape and no
numbers. What the numbers would decide is answered here: see ``_ANSWERS``. Of a tensor that is
divided over ranks what counts is this rank's part.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

WEIGHTS: Final = "weights"
GRADIENTS: Final = "gradients"
OPTIMIZER: Final = "optimizer states"
REFERENCE: Final = "live reference"
ACTIVATIONS: Final = "activations"
TOGETHER: Final = "put together"  # of the parts of weights that ranks hold
COPIES: Final = "autocast copies"
HEAD: Final = "head"
TEMPORARY: Final = "temporary"
KINDS: Final = (
    WEIGHTS, GRADIENTS, OPTIMIZER, REFERENCE, TOGETHER, ACTIVATIONS, COPIES, HEAD, TEMPORARY,
)  # fmt: skip

Bytes = Mapping[str, float]
"""From kinds to bytes."""
Peaks = Mapping[str, Bytes]
"""From phases to what is held at the moment of the phase's peak."""

_aten = torch.ops.aten


@dataclass
class _Storage:
    """Memory that a tensor has; ``values`` are its numbers where those are known."""

    kind: str
    nbytes: int
    reference: weakref.ref[torch.UntypedStorage]
    values: Sequence[int] | None = None


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and keeps the peak of each phase.

    Attributes:
        phase: the name under which a peak is kept; set it as the work goes on.
        kind: what a tensor made at this moment is for.
        peaks: by phase; empty it to forget what was.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.kind = "start", TEMPORARY
        self.peaks: dict[str, dict[str, float]] = {}
        self._held: Counter[str] = Counter()
        self._storages: dict[int, _Storage] = {}
        self._weight_shapes: set[torch.Size] = set()
        self._usual_resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        """Begin to count, also what is resized in place, as no operation is seen to do."""

        def resize(storage: Any, size: int) -> None:
            self._usual_resize(storage, size)
            self._note_size(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *reason: Any) -> None:
        """Count no more."""
        torch.UntypedStorage.resize_ = self._usual_resize  # type: ignore[method-assign]
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def enter(self, phase: str, kind: str = TEMPORARY) -> None:
        """Begin a phase, in which tensors are made for ``kind``."""
        self.phase, self.kind = phase, kind
        self._note_peak()

    def watch_weights(self, module: nn.Module) -> None:
        """Count parameters and buffers as weights, and what autograd gives them as gradients."""
        for weight in (*module.parameters(), *module.buffers()):
            self.label(weight, WEIGHTS)
            self._weight_shapes.add(weight.shape)
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._label_gradient)

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is for."""
        storage = self._see(tensor)
        self._held[storage.kind] -= storage.nbytes
        storage.kind = kind
        self._held[kind] += storage.nbytes

    def know(self, tensor: Tensor, values: Sequence[int]) -> None:
        """Say what a tensor that begins its storage holds."""
        self._see(tensor).values = values

    def value(self, tensor: Tensor) -> int | None:
        """Return the number in a tensor of one, if it is known."""
        values = self._see(tensor).values
        return None if values is None else values[int(tensor.storage_offset())]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it made."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # it comes again, with the part that is held here
        if func in _ANSWERS:
            return _ANSWERS[func](self, *args, **(kwargs or {}))
        if self._adds_gradients_of_a_weight(func, args):
            return args[0].add_(args[1])
        result = func(*args, **(kwargs or {}))
        kind = COPIES if self._casts_a_weight(func, args) else self.kind
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, kind)
        if filled := _PUTS_TOGETHER.get(func._schema.name):
            for leaf in tree_leaves(filled(args, kwargs)):
                self.label(leaf, TOGETHER)
        return result

    def _see(self, tensor: Tensor, kind: str | None = None) -> _Storage:
        """Return what is known of the tensor's memory, which may be new."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._storages[key] = _Storage(kind or self.kind, storage.nbytes(), reference)
            self._held[kind or self.kind] += storage.nbytes()
            self._note_peak()
        return self._storages[key]

    def _forget(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._held[storage.kind] -= storage.nbytes

    def _note_size(self, storage: torch.UntypedStorage) -> None:
        if known := self._storages.get(storage._cdata):
            self._held[known.kind] += storage.nbytes() - known.nbytes
            known.nbytes = storage.nbytes()
            self._note_peak()

    def _note_peak(self) -> None:
        if self._held.total() > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self._held)

    def _label_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.label(weight.grad, GRADIENTS)

    def _casts_a_weight(self, func: Any, args: tuple[Any, ...]) -> bool:
        return func is _aten._to_copy.default and self._see(args[0]).kind in (WEIGHTS, TOGETHER)

    def _adds_gradients_of_a_weight(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Is this autograd adding what two uses of one weight give?

        It adds in place, which it does not dare where a dispatch mode looks on.
        """
        return (
            func is _aten.add.Tensor
            and self.kind == TEMPORARY
            and isinstance(args[1], Tensor)
            and args[0].shape == args[1].shape
            and args[0].shape in self._weight_shapes
        )


def _one(tracker: MemoryTracker, tensor: Tensor) -> bool | int | float:
    """Answer that a number is one: a sum is above zero, what should be true is true."""
    if (known := tracker.value(tensor)) is not None:
        return known
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _even_counts(
    tracker: MemoryTracker, numbers: Tensor, weights: None = None, minlength: int = 0
) -> Tensor:
    """Answer that all numbers are equally frequent: tokens spread evenly over experts."""
    counts = numbers.new_empty(minlength)
    whole, rest = divmod(numbers.numel(), minlength)
    tracker.know(counts, [whole + (number < rest) for number in range(minlength)])
    return counts


def _all_different(
    tracker: MemoryTracker, numbers: Tensor, *_: bool, **__: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer that no number follows its like: the numbers, nothing, and that each is there once."""
    return numbers, numbers.new_empty(0), torch.ones_like(numbers)


_ANSWERS: Final[dict[Any, Callable[..., Any]]] = {
    _aten._local_scalar_dense.default: _one,
    _aten.bincount.default: _even_counts,
    _aten.unique_consecutive.default: _all_different,
}
# What operations are given to be filled with weights of which ranks hold parts.
_PUTS_TOGETHER: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "c10d::_allgather_base_": lambda args, _: args[0],
    "fsdp::split_with_sizes_copy": lambda _, kwargs: kwargs["out"],
}
