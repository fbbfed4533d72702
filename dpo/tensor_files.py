"""Named tensors on disk: safetensors files with the usual permissions and the usual errors.

Written and read a tensor at a time, so that no more than one is on the host. A file may hold pieces
of tensors, which says its metadata; several files make whole ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from dpo.files import Entry, write_hashed
from dpo.ranks import Place

_DTYPES: Final = {  # in the order of the file, in which the data of each is aligned
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER: Final = [*_DTYPES]
_BY_NAME: Final = {name: dtype for dtype, name in _DTYPES.items()}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place] | None = None
) -> Entry:
    """Write named tensors as safetensors; a tensor under a second name is stored as that name only.

    Args:
        path: of the file, which is replaced.
        tensors: on any device.
        places: of those that are pieces of a tensor.

    Returns:
        The file's entry in a manifest.

    Raises:
        OSError: the file could not be written.
    """
    first_names: dict[object, str] = {}
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = first_names.setdefault(_identity(tensor) or name, name)
        if first == name:
            stored[name] = tensor.detach()
        else:
            shared[name] = first
    metadata = {"format": "pt"} | ({"shared": json.dumps(shared)} if shared else {})
    if places:
        described = {name: [place.starts, place.shape] for name, place in places.items()}
        metadata["pieces"] = json.dumps(described)
    ordered = sorted(stored, key=lambda name: (_ORDER.index(stored[name].dtype), name))
    return write_hashed(path, _content({name: stored[name] for name in ordered}, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that ``write_tensors`` wrote, those of one memory sharing it again.

    Raises:
        SafetensorError: it is no such file, or a cut one.
        LookupError: a tensor shares the memory of one that is not there.
        OSError: it could not be read.
    """
    pieces, shared = _read_header(path)
    tensors = {name: piece.read() for name, piece in pieces.items()}
    return tensors | {name: tensors[first] for name, first in shared.items()}


class StoredTensors(Mapping[str, Tensor]):
    """Named tensors of files, each of which is read when it is asked for, into memory of its own.

    Raises:
        SafetensorError: one is no such file, or a cut one.
        ValueError: the pieces of a tensor do not make a whole one.
        LookupError: a tensor shares the memory of one that is not there.
        OSError: a file could not be read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_StoredPiece]] = {}
        shared: dict[str, str] = {}
        for path in paths:
            pieces, of_file = _read_header(path)
            shared |= of_file
            for name, piece in pieces.items():
                self._pieces.setdefault(name, []).append(piece)
        self._pieces |= {name: self._pieces[first] for name, first in shared.items()}
        for name, found in self._pieces.items():
            shapes = {piece.place.shape for piece in found}
            if shapes != {(shape := found[0].place.shape)} or math.prod(shape) != sum(
                math.prod(piece.sizes) for piece in found
            ):
                raise ValueError(f"{found[0].path}: the pieces of {name} make no tensor")

    def __getitem__(self, name: str) -> Tensor:
        """Read a whole tensor."""
        shape = self._pieces[name][0].place.shape
        return self.region(name, Place((0,) * len(shape), shape), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def region(self, name: str, place: Place, sizes: Sequence[int]) -> Tensor:
        """Read a part of a tensor, from ``place.starts`` on, and little else.

        Raises:
            ValueError: the tensor is not of ``place.shape``.
        """
        pieces = self._pieces[name]
        if pieces[0].place.shape != place.shape:
            found = pieces[0].place.shape
            raise ValueError(f"{name} is of shape {found}, expected {place.shape}")
        region = torch.empty(tuple(sizes), dtype=pieces[0].dtype)
        for piece in pieces:
            ends = [min(pair) for pair in zip(piece.ends, _ends(place.starts, sizes), strict=True)]
            starts = [max(pair) for pair in zip(piece.place.starts, place.starts, strict=True)]
            if any(start >= end for start, end in zip(starts, ends, strict=True)):
                continue
            found_there = piece.read(starts[0], ends[0]) if starts else piece.read()
            origin = (*starts[:1], *piece.place.starts[1:])
            source = found_there[_slices(starts, ends, origin)]
            if source.shape == region.shape:
                return source
            region[_slices(starts, ends, place.starts)].copy_(source)
        return region


@dataclass(frozen=True)
class _StoredPiece:
    """A piece of a tensor in a file, from the byte ``offset`` on."""

    path: Path
    offset: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    place: Place

    @property
    def ends(self) -> tuple[int, ...]:
        return _ends(self.place.starts, self.sizes)

    def read(self, start: int | None = None, end: int | None = None) -> Tensor:
        """Read the rows of the tensor from ``start`` to ``end``; all of the piece if not given."""
        sizes, offset = self.sizes, self.offset
        if start is not None and end is not None:
            of_row = math.prod(sizes[1:]) * self.dtype.itemsize
            sizes, offset = (
                (end - start, *sizes[1:]),
                offset + (start - self.place.starts[0]) * of_row,
            )
        tensor = torch.empty(sizes, dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(offset)
            if file.readinto(_bytes_of(tensor)) != tensor.nbytes:
                raise OSError(f"{self.path}: cut off while it was read")
        return tensor


def _read_header(path: Path) -> tuple[dict[str, _StoredPiece], dict[str, str]]:
    """Return what a file holds by name, and names that share the memory of another."""
    with safe_open(path, "pt"):  # which refuses sizes and offsets that do not fit the file
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    places = json.loads(metadata.get("pieces", "{}"))
    pieces = {}
    for name, entry in header.items():
        sizes = tuple(entry["shape"])
        starts, shape = places.get(name, ((0,) * len(sizes), sizes))
        place = Place(tuple(map(int, starts)), tuple(map(int, shape)))
        offset = 8 + size + entry["data_offsets"][0]
        piece = _StoredPiece(path, offset, _BY_NAME[entry["dtype"]], sizes, place)
        if any(
            s < 0 or e > n for s, e, n in zip(place.starts, piece.ends, place.shape, strict=True)
        ):
            raise ValueError(f"{path}: the piece of {name} lies outside of it")
        pieces[name] = piece
    return pieces, json.loads(metadata.get("shared", "{}"))


def _content(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, a tensor at a time."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield _bytes_of(tensor.cpu().contiguous())


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _ends(starts: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(start + size for start, size in zip(starts, sizes, strict=True))


def _slices(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """Return the indices from ``starts`` to ``ends`` of a tensor that begins at ``origin``."""
    return tuple(
        slice(start - zero, end - zero)
        for start, end, zero in zip(starts, ends, origin, strict=True)
    )


def _identity(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what equals only for tensors over the very same memory; None for empty tensors."""
    if tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
