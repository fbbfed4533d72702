"""What is done to a policy between its loading and its training."""

from __future__ import annotations

from dpo.adapter_files import check_names
from dpo.adapters import add_adapter
from dpo.config import RunConfig
from dpo.models import Decoder
from dpo.models.transforms import compile_blocks, recompute
from dpo.offload import CudaLane, Lane, offload_activations


def prepare_policy(policy: Decoder, config: RunConfig, lane: Lane | None = None) -> None:
    """Apply to ``policy``, in place, what the options of a run ask for.

    Real runs and the planner's rehearsals of them both come through here; the latter bring a
    ``lane`` to a host that they have not.
    """
    if config.adapter.kind is not None:
        adapter, targets = config.adapter.build(), config.adapter.targets
        add_adapter(policy, adapter, targets=targets, seed=config.train.seed)
        check_names(policy)
    if config.train.compile:
        compile_blocks(policy)
    if config.train.recompute is not None:
        recompute(policy, config.train.recompute)
    if config.train.offload_activations:
        offload_activations(policy, lane or CudaLane(next(policy.parameters()).device))
