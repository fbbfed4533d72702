"""How checkpoints name and arrange the weights, where that is not how the decoder does.

The decoder has one set of names, those of Llama. A ``Layout`` maps them to the names in the files
of an architecture; parameters that get one name are one tensor there.

Shapes: X experts, rows and columns of a matrix as ``nn.Linear`` has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The names and the arrangement of the weights of an architecture.

    Attributes:
        names: ours to theirs, of whole pieces between dots. Parameters that get one name have their
            rows one after another there, in the order of the decoder.
        optional_prefix: what some checkpoints leave out in front of all names.
        interleaves_heads: joined rows stand head by head (of one head's query, key, value, then of
            the next head's) and not matrix by matrix.
        transposes_layers: the matrices of the layers are stored as (columns, rows).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    optional_prefix: str = ""
    interleaves_heads: bool = False
    transposes_layers: bool = False

    def rename(self, name: str) -> str:
        """Return what the checkpoint calls the tensor that has ``name`` in the decoder."""
        if not self.names:
            return name
        longest_first = sorted(self.names, key=len, reverse=True)
        pieces = "|".join(re.escape(ours) for ours in longest_first)
        return re.sub(rf"(?<![^.])({pieces})(?![^.])", lambda found: self.names[found[1]], name)

    def keeps(self, name: str) -> bool:
        """Say whether a checkpoint has the matrix ``name`` by itself, under that name, as it is."""
        return self.rename(name) == name and not self.transposes_layers

    def stored(self, parameters: Mapping[str, Tensor], *, heads: int) -> dict[str, StoredTensor]:
        """List the tensors of a checkpoint.

        Args:
            parameters: of the decoder, each under one name; may be on the meta device.
            heads: query heads of a layer.
        """
        parts: dict[str, list[Part]] = {}
        for name, parameter in parameters.items():
            for part in _parts(name, parameter):
                parts.setdefault(self.rename(part.name), []).append(part)
        return {
            name: StoredTensor(
                name,
                tuple(joined),
                groups=heads if self.interleaves_heads and len(joined) > 1 else 1,
                is_transposed=self.transposes_layers
                and ".layers." in joined[0].parameter
                and parameters[joined[0].parameter].dim() == 2,
            )
            for name, joined in parts.items()
        }


@dataclass(frozen=True)
class Part:
    """A parameter, or the matrix of one expert in a parameter of (X, rows, columns).

    Attributes:
        parameter: its name.
        rows: of the parameter or matrix.
        expert: None for the whole parameter.
        name: of the part, as if it were a parameter of its own.
    """

    parameter: str
    rows: int
    expert: int | None
    name: str

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the part, in the memory of its parameter."""
        parameter = parameters[self.parameter]
        return parameter if self.expert is None else parameter[self.expert]


def _parts(name: str, parameter: Tensor) -> list[Part]:
    if parameter.dim() < 3:
        return [Part(name, parameter.shape[0], None, name)]
    module, matrix = name.rsplit(".", 1)
    return [
        Part(name, parameter.shape[1], expert, f"{module}.{expert}.{matrix}.weight")
        for expert in range(len(parameter))
    ]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its name there and the parts of the decoder that it holds.

    Attributes:
        name: in the file.
        parts: one, or several whose rows are joined.
        groups: rows are joined within each of so many equal groups.
        is_transposed: stored as (columns, rows).
    """

    name: str
    parts: tuple[Part, ...]
    groups: int
    is_transposed: bool

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor as it is stored; in the memory of its parameter, if it is the same."""
        tensors = [part.of(parameters) for part in self.parts]
        if len(tensors) > 1:
            grouped = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
            tensors = [torch.cat(grouped, dim=1).flatten(0, 1)]
        return tensors[0].T if self.is_transposed else tensors[0]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Undo ``join``: return the tensors of the parts."""
        if self.is_transposed:
            tensor = tensor.T
        if len(self.parts) > 1:
            rows = [part.rows // self.groups for part in self.parts]
            grouped = tensor.unflatten(0, (self.groups, -1)).split(rows, dim=1)
            return [piece.flatten(0, 1).contiguous() for piece in grouped]
        return [tensor.contiguous()]
