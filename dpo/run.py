"""A whole run, from a config to a run folder: ``dpo train`` and ``dpo reference``.

What is composed here is defined elsewhere; this module decides what happens in which order.
``dpo.run_loop`` has the loop, README.md describes the folder of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from dpo.adapters import adapted_layers, rate_scales
from dpo.checkpoint import Checkpoint
from dpo.config import RunConfig
from dpo.device import choose_device, explained_lack_of_memory
from dpo.distributed import joined_ranks
from dpo.duration import seconds_of
from dpo.errors import InputError, RunError
from dpo.files import FolderLock, atomic_write, remove_leftovers
from dpo.inputs import Inputs, ModelFolder, Models, find_models, load_inputs, pin_revisions
from dpo.launch import Launch
from dpo.models import Decoder
from dpo.parallel import kind_of_ranks
from dpo.precision import precision_of
from dpo.prepare import prepare_policy
from dpo.progress import Console, SilentConsole
from dpo.ranks import Ranks
from dpo.reference_pass import References, obtain_references
from dpo.rehearsed_ranks import ranks_alike
from dpo.report.record import CONFIG
from dpo.run_checks import check_models, refuse_another
from dpo.run_folder import CHECKPOINTS, find_checkpoint
from dpo.run_header import header
from dpo.run_loop import RunLoop, RunResult
from dpo.run_record import write_data
from dpo.stopping import TimeLimit
from dpo.token_budget import choose_budget, with_budget
from dpo.tracking import check_trackers, plain_config, tracking
from dpo.train_config import AUTO
from dpo.trainer import Trainer, uses_live_reference


def train(config: RunConfig, *, console: Console, go_on: str | None = None) -> RunResult:
    """Train a model on preference pairs and write the run folder ``config.out``.

    Under torchrun the processes train one model together (``dpo.distributed``), and the first of
    them writes the folder.

    Args:
        config: of the run.
        console: is told what happens.
        go_on: what goes on with the run if it is stopped, in words; None: ``dpo resume``.

    Raises:
        InputError: the model, the data or the folder cannot be used.
        RunError: training cannot go on.
        SystemExit: a signal or the time stopped the run after a checkpoint; the code is 128 + the
            signal's number, or ``OUT_OF_TIME``.
    """
    limit = TimeLimit(config.train)
    check_trackers(config.train.track)
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: --out of dpo train is the folder of the run")
    device = choose_device(config.train)
    kind = kind_of_ranks(config)
    waits = timedelta(seconds=seconds_of(config.train.rank_timeout or "1h"))
    with (
        joined_ranks(device, kind, timeout=waits) as ranks,
        _held(folder, ranks),
        explained_lack_of_memory(),
    ):
        own_console, console = console, console if ranks.is_first else SilentConsole()
        checkpoint = _find_checkpoint(folder, config, ranks, console)
        told_before = len(console.told)
        models, inputs = _load(config, ranks, console, partial(check_models, config))
        told_of_data = console.told[told_before:]
        config = pin_revisions(config, models, inputs)
        if checkpoint is not None:
            refuse_another(checkpoint, config, models, inputs)
        if config.train.tokens_per_micro_batch == AUTO:
            alike = ranks_alike(config, Launch.of_environment())
            budget = choose_budget(
                config, models.policy.config, inputs.pairs, device=device, ranks=alike
            )
            console.say(budget.describe())
            config = with_budget(config, ranks.first([budget.tokens])[0])
        if ranks.is_first:
            whole = replace(config, train=replace(config.train, resume=None))
            for line in header(config, models, inputs, device=str(device)):
                console.say(line)
            atomic_write(folder / CONFIG, whole.to_toml())
            write_data(folder, inputs, told_of_data)
        is_new = checkpoint is None
        trainer = _make_trainer(config, models, inputs, device, ranks, console, is_new=is_new)
        advice = go_on or f"dpo resume {folder}"
        run = RunLoop(config, models, trainer, console, own_console, limit, advice)
        run.begin_samples()
        if checkpoint is not None:
            run.restore(checkpoint)
        with tracking(
            config.train.track if ranks.is_first else None,
            folder,
            plain_config(config.flat()),
            step=trainer.step,
            console=console,
        ) as tracked:
            return run.train(tracked)


def compute_reference_only(config: RunConfig, *, console: Console) -> None:
    """Fill the reference cache for the pairs of ``config`` and train nothing.

    Raises:
        InputError: the model or the data cannot be used.
        RunError: a log-prob is not finite, or the device's memory is full.
    """
    device = choose_device(config.train)
    with joined_ranks(device) as ranks, explained_lack_of_memory():
        console = console if ranks.is_first else SilentConsole()
        models, inputs = _load(config, ranks, console)
        obtain_references(config, models, inputs, console, device=device, ranks=ranks)


@contextmanager
def _held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder of a run, rid of what killed writers left, on the rank that writes to it."""
    with FolderLock(folder) if ranks.is_first else nullcontext():
        for place in (folder, folder / CHECKPOINTS) if ranks.is_first else ():
            remove_leftovers(place)
        yield


def _find_checkpoint(
    folder: Path, config: RunConfig, ranks: Ranks, console: Console
) -> Checkpoint | None:
    """Find what ``train.resume`` asks for; where nothing can be found the first rank says so."""
    try:
        return find_checkpoint(folder, config.train.resume, console, ranks)
    except (InputError, RunError):
        if not ranks.is_first:
            ranks.wait()  # for the first, which ends
        raise


def _load(
    config: RunConfig,
    ranks: Ranks,
    console: Console,
    check: Callable[[Models], None] | None = None,
) -> tuple[Models, Inputs]:
    """Find models and read data: one rank of a machine fetches and tokenizes for all of them.

    Raises:
        InputError: one of them cannot be used, or a rank sees other data.
    """

    def load() -> tuple[Models, Inputs]:
        models = find_models(config)
        if check is not None:
            check(models)
        return models, load_inputs(config, models, console)

    models, inputs = ranks.one_before_others(load)
    ranks.check_same("the pairs", inputs.pairs.fingerprint)
    return models, inputs


def _make_trainer(
    config: RunConfig,
    models: Models,
    inputs: Inputs,
    device: torch.device,
    ranks: Ranks,
    console: Console,
    *,
    is_new: bool,
) -> Trainer:
    loss, is_own_reference = config.loss.build(), models.reference is models.policy
    for pairs in (inputs.pairs, inputs.eval_pairs):
        if pairs is not None:  # the trainer asks the same, but after the reference is computed
            loss.check(pairs)
    # A policy that is its own reference is scored as it lies on disk: this comes before a resumed
    # run restores it. Another reference leaves the memory before the policy is loaded.
    policy = _load_policy(config, models.policy, device, ranks) if is_own_reference else None
    references = mismatched = References()
    reference_weights = None
    if uses_live_reference(loss, config.train):
        if not is_own_reference:
            model = _load_policy(config, models.reference, device, ranks)
            reference_weights = dict(model.named_parameters())
    elif loss.needs_reference:
        obtain = partial(
            obtain_references,
            config,
            models,
            console=console,
            device=device,
            model=policy,
            ranks=ranks,
        )
        references = obtain(inputs, compares_later=is_new)
        if loss.needs_mismatch:
            mismatched = obtain(inputs.mismatched(seed=config.train.seed))
    policy = policy or _load_policy(config, models.policy, device, ranks)
    known = models.policy.adapter
    if known is not None and known.dropout:
        console.warn(f"{known.path} was trained with a dropout of {known.dropout}; here is none")
    ranks.take_apart(policy)
    prepare_policy(policy, config)
    rounds_to_nearest = config.train.dtype == "bfloat16" and not config.train.stochastic_rounding
    if rounds_to_nearest and not adapted_layers(policy):
        console.warn(
            "bfloat16 weights do not move at the learning rates of DPO, which lie below their "
            "resolution: --stochastic-rounding lets them, bf16-mixed keeps float32 weights"
        )
    return Trainer(
        policy,
        inputs.pairs,
        config.train,
        loss=loss,
        reference=references.pairs,
        eval_pairs=inputs.eval_pairs,
        eval_reference=references.eval_pairs,
        mismatched_reference=mismatched.pairs,
        eval_mismatched_reference=mismatched.eval_pairs,
        reference_weights=reference_weights,
        starts_at_reference=is_own_reference,
        rate_factors=rate_scales(policy, config.adapter.b_rate_ratio or 1.0),
        ranks=ranks,
    )


def _load_policy(
    config: RunConfig, folder: ModelFolder, device: torch.device, ranks: Ranks
) -> Decoder:
    dtype = precision_of(config.train).parameters
    return folder.load(dtype=dtype, device=device, ranks=ranks)
