"""What several processes of a run divide, and what does not go with that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from dpo.config import RunConfig
from dpo.distributed import JoinedRanks
from dpo.errors import InputError
from dpo.inputs import Models
from dpo.launch import Launch
from dpo.models import ModelConfig
from dpo.precision import precision_of
from dpo.train_config import TrainConfig
from dpo.trainer import uses_live_reference

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

KindOfRanks = Callable[[Launch, "Store", "torch.device"], JoinedRanks]


def is_in_parts(config: TrainConfig) -> bool:
    """Say whether a process holds but a part of the model."""
    return config.parallel != "data" or config.tensor_ranks > 1


def kind_of_ranks(config: RunConfig, launch: Launch | None = None) -> KindOfRanks:
    """Choose what several processes divide.

    Args:
        config: of the run.
        launch: one of the processes; None for this one.

    Raises:
        InputError: an option does not go with that, or there is one process.
    """
    train, launch = config.train, launch or Launch.of_environment()
    if train.rank_timeout is not None and launch.count == 1:
        raise InputError("train.rank_timeout is for several processes: start them with torchrun")
    if not is_in_parts(train):
        return JoinedRanks
    is_hybrid, size = train.parallel == "hybrid", train.tensor_ranks
    _refuse(
        train,
        {
            "one process: start it with torchrun": launch.count == 1,
            f"{launch.count} processes, which are no multiple": launch.count % size > 0,
            f"machines of {launch.local_count} processes": launch.local_count % size > 0,
            "train.parallel = hybrid: take data or shard": is_hybrid and size > 1,
            "one machine, or unequal ones: take shard": is_hybrid
            and (launch.count == launch.local_count or launch.count % launch.local_count > 0),
            **_unfit_options(config),
        },
    )
    # half a second, which other runs do without
    from dpo.sharding import HybridRanks, ShardedRanks
    from dpo.tensor_parallel import TensorRanks

    kinds = {"shard": ShardedRanks, "hybrid": HybridRanks}
    kind: Callable[..., JoinedRanks] = JoinedRanks
    if train.parallel != "data":
        kind = partial(kinds[train.parallel], products=precision_of(train).autocast)
    return kind if size == 1 else partial(TensorRanks, size=size, kind=kind)


def _unfit_options(config: RunConfig) -> dict[str, bool]:
    """Say of each option that does not go with a model in parts whether it is there."""
    train = config.train
    by_number = ["adamw", "lion", "schedule-free"]  # look at each number of a parameter by itself
    return {
        f"train.optimizer = {train.optimizer}, which looks at whole matrices or blocks: take "
        f"{' or '.join(by_number)}": train.optimizer not in by_number,
        "train.dtype = fp16-mixed": train.dtype == "fp16-mixed",
        "train.compile": train.compile and train.tensor_ranks > 1,
        "train.offload_activations": train.offload_activations,
        "adapter.kind = dora": config.adapter.kind == "dora",
        "adapter.quantize": config.adapter.quantize is not None,
        "a reference that is held in memory": uses_live_reference(config.loss.build(), train),
    }


def _refuse(train: TrainConfig, unfit: Mapping[str, bool]) -> None:
    found = [what for what, is_so in unfit.items() if is_so]
    if found:
        size = train.tensor_ranks
        what = f"parallel = {train.parallel}" if size == 1 else f"tensor_ranks = {size}"
        raise InputError(f"train.{what} does not go with {'; '.join(found)}")


def check_parts(config: RunConfig, models: Models) -> None:
    """Refuse models that cannot be held in parts.

    Raises:
        InputError: one is.
    """
    for folder in (models.policy, models.reference):
        if any(folder.config.experts):
            raise InputError(f"train.parallel = data is what experts ask for, as in {folder.path}")
        if folder.adapter is not None and folder.adapter.adapter.is_dora:
            raise InputError(f"train.parallel = data is what DoRA asks for, as in {folder.name}")
        if fault := _fault(folder.config, config.train.tensor_ranks):
            raise InputError(f"train.tensor_ranks = {config.train.tensor_ranks}: {fault}")


def _fault(model: ModelConfig, size: int) -> str | None:
    """Say why a model cannot be divided into so many parts, if it cannot."""
    if size > 1 and model.query_key_norm == "all heads":
        return f"{model.architecture} norms all heads of a token together: give 1"
    divided = {
        "heads": model.heads,
        "key heads": model.key_heads,
        "inner numbers of the MLP": model.intermediate_size,
        "tokens of the vocabulary": model.vocab_size,
    }
    if all(number % size == 0 for number in divided.values()):
        return None
    shown = ", ".join(f"{number:,} {what}" for what, number in divided.items())
    common = math.gcd(*divided.values())
    fitting = [str(each) for each in range(1, common + 1) if common % each == 0]
    return f"the model has {shown}, which are divided by {', '.join(fitting)} alone"
