"""A model whose parameters are divided over ranks: FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

Each rank holds a part of every parameter, of its gradient and of its optimizer states. A block is
put together while it computes and its gradient summed and divided as soon as it is there, so all
ranks run the model equally often (``Ranks.in_step``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo.distributed import JoinedRanks
from dpo.launch import Launch
from dpo.models import Decoder
from dpo.models.norms import Norm
from dpo.ranks import Piece, Place


class ShardedRanks(JoinedRanks):
    """One of several processes that hold a part of the model each.

    Args:
        launch: which process.
        store: as of ``JoinedRanks``.
        device: of the process.
        group: those that divide the pairs and the model; None for all.
        products: what autocast rounds the matrices of blocks to, in which they then travel; None:
            they are multiplied and travel as they are.
    """

    in_step = True

    def __init__(
        self,
        launch: Launch,
        store: Store,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        *,
        products: torch.dtype | None = None,
    ) -> None:
        super().__init__(launch, store, device, group)
        self.mesh, self.products = self._make_mesh(), products

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum those of parameters that ranks hold whole, as adapters are.

        Of the others the backward pass has left the sum in the parts.
        """
        super().sum_gradients([p for p in parameters if not isinstance(p, DTensor)])

    def share_weights(self, weights: Iterable[Tensor]) -> None:
        """Do nothing: each rank has read its part of the same file."""

    def prepare(self, model: nn.Module) -> None:
        """Divide the parameters of ``model``, which may have no numbers yet, over the ranks.

        Embedding, last norm and output projection stay whole from a forward pass to the end of its
        backward pass, for the head is walked in between. Norms, which autocast does not round,
        travel by themselves where matrices are rounded before they do.
        """
        assert isinstance(model, Decoder)
        policy = MixedPrecisionPolicy()
        if self.products is not None:  # summed as autocast's way back gives them to weights
            policy = MixedPrecisionPolicy(self.products, torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            if self.products is not None:
                fully_shard([m for m in block.modules() if isinstance(m, Norm)], mesh=self.mesh)
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh)
        for module in _divided(model):
            # sums, not means; gloo knows no other way to leave the division out
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _make_mesh(self) -> DeviceMesh:
        """Return the ranks that a model is divided over, the last dimension, and its copies."""
        if self.group is not None:
            return DeviceMesh.from_group(self.group, self.device.type)
        return init_device_mesh(self.device.type, (self.count,), mesh_dim_names=("parts",))

    def divide(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a whole tensor, which every rank has, in parts."""
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        value = value.to(self.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the part of a divided tensor that this rank holds, which shares its memory."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def piece(self, tensor: Tensor, name: str) -> Piece:
        """Return what this rank holds of a tensor: some of its rows, if it is divided."""
        if not isinstance(tensor, DTensor):
            return super().piece(tensor, name)
        rows, dimension = len(tensor), self.mesh.ndim - 1
        parts, machines = self.mesh.size(dimension), self.mesh.size() // self.mesh.size(dimension)
        start = self.mesh.get_local_rank(dimension) * -(-rows // parts)  # as torch.chunk divides
        machine = self.mesh.get_local_rank(0) if machines > 1 else 0
        return Piece(
            tensor.to_local().detach(),
            Place((min(start, rows), *(0,) * (tensor.dim() - 1)), tuple(tensor.shape)),
            is_divided=True,
            copy=machine,
            copies=machines,
        )

    def joint_norm(self, norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of all tensors, (), from the (n,) of what this rank holds of each."""
        squares = norms.square()
        are_parts = norms.new_tensor([isinstance(t, DTensor) for t in tensors], dtype=torch.bool)
        square = torch.where(are_parts, squares, 0).sum()
        dist.all_reduce(square, group=self.mesh.get_group(self.mesh.ndim - 1))
        return (square + torch.where(are_parts, 0, squares).sum()).sqrt()

    def take_apart(self, model: nn.Module) -> None:
        """Let ``model`` have the optimizer's parameters, if it still holds whole ones."""
        for module in _divided(model):
            module.reshard()

    def whole(self, tensor: Tensor, name: str) -> Tensor:
        """Return a divided tensor whole, on the host of the first rank; others get nothing."""
        if not isinstance(tensor, DTensor):
            return tensor
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if self.rank == 0 else full.new_empty(0)


class HybridRanks(ShardedRanks):
    """One of the processes of a machine, each of which holds a part of the machine's model."""

    def _make_mesh(self) -> DeviceMesh:
        here = self.launch.local_count
        shape, names = (self.count // here, here), ("machines", "parts")
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)


def _divided(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
