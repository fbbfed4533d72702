"""Several processes that train one model: what they exchange, and how they fail together.

What the host knows (flags, counts, log-probs
that were read) is exchanged over gloo, so that it does not wait for a device; gradients and weights
go over the device's own backend.

Shapes: n rows of a rank, any number of them, also none.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dpo.errors import InputError, RunError
from dpo.launch import Launch
from dpo.ranks import Piece, Ranks

TIMEOUT: Final = timedelta(hours=1)  # a first rank may tokenize or write a model meanwhile
BUCKET_BYTES: Final = 2**25  # of gradients that are summed at once

_DTYPES: Final = (torch.float64, torch.float32, torch.int64)  # of what is gathered

T = TypeVar("T")


class LostRanksError(RuntimeError):
    """The other ranks cannot be reached: one is gone, or does not answer."""


class JoinedRanks(Ranks):
    """One of several processes, in a process group.

    Args:
        launch: which.
        store: what the processes share even when one of them is gone.
        device: of this process.
        group: those that divide the pairs; None for all.
    """

    def __init__(
        self,
        launch: Launch,
        store: Store,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.launch, self.process, self.processes = launch, launch.rank, launch.count
        self.store, self.device, self.group = store, device, group
        self._exchanges = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the first of all processes."""
        return self.launch.rank == 0

    def max(self, value: float) -> float:
        """Return the greatest value of all ranks."""
        found = torch.tensor(float(value), dtype=torch.float64)
        with self._exchanging():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def gather(self, part: Tensor | None) -> Tensor | None:
        """Join the (n, ...) tensors of all ranks that divide the pairs, on the host."""
        with self._exchanging():
            return _gathered(part, self.group)

    def first(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers that the first rank has."""
        own = torch.tensor(numbers, dtype=torch.int64) if self.is_first else None
        with self._exchanging():
            found = _gathered(own, None)
        assert found is not None
        return found.tolist()

    def texts(self, text: str) -> list[str]:
        """Return the text of each process, in their order."""
        own = torch.tensor([*json.dumps(text).encode(), ord("\n")], dtype=torch.int64)
        with self._exchanging():
            found = _gathered(own, None)
        assert found is not None
        return [json.loads(line) for line in bytes(found.tolist()).splitlines()]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradient of each parameter over the ranks, in place, a bucket at a time."""
        self._sum_over(parameters, self.group)

    def _sum_over(
        self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None
    ) -> None:
        """Sum what this rank holds of each gradient over a group, all of which hold the same."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        has_gradient = torch.tensor([parameter.grad is not None for parameter in trained]).int()
        with self._exchanging():
            dist.all_reduce(has_gradient, dist.ReduceOp.MAX, group=group)
            gradients = []
            for parameter, has in zip(trained, has_gradient.tolist(), strict=True):
                if has and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients += [] if parameter.grad is None else [self.part_of(parameter.grad)]
            for bucket in buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat, group=group)
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def share_weights(self, weights: Iterable[Tensor]) -> None:
        """Give all ranks the weights of the first, in place."""
        with self._exchanging():
            for weight in weights:
                dist.broadcast(weight.detach(), group=self.group, group_src=0)

    def piece(self, tensor: Tensor, name: str) -> Piece:
        """Return a tensor, which the ranks that divide the pairs have all of."""
        found = super().piece(tensor, name)
        return replace(found, copy=self.rank, copies=self.count)

    def check_same(self, what: str, text: str) -> None:
        """Compare a text with that of the first rank."""
        if self.any(self.first_text(text) != text):
            raise InputError(
                f"{what} differ from rank to rank: every machine must see the same files"
            )

    def one_before_others(self, work: Callable[[], T]) -> T:
        """Do ``work`` on one rank of each machine, then on the others."""
        if self.launch.local_rank:
            self.wait()
            return work()
        result = work()
        self.wait()
        return result

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.max(0)

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Note that this rank has come so far, and tell the loss of others from other errors.

        Raises:
            LostRanksError: they cannot be reached.
        """
        self._exchanges += 1
        try:
            self.store.set(f"exchanges/{self.launch.rank}", str(self._exchanges))
            yield
        except RuntimeError as error:
            raise LostRanksError(_brief(error)) from error

    def _behind(self) -> str:
        """Name the ranks that have not come as far as others, as far as is known."""
        try:
            keys = [f"exchanges/{rank}" for rank in range(self.processes)]
            counts = [int(self.store.get(key)) if self.store.check([key]) else 0 for key in keys]
        except RuntimeError:  # the store is gone, with the machine that kept it
            return ""
        ranks = [str(rank) for rank, count in enumerate(counts) if count < max(counts)]
        return f"behind is {', '.join(ranks)}; " if ranks else ""

    def failure(self, error: Exception) -> BaseException:
        """Return what this rank ends with, so that of all ranks one says what happened.

        That is the first to ask. A rank with an error of its own asks before it ends, the others
        only miss it afterwards: so what is said is the cause.
        """
        try:
            is_told = self.store.add("failures", 1) > 1
        except RuntimeError:  # the store is gone, with the machine that kept it
            is_told = False
        if is_told:
            return SystemExit(2 if isinstance(error, InputError) else 1)
        if _is_loss(error):
            return RunError(
                f"rank {self.launch.rank} of {self.processes} has lost the others: "
                f"{self._behind()}one was ended from outside or does not answer "
                f"({_brief(error)}); the launcher says which. Go on with --resume auto"
            )
        if not self.is_first and type(error) in (InputError, RunError):
            return type(error)(f"rank {self.launch.rank}: {error}")
        return error


def _gathered(part: Tensor | None, group: dist.ProcessGroup | None) -> Tensor | None:
    """Join the (n, ...) tensors of the ranks of a group, on the host; None if none has one."""
    shapes = _shapes(part, group)
    known = next(((dtype, shape) for dtype, shape in shapes if dtype is not None), None)
    if known is None:
        return None
    dtype, (_, *of_row) = known
    sizes = [shape[0] if shape else 0 for _, shape in shapes]
    padded = torch.zeros(max(sizes), *of_row, dtype=dtype)
    if part is not None:
        padded[: len(part)] = part.detach().cpu()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])


def _shapes(
    part: Tensor | None, group: dist.ProcessGroup | None
) -> list[tuple[torch.dtype | None, list[int]]]:
    """Return dtype and shape of what each rank brings to ``_gathered``; None of nothing."""
    header = torch.zeros(2 + 4, dtype=torch.int64)  # dtype + 1, dimensions, up to 4 sizes
    if part is not None:
        header[0], header[1] = _DTYPES.index(part.dtype) + 1, part.dim()
        header[2 : 2 + part.dim()] = torch.tensor(part.shape)
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size(group))]
    dist.all_gather(headers, header, group=group)
    return [
        (_DTYPES[number - 1] if number else None, sizes[:dimensions])
        for number, dimensions, *sizes in (each.tolist() for each in headers)
    ]


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Divide tensors, in their order, into lists of one dtype and about ``BUCKET_BYTES`` each."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def joined_ranks(
    device: torch.device,
    kind: Callable[[Launch, Store, torch.device], JoinedRanks] = JoinedRanks,
    *,
    timeout: timedelta = TIMEOUT,
) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, if it has, while a ``with`` block runs.

    Args:
        device: of this process; its kind decides what gradients travel over.
        kind: what the ranks divide.
        timeout: how long a rank waits for another.

    Raises:
        RunError: another rank is lost.
        SystemExit: this rank ends because of an error that another one tells.
    """
    launch = Launch.of_environment()
    if launch.count == 1:
        yield Ranks()
        return
    with _listening_to_start(launch):
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts processes again: with where the last ones were
        store = PrefixStore(f"start {launch.restarts}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    ranks = kind(launch, store, device)
    try:
        yield ranks
    except Exception as error:
        _heed_no_more_signals()  # the launcher ends what is left as soon as one rank has ended
        told = ranks.failure(error)
        if told is error:
            raise
        raise told from error
    except SystemExit:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _listening_to_start(launch: Launch) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"rank {launch.rank} of {launch.count} does not reach the others: {_brief(error)}"
        ) from error


def _is_loss(error: Exception) -> bool:
    """Say whether an error is that other ranks cannot be reached, also inside the model."""
    is_of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_of_gloo or isinstance(error, LostRanksError | dist.DistError)


def _brief(error: Exception) -> str:
    """Return what an error of torch says, without its advice."""
    return str(error).splitlines()[0].partition(". This is typically")[0]


def _heed_no_more_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
