"""What is trained in the place of all weights, and how the rest is held: options, without torch.

The text beside each field is its documentation and its line in ``dpo train --help``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from dpo.errors import InputError

if TYPE_CHECKING:
    from dpo.adapters import Adapter

AdapterKind = Literal["lora", "dora"]
Quantization = Literal["int8", "nf4", "nf4-double"]

_CHOICES = {"kind": AdapterKind, "quantize": Quantization}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Options of the adapter of a run.

    Rank and alpha default to TRL's. A model that is an adapter has its own kind, rank, alpha and
    targets, and is trained on.

    Raises:
        InputError: values are out of range, or an option has no adapter to describe; names all
            faults.
    """

    kind: Annotated[
        AdapterKind | None, "Train low-rank updates of frozen weights; none trains what --model is."
    ] = None
    rank: Annotated[int | None, "Rank of each update, >= 1; 16."] = None
    alpha: Annotated[
        float | None,
        "An update counts alpha / rank times, > 0; with --rslora alpha / rank^0.5; 32.",
    ] = None
    rslora: Annotated[bool, "Let updates of a high rank count more: rank-stabilized LoRA."] = False
    targets: Annotated[
        str | None,
        "Layers with an update: names or ends of names, with commas between, or a regular "
        "expression of whole names; all linear layers but the output unless given.",
    ] = None
    b_rate_ratio: Annotated[
        float | None, "LoRA+: the matrices that start at 0 learn so many times faster, > 0; 1."
    ] = None
    quantize: Annotated[
        Quantization | None,
        "Hold the frozen linear layers of every model in 8 bits, 4.5 or 4.13.",
    ] = None
    base: Annotated[
        str | None, "Base of a model that is an adapter; none: the one that it names."
    ] = None

    def __post_init__(self) -> None:
        if faults := [*self._faults()]:
            raise InputError("\n".join(faults))
        if self.kind is not None and self.rank is None:
            object.__setattr__(self, "rank", 16)
        if self.kind is not None and self.alpha is None:
            object.__setattr__(self, "alpha", 32.0)

    def _faults(self) -> Iterator[str]:
        for name, choice in _CHOICES.items():
            if (value := getattr(self, name)) not in (None, *get_args(choice)):
                yield f"adapter.{name} must be one of {', '.join(get_args(choice))}, got {value!r}"
        if self.rank is not None and self.rank < 1:
            yield f"adapter.rank must be at least 1, got {self.rank}"
        for name in ("alpha", "b_rate_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"adapter.{name} must be above 0 and finite, got {value}"
        for name in ("rank", "alpha", "rslora", "targets"):
            if getattr(self, name) and self.kind is None:
                yield f"adapter.{name} needs adapter.kind: without it no adapter is made"

    def build(self) -> "Adapter":
        """Describe the adapter that ``kind`` asks for; imports torch."""
        from dpo.adapters import Adapter

        assert self.rank is not None
        assert self.alpha is not None
        return Adapter(self.rank, self.alpha, is_rslora=self.rslora, is_dora=self.kind == "dora")

    def identity(self) -> str | None:
        """Tell what a resumed run must have in common with its checkpoint; None if all is default.

        Where the base lies is not part of it: its fingerprint says which it is.
        """
        mathematics = replace(self, base=None)
        return None if mathematics == AdapterConfig() else repr(mathematics)
