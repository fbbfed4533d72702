"""The entries of a decoded ``config.json``, read with their types checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo.errors import InputError

HubConfig = Mapping[str, Any]  # the decoded config.json


@dataclass(frozen=True)
class Entries:
    """Entries are asked for by Llama's names and refused by the name that the file has for them.

    Attributes:
        config: the decoded file.
        where: the file, for messages.
        names: what the architecture calls an entry, by Llama's name, where that is another.
        defaults: of entries that are not in the file, by Llama's name.
    """

    config: HubConfig
    where: str
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Return an entry as it is; the default if the file does not have it, else None."""
        name = self.names.get(key, key)
        return self.config[name] if name in self.config else self.defaults.get(key)

    def count(self, key: str, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """Return an integer of ``least`` or more, and not more than ``most``."""
        value = self.get(key)
        if isinstance(value, int) and value > most:
            raise self.fault(key, f"must be at most {most}, got {value}")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            expected = "a positive integer" if least else "an integer >= 0"
            raise self.fault(key, f"must be {expected}, got {value!r}")
        return value

    def count_or_none(self, key: str) -> int | None:
        """Return a positive integer, or None where there is none."""
        return None if self.get(key) is None else self.count(key)

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a positive, finite number."""
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise self.fault(key, f"must be a positive number, got {value!r}")

    def positive_or_none(self, key: str) -> float | None:
        """Return a positive, finite number, or None where there is none."""
        return None if self.get(key) is None else self.positive(key)

    def flag(self, key: str) -> bool:
        """Return a switch; one that is null or not in the file is off."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.fault(key, f"must be true or false, got {value!r}")
        return bool(value)

    def listed(self, key: str, length: int) -> list[Any] | None:
        """Return a list of ``length`` items, or None where there is none."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and len(value) == length):
            raise self.fault(key, f"must be a list of {length} items, got {value!r}")
        return value

    def refuse(self, key: str, allowed: object) -> None:
        """Refuse an entry unless it is null, not in the file, or ``allowed``.

        Raises:
            InputError: it is something else.
        """
        value = self.get(key)
        if value not in (None, allowed):
            raise self.fault(key, f"{value!r} is not supported; expected {allowed!r}")

    def within(self, key: str) -> Entries | None:
        """Return the entries of the object that an entry is; None where there is none.

        Raises:
            InputError: it is no object.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.fault(key, f"must be an object, got {value!r}")
        return Entries(value, self.where) if value else None

    def fault(self, key: str, message: str) -> InputError:
        """Make the error that says what is wrong with an entry."""
        return InputError(f"{self.where}: {self.names.get(key, key)} {message}")
