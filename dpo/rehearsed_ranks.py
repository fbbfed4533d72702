"""One of many ranks, for a rehearsal: none of the others needs to be there.

What ranks exchange of a model goes through torch's collectives, which of tensors without memory
(``FakeTensorMode``) ask nobody. What the host would ask is answered here: others do as this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from dpo.config import RunConfig
from dpo.distributed import JoinedRanks
from dpo.launch import Launch
from dpo.parallel import kind_of_ranks
from dpo.ranks import Ranks

A_MACHINE: Final = 8  # GPUs


class RanksAlike(Ranks):
    """A rank that takes the others to do as it does, with pairs of their own."""

    def __init__(self, own: JoinedRanks) -> None:
        self.own, self.in_step, self.processes = own, own.in_step, own.processes

    def prepare(self, model: nn.Module) -> None:
        """Let ``model`` hold this rank's parts."""
        self.own.prepare(model)

    def take_apart(self, model: nn.Module) -> None:
        """Let ``model`` have the optimizer's parameters."""
        self.own.take_apart(model)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the part of a divided tensor that this rank holds."""
        return self.own.part_of(tensor)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients that the backward pass has not summed."""
        self.own.sum_gradients(parameters)

    def joint_norm(self, norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of all ``tensors``."""
        return self.own.joint_norm(norms, tensors)


def ranks_alike(config: RunConfig, launch: Launch) -> Ranks:
    """Return what a run's ranks are to a rehearsal; all that have joined call it.

    Whatever the devices of the ranks are, the rehearsal is on a CPU.
    """
    if launch.count == 1:
        return Ranks()
    kind = kind_of_ranks(config, launch)
    return RanksAlike(kind(launch, HashStore(), torch.device("cpu")))


@contextmanager
def pretended_ranks(config: RunConfig, count: int) -> Iterator[Ranks]:
    """Be the first of ``count`` processes, of machines of up to eight, while a block runs.

    Raises:
        InputError: an option does not go with a model in parts, or not with so many processes.
    """
    launch = Launch(count=count, local_count=min(count, A_MACHINE))
    if count == 1:
        yield ranks_alike(config, launch)
        return
    # registers a group that exchanges nothing
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield ranks_alike(config, launch)
    finally:
        dist.destroy_process_group()
