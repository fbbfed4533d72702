"""A model whose parameters are divided over ranks: FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

Each rank holds a part of every parameter, of its gradient and of its optimizer states. A block is
put together while it computes and its gradient summed and divided as soon as it is there, so all
ranks run the model equally often (``Ranks.in_step``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo.distributed import JoinedRanks
from dpo.models import Decoder


class ShardedRanks(JoinedRanks):
    """One of several processes that hold a part of the model each."""

    in_step = True

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum those of parameters that ranks hold whole, as adapters are.

        Of the others the backward pass has left the sum in the parts.
        """
        super().sum_gradients(p for p in parameters if not isinstance(p, DTensor))

    def share_weights(self, weights: Iterable[Tensor]) -> None:
        """Do nothing: each rank has read its part of the same file."""

    def prepare(self, model: nn.Module) -> None:
        """Divide the parameters of ``model``, which may have no numbers yet, over the ranks.

        Embedding, last norm and output projection stay whole from a forward pass to the end of its
        backward pass, for the head is walked in between.
        """
        assert isinstance(model, Decoder)
        shape = self._mesh_shape()
        names = ("machines", "parts")[-len(shape) :]
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
        for module in _divided(model):
            # sums, not means; gloo knows no other way to leave the division out
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _mesh_shape(self) -> tuple[int, ...]:
        """Return among how many ranks a model is divided, the last number, and copies before it."""
        return (self.count,)

    def divide(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a whole tensor, which every rank has, in parts."""
        if not isinstance(like, DTensor):
            return value
        value = value.to(self.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the part of a divided tensor that this rank holds, which shares its memory."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def joint_norm(self, norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of tensors, (), from that of the parts of them that this rank holds.

        Of tensors that are divided, all of them, or held whole.
        """
        if not isinstance(tensors[0], DTensor):
            return norm
        square = norm.square()
        mesh = tensors[0].device_mesh
        dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
        return square.sqrt()

    def take_apart(self, model: nn.Module) -> None:
        """Let ``model`` have the optimizer's parameters, if it still holds whole ones."""
        for module in _divided(model):
            module.reshard()

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a divided tensor whole, on the host of the first rank; others get nothing."""
        if not isinstance(tensor, DTensor):
            return tensor
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if self.is_first else full.new_empty(0)


class HybridRanks(ShardedRanks):
    """One of the processes of a machine, each of which holds a part of the machine's model."""

    def _mesh_shape(self) -> tuple[int, ...]:
        here = self.launch.local_count
        return self.count // here, here


def _divided(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
