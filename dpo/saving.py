"""How a run saves its checkpoints: between two steps, or beside them in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from dpo.background import Background
from dpo.checkpoint import Draft, Share, copied, drafted_checkpoint, own_share, prune
from dpo.files import JSON
from dpo.ranks import Ranks


class Saver(Background):
    """Writes the checkpoints of a run, and removes old ones, as a context manager.

    Ranks that hold parts of the model call the same methods after the same steps, and write their
    shares at the same time. Of ranks that hold all of it the first writes, without the others.

    Args:
        folder: of the checkpoints.
        ranks: of the run.
        keep: how many checkpoints stay, beside the best one.
        beside_steps: whether a thread writes a copy while the steps go on.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, beside_steps: bool) -> None:
        super().__init__(ranks if ranks.in_step else None)
        self._folder, self._keep, self._beside_steps = folder, keep, beside_steps
        self._is_idle = not (ranks.in_step or ranks.is_first)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        *,
        best: int | None,
    ) -> None:
        """Write the checkpoint of a step, when that before it is there.

        Args:
            step: optimizer steps done.
            tensors: what this rank holds, as ``Trainer.tensors`` returns it.
            state: as of ``save_checkpoint``; that of the first rank counts.
            best: the step whose checkpoint is not to be removed.

        Raises:
            OSError: this one, or with ``beside_steps`` the one before, could not be written.
        """
        if self._is_idle:
            return
        self.finish()
        share = own_share(tensors, self.ranks)
        drafted = partial(self._drafted, step, state, best=best)
        if not self._beside_steps:
            _write(share, drafted)
        elif self.ranks.processes == 1:
            self.begin(partial(_write, copied(share), drafted))
        else:  # the thread writes, but it is between steps that the ranks meet
            with ExitStack() as scope:
                draft = scope.enter_context(drafted())
                self.begin(partial(draft.write, copied(share)), within=scope.pop_all())

    @contextmanager
    def _drafted(
        self, step: int, state: Mapping[str, JSON], *, best: int | None
    ) -> Iterator[Draft]:
        with drafted_checkpoint(self._folder, step, state, self.ranks) as draft:
            yield draft
        if self.ranks.is_first:
            prune(self._folder, keep=self._keep, best=best)


def _write(share: Share, drafted: Callable[[], AbstractContextManager[Draft]]) -> None:
    with drafted() as draft:
        draft.write(share)
