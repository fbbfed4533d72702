"""What several processes of a run divide, and what does not go with that."""

from __future__ import annotations

from dpo.config import RunConfig
from dpo.distributed import JoinedRanks
from dpo.errors import InputError
from dpo.inputs import Models
from dpo.launch import Launch
from dpo.trainer import uses_live_reference


def kind_of_ranks(config: RunConfig) -> type[JoinedRanks]:
    """Choose what several processes divide.

    Raises:
        InputError: an option does not go with that, or there is one process.
    """
    if config.train.parallel == "data":
        return JoinedRanks
    train, loss, launch = config.train, config.loss.build(), Launch.of_environment()
    is_hybrid = train.parallel == "hybrid"
    unfit = {
        "one process: start it with torchrun": launch.count == 1,
        "one machine, or unequal ones: take shard": is_hybrid
        and (launch.count == launch.local_count or launch.count % launch.local_count > 0),
        f"train.optimizer = {train.optimizer}, which looks at whole matrices or blocks, or "
        "averages: take adamw or lion": train.optimizer not in ("adamw", "lion"),
        "train.ema_decay": train.ema_decay is not None,
        "train.dtype = fp16-mixed": train.dtype == "fp16-mixed",
        "train.compile": train.compile,
        "adapter.kind = dora": config.adapter.kind == "dora",
        "adapter.quantize": config.adapter.quantize is not None,
        "a reference that is held in memory": uses_live_reference(loss, train),
    }
    found = [what for what, is_so in unfit.items() if is_so]
    if found:
        raise InputError(f"train.parallel = {train.parallel} does not go with {'; '.join(found)}")
    # half a second, which other runs do without
    from dpo.sharding import HybridRanks, ShardedRanks

    return HybridRanks if is_hybrid else ShardedRanks


def check_parts(models: Models) -> None:
    """Refuse models that cannot be held in parts.

    Raises:
        InputError: one is.
    """
    for folder in (models.policy, models.reference):
        if any(folder.config.experts):
            raise InputError(f"train.parallel = data is what experts ask for, as in {folder.path}")
        if folder.adapter is not None and folder.adapter.adapter.is_dora:
            raise InputError(f"train.parallel = data is what DoRA asks for, as in {folder.name}")
