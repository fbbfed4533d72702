"""From a config file, ``--set`` and flags to a checked config that knows where it came from.

Sources are layers of settings; a later layer overrides an earlier one. Every fault of every layer
is found before any is reported.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dpo.config import NONE, LossConfig, RunConfig, Sources
from dpo.errors import InputError

Section = TypeVar("Section")

# Two ways to say one thing: the one that is set takes the place of the other of an earlier layer.
_ALTERNATIVES = {
    "train.micro_batch_size": "train.tokens_per_micro_batch",
    "train.tokens_per_micro_batch": "train.micro_batch_size",
    "train.epochs": "train.steps",
    "train.steps": "train.epochs",
    "eval_data": "eval_split",
    "eval_split": "eval_data",
}
_MOST_DOTS = 1_000  # of a line: the time to read a dotted key grows with the square of its parts
_NUMBER_OR_TEXT = float | str  # what an option of a loss can be
_NUMBERS = tuple[float, ...]
_LISTS: Mapping[Any, Any] = {Sources: str, _NUMBERS: float}  # what the items of a list are
_ALONE: Mapping[Any, Any] = {Sources: str, _NUMBERS: ()}  # what is no list


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as the user gave it.

    Attributes:
        key: ``table.name``, or ``name`` at the top of the file.
        value: as TOML decodes it, or the text of a command line.
        origin: where it was given, as the user would say it.
        is_text: whether the value is still to be read from text.
    """

    key: str
    value: object
    origin: str
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config, and the origin of each key that is not a default."""

    config: RunConfig
    origins: Mapping[str, str]

    def to_toml(self) -> str:
        """Write the config as TOML with the origin of each value beside it."""
        return self.config.to_toml(self.origins)


@dataclass(frozen=True, slots=True)
class Option:
    """A key of the config.

    Attributes:
        kind: its type without None and words.
        is_optional: whether None is allowed.
        help: what it means.
        default: what it is if not given.
        words: texts that are allowed beside ``kind``.
    """

    kind: Any
    is_optional: bool
    help: str
    default: object = None
    words: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a ``Literal``; empty for other types."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


@cache
def known_options() -> Mapping[str, Option]:
    """Return every key of the config except a loss's own options."""
    return dict(_options(RunConfig, ""))


def read_settings(path: Path) -> list[Setting]:
    """Read a layer from a TOML file.

    Raises:
        InputError: the file cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if max((line.count(".") for line in text.splitlines()), default=0) > _MOST_DOTS:
            raise ValueError(f"a line has more than {_MOST_DOTS} dots")
        document = tomllib.loads(text)
        return [Setting(key, value, str(path)) for key, value in flat_document(document)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read the config file: {error.strerror}") from error


def settings_of_run(folder: Path) -> list[Setting]:
    """Read what a run that has begun in ``folder`` is; wherever that lies by now.

    Raises:
        InputError: no run has begun there.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise InputError(f"{folder} is no folder of a run that has begun: config.toml is missing")
    return [*read_settings(path), Setting("out", str(folder), "the folder of the run")]


def parse_assignment(text: str) -> Setting:
    """Read ``key=value`` of ``--set``.

    Raises:
        InputError: there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: expected key=value, as in train.batch_size=64")
    return Setting(key.strip(), value.strip(), f"--set {key.strip()}", is_text=True)


def resolve(*layers: Sequence[Setting]) -> Resolved:
    """Lay the layers over the defaults and check the result, the loss's options included.

    Raises:
        InputError: a key is unknown, a value has another type or is out of range, a required value
            is missing, or options contradict each other; all faults are named.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    typed: set[str] = set()
    faults: list[str] = []
    for layer in layers:
        given = {setting.key for setting in layer}
        for setting in layer:
            try:
                value = _checked(setting)
            except InputError as error:
                faults.append(str(error))
                continue
            values[setting.key], origins[setting.key] = value, setting.origin
            typed = typed | {setting.key} if setting.is_text else typed - {setting.key}
            other = _ALTERNATIVES.get(setting.key)
            if other in values and other not in given and value is not None:
                values[other], origins[other] = None, f"{setting.origin} takes its place"
    unplaced: list[str] = []
    config = _build_run(values, unplaced)
    faults += [_with_origins(fault, origins) for fault in unplaced]
    if config is None or faults:
        raise InputError("\n".join(faults))
    if "loss.name" not in typed:
        _refuse_code(config, origins)
    return Resolved(_with_loss_defaults(config, origins), origins)


def _build_run(values: Mapping[str, object], faults: list[str]) -> RunConfig | None:
    """Make the sections and the config of them; add the faults of all of them to ``faults``."""
    top: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for item in fields(RunConfig):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in top:
            faults.append(
                f"{item.name} is missing: give --{item.name} or set it in the config file"
            )
            top[item.name] = "missing"  # to go on and find further faults
    for name, section in _sections().items():
        prefix = f"{name}."
        arguments: dict[str, Any] = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }
        if section is LossConfig:
            options = {key: arguments.pop(key) for key in [*arguments] if key != "name"}
            arguments["options"] = options
        if (made := _make(section, arguments, faults)) is not None:
            top[name] = made
    return _make(RunConfig, top, faults)


def _make(
    section: Callable[..., Section], arguments: Mapping[str, object], faults: list[str]
) -> Section | None:
    try:
        return section(**arguments)
    except InputError as error:
        faults += str(error).splitlines()
        return None


def _refuse_code(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Refuse to import what a file names: that is for the command line alone to ask.

    Raises:
        InputError: the loss is to be imported.
    """
    from dpo.losses import is_imported

    if is_imported(config.loss.name):
        raise InputError(
            f"{origins['loss.name']}: loss.name names code to run, which a file cannot: if you "
            f"mean it, give --loss {config.loss.name}"
        )


def _with_loss_defaults(config: RunConfig, origins: Mapping[str, str]) -> RunConfig:
    """Check the loss's options and spell out those that were left at their defaults."""
    from dpo.losses import LOSSES

    try:
        loss = config.loss.build()
    except InputError as error:
        given = {origin for key, origin in origins.items() if key.startswith("loss.")}
        raise InputError(f"{error} (from {', '.join(sorted(given))})") from error
    if config.reference is not None and not loss.needs_reference:
        raise InputError(
            f"reference is given ({config.reference}), but the loss {config.loss.name} reads none"
        )
    if config.loss.name not in LOSSES:
        return config
    options = {item.name: getattr(loss, item.name) for item in fields(loss)}
    return replace(config, loss=LossConfig(config.loss.name, options))


def _with_origins(fault: str, origins: Mapping[str, str]) -> str:
    """Say behind a fault where the values that it names were given."""
    words = dict.fromkeys(word.strip(".") for word in re.findall(r"[\w.-]+", fault))
    given = [f"{word}: {origins[word]}" for word in words if word in origins]
    return f"{fault} ({', '.join(given)})" if given else fault


def _checked(setting: Setting) -> object:
    """Return the setting's value in the type of its option."""
    option = _option(setting)
    value = _from_text(str(setting.value), option) if setting.is_text else setting.value
    if option.is_optional and value == NONE:
        return None
    value = tuple(value) if isinstance(value, list) else value
    texts = value if isinstance(value, tuple) else (value,)
    if not all(_is_unicode(text) for text in texts if isinstance(text, str)):
        raise InputError(f"{setting.origin}: {setting.key} is not valid UTF-8: {value!r}")
    if not _fits(value, option):
        raise InputError(
            f"{setting.origin}: {setting.key} must be {_expected(option)}, got {_in_words(value)}"
            f"{_nearest(value, option)}"
        )
    if option.kind is float and isinstance(value, int):
        return float(value) if abs(value) < 2**1023 else (math.inf if value > 0 else -math.inf)
    return value


def _option(setting: Setting) -> Option:
    table, _, name = setting.key.partition(".")
    if setting.key in known_options():
        return known_options()[setting.key]
    if table == "loss" and name:
        return Option(_NUMBER_OR_TEXT, is_optional=False, help="an option of the loss")
    if setting.key in _sections():
        raise InputError(f"{setting.origin}: {setting.key} is a table, name a key of it")
    raise InputError(f"{setting.origin}: unknown key {setting.key!r}{_hint(setting.key)}")


def _hint(key: str) -> str:
    known = [*known_options(), "loss.beta", "loss.label_smoothing"]
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same_name or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _from_text(text: str, option: Option) -> object:
    """Read the text of a command line; text that does not fit is returned as it is."""
    if option.kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if get_origin(option.kind) is Mapping:
        pairs = [part.partition("=") for part in text.split(",") if part]
        _, kind = get_args(option.kind)
        return {name.strip(): _read(value.strip(), kind) for name, _, value in pairs}
    if option.kind == _NUMBERS:
        return tuple(_read(part, float) for part in text.split(","))
    return _read(text, option.kind)


def _read(text: str, kind: Any) -> object:
    try:
        return {int: int, float: float, _NUMBER_OR_TEXT: float}.get(kind, str)(text)
    except ValueError:
        return text


def _fits(value: object, option: Option) -> bool:
    if option.choices or value in option.words:
        return value in (*option.choices, *option.words)
    if get_origin(option.kind) is Mapping:
        _, kind = get_args(option.kind)
        return isinstance(value, dict) and all(
            name and item != "" and _is_of(kind, item) for name, item in value.items()
        )
    if isinstance(value, tuple):
        kind = _LISTS.get(option.kind, NoneType)
        return len(value) > 0 and all(_is_of(kind, item) for item in value)
    return _is_of(_ALONE.get(option.kind, option.kind), value)


def _is_of(kind: Any, value: object) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not text
        return False
    return True


def _nearest(value: object, option: Option) -> str:
    near = difflib.get_close_matches(str(value), [*option.choices, *option.words], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _expected(option: Option) -> str:
    if option.choices:
        words = f"one of {', '.join(option.choices)}"
    else:
        words = {
            bool: "true or false",
            int: "an integer",
            float: "a number",
            str: "a text",
            _NUMBER_OR_TEXT: "a number or a text",
            Sources: "a text or a list of texts",
            _NUMBERS: "a list of numbers",
            Mapping[str, str]: "a table of texts, as in prompt=question",
            Mapping[str, float]: "a table of numbers, as in lm_head=0.5",
        }[option.kind]
    words = " or ".join([words, *option.words])
    return f"{words}, or none" if option.is_optional else words


def _in_words(value: object) -> str:
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a text",
        tuple: "a list",
    }
    plain = list(value) if isinstance(value, tuple) else value
    shown = str(value).lower() if isinstance(value, bool) else repr(plain)
    return f"{shown} ({kinds.get(type(value), 'a ' + type(value).__name__)})"


def flat_document(document: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield ``table.name`` and value of each entry."""
    for name, value in document.items():
        key = prefix + name
        if isinstance(value, dict) and key not in known_options() and (value or key in _sections()):
            yield from flat_document(value, f"{key}.")
        else:
            yield key, value


@cache
def _sections() -> Mapping[str, Any]:
    hints = get_type_hints(RunConfig)
    return {name: hint for name, hint in hints.items() if is_dataclass(hint)}


def _options(config: type, prefix: str) -> Iterator[tuple[str, Option]]:
    hints = get_type_hints(config, include_extras=True)
    for item in fields(config):
        hint = hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _options(hint, f"{item.name}.")
        elif get_origin(hint) is Annotated:
            kind, text = get_args(hint)
            default = None if item.default is MISSING else item.default
            yield prefix + item.name, _described(kind, text, default)


def _described(hint: Any, text: str, default: object) -> Option:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [member for member in members if member is not NoneType]
    plain = [kind for kind in kinds if get_origin(kind) is not Literal] or kinds
    words = tuple(word for kind in kinds if kind not in plain for word in get_args(kind))
    kind = plain[0] if len(plain) == 1 else hint
    return Option(kind, NoneType in members, text, default, words)
