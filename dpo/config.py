"""What a run is: the model, the data and every option, as one value that TOML can hold.

The text beside a field is its documentation and its line in ``dpo train --help``. To add an option,
add a field to its section; to add a section, add a dataclass and a field of ``RunConfig``. The
config file, ``--set``, the flag and ``--print-config`` follow from the fields (``dpo.settings``).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from dpo.adapter_config import AdapterConfig
from dpo.errors import InputError
from dpo.mixing import MixConfig
from dpo.pair import AnswerTurns
from dpo.pair_rows import RankedPairs
from dpo.tokenize_config import TokenizeOptions
from dpo.train_config import EVALUATION_OPTIONS, TrainConfig

if TYPE_CHECKING:
    from dpo.losses import Loss

OnBadRow = Literal["error", "skip"]
Sources = str | tuple[str, ...]
NONE = "none"  # TOML has no null: an optional value that is off is this word


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The loss and its own options, which are checked when it is built."""

    name: Annotated[
        str, "Name of a loss, a mixture (sigmoid:0.8,sft:0.2), or package.module:function."
    ] = "sigmoid"
    options: Mapping[str, float | str] = field(default_factory=dict)

    def build(self) -> "Loss":
        """Make the loss; imports torch.

        Raises:
            InputError: there is no such loss, or it refuses an option.
        """
        from dpo.losses import make_loss

        return make_loss(self.name, **self.options)


@dataclass(frozen=True, slots=True)
class ReferenceCacheConfig:
    """Where the reference log-probs are kept."""

    dir: Annotated[
        str | None, "Folder of the reference log-probs, shared by runs; none: the user's cache."
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run of ``dpo train``, ``dpo reference`` or ``dpo score``.

    Raises:
        InputError: a value is empty or out of range, or two options contradict each other.
    """

    model: Annotated[str, "Model to start from: a folder, or an id of the Hugging Face Hub."]
    data: Annotated[
        Sources,
        "Preference pairs: .jsonl[.gz], .json, .parquet, or an id of the Hub; several are mixed.",
    ]
    out: Annotated[str, "What is written: a folder for the run; of dpo score, the file of scores."]
    revision: Annotated[str | None, "Commit, tag or branch of a model on the Hub."] = None
    reference: Annotated[str | None, "Reference model; none: the model as it starts."] = None
    reference_revision: Annotated[
        str | None, "Commit, tag or branch of a reference on the Hub."
    ] = None
    data_split: Annotated[str | None, "Split of a data set on the Hub."] = None
    data_revision: Annotated[str | None, "Commit, tag or branch of a data set on the Hub."] = None
    eval_data: Annotated[str | None, "Held-out pairs, in the forms of --data."] = None
    eval_data_split: Annotated[str | None, "Split of held-out pairs on the Hub."] = None
    eval_data_revision: Annotated[
        str | None, "Commit, tag or branch of held-out pairs on the Hub."
    ] = None
    eval_split: Annotated[
        float | None, "Share of --data to hold out, in (0, 1); in place of --eval-data."
    ] = None
    columns: Annotated[
        Mapping[str, str], "Columns under other names: prompt=question,chosen=response_a,..."
    ] = field(default_factory=dict)
    ranked: Annotated[
        RankedPairs | None,
        "Of rows that rank answers by scores: all two of them make a pair, the best and each worse "
        "one, or as a list each and the next worse one; list for a loss of lists, else all.",
    ] = None
    answer_turns: Annotated[
        AnswerTurns | None,
        "Let answers go on over turns of a tool or a user, and train on all messages of the "
        "assistant in them or on the last; none refuses such answers.",
    ] = None
    on_bad_row: Annotated[OnBadRow, "At a faulty row: stop, or skip and count it."] = "error"
    mix: MixConfig = field(default_factory=MixConfig)
    tokenize: TokenizeOptions = field(default_factory=TokenizeOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reference_cache: ReferenceCacheConfig = field(default_factory=ReferenceCacheConfig)

    def __post_init__(self) -> None:
        if faults := [*self._faults(), *self._contradictions()]:
            raise InputError("\n".join(faults))

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets that ``data`` names."""
        return (self.data,) if isinstance(self.data, str) else self.data

    def _faults(self) -> Iterator[str]:
        for name, texts in (("model", [self.model]), ("data", self.sources), ("out", [self.out])):
            if not texts or not all(texts):
                yield f"{name} must not be empty"
        if len(set(self.sources)) < len(self.sources):
            yield f"data names a data set twice: {', '.join(self.sources)}"
        if self.eval_split is not None and not 0 < self.eval_split < 1:
            yield f"eval_split must be in (0, 1), got {self.eval_split}"
        if self.ranked not in (None, *get_args(RankedPairs)):
            yield f"ranked must be one of {', '.join(get_args(RankedPairs))}, got {self.ranked!r}"
        if self.answer_turns not in (None, *get_args(AnswerTurns)):
            yield f"answer_turns must be one of all, last, got {self.answer_turns!r}"
        if self.on_bad_row not in get_args(OnBadRow):
            yield (
                f"on_bad_row must be one of {', '.join(get_args(OnBadRow))}, "
                f"got {self.on_bad_row!r}"
            )

    def _contradictions(self) -> Iterator[str]:
        if self.eval_data is not None and self.eval_split is not None:
            yield "eval_data and eval_split: give one, not both"
        if self.eval_data is None and self.eval_split is None:
            for name in EVALUATION_OPTIONS:
                if getattr(self.train, name):
                    yield f"train.{name} needs held-out pairs: give eval_data or eval_split"
        sets, weights = len(self.sources), self.mix.weights
        if sets > 1 and self.data_revision is not None:
            yield f"data_revision is of one data set, but data names {sets}"
        if sets == 1 and self.mix != MixConfig():
            given = [item.name for item in fields(MixConfig) if getattr(self.mix, item.name)]
            yield f"mix.{given[0]} is for several data sets, but data names one"
        elif weights is not None and len(weights) != sets:
            yield f"mix.weights has {len(weights)} numbers, but data names {sets} data sets"
        for name, needed in (
            ("reference_revision", "reference"),
            ("eval_data_split", "eval_data"),
            ("eval_data_revision", "eval_data"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                yield f"{name} needs {needed}, which is not given"

    def to_toml(self, origins: Mapping[str, str] | None = None) -> str:
        """Write the config as TOML, which reads back as the same config.

        Args:
            origins: where the value of each key came from, to be said in a comment.
        """
        lines: list[str] = []
        tables: dict[str, list[str]] = {"": lines}
        for key, value in self.flat().items():
            table, _, name = key.rpartition(".")
            entry = f"{name} = {_toml_value(value)}"
            if origins is not None:
                entry = f"{entry:<40}  # {origins.get(key, 'default')}"
            tables.setdefault(table, []).append(entry)
        parts = ["\n".join(tables.pop(""))]
        parts += [f"[{table}]\n" + "\n".join(entries) for table, entries in tables.items()]
        return "\n\n".join(parts) + "\n"

    def flat(self) -> dict[str, object]:
        """Return every value under its key, ``table.name`` or, at the top, ``name``."""
        return dict(_flat(self, ""))


def _flat(section: object, prefix: str) -> Iterator[tuple[str, object]]:
    assert is_dataclass(section)
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _flat(value, f"{item.name}.")
        elif isinstance(section, LossConfig) and item.name == "options":
            yield from ((f"{prefix}{name}", option) for name, option in value.items())
        else:
            yield prefix + item.name, value


def _toml_value(value: object) -> str:
    match value:
        case None:
            return json.dumps(NONE)
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # a JSON string is a TOML string, but for this one character
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple():
            return "[" + ", ".join(map(_toml_value, value)) + "]"
        case Mapping():
            entries = (f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
            return "{ " + ", ".join(entries) + " }" if value else "{}"
    raise TypeError(f"no TOML for {type(value).__name__}")
