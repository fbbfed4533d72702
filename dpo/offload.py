"""What the backward pass of a decoder's blocks needs, kept on the host while other blocks compute.

Behind each block's forward pass a copy of what it keeps begins in a stream of its own, and its
memory is let go when the next block is through. In the backward pass what a block needs is fetched
while the block above it is differentiated. The last block keeps its own: it is needed at once.

Shapes: V values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dpo.models import Decoder
from dpo.models.rope import Rotation

SMALLEST: Final = 2**16  # bytes of what is worth a copy


class Lane(Protocol):
    """Copies between a device and the host, beside the device's computing."""

    def follow(self) -> None:
        """Begin no further copy before what the device was told to compute so far is done."""
        ...

    def to_host(self, source: Tensor) -> Tensor:
        """Begin to copy (V,) of the device; return where it will be."""
        ...

    def to_device(self, source: Tensor) -> Tensor:
        """Begin to copy back what ``to_host`` returned; return where it will be."""
        ...

    def mark(self) -> Callable[[], None]:
        """Return what makes the device's computing wait for the copies begun so far."""
        ...


class CudaLane:
    """Copies from and to pinned memory in a stream of their own.

    What is fetched is allocated in that stream, and each copy waits for the computing before it, so
    memory that is let go early is not written to while it is something else. The stream is made
    with the first copy: a model that is only looked at or saved is prepared without a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def follow(self) -> None:
        """Begin no further copy before what the device was told to compute so far is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def to_host(self, source: Tensor) -> Tensor:
        """Begin to copy (V,) of the device; return where it will be."""
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(source, device="cpu", pin_memory=True)
            return host.copy_(source, non_blocking=True)

    def to_device(self, source: Tensor) -> Tensor:
        """Begin to copy back what ``to_host`` returned; return where it will be."""
        with torch.cuda.stream(self._stream):
            return source.to(self._stream.device, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        """Return what makes the device's computing wait for the copies begun so far."""
        event = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._stream.device).wait_event(event)


def offload_activations(model: Decoder, lane: Lane) -> None:
    """Keep on the host what the backward pass of each block but the last needs, in place.

    Gradients are bit-equal. What a block shares with others stays: weights, their copies in 16
    bits, and the angles of the positions.

    Args:
        model: whose blocks are compiled before, if at all.
        lane: does the copies.
    """
    belt = _Belt(lane)
    blocks: list[nn.Module] = [*model.model.layers]
    for block in blocks[:-1]:
        block.forward = partial(belt.run, block, block.forward)
    blocks[-1].forward = partial(belt.run_last, blocks[-1].forward)


@dataclass(eq=False)
class _Memory:
    """The memory behind tensors that a block keeps, (V,): on the device, on the host, or both."""

    device: Tensor | None
    host: Tensor | None = None


@dataclass(frozen=True)
class _Kept:
    """A tensor that was packed, as a view of memory."""

    memory: _Memory
    dtype: torch.dtype
    shape: torch.Size
    stride: Sequence[int]
    offset: int


@dataclass(eq=False)
class _Part:
    """What one forward pass through a block keeps.

    The graph alone holds the memories, and lets each go when it is done with it.

    Attributes:
        below: that of the block before, in the same pass through the model.
        memories: by the identity of their storage.
        arrived: makes the computing wait for the copies that are under way.
    """

    below: _Part | None
    memories: dict[int, weakref.ref[_Memory]] = field(default_factory=dict)
    arrived: Callable[[], None] | None = None

    def living(self) -> list[_Memory]:
        return [memory for each in self.memories.values() if (memory := each()) is not None]


class _Belt:
    """Carries what blocks keep to the host and back."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._newest: _Part | None = None  # whose copies to the host are under way

    def run(
        self,
        block: nn.Module,
        forward: Callable[..., Tensor],
        hidden: Tensor,
        rotation: Rotation | None,
        *rest: Any,
    ) -> Tensor:
        """Run a block and begin to take away what it keeps."""
        part, stays = _Part(self._newest), _Stays.of(block, rotation)
        with saved_tensors_hooks(partial(self._pack, part, stays), partial(self._unpack, part)):
            output = forward(hidden, rotation, *rest)
        self._let_go()
        if memories := part.living():
            self._lane.follow()
            for memory in memories:
                assert memory.device is not None
                memory.host = self._lane.to_host(memory.device)
            part.arrived, self._newest = self._lane.mark(), part
        return output

    def run_last(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run the last block, which keeps what it keeps."""
        output, part = forward(*inputs), self._newest
        self._let_go()
        self._newest = None  # the next pass through the model begins anew
        if part is not None:
            output.register_hook(lambda _: self._fetch(part))
        return output

    def _let_go(self) -> None:
        """Free the device's memory of the block before, when it is copied."""
        part = self._newest
        if part is None or part.arrived is None:
            return
        part.arrived()
        part.arrived = None
        for memory in part.living():
            memory.device = None

    def _pack(self, part: _Part, stays: _Stays, tensor: Tensor) -> Tensor | _Kept:
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or stays.has(tensor):
            return tensor
        known = part.memories.get(storage._cdata)
        memory = None if known is None else known()
        if memory is None:
            size = storage.nbytes() // tensor.element_size()
            memory = _Memory(tensor.as_strided((size,), (1,), 0))
            part.memories[storage._cdata] = weakref.ref(memory)
        offset = int(tensor.storage_offset())
        return _Kept(memory, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def _unpack(self, part: _Part, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(part)
        if part.arrived is not None:
            part.arrived()
            part.arrived = None
            if part.below is not None:
                self._fetch(part.below)
        device = kept.memory.device
        assert device is not None, "it is fetched"
        return device.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.offset)

    def _fetch(self, part: _Part) -> None:
        """Begin to bring back what is not on the device."""
        missing = [memory for memory in part.living() if memory.device is None]
        if not missing:
            return
        self._lane.follow()
        for memory in missing:
            assert memory.host is not None
            memory.device = self._lane.to_device(memory.host)
        part.arrived = self._lane.mark()


@dataclass(frozen=True)
class _Stays:
    """What is not to be taken away.

    Attributes:
        storages: that others use.
        shapes: of weights. What has one of them is taken for a copy of a weight: so is now and
            then an activation, which stays then.
    """

    storages: frozenset[int]
    shapes: frozenset[tuple[int, ...]]

    @classmethod
    def of(cls, block: nn.Module, rotation: Rotation | None) -> _Stays:
        weights = [*block.parameters(), *block.buffers()]
        angles = [] if rotation is None else [rotation.cosines, rotation.sines]
        return cls(
            frozenset(each.untyped_storage()._cdata for each in [*weights, *angles]),
            frozenset(tuple(each.shape) for each in weights),
        )

    def has(self, tensor: Tensor) -> bool:
        shape = tuple(tensor.shape)
        is_weight = len(shape) == 2 and (shape in self.shapes or shape[::-1] in self.shapes)
        return is_weight or tensor.untyped_storage()._cdata in self.storages
