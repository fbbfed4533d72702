"""What a run says of itself before it begins: model, data, steps, memory, where it writes."""

from __future__ import annotations

from collections.abc import Iterator

from dpo.adapter_files import adapter_parameters
from dpo.adapters import adapt
from dpo.averaging import moving_average_bytes
from dpo.config import RunConfig
from dpo.inputs import Inputs, Models
from dpo.memory_tracker import GRADIENTS, OPTIMIZER, REFERENCE, WEIGHTS
from dpo.models import Decoder
from dpo.parallel import is_in_parts
from dpo.quantization import is_linear
from dpo.rehearsal import outlined_policy
from dpo.run_optimizer import make_run_optimizer
from dpo.sampling import make_sampler
from dpo.scoring import MicroBatches
from dpo.trainer import uses_live_reference


def header(config: RunConfig, models: Models, inputs: Inputs, *, device: str) -> Iterator[str]:
    """Yield the lines; no weight is loaded."""
    policy = _outline(config, models)
    yield f"model   {_model(config, models, policy)}, on {device}"
    yield f"data    {_data(inputs)}"
    yield f"steps   {_steps(config, inputs)}"
    yield f"memory  {_memory(config, policy)}"
    yield f"writes  {config.out}"


def held_bytes(config: RunConfig, policy: Decoder) -> dict[str, int]:
    """Count what is held from the first step on: weights, gradients, states; no activation.

    Args:
        config: of the run.
        policy: which it trains; on the meta device, or else as much memory is taken for a moment.
    """
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    nbytes = sum(weight.nbytes for weight in trained)
    states = make_run_optimizer(policy, config.train).state_bytes()
    if config.train.ema_decay is not None:
        states += moving_average_bytes(trained)
    has_reference = uses_live_reference(config.loss.build(), config.train)
    return {
        WEIGHTS: sum(each.nbytes for each in (*policy.parameters(), *policy.buffers())),
        GRADIENTS: nbytes,
        OPTIMIZER: states,
        REFERENCE: nbytes if has_reference else 0,
    }


def _outline(config: RunConfig, models: Models) -> Decoder:
    """Make the policy of the run without memory, with the adapter that it may have already."""
    policy = outlined_policy(models.policy.config, config)
    if (known := models.policy.adapter) is not None:
        layers = {name.rpartition(".")[0] for name in adapter_parameters(known.path)}
        linears = [name for name, module in policy.named_modules() if is_linear(module)]
        adapt(policy, [name for name in linears if name in layers], known.adapter)
    return policy


def _model(config: RunConfig, models: Models, policy: Decoder) -> str:
    parameters = list(policy.parameters())
    size = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    words = [f"{models.policy.name.resolve().name}: {size:,} parameters"]
    if models.policy.adapter is not None:
        words.append("with an adapter, which is trained")
    elif trained < size:
        words.append(f"{trained:,} of them trained")
    return ", ".join([*words, config.train.dtype])


def _memory(config: RunConfig, policy: Decoder) -> str:
    held = {kind: nbytes / 2**20 for kind, nbytes in held_bytes(config, policy).items() if nbytes}
    words = ", ".join(f"{kind} {mib:,.0f}" for kind, mib in held.items())
    whose = " of the whole model" if is_in_parts(config.train) else ""
    return f"{sum(held.values()):,.0f} MiB{whose} without activations: {words}"


def _data(inputs: Inputs) -> str:
    pairs = inputs.pairs
    words = f"{len(pairs):,} rows, {int(pairs.lengths().sum()):,} useful tokens an epoch"
    return words if inputs.eval_pairs is None else f"{words}; {len(inputs.eval_pairs):,} held out"


def _steps(config: RunConfig, inputs: Inputs) -> str:
    train = config.train
    per_epoch = make_sampler(config.loss.build(), inputs.pairs, train).steps_per_epoch
    limit = MicroBatches.of_run(train, inputs.pairs).limit
    return (
        f"{train.total_steps(per_epoch):,} of {train.batch_size:,} rows, in micro-batches of at "
        f"most {limit}; loss {config.loss.name}, learning rate {train.learning_rate:g}"
    )
