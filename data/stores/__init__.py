"""Feedback stores: JSON Lines, SQLite and PostgreSQL behind one class, `FeedbackStore`."""

from collections.abc import Callable
from pathlib import Path

from dpo.data.stores.base import FeedbackStore
from dpo.data.stores.jsonl import JsonLinesStore
from dpo.data.stores.sql import shown_url
from dpo.data.stores.sqlite import SqliteStore
from dpo.errors import InputError

__all__ = ["FILE_STORES", "FeedbackStore", "open_store"]

FILE_STORES: dict[str, Callable[..., FeedbackStore]] = {
    ".jsonl": JsonLinesStore,
    ".jsonl.gz": JsonLinesStore,
    ".db": SqliteStore,
    ".sqlite": SqliteStore,
    ".sqlite3": SqliteStore,
}


def open_store(source: str | Path, *, create: bool = False) -> FeedbackStore:
    """Open the feedback store that ``source`` names; use it in a ``with`` statement.

    Args:
        source: a file with one of the endings of ``FILE_STORES``, or a ``postgresql://`` URL.
        create: make the store if there is none.

    Raises:
        InputError: a folder or another ending, there is no such store, or it cannot be used as it
            is.
    """
    text = str(source)
    if text.startswith(("postgresql://", "postgres://")):
        return _postgres_store(text, create=create)
    if "://" in text:
        raise InputError(f"{shown_url(text)}: the only kind of URL known is postgresql://")
    if Path(source).is_dir():
        raise InputError(f"{source} is a folder: name a store, a file ending in .jsonl or .db")
    for ending, store in FILE_STORES.items():
        if text.lower().endswith(ending):
            return store(Path(source), create=create)
    raise InputError(
        f"{source}: cannot tell what store this is: expected a file ending in "
        f"{', '.join(FILE_STORES)} or a postgresql:// URL"
    )


def _postgres_store(url: str, *, create: bool) -> FeedbackStore:
    try:
        from dpo.data.stores.postgres import PostgresStore
    except ImportError as error:
        raise InputError(
            f"{shown_url(url)}: PostgreSQL needs psycopg ({error}): "
            "pip install 'dpo-engine[postgres]'"
        ) from error
    return PostgresStore(url, create=create)
