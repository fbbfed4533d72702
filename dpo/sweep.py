"""A grid of runs, one after another in one folder: ``dpo sweep``.

An option that takes a number, a switch, one of a few words or the name of a loss may be given
several values, separated by commas; the runs are all combinations of them.
"""

from __future__ import annotations

import gc
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from dpo import run
from dpo.config import NONE, RunConfig
from dpo.errors import InputError, RunError
from dpo.progress import Console
from dpo.report import REPORT, write_comparison
from dpo.report.charts import SERIES
from dpo.report.record import CONFIG, read_record
from dpo.settings import Option, Setting, flat_document, known_options, read_settings, resolve
from dpo.train_config import AUTO

Layer = Sequence[Setting]
_MOST_RUNS = 1_000
_OF_LOSS = Option(float | str, is_optional=False, help="")
_FOUND_LATER = ("revision", "reference_revision", "data_revision", "eval_data_revision")


@dataclass(frozen=True, slots=True)
class Axis:
    """An option that has several values, as the user wrote them."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GridRun:
    """A run of the grid.

    Attributes:
        name: what tells it from the others, and the name of its folder.
        config: of the run, in its folder.
    """

    name: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.out)

    @property
    def is_done(self) -> bool:
        """Whether the run has ended: its model is written last."""
        return (self.folder / "model").is_dir()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: of the grid.
        state: "done", "was done" or "failed".
        ends: the last held-out value of some metrics, those that there are.
    """

    run: GridRun
    state: str
    ends: dict[str, float]


def plan_sweep(layers: Sequence[Layer], *, name_of: Callable[[str], str]) -> list[GridRun]:
    """Make all combinations of the values that options have; nothing is loaded or written.

    Args:
        layers: of settings, a later one over an earlier one, as for ``resolve``.
        name_of: the short name of a key, for the names of the runs.

    Raises:
        InputError: no option has several values, a combination is no config, two are the same run,
            or a folder holds a run with another config.
    """
    given = {setting.key: setting for layer in layers for setting in layer}
    axes = [
        Axis(key, tuple(part.strip() for part in str(setting.value).split(",")))
        for key, setting in given.items()
        if _has_several(setting)
    ]
    if not axes:
        raise InputError(
            "no option has several values: give some separated by commas, as in --beta 0.05,0.1"
        )
    if given.get("train.resume", Setting("", NONE, "")).value != NONE:
        raise InputError(
            "train.resume: dpo sweep goes on with the runs of its folder by itself; leave it away"
        )
    points = list(product(*(axis.values for axis in axes)))
    if len(points) > _MOST_RUNS:
        raise InputError(f"the grid has {len(points):,} runs; at most {_MOST_RUNS:,} are done")
    runs, faults = [], []
    for values in points:
        choice = dict(zip([axis.key for axis in axes], values, strict=True))
        name = _name({name_of(key): value for key, value in choice.items()})
        try:
            runs.append(GridRun(name, _config(layers, choice, name)))
        except InputError as error:
            faults += [f"{name}: {line}" for line in str(error).splitlines()]
    faults += [*_doubles(runs), *(fault for each in runs for fault in _other_config(each))]
    if faults:
        raise InputError("\n".join(dict.fromkeys(faults)))
    return runs


def run_sweep(runs: Sequence[GridRun], *, console: Console) -> Iterator[Outcome]:
    """Do the runs in turn, those apart that are done, and yield what became of each.

    A run that was stopped goes on; one that fails is told, and the next one begins. After each the
    page about all that have begun is written beside their folders.

    Raises:
        SystemExit: a signal or the time stopped a run after a checkpoint.
    """
    for number, each in enumerate(runs, start=1):
        title = f"run {number} of {len(runs)}: {each.name}"
        if each.is_done:
            console.say(f"{title}: was done")
            state = "was done"
        else:
            console.say(title)
            state = _do(each, console)
        begun = [one.folder for one in runs if (one.folder / CONFIG).exists()]
        if begun:
            write_comparison(begun, report_of(runs), title=f"Sweep {each.folder.parent.name}")
        yield Outcome(each, state, read_record(each.folder, SERIES).ends())


def report_of(runs: Sequence[GridRun]) -> Path:
    """Return where the page about all runs is."""
    return runs[0].folder.parent / REPORT


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the run of the highest held-out accuracy, of equal ones that nearest its reference.

    Losses of several betas do not compare, accuracies do. None if no run has one.
    """
    known = [each for each in outcomes if "rewards/accuracy" in each.ends]
    return max(
        known,
        key=lambda each: (each.ends["rewards/accuracy"], -each.ends.get("kl/k3_tok", 0.0)),
        default=None,
    )


def _do(each: GridRun, console: Console) -> str:
    resumed = replace(each.config, train=replace(each.config.train, resume="auto"))
    try:
        run.train(resumed, console=console, go_on="the same dpo sweep")
    except (InputError, RunError, OSError) as error:
        console.warn(f"{each.name} failed: {error}")
        return "failed"
    finally:  # the memory of a model is there for the next one
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return "done"


def _has_several(setting: Setting) -> bool:
    """Tell whether a text of the command line holds several values of its option."""
    text, table = setting.value, setting.key.partition(".")[0]
    if not setting.is_text or not isinstance(text, str) or "," not in text:
        return False
    if setting.key == "loss.name":
        return ":" not in text  # else a mixture, or code
    default = _OF_LOSS if table == "loss" else Option(str, is_optional=False, help="")
    option = known_options().get(setting.key, default)
    return bool(option.choices) or option.kind in (int, float, bool, _OF_LOSS.kind)


def _name(values: dict[str, str]) -> str:
    """Name a folder by options and values: ``beta-0.1_loss-ipo``."""
    return "_".join(
        re.sub(r"[^\w.+-]", "-", f"{name}-{value}", flags=re.ASCII)
        for name, value in values.items()
    )


def _config(layers: Sequence[Layer], choice: dict[str, str], name: str) -> RunConfig:
    """Resolve the layers with one value of each axis, in the folder of the run."""
    chosen = [
        [
            replace(setting, value=choice[setting.key]) if setting.key in choice else setting
            for setting in layer
        ]
        for layer in layers
    ]
    config = resolve(*chosen).config
    return replace(config, out=str(Path(config.out) / name))


def _doubles(runs: Sequence[GridRun]) -> Iterator[str]:
    """Yield a fault for each run that is another one too, or has its folder."""
    seen: list[GridRun] = []
    for each in runs:
        for other in seen:
            if replace(each.config, out=other.config.out) == other.config:
                yield f"{other.name} and {each.name} are the same run: a value is given twice"
            elif each.name == other.name:
                yield f"two runs have the name {each.name}"
        seen.append(each)


def _other_config(each: GridRun) -> Iterator[str]:
    """Yield a fault for each option with which the folder's run was done otherwise."""
    if not each.is_done or not (each.folder / CONFIG).is_file():
        return
    was = {setting.key: setting.value for setting in read_settings(each.folder / CONFIG)}
    wanted = dict(flat_document(tomllib.loads(each.config.to_toml())))
    for key in dict.fromkeys([*wanted, *was]):
        is_found_later = wanted.get(key) == AUTO or (
            key in _FOUND_LATER and wanted.get(key) == NONE
        )
        if key != "out" and not is_found_later and was.get(key) != wanted.get(key):
            yield (
                f"{each.folder} holds a run that was done with {key} = {was.get(key)}, which is to "
                f"be {wanted.get(key)}: choose another --out, or remove it"
            )
