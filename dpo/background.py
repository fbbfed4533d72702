"""Work that is done beside the training, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self


class Background:
    """Does what it is given in a thread of its own, as a context manager that leaves none undone.

    What fails there is raised here: by the next call, or at the end of the block, unless that ends
    with an error of its own.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._begun: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do ``work`` when that before it is done, which is waited for."""
        self.finish()
        self._begun = self._pool.submit(work)

    def check(self) -> None:
        """Raise the error of what has failed, without waiting."""
        if self._begun is not None and self._begun.done():
            self.finish()

    def finish(self) -> None:
        """Wait for what is being done."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is being done, and raise its error if there is none."""
        if error is not None and self._begun is not None:
            wait([self._begun])
            self._begun = None
        self._pool.shutdown()
        self.finish()
