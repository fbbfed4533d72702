"""Work that is done beside the training, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from dpo.ranks import Ranks


class Background:
    """Does what it is given in a thread of its own, as a context manager that leaves none undone.

    What fails there is raised here: by the next call, or at the end of the block, unless that ends
    with an error of its own.

    Attributes:
        ranks: that call the same methods at the same time; a process that is alone by default.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._begun: Future[None] | None = None
        self._within = ExitStack()

    def begin(self, work: Callable[[], None], within: ExitStack | None = None) -> None:
        """Do ``work`` when that before it is done, which is waited for.

        Args:
            work: what a thread does.
            within: what is closed here, not in the thread, when the work is done on all ranks.
        """
        self.finish()
        self._within = within or ExitStack()
        self._begun = self._pool.submit(work)

    def check(self) -> None:
        """Raise the error of what has failed, without waiting; close what is done on all ranks."""
        if self._begun is not None and not self.ranks.any(not self._begun.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for what is being done."""
        begun, self._begun = self._begun, None
        if begun is not None:
            with self._within:
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
            self._within.__exit__(kind, error, traceback)
        self._pool.shutdown()
        self.finish()
