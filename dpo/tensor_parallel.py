"""A model whose matrices are divided over neighbouring ranks, which compute each text together.

Shoeybi et al. 2019 ("Megatron-LM", arXiv 1909.08053, section 3): of attention and MLP the matrices
that read the residual stream are divided by rows, so that each rank has some heads and some inner
numbers, and those that write to it by columns, so that the sum over the ranks is what they write.
Embedding and output projection are divided over the vocabulary, and no logits are exchanged.

Everything else (norms, adapters, biases of what is written) is whole on each rank. Inside of
attention, MLP and output projection each rank has but a summand of the gradient of such a
parameter; outside, all ranks compute all of it.

Shapes: N tokens, D hidden size, V vocabulary, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from dpo.distributed import JoinedRanks
from dpo.launch import Launch
from dpo.models import Decoder
from dpo.policy import Vocabulary
from dpo.ranks import Piece, Place

_BY_ROWS: Final = (
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head",
)  # fmt: skip
_BY_COLUMNS: Final = ("o_proj", "down_proj")


def divided_dimension(name: str) -> int | None:
    """Return the dimension that a parameter of this name is divided along, None if it is whole."""
    path, _, kind = name.rpartition(".")
    layer = path.removesuffix(".base").rpartition(".")[2]  # an adapter lies around its base
    if layer in _BY_ROWS and kind in ("weight", "bias"):
        return 0
    return 1 if layer in _BY_COLUMNS and kind == "weight" else None


def own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Make a process group of each of some lists of ranks; return the one that this rank is in."""
    found, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups])
    assert isinstance(found, dist.ProcessGroup)
    return found


@dataclass(frozen=True)
class Part:
    """One of the equal parts that a model is divided into.

    Attributes:
        number: from 0.
        count: of the parts.
        group: the ranks that hold them.
    """

    number: int
    count: int
    group: dist.ProcessGroup

    def range(self, size: int) -> slice:
        """Return which of ``size`` rows or columns are this part's."""
        step = size // self.count
        return slice(self.number * step, (self.number + 1) * step)

    def of(self, whole: Tensor, dimension: int) -> Tensor:
        """Return this part of a tensor, in memory of its own."""
        found = self.range(whole.shape[dimension])
        return whole.narrow(dimension, found.start, found.stop - found.start).clone()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a contiguous tensor over the parts, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor


class TensorRanks(JoinedRanks):
    """One of several processes, neighbours of which share a model and the pairs.

    ``rank`` and ``count`` are those of its model among the models.

    Args:
        launch: which process.
        store: as of ``JoinedRanks``.
        device: of the process.
        size: processes of one model; divides their number.
        kind: what ranks that have the same part of different models divide.
    """

    in_step = True

    def __init__(
        self,
        launch: Launch,
        store: Store,
        device: torch.device,
        *,
        size: int,
        kind: Callable[..., JoinedRanks] = JoinedRanks,
    ) -> None:
        ranks = range(launch.count)
        models = [ranks[first : first + size] for first in ranks[::size]]
        group = own_group([ranks[number::size] for number in range(size)])
        super().__init__(launch, store, device, group)
        self.same_part = kind(launch, store, device, group)
        self.part = Part(launch.rank % size, size, own_group(models))
        self._dimensions: dict[Tensor, int | None] = {}
        self._summands: set[Tensor] = set()

    @property
    def is_first_of_pairs(self) -> bool:
        """Whether of the ranks that score the same pairs this is the one that keeps the result."""
        return self.part.number == 0

    def prepare(self, model: nn.Module) -> None:
        """Let ``model`` hold this rank's part, in place, and compute together with the others."""
        assert isinstance(model, Decoder)
        divide_model(model, self.part)
        self.same_part.prepare(model)

    def divide(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a whole tensor in parts, divided as ``like`` is."""
        if value.dim() == like.dim():
            for dimension, (whole, own) in enumerate(zip(value.shape, like.shape, strict=True)):
                if whole != own:
                    value = self.part.of(value, dimension)
        return self.same_part.divide(value, like)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor that this rank holds, which shares its memory."""
        return self.same_part.part_of(tensor)

    def piece(self, tensor: Tensor, name: str) -> Piece:
        """Return what this rank holds of a tensor: some of its rows or columns, if it is divided.

        Of several parts of rows it may have one, or rows of its columns.
        """
        found, size = self.same_part.piece(tensor, name), self.part.count
        dimension = divided_dimension(name)
        if dimension is None or tensor.dim() <= dimension:
            if not found.is_divided:
                return found
            copy = found.copy * size + self.part.number
            return replace(found, copy=copy, copies=found.copies * size)
        starts, shape = [*found.place.starts], [*found.place.shape]
        starts[dimension] += self.part.number * shape[dimension]
        shape[dimension] *= size
        return replace(found, place=Place(tuple(starts), tuple(shape)), is_divided=True)

    def take_apart(self, model: nn.Module) -> None:
        """Let ``model`` have the optimizer's parameters, and note which of them are parts."""
        self.same_part.take_apart(model)
        named = dict(model.named_parameters())
        self._dimensions = {each: divided_dimension(name) for name, each in named.items()}
        inside = {each for module in _divided(model) for each in module.parameters()}
        self._summands = {each for each in inside if self._dimensions.get(each) is None}

    def share_weights(self, weights: Iterable[Tensor]) -> None:
        """Give the ranks of one part the weights of the first of them, in place."""
        self.same_part.share_weights(weights)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum those of whole parameters over the parts, then all over the models.

        What each part has all of counts once, so that no kernel's noise lets parts drift apart.
        """
        parameters = [*parameters]
        whole = [each for each in parameters if self._dimensions.get(each) is None]
        for each in whole if self.part.number > 0 else ():
            if each.grad is not None and each not in self._summands:
                each.grad.zero_()
        self._sum_over(whole, self.part.group)
        self.same_part.sum_gradients(parameters)

    def joint_norm(self, norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of all from those of what this rank holds of each."""
        squares = []
        for are_parts in (True, False):
            which = [
                index
                for index, each in enumerate(tensors)
                if (self._dimensions.get(each) is not None) == are_parts
            ]
            chosen = [tensors[index] for index in which]
            squares.append(self.same_part.joint_norm(norms[which], chosen).square())
        return (self.part.sum(squares[0]) + squares[1]).sqrt()

    def whole(self, tensor: Tensor, name: str) -> Tensor:
        """Return a tensor whole on the host of the first rank; others get nothing."""
        own = self.same_part.whole(tensor, name).detach()
        if self.rank > 0:
            return own.new_empty(0)
        dimension = divided_dimension(name)
        if dimension is None or own.dim() <= dimension:
            return own
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.part.count)] if self.is_first else None
        dist.gather(own, parts, group=self.part.group, group_dst=0)
        return own.new_empty(0) if parts is None else torch.cat([p.cpu() for p in parts], dimension)


def divide_model(model: Decoder, part: Part) -> None:
    """Let a decoder hold one part of its matrices and compute together with the others, in place.

    Its numbers of heads, inner numbers and tokens are multiples of the number of parts.
    """
    for name, module in model.named_modules():
        for kind, parameter in [*module.named_parameters(recurse=False)]:
            dimension = divided_dimension(f"{name}.{kind}")
            if dimension is not None:
                own = part.of(parameter.detach(), dimension)
                setattr(module, kind, nn.Parameter(own, requires_grad=parameter.requires_grad))
        layer = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and layer in (*_BY_ROWS, *_BY_COLUMNS):
            everything = slice(None)
            rows, columns = everything, everything
            if layer in _BY_ROWS:
                rows = part.range(module.out_features)
            else:
                columns = part.range(module.in_features)
                if part.number > 0:  # the sum is to have the bias once
                    vars(module)["forward"] = partial(_without_bias, module)
            vars(module)["part"] = rows, columns  # of an adapter's factors
    model.tie_weights()
    for block in model.model.layers:
        inner: list[Any] = [block.self_attn, block.mlp]
        for each in inner:
            each.register_forward_pre_hook(partial(_before, part.group))
            each.register_forward_hook(partial(_behind, part.group))
    first, embedding = part.range(model.config.vocab_size).start, model.model.embed_tokens
    vars(embedding)["forward"] = partial(_embedded, embedding, first=first, group=part.group)
    model.vocabulary = VocabularyPart(first, part.group)


def _divided(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside of which each rank has a summand of each gradient."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("self_attn", "mlp", "lm_head"):
            yield module


class VocabularyPart(Vocabulary):
    """The part of the vocabulary from ``first`` on; ``group`` has all of it."""

    def __init__(self, first: int, group: dist.ProcessGroup) -> None:
        self.first, self.group = first, group

    def shared(self, hidden: Tensor) -> Tensor:
        """Return (K, D) hidden states, whose gradient is that of all parts."""
        return _shared(hidden, self.group)

    def max(self, values: Tensor) -> Tensor:
        """Return the greatest of what each part has, number by number."""
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of what each part has, number by number."""
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values


def _without_bias(linear: nn.Linear, hidden: Tensor) -> Tensor:
    return F.linear(hidden, linear.weight)


def _embedded(
    embedding: nn.Embedding, ids: Tensor, *, first: int, group: dist.ProcessGroup
) -> Tensor:
    """Return (N, D) embeddings of (N,) tokens, of which this rank has those from ``first`` on."""
    places = ids - first
    is_own = (places >= 0) & (places < len(embedding.weight))
    found = F.embedding(torch.where(is_own, places, 0), embedding.weight)
    return _summed(torch.where(is_own[:, None], found, 0), group)


def _before(
    group: dist.ProcessGroup, _module: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    hidden, *others = arguments
    return _shared(hidden, group), *others


def _behind(
    group: dist.ProcessGroup, _module: nn.Module, _arguments: tuple[Any, ...], output: Tensor
) -> Tensor:
    return _summed(output, group)


def _shared(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return what all ranks have, whose gradient is the sum of theirs."""
    shared: Tensor = _Shared.apply(tensor, group)  # type: ignore[no-untyped-call]
    return shared


def _summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of what each rank has, on all of them."""
    total: Tensor = _Summed.apply(tensor, group)  # type: ignore[no-untyped-call]
    return total


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
