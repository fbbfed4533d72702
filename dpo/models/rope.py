"""Rotary position embeddings: what ``config.json`` says of them, and the rotation itself.

Su et al. 2021, "RoFormer", arXiv 2104.09864.

Shapes: N tokens, H heads, E size of a head, R numbers of a head that are rotated.

To add a kind of scaling: a function in ``_FIELDS`` from its entries to the fields of ``Rope`` that
it needs, and its frequencies in ``_SCALINGS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dpo.errors import InputError
from dpo.models.entries import Entries


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and, for long contexts, how frequencies are scaled.

    Attributes:
        theta: base of the geometric series of frequencies.
        size: R, the first numbers of a head, which are rotated; even.
        kind: "default", "linear", "llama3", "yarn" or "longrope".
        factor: context extension factor of "linear", "llama3" and "yarn".
        low_frequency_factor: waves with fewer turns than this over the original context are scaled
            by the factor ("llama3", "yarn").
        high_frequency_factor: waves with more turns than this are left alone.
        original_context: tokens the model was first trained with ("llama3", "yarn", "longrope").
        rounds_bounds: "yarn" only; blends between whole frequencies.
        short_factors: "longrope" only; R/2 divisors of the frequencies, of texts that fit the
            original context.
        magnitude: factor on the rotated numbers.
        pairs_neighbours: a number is rotated with the one beside it, not with the one R/2 away.
    """

    theta: float
    size: int
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    rounds_bounds: bool = True
    short_factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    pairs_neighbours: bool = False


@dataclass(frozen=True)
class Rotation:
    """The rotary angles of N tokens.

    Attributes:
        cosines: (N, 1, R) float32, those of a pair twice: R/2 apart or side by side.
        sines: (N, 1, R) float32.
        pairs_neighbours: as of the ``Rope``.
    """

    cosines: Tensor
    sines: Tensor
    pairs_neighbours: bool = False

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate the first R numbers of (N, H, E) queries or keys by their positions."""
        size = self.cosines.shape[-1]
        if size < heads.shape[-1]:
            turned = self.rotate(heads[..., :size])
            return torch.cat([turned, heads[..., size:].to(turned.dtype)], dim=-1)
        if torch.compiler.is_compiling():  # which makes the backward pass by itself
            return _rotated(heads, self.cosines, self.sines, self.pairs_neighbours)
        rotated: Tensor = _Rotate.apply(  # type: ignore[no-untyped-call]
            heads, self.cosines, self.sines, self.pairs_neighbours
        )
        return rotated


class _Rotate(torch.autograd.Function):
    """Each pair (x, y) to (x cos - y sin, y cos + x sin); back by the negated angle."""

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor, pairs_neighbours: bool
    ) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.pairs_neighbours, ctx.dtype = pairs_neighbours, heads.dtype
        return _rotated(heads, cosines, sines, pairs_neighbours)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        back = _rotated(grads[0], cosines, -sines, ctx.pairs_neighbours)
        return back.to(ctx.dtype), None, None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor, pairs_neighbours: bool) -> Tensor:
    rotated = heads * cosines  # (N, H, R)
    if pairs_neighbours:
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        half = heads.shape[-1] // 2
        first, second = slice(half), slice(half, None)
    rotated[..., first].addcmul_(heads[..., second], sines[..., first], value=-1)
    rotated[..., second].addcmul_(heads[..., first], sines[..., second])
    return rotated


def rotation(positions: Tensor, rope: Rope) -> Rotation:
    """Compute the angles of tokens at (N,) int64 ``positions``."""
    angles = positions[:, None].float() * frequencies(rope, positions.device)  # (N, R/2)
    if rope.pairs_neighbours:
        angles = angles.repeat_interleave(2, dim=1)[:, None]  # (N, 1, R)
    else:
        angles = torch.cat([angles, angles], dim=1)[:, None]
    cosines, sines = angles.cos(), angles.sin()
    if rope.magnitude != 1.0:
        cosines, sines = cosines * rope.magnitude, sines * rope.magnitude
    return Rotation(cosines, sines, rope.pairs_neighbours)


def frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """(R/2,) float32 rotary frequencies in radians per token."""
    exponents = torch.arange(0, rope.size, 2, dtype=torch.float32, device=device) / rope.size
    return _SCALINGS[rope.kind](1.0 / rope.theta**exponents, rope)


def _stretched(base: Tensor, rope: Rope) -> Tensor:
    """Stretch positions: Chen et al. 2023, arXiv 2306.15595."""
    return base / rope.factor


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    """Stretch long waves only and blend in between by the turns over the context (Llama 3.1)."""
    turns = rope.original_context * base / (2 * math.pi)
    span = rope.high_frequency_factor - rope.low_frequency_factor
    kept = ((turns - rope.low_frequency_factor) / span).clamp(0, 1)
    return kept * base + (1 - kept) * base / rope.factor


def _yarn(base: Tensor, rope: Rope) -> Tensor:
    """Stretch long waves only and blend in between by their number: arXiv 2309.00071, section 3.2.

    Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models".
    """

    def number(turns: float) -> float:
        """Return which frequency has so many turns over the original context."""
        base_of_log = 2 * math.log(rope.theta)
        return rope.size * math.log(rope.original_context / (turns * 2 * math.pi)) / base_of_log

    first, last = number(rope.high_frequency_factor), number(rope.low_frequency_factor)
    if rope.rounds_bounds:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.size - 1)
    numbers = torch.arange(len(base), dtype=torch.float32, device=base.device)
    scaled = ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
    return scaled * base / rope.factor + (1 - scaled) * base


def _longrope(base: Tensor, rope: Rope) -> Tensor:
    """Divide each frequency by its own factor: Ding et al. 2024, arXiv 2402.13753."""
    return base / torch.tensor(rope.short_factors, dtype=torch.float32, device=base.device)


_SCALINGS: Final[dict[str, Callable[[Tensor, Rope], Tensor]]] = {
    "default": lambda base, _: base,
    "linear": _stretched,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def parse_rope(
    entries: Entries,
    head_size: int,
    *,
    scaling: Entries | None = None,
    theta: str = "rope_theta",
    pairs_neighbours: bool = False,
) -> Rope:
    """Read a rotary embedding.

    Args:
        entries: the whole file.
        head_size: E.
        scaling: the object that describes it; None for ``rope_parameters`` (transformers 5), else
            ``rope_scaling``.
        theta: the entry with the base, where the object has none.
        pairs_neighbours: as of ``Rope``.

    Raises:
        InputError: an entry is missing, of a wrong type or not supported.
    """
    scaling = scaling or entries.within("rope_parameters") or entries.within("rope_scaling")
    context = entries.get("original_max_position_embeddings")
    scaling = Entries(
        scaling.config if scaling else {},
        entries.where,
        defaults={
            "max_position_embeddings": entries.get("max_position_embeddings"),
            "original_max_position_embeddings": context or entries.get("max_position_embeddings"),
            "partial_rotary_factor": entries.get("partial_rotary_factor"),
            "rope_theta": entries.get(theta),
        },
    )
    kinds = [scaling.get("rope_type"), scaling.get("type"), "default"]
    kind = next(kind for kind in kinds if kind is not None)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise InputError(
            f"{entries.where}: rope type {kind!r} is not supported; "
            f"supported are {', '.join(_FIELDS)}"
        )
    if missing := [key for key in _NEEDED.get(kind, ()) if scaling.get(key) is None]:
        raise InputError(f"{entries.where}: rope type {kind!r} needs {missing[0]!r}")
    rope = Rope(
        theta=scaling.positive("rope_theta", 10000.0),
        size=int(head_size * scaling.positive("partial_rotary_factor", 1.0)),
        kind=kind,
        pairs_neighbours=pairs_neighbours,
        **_FIELDS[kind](scaling),
    )
    _check_sizes(rope, head_size, entries.where)
    return rope


def _check_sizes(rope: Rope, head_size: int, where: str) -> None:
    if rope.size % 2 or not 0 < rope.size <= head_size:
        raise InputError(
            f"{where}: partial_rotary_factor rotates {rope.size} of the {head_size} numbers of a "
            "head; expected an even number of them"
        )
    if rope.kind == "longrope" and len(rope.short_factors) != rope.size // 2:
        raise InputError(
            f"{where}: short_factor has {len(rope.short_factors)} numbers, expected "
            f"{rope.size // 2}"
        )


Fields = dict[str, Any]


def _llama3_fields(scaling: Entries) -> Fields:
    return {
        "factor": scaling.positive("factor"),
        "low_frequency_factor": scaling.positive("low_freq_factor"),
        "high_frequency_factor": scaling.positive("high_freq_factor"),
        "original_context": scaling.count("original_max_position_embeddings"),
    }


def _yarn_fields(scaling: Entries) -> Fields:
    factor = scaling.positive("factor")
    return {
        "factor": factor,
        "low_frequency_factor": scaling.positive("beta_slow", 1.0),
        "high_frequency_factor": scaling.positive("beta_fast", 32.0),
        "original_context": scaling.count("original_max_position_embeddings"),
        "rounds_bounds": scaling.get("truncate") is not False,
        "magnitude": scaling.positive("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0),
    }


def _longrope_fields(scaling: Entries) -> Fields:
    factors = scaling.get("short_factor")
    if not isinstance(factors, list) or not all(isinstance(each, int | float) for each in factors):
        raise scaling.fault("short_factor", f"must be a list of numbers, got {factors!r}")
    context = scaling.count("original_max_position_embeddings")
    factor = scaling.positive("factor", scaling.count("max_position_embeddings") / context)
    magnitude = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(context))
    return {
        "original_context": context,
        "short_factors": tuple(factors),
        "magnitude": scaling.positive("attention_factor", magnitude),
    }


_FIELDS: Final[dict[str, Callable[[Entries], Fields]]] = {  # of a Rope, from its entries
    "default": lambda _: {},
    "linear": lambda scaling: {"factor": scaling.positive("factor")},
    "llama3": _llama3_fields,
    "yarn": _yarn_fields,
    "longrope": _longrope_fields,
}
_NEEDED: Final = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor",),
}
