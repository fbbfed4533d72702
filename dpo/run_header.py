"""What a run says of itself before it begins: model, data, steps, where it writes."""

from __future__ import annotations

from collections.abc import Iterator

from dpo.config import RunConfig
from dpo.inputs import Inputs, Models
from dpo.rehearsal import outlined_policy
from dpo.sampling import make_sampler
from dpo.scoring import MicroBatches


def header(config: RunConfig, models: Models, inputs: Inputs, *, device: str) -> Iterator[str]:
    """Yield the lines; no weight is loaded."""
    yield f"model   {_model(config, models)}, on {device}"
    yield f"data    {_data(inputs)}"
    yield f"steps   {_steps(config, inputs)}"
    yield f"writes  {config.out}"


def _model(config: RunConfig, models: Models) -> str:
    parameters = list(outlined_policy(models.policy.config, config).parameters())
    size = sum(p.numel() for p in parameters)
    memory = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    words = [f"{models.policy.name.resolve().name}: {size:,} parameters"]
    if models.policy.adapter is not None:
        words.append("with an adapter, which is trained")
    elif trained < size:
        words.append(f"{trained:,} of them trained")
    return ", ".join([*words, f"{memory / 2**20:,.0f} MiB of weights ({config.train.dtype})"])


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
