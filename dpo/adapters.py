"""Low-rank adapters: small trained updates of frozen linear layers.

They are put into a model, which is then trained like any other; the trainer knows nothing of them.

Shapes: I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.models import Decoder
from dpo.models.linear import Linear
from dpo.policy import LowRank, OutputHead, Policy
from dpo.quantization import QuantizedLinear, head_weight, holds, inner_linears, is_linear

_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What the updates of all adapted layers have in common.

    Attributes:
        rank: R, at least 1.
        alpha: strength of an update, above 0.
        is_rslora: an update counts alpha / sqrt(R), not alpha / R times: Kalajdzievski 2023 (arXiv
            2312.03732), theorem 3.2.
        is_dora: the length of each row of a weight is trained apart from its direction.
    """

    rank: int = 16
    alpha: float = 32.0
    is_rslora: bool = False
    is_dora: bool = False

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rslora else self.rank)


class AdaptedLinear(nn.Module):
    """A frozen linear layer whose weight W counts as ``W + s B A``, with trained factors.

    Hu et al. 2021 (arXiv 2106.09685), equation 3: A is ``down`` (R, I), B is ``up`` (O, R) and zero
    at first. With DoRA (Liu et al. 2024, arXiv 2402.09353), equation 5, the weight is
    ``m * (W + s B A) / |W + s B A|``, where m is ``magnitude`` (O,), the lengths of the rows of W
    at first; the divisor has no gradient (section 4.3). What is trained is float32 at least,
    whatever the dtype of W: the steps of an adapter are as small as those of a weight.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, adapter: Adapter) -> None:
        """Wrap ``base``; the factors are those of no update, with A still to be drawn."""
        super().__init__()
        self.base, self.adapter = base, adapter
        like = base.weight if isinstance(base, nn.Linear) else base.scales
        dtype = torch.promote_types(like.dtype, torch.float32)
        # not like.new_zeros: W may be divided over ranks, which hold the factors whole
        zeros = partial(torch.zeros, dtype=dtype, device=like.device)
        self.down = nn.Parameter(zeros(adapter.rank, base.in_features))
        self.up = nn.Parameter(zeros(base.out_features, adapter.rank))
        self.magnitude: nn.Parameter | None = None
        if adapter.is_dora:
            self.magnitude = nn.Parameter(_lengths(base.weight.detach(), dtype))

    @property
    def weight(self) -> Tensor:
        """W, (O, I)."""
        return self.base.weight

    @property
    def update(self) -> LowRank:
        """The update s B A in its factors."""
        part = getattr(self.base, "part", None)  # of a base that is divided over ranks
        if part is None:
            return LowRank(self.down, self.up, self.adapter.scale)
        rows, columns = part
        return LowRank(self.down[:, columns], self.up[rows], self.adapter.scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        output: Tensor = self.base(hidden)
        update = self.update(hidden)
        if self.magnitude is None:
            return output + update
        ratio = self.magnitude / self._sum_lengths()  # (O,)
        product = output if self.base.bias is None else output - self.base.bias
        scaled = ratio.to(product.dtype) * (product + update)
        return output + (scaled - product)  # so that no update leaves the output bit for bit

    def merged_weight(self) -> Tensor:
        """Return the (O, I) weight of the plain layer that equals this one, differentiably."""
        if self.magnitude is None:
            return self._sum()
        return (self.magnitude / self._sum_lengths())[:, None] * self._sum()

    @torch.no_grad()
    def _sum_lengths(self) -> Tensor:
        return _lengths(self._sum(), self.up.dtype)

    def _sum(self) -> Tensor:
        """Return W + s B A, (O, I)."""
        total: Tensor = self.weight.to(self.up.dtype) + self.adapter.scale * self.up @ self.down
        return total


def add_adapter(
    model: nn.Module, adapter: Adapter, *, targets: str | None = None, seed: int = 0
) -> None:
    """Freeze ``model`` and give layers of it an update that is trained, in place.

    The updates are zero at first, so the model computes what it did before. A is drawn as PEFT
    draws it, uniform within 1 / sqrt(I).

    Args:
        model: the output projection of a ``Policy`` may be adapted too.
        adapter: rank and form of the updates.
        targets: which linear layers, as ``find_targets`` reads it.
        seed: of the draws, which are the same on every device.

    Raises:
        InputError: no layer is meant, or the model has an adapter already.
    """
    layers = adapt(model, find_targets(model, targets), adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            bound = layer.base.in_features**-0.5
            drawn = torch.empty(layer.down.shape).uniform_(-bound, bound, generator=generator)
            layer.down.copy_(drawn)


def find_targets(model: nn.Module, targets: str | None) -> list[str]:
    """Find the linear layers that ``targets`` means, by PEFT's rules.

    Args:
        model: what is searched.
        targets: names or ends of names (``q_proj``, ``self_attn.q_proj``) with commas between, or
            a regular expression that whole names match; None for all but the output projection.

    Raises:
        InputError: it is no regular expression, or one of the names or all of it matches nothing.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    if targets is None:
        return _some(list(inner_linears(model)), linears, "")
    if not _NAMES.fullmatch(targets):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(
                f"adapter.targets: {targets!r} is neither names nor a regular expression: {error}"
            ) from error
        return _some([name for name in linears if pattern.fullmatch(name)], linears, targets)
    ends = [end.strip() for end in targets.split(",")]
    for end in ends:
        _some(matching(linears, [end]), linears, end)
    return matching(linears, ends)


def matching(names: Iterable[str], ends: Iterable[str]) -> list[str]:
    """Return the ``names`` that are one of ``ends`` or end so behind a dot."""
    suffixes = tuple(f".{end}" for end in ends)
    return [name for name in names if f".{name}".endswith(suffixes)]


def _some(found: list[str], linears: Iterable[str], wanted: str) -> list[str]:
    if not found:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise InputError(
            f"adapter.targets: no linear layer matches {wanted!r}; there are "
            f"{', '.join(known) or 'none'}"
        )
    return found


def adapt(model: nn.Module, names: Iterable[str], adapter: Adapter) -> dict[str, AdaptedLinear]:
    """Freeze ``model`` and wrap the linear layers of these names, in place; return them by name.

    Raises:
        InputError: the model has an adapter already.
    """
    if adapted_layers(model):
        raise InputError("the model has an adapter already: merge it before another is added")
    head = head_weight(model)
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert is_linear(base)
        layer = AdaptedLinear(base, adapter)
        model.set_submodule(name, layer)
        if holds(base, head) and isinstance(model, Policy):
            # by its dictionary: nn.Module declares only tensors and modules as attributes
            vars(model)["output_head"] = partial(_adapted_head, model.output_head, layer)
    return adapted_layers(model)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers of ``model`` by name; none if it has no adapter."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, AdaptedLinear)}


def rate_scales(model: nn.Module, b_rate_ratio: float) -> Mapping[str, float]:
    """Return the factors on the learning rate by parameter name, of those whose factor is not 1.

    Args:
        model: with an adapter.
        b_rate_ratio: how many times faster B learns than A: Hayou et al. 2024 (LoRA+, arXiv
            2402.12354), lambda of section 4.
    """
    return {f"{name}.up": b_rate_ratio for name in adapted_layers(model) if b_rate_ratio != 1}


@torch.no_grad()
def merge_adapter(model: Decoder) -> None:
    """Make every layer a plain linear one with the weight that it stands for, in place.

    Quantized layers too: their weights are those that they compute with. An output projection that
    was tied to the embedding and has an update is one of its own then.
    """
    for name, layer in adapted_layers(model).items():
        weight = layer.merged_weight().to(layer.weight.dtype)
        model.set_submodule(name, _plain(weight, layer.base.bias))
    for name, module in [*model.named_modules()]:
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, _plain(module.weight, module.bias))
    vars(model).pop("output_head", None)
    if model.config.ties_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        source = {**model.config.source, "tie_word_embeddings": False}
        model.config = replace(model.config, ties_embeddings=False, source=source)
    model.requires_grad_(True)


def _lengths(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (O,) lengths of the rows of (O, I)."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return lengths


def _plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", bias)
    return linear


def _adapted_head(original: Callable[[], OutputHead], layer: AdaptedLinear) -> OutputHead:
    """Return the output head of a model whose output projection is ``layer``."""
    if layer.magnitude is not None:
        return replace(original(), weight=layer.merged_weight())
    return replace(original(), update=layer.update)
