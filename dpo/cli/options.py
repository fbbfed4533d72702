"""Flags made from the fields of the config, and the config that the flags of a call make."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dpo.config import Sources
from dpo.settings import (
    Option,
    Resolved,
    Setting,
    known_options,
    parse_assignment,
    read_settings,
    resolve,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Command = TypeVar("Command", bound=Callable[..., Any])

TRAIN_KEYS = (  # of dpo train, dpo sweep and dpo plan
    "model", "revision", "data", "mix.", "data_split", "data_revision",
    "eval_data", "eval_data_split", "eval_data_revision", "eval_split",
    "columns", "ranked", "answer_turns", "on_bad_row", "out",
    "reference", "reference_revision", "reference_cache.", "tokenize.",
    "loss.", "train.", "adapter.",
)  # fmt: skip
_FLAGS = {  # where the flag is not the last part of the key
    "loss.name": "loss",
    "train.share_prefix": "prefix-sharing",
    "reference_cache.dir": "reference-cache",
    "mix.weights": "mix-weights",
    "mix.temperature": "mix-temperature",
    "mix.rows": "mix-rows",
    "adapter.kind": "adapter",
    "adapter.rank": "adapter-rank",
    "adapter.alpha": "adapter-alpha",
    "adapter.targets": "adapter-targets",
    "adapter.base": "adapter-base",
}
_LOSS_OPTIONS = {  # the two that most losses have; the others are given by --set loss.NAME=VALUE
    "loss.beta": Option(float, is_optional=False, help="The loss's strength of the reference."),
    "loss.label_smoothing": Option(
        float, is_optional=False, help="The loss's share of labels taken to be wrong."
    ),
}
_METAVARS: Mapping[object, str] = {
    int: "INTEGER",
    float: "NUMBER",
    str: "TEXT",
    Sources: "TEXT",
    tuple[float, ...]: "NUMBER,...",
    Mapping[str, str]: "NAME=COLUMN,...",
    Mapping[str, float]: "PATTERN=NUMBER,...",
}
_UNSET = (None, ())  # of a flag, and of one that can be repeated


class ConfigFlag(click.Option):
    """A flag that sets one key of the config; not given, it sets nothing."""

    def __init__(self, declarations: Sequence[str], *, key: str, **attributes: Any) -> None:
        super().__init__(declarations, **attributes)
        self.key = key

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Complete a value."""
        from dpo.cli.completion import complete_value

        return complete_value(self.key, incomplete)

    def setting(self, value: object) -> Setting:
        """Return the setting that a value of this flag makes, or all values if it is repeated."""
        if isinstance(value, tuple) and len(value) == 1:
            (value,) = value
        flag = self.secondary_opts[0] if value is False else self.opts[0]
        return Setting(self.key, value, flag, is_text=isinstance(value, str))


def config_flags(*keys: str) -> Callable[[Command], Command]:
    """Give a command a flag for each key, and the flags that every such command has.

    The values reach the command through ``resolve_flags``.

    Args:
        keys: keys of the config; ``table.`` stands for all keys of a table.
    """
    options = {**known_options(), **_LOSS_OPTIONS}
    named = [
        name
        for key in keys
        for name in options
        if name == key or (key.endswith(".") and name.startswith(key))
    ]

    def decorate(command: Command) -> Command:
        for flag in reversed([*(_flag(name, options[name]) for name in named), *_COMMON_FLAGS]):
            command = flag(command)
        return command

    return decorate


def resolve_flags(context: click.Context, *, below: Sequence[Setting] = ()) -> Resolved:
    """Lay the flags of this call over ``--set`` over ``--config`` over the defaults.

    Args:
        context: of the call of a command that has ``config_flags``.
        below: a layer beneath the config file.

    Raises:
        InputError: as ``dpo.settings.resolve``.
    """
    return resolve(below, *layers_of(context))


def layers_of(context: click.Context) -> list[list[Setting]]:
    """Return the settings of ``--config``, of ``--set`` and of the flags of this call.

    Raises:
        InputError: the file cannot be read, or a ``--set`` has no value.
    """
    path: Path | None = context.params["config"]
    given = [
        flag.setting(value)
        for flag in context.command.params
        if isinstance(flag, ConfigFlag) and (value := context.params[str(flag.name)]) not in _UNSET
    ]
    return [
        [] if path is None else read_settings(path),
        [parse_assignment(text) for text in context.params["assignments"]],
        given,
    ]


def flag_name(key: str) -> str:
    """Return the name of the flag of a key, without its dashes."""
    return _FLAGS.get(key, key.rpartition(".")[2].replace("_", "-"))


def _flag(key: str, option: Option) -> Callable[[Command], Command]:
    name = flag_name(key)
    default = "" if option.default is None else f"  [default: {_shown(option.default)}]"
    is_switch = option.kind is bool
    return click.option(
        f"--{name}/--no-{name}" if is_switch else f"--{name}",
        key.replace(".", "__"),
        cls=ConfigFlag,
        key=key,
        default=None,
        multiple=option.kind == Sources,
        help=f"{option.help}{default}",
        metavar=None if is_switch else _metavar(option),
    )


def _metavar(option: Option) -> str:
    if option.choices:
        return f"[{'|'.join(option.choices)}]"
    return "|".join([_METAVARS[option.kind], *option.words])


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _complete_assignment(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    from dpo.cli.completion import complete_assignment

    return complete_assignment(context, parameter, incomplete)


_COMMON_FLAGS: Sequence[Callable[[Any], Any]] = (
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of options, as in RUN/config.toml; flags and --set override it.",
    ),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=_complete_assignment,
        help="Set any key of the config, as in --set loss.beta=0.2; may be repeated.",
    ),
    click.option(
        "--print-config",
        is_flag=True,
        help="Print the values that would be used and where each comes from, and stop.",
    ),
    click.option("--quiet", is_flag=True, help="Show no progress, only warnings and results."),
)
