"""How a model is trained: the options that the trainer reads, without torch.

The text beside each field is its documentation and its line in ``dpo train --help``.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from dpo.duration import seconds_of
from dpo.errors import InputError
from dpo.tracking import tracker_names

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion", "muon", "schedule-free"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
Dtype = Literal["float32", "bfloat16", "bf16-mixed", "fp16-mixed"]
Device = Literal["auto", "cpu", "cuda"]
Parallel = Literal["data", "shard", "hybrid"]
Recompute = Literal["mlp", "layer"]
OnNonfinite = Literal["stop", "skip"]
Auto = Literal["auto"]

AUTO: Auto = "auto"

EVALUATION_OPTIONS = ("eval_every", "keep_best", "early_stopping", "samples")  # need held-out pairs

_Range = tuple[str, Callable[[float], bool]]  # in words, and the test


_AT_LEAST_ONE: _Range = ("at least 1", lambda value: value >= 1)
_AT_LEAST_ZERO: _Range = ("at least 0", lambda value: 0 <= value < math.inf)
_ABOVE_ZERO: _Range = ("above 0 and finite", lambda value: 0 < value < math.inf)
_FRACTION: _Range = ("in [0, 1)", lambda value: 0 <= value < 1)
_ADAMW_DEFAULTS = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
_RANGES: dict[str, _Range] = {
    "batch_size": _AT_LEAST_ONE,
    "micro_batch_size": _AT_LEAST_ONE,
    "tokens_per_micro_batch": _AT_LEAST_ONE,
    "epochs": _AT_LEAST_ONE,
    "steps": _AT_LEAST_ONE,
    "learning_rate": _ABOVE_ZERO,
    "warmup_steps": _AT_LEAST_ZERO,
    "decay_share": ("in (0, 1]", lambda value: 0 < value <= 1),
    "weight_decay": _AT_LEAST_ZERO,
    "max_grad_norm": _ABOVE_ZERO,
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "epsilon": _ABOVE_ZERO,
    "router_loss": _ABOVE_ZERO,
    "reference_sync_every": _AT_LEAST_ONE,
    "reference_sync_share": ("in (0, 1]", lambda value: 0 < value <= 1),
    "momentum": _FRACTION,
    "ema_decay": ("in (0, 1)", lambda value: 0 < value < 1),
    "tensor_ranks": _AT_LEAST_ONE,
    "threads": ("in [1, 1024]", lambda value: 1 <= value <= 1024),
    "seed": ("in [0, 2^63)", lambda value: 0 <= value < 2**63),
    "eval_every": _AT_LEAST_ONE,
    "save_every": _AT_LEAST_ONE,
    "keep": _AT_LEAST_ONE,
    "early_stopping": _AT_LEAST_ONE,
    "log_every": _AT_LEAST_ONE,
    "samples": ("in [1, 100]", lambda value: 1 <= value <= 100),
}
_OPTIMIZER_DEFAULTS: Mapping[str, Mapping[str, float]] = {  # of torch, and of the papers
    "adamw": _ADAMW_DEFAULTS,
    "adamw8bit": _ADAMW_DEFAULTS,
    "adafactor": {},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "muon": {**_ADAMW_DEFAULTS, "momentum": 0.95},
    "schedule-free": _ADAMW_DEFAULTS,
}
_CHOICES = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "dtype": Dtype,
    "device": Device,
    "parallel": Parallel,
    "on_nonfinite": OnNonfinite,
}
_OPTIONAL_CHOICES = {"recompute": Recompute}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Options of one training run.

    The defaults of the optimizer are those of ``torch.optim.AdamW``, without weight decay; the
    learning rate is that of Rafailov et al. 2023 (arXiv 2305.18290, appendix B); the linear decay
    and the clipping at 1 are TRL's; the share that wsd decays over is that of Hägele et al. 2024
    (arXiv 2405.18392), and that by which a reference moves of TR-DPO (arXiv 2404.09656).

    Raises:
        InputError: values are out of range or options contradict each other; names all faults.

    Example:
        >>> from dpo import TrainConfig
        >>> config = TrainConfig(batch_size=8, steps=100, warmup_steps=10)
        >>> config.learning_rate, config.schedule
        (1e-06, 'linear')
    """

    batch_size: Annotated[int, "Preference pairs per optimizer step, >= 1."] = 32
    micro_batch_size: Annotated[
        int | None, "Pairs per forward pass, >= 1; in place of --tokens-per-micro-batch."
    ] = None
    tokens_per_micro_batch: Annotated[
        int | Auto | None,
        "Tokens per forward pass, >= 1; auto: as many as the memory holds; 8192 unless "
        "--micro-batch-size is given.",
    ] = None
    epochs: Annotated[int | None, "Passes over the pairs, >= 1; 1 unless --steps is given."] = None
    steps: Annotated[int | None, "Optimizer steps, >= 1; in place of --epochs."] = None

    learning_rate: Annotated[float, "Peak learning rate, > 0."] = 1e-6
    warmup_steps: Annotated[int, "Steps of linear warm-up from 0, >= 0."] = 0
    schedule: Annotated[Schedule, "Learning rate after the warm-up."] = "linear"
    decay_share: Annotated[
        float | None, "Share of the steps that wsd decays over, in (0, 1]; 0.2 with wsd."
    ] = None
    weight_decay: Annotated[float, "Decoupled weight decay of the weight matrices, >= 0."] = 0.0
    max_grad_norm: Annotated[
        float | None, "L2 norm to which gradients are clipped, > 0; none leaves them."
    ] = 1.0
    optimizer: Annotated[
        Optimizer,
        "lion keeps one state where adamw keeps two, adamw8bit a quarter of them, adafactor next "
        "to none; muon is for matrices; schedule-free averages the weights.",
    ] = "adamw"
    beta1: Annotated[
        float | None,
        "In [0, 1), not of adafactor: decay of the gradient mean, 0.9; of schedule-free, in "
        "(0, 1): share of the average in the weights that are trained.",
    ] = None
    beta2: Annotated[
        float | None,
        "In [0, 1), not of adafactor: decay of the squares, 0.999; of lion's state, 0.99.",
    ] = None
    epsilon: Annotated[
        float | None, "Not of adafactor and lion: term in the denominator, > 0; 1e-8."
    ] = None
    momentum: Annotated[
        float | None, "Of muon, in [0, 1): decay of the gradient mean of hidden matrices; 0.95."
    ] = None
    rates: Annotated[
        Mapping[str, float],
        "Factors > 0 on the learning rate of parameters by regular expression of their names: "
        "embed_tokens=0.1,... The first that matches counts.",
    ] = field(default_factory=dict)
    ema_decay: Annotated[
        float | None,
        "In (0, 1): evaluate and save an exponential moving average of the weights, which keeps "
        "this share of itself at each step; none: the weights.",
    ] = None

    dtype: Annotated[Dtype, "Numerics of weights and arithmetic; -mixed keeps float32 weights."] = (
        "float32"
    )
    stochastic_rounding: Annotated[
        bool,
        "Round bfloat16 weights and states up as often as is right on average, so that they move "
        "at small learning rates; dtype bfloat16, of adamw and lion.",
    ] = False
    tf32: Annotated[
        bool, "Round the factors of float32 products to 10 bits: faster on a GPU; dtype float32."
    ] = False
    device: Annotated[Device, "Where to train; auto takes CUDA if there is one."] = "auto"
    parallel: Annotated[
        Parallel,
        "Of several processes of torchrun each holds the whole model; or a part of it, with its "
        "gradients and optimizer states (shard: FSDP); or each machine all parts (hybrid: HSDP).",
    ] = "data"
    tensor_ranks: Annotated[
        int,
        "Neighbouring processes that share a model and its pairs, each with a part of every "
        "matrix, >= 1 (tensor parallelism); --parallel is then of the others.",
    ] = 1
    rank_timeout: Annotated[
        str | None, "How long a process waits for another, as 90s, 15m or 2h30m; none: an hour."
    ] = None
    threads: Annotated[int | None, "CPU threads, in [1, 1024]; none leaves torch's choice."] = None
    compile: Annotated[bool, "Compile the model with torch.compile."] = False
    recompute: Annotated[
        Recompute | None,
        "Compute this again in the backward pass in place of keeping it: the inside of each MLP "
        "(half of the activations, a tenth more time), all of each layer (most of them, a third "
        "more time); none: nothing.",
    ] = None
    offload_activations: Annotated[
        bool, "Keep what the backward pass of each layer needs in the host's memory; needs a GPU."
    ] = False
    share_prefix: Annotated[
        bool, "Compute a prompt once for all answers to it in a micro-batch."
    ] = True
    group_prompts: Annotated[
        bool, "Put the pairs of a prompt into the same step, which computes it once."
    ] = False

    router_loss: Annotated[
        float | None, "Weight of the loss that keeps experts evenly used, > 0; none: without it."
    ] = None
    reference_sync_every: Annotated[
        int | None, "Move the reference towards the policy every so many steps, >= 1; none: never."
    ] = None
    reference_sync_share: Annotated[
        float | None, "How far it moves, in (0, 1]: 1 copies the policy; 0.6 (TR-DPO's alpha)."
    ] = None

    seed: Annotated[int, "Seed of the order of pairs and of every random draw, in [0, 2^63)."] = 0
    eval_every: Annotated[
        int | None, "Evaluate every so many steps, >= 1; none: before the first and after the last."
    ] = None
    save_every: Annotated[
        int | None, "Write a checkpoint every so many steps, >= 1; none: when stopped or done."
    ] = None
    save_in_background: Annotated[
        bool,
        "Copy the state that --save-every writes within the host's memory, and write it while "
        "training goes on.",
    ] = False
    max_time: Annotated[
        str | None,
        "Stop with a checkpoint before the run takes longer, as 90s, 15m or 2h30m; none: never.",
    ] = None
    save_before_end: Annotated[
        str | None,
        "Stop with a checkpoint so long before the end of the Slurm job it is in; none: do not.",
    ] = None
    keep: Annotated[int, "Newest checkpoints kept, >= 1."] = 2
    keep_best: Annotated[bool, "Save the model of the lowest evaluation loss."] = False
    early_stopping: Annotated[
        int | None, "Stop after so many evaluations without a lower loss, >= 1; none: never."
    ] = None
    log_every: Annotated[int, "Write a line of metrics every so many steps, >= 1."] = 1
    samples: Annotated[
        int | None,
        "Held-out prompts, 1 to 100, that the model answers before and after, for the report.",
    ] = None
    track: Annotated[
        str | None,
        "Log to these as well, separated by commas: tensorboard, wandb, mlflow; none: to "
        "metrics.jsonl alone.",
    ] = None
    on_nonfinite: Annotated[
        OnNonfinite, "At a non-finite loss or gradient: stop the run, or skip the step."
    ] = "stop"
    resume: Annotated[
        str | None, "Checkpoint to go on from: a path, or auto for the newest in the run folder."
    ] = None

    def __post_init__(self) -> None:
        if faults := [*self._faults(), *self._contradictions()]:
            raise InputError("\n".join(faults))
        if self.micro_batch_size is None and self.tokens_per_micro_batch is None:
            object.__setattr__(self, "tokens_per_micro_batch", 8192)
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        for name, value in _OPTIMIZER_DEFAULTS[self.optimizer].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.reference_sync_share is None and self.reference_sync_every is not None:
            object.__setattr__(self, "reference_sync_share", 0.6)
        if self.decay_share is None and self.schedule == "wsd":
            object.__setattr__(self, "decay_share", 0.2)

    @property
    def token_budget(self) -> int | None:
        """Tokens per micro-batch as a number; None where pairs are counted.

        Raises:
            InputError: it is still to be chosen.
        """
        if self.tokens_per_micro_batch == AUTO:
            raise InputError(
                "train.tokens_per_micro_batch = auto is chosen by dpo train and dpo plan, from "
                "what a step of training needs: give a number"
            )
        return self.tokens_per_micro_batch

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of a run with so many steps per pass over the data."""
        return self.steps or steps_per_epoch * (self.epochs or 1)

    def _faults(self) -> Iterator[str]:
        for name, (expected, holds) in _RANGES.items():
            value = getattr(self, name)
            if value not in (None, AUTO) and not holds(value):
                yield f"train.{name} must be {expected}, got {value}"
        given = {name for name in _OPTIONAL_CHOICES if getattr(self, name) is not None}
        choices = _CHOICES | {name: _OPTIONAL_CHOICES[name] for name in given}
        for name, choice in choices.items():
            if (value := getattr(self, name)) not in get_args(choice):
                yield f"train.{name} must be one of {', '.join(get_args(choice))}, got {value!r}"
        for name in ("max_time", "save_before_end", "rank_timeout"):
            if (span := getattr(self, name)) is not None:
                try:
                    seconds_of(span)
                except InputError as error:
                    yield f"train.{name}: {error}"
        try:
            tracker_names(self.track)
        except InputError as error:
            yield f"train.track: {error}"
        for pattern, scale in self.rates.items():
            if not 0 < scale < math.inf:
                yield f"train.rates: {pattern} must be above 0 and finite, got {scale}"
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"train.rates: {pattern!r} is no regular expression: {error}"

    def _contradictions(self) -> Iterator[str]:
        if self.micro_batch_size is not None and self.tokens_per_micro_batch is not None:
            yield "train.micro_batch_size and train.tokens_per_micro_batch: give one, not both"
        if self.epochs is not None and self.steps is not None:
            yield "train.epochs and train.steps: give one, not both"
        if self.samples is not None and self.parallel != "data":
            yield f"train.samples needs train.parallel = data, which is {self.parallel}"
        if self.samples is not None and self.tensor_ranks > 1:
            yield f"train.samples needs train.tensor_ranks = 1, which is {self.tensor_ranks}"
        yield from self._contradictions_of_the_optimizer()
        if self.decay_share is not None and self.schedule != "wsd":
            yield f"train.decay_share is for train.schedule = wsd, which is {self.schedule}"
        if self.reference_sync_share is not None and self.reference_sync_every is None:
            yield "train.reference_sync_share needs train.reference_sync_every"
        if self.early_stopping is not None and self.eval_every is None:
            yield "train.early_stopping needs train.eval_every: it counts evaluations"
        if self.keep_best and self.eval_every is None:
            yield "train.keep_best needs train.eval_every: it compares evaluations"
        if self.save_in_background and self.save_every is None and not self.keep_best:
            yield "train.save_in_background needs train.save_every or train.keep_best"
        if self.group_prompts and not self.share_prefix:
            yield "train.group_prompts needs train.share_prefix: prompts are not shared without it"
        if self.dtype == "fp16-mixed" and self.device == "cpu":
            yield "train.dtype = fp16-mixed needs a GPU, train.device is cpu"
        if self.offload_activations and self.device == "cpu":
            yield "train.offload_activations needs a GPU, train.device is cpu"
        if self.tf32 and self.device == "cpu":
            yield "train.tf32 needs a GPU, train.device is cpu"
        if self.tf32 and self.dtype != "float32":
            yield f"train.tf32 is for train.dtype = float32, which is {self.dtype}"

    def _contradictions_of_the_optimizer(self) -> Iterator[str]:
        if self.stochastic_rounding:
            yield from self._contradictions_of_rounding()
        read = _OPTIMIZER_DEFAULTS.get(self.optimizer, {})
        for name in ("beta1", "beta2", "epsilon", "momentum"):
            if getattr(self, name) is not None and name not in read:
                yield f"train.{name} has no meaning for train.optimizer = {self.optimizer}"
        if self.optimizer != "schedule-free":
            return
        if self.schedule != "constant":
            yield (
                "train.optimizer = schedule-free needs train.schedule = constant, which is "
                f"{self.schedule}: its average takes the place of a decay"
            )
        if self.beta1 == 0:
            yield "train.beta1 must be above 0 for train.optimizer = schedule-free, got 0.0"
        if self.ema_decay is not None:
            yield "train.ema_decay has no meaning for train.optimizer = schedule-free: it averages"

    def _contradictions_of_rounding(self) -> Iterator[str]:
        for name, ones in (
            ("dtype", ("bfloat16",)),
            ("optimizer", ("adamw", "lion")),
            ("parallel", ("data",)),
            ("tensor_ranks", (1,)),
        ):
            if (value := getattr(self, name)) not in ones:
                allowed = " or ".join(map(str, ones))
                yield f"train.stochastic_rounding is for train.{name} = {allowed}, which is {value}"
