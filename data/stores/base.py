"""What every feedback store can do; a store brings transactions, reading and deleting."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

from dpo.data.filters import Bound, DecisionFilter, parse_moment
from dpo.data.records import (
    Decision,
    DecisionOutcome,
    decision_to_json,
    format_time,
)
from dpo.data.strict_json import same_json
from dpo.errors import InputError
from dpo.files import JSON

RECORDS_PER_TRANSACTION = 5000

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision with its latest outcome; ``outcome_at`` says as of when, if there is one."""

    decision: Decision
    outcome_at: datetime | None

    def with_outcome(self, outcome: DecisionOutcome) -> "StoredDecision":
        """Return the decision with another outcome."""
        decision = replace(self.decision, reward=outcome.reward, outcome=outcome.outcome)
        return StoredDecision(decision, outcome.at)


class FeedbackStore(ABC):
    """Decisions and their outcomes, for one thread; several processes may hold the same store open.

    Recording the same again changes nothing, so a caller that does not know whether a call came
    through repeats it. A decision never changes: another one under its id is refused. An outcome
    may be corrected: the one with the latest ``at`` counts, whatever order they arrive in. An
    outcome recorded with its decision is as of ``decided_at``. What a call has recorded when it
    returns is on the disk.
    """

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know about the store as it was found, a sentence each."""
        return ()

    def record_decision(self, decision: Decision) -> bool:
        """Record one decision; return false if it was there already.

        Raises:
            InputError: its id belongs to another decision, or its outcome contradicts what is
                known.
        """
        return self.record_decisions([decision]) == 1

    def record_decisions(self, decisions: Iterable[Decision]) -> int:
        """Record many decisions, far faster than one by one; return how many were not there yet.

        They are recorded in batches of some thousand, each whole or not at all. If one is refused
        the batches before it stay; after a correction the call is safe to repeat.

        Raises:
            InputError: as `record_decision`.
        """
        return sum(map(self._record_decisions, batches(decisions)))

    def record_outcome(
        self,
        decision_id: str,
        outcome: Mapping[str, JSON] | None = None,
        reward: float | None = None,
        at: datetime | None = None,
    ) -> bool:
        """Record what became of a decision; return false if the same or later news is known.

        Args:
            decision_id: a recorded decision.
            outcome: what was observed, as the kind defines it.
            reward: in [-1, 1]; reward, outcome or both are given.
            at: as of when; None is the present.

        Raises:
            InputError: no such decision, a wrong value, or another outcome with the same ``at``.
        """
        news = DecisionOutcome(decision_id, at or datetime.now(UTC), reward, outcome)
        return self.record_outcomes([news]) == 1

    def record_outcomes(self, outcomes: Iterable[DecisionOutcome]) -> int:
        """Record many outcomes, in batches as `record_decisions`; return how many were news.

        Raises:
            InputError: as `record_outcome`.
        """
        return sum(map(self._record_outcomes, batches(outcomes)))

    def decisions(self, wanted: DecisionFilter | None = None) -> Iterator[Decision]:
        """Yield decisions with their latest outcomes, the oldest first, in bounded memory.

        The order is that of ``decided_at``, then ``id``. What is recorded meanwhile is not seen.

        Raises:
            InputError: the store is damaged; the message names the place.
        """
        wanted = wanted or DecisionFilter()
        accepted = (decision for decision in self._read(wanted) if wanted.accepts(decision))
        return islice(accepted, wanted.limit)

    def delete_before(self, moment: Bound) -> int:
        """Delete the decisions made before ``moment``, with their outcomes; return how many.

        Args:
            moment: the first moment to keep; a date begins at midnight UTC.
        """
        return self._delete_before(parse_moment("delete_before", moment))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def place(self, decision_id: str) -> str:
        """Return where a decision stands, to begin an error with."""
        return str(self)

    @abstractmethod
    def __str__(self) -> str:
        """Return what the user calls the store, to begin an error with; never a password."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of decisions."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the store holds open; closing twice is harmless."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[None]:
        """Keep other writers out; at the end force all to the disk, or undo it on an exception."""

    @abstractmethod
    def _known(self, ids: Collection[str]) -> dict[str, StoredDecision]:
        """Return those of the decisions that are recorded, by id; called in a transaction."""

    @abstractmethod
    def _write(self, new: Sequence[StoredDecision], updated: Sequence[StoredDecision]) -> None:
        """Add decisions, and set the outcomes of earlier ones; called in a transaction."""

    @abstractmethod
    def _read(self, wanted: DecisionFilter) -> Iterator[Decision]:
        """Yield all decisions in order, leaving out only what ``wanted`` refuses."""

    @abstractmethod
    def _delete_before(self, moment: datetime) -> int:
        """Delete what was decided before ``moment``, in UTC; return how many decisions."""

    def _record_decisions(self, chunk: Sequence[Decision]) -> int:
        with self._transaction():
            known = self._known({decision.id for decision in chunk})
            new: dict[str, StoredDecision] = {}
            updated: dict[str, StoredDecision] = {}
            for stored in map(as_recorded, chunk):
                identity = stored.decision.id
                before = known.setdefault(identity, stored)
                if before is stored:
                    new[identity] = stored
                    continue
                if not same_decision(before.decision, stored.decision):
                    raise InputError(
                        f"{self}: decision {identity!r} is recorded with other content: "
                        "a decision cannot change, give this one another id"
                    )
                if supersedes(stored, before, str(self)):
                    (new if identity in new else updated)[identity] = known[identity] = stored
            self._write(list(new.values()), list(updated.values()))
        return len(new)

    def _record_outcomes(self, chunk: Sequence[DecisionOutcome]) -> int:
        with self._transaction():
            known = self._known({outcome.decision_id for outcome in chunk})
            updated: dict[str, StoredDecision] = {}
            news = 0
            for outcome in chunk:
                identity = outcome.decision_id
                if identity not in known:
                    raise InputError(f"{self}: no decision {identity!r}: record the decision first")
                stored = known[identity].with_outcome(outcome)
                if supersedes(stored, known[identity], str(self)):
                    updated[identity] = known[identity] = stored
                    news += 1
            self._write([], list(updated.values()))
        return news


def batches(items: Iterable[Item], size: int = RECORDS_PER_TRANSACTION) -> Iterator[list[Item]]:
    """Yield the items in lists of ``size``, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def as_recorded(decision: Decision) -> StoredDecision:
    """Return a decision with the outcome that it was recorded with."""
    return StoredDecision(decision, decision.decided_at if decision.has_outcome else None)


def same_decision(one: Decision, other: Decision) -> bool:
    """Return whether two decisions are the same but for their outcomes."""
    return same_json(*(_without_outcome(decision) for decision in (one, other)))


def supersedes(new: StoredDecision, known: StoredDecision, where: str) -> bool:
    """Return whether the outcome of ``new`` takes the place of what is known.

    Raises:
        InputError: the two differ and claim to be as of the same time.
    """
    if new.outcome_at is None:
        return False
    if known.outcome_at is None or new.outcome_at > known.outcome_at:
        return True
    if new.outcome_at == known.outcome_at and not same_json(
        *([stored.decision.reward, stored.decision.outcome] for stored in (new, known))
    ):
        raise InputError(
            f"{where}: decision {new.decision.id!r} has another outcome as of "
            f"{format_time(new.outcome_at)}: give a correction a later time"
        )
    return False


def _without_outcome(decision: Decision) -> dict[str, JSON]:
    return decision_to_json(replace(decision, reward=None, outcome=None))
