import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpo.data.import_original import TABLES, SkippedRows, check_original, import_original
from dpo.data.records import Decision
from dpo.data.stores import FeedbackStore, open_store
from dpo.errors import InputError
from dpo.files import JSON

# The original's migration, with its nullability, checks, defaults and missing uniqueness.
SCHEMA = """
CREATE TABLE sessions (id TEXT PRIMARY KEY);
CREATE TABLE memory_retrievals (
    id TEXT PRIMARY KEY, session_id TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    conversation_id TEXT, query_text TEXT, query_hash TEXT, query_embedding TEXT,
    entry_type TEXT NOT NULL CHECK (entry_type IN ('tool', 'guideline', 'knowledge', 'experience')),
    entry_id TEXT NOT NULL, retrieval_rank INTEGER NOT NULL, retrieval_score REAL NOT NULL,
    semantic_score REAL, context_tokens INTEGER,
    retrieved_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE task_outcomes (
    id TEXT PRIMARY KEY, session_id TEXT NOT NULL, conversation_id TEXT,
    outcome_type TEXT NOT NULL, outcome_signal TEXT NOT NULL, confidence REAL NOT NULL DEFAULT 1.0,
    metadata TEXT, outcome_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE retrieval_outcomes (
    id TEXT PRIMARY KEY, retrieval_id TEXT NOT NULL, outcome_id TEXT NOT NULL,
    contribution_score REAL, attribution_method TEXT NOT NULL DEFAULT 'linear',
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE extraction_decisions (
    id TEXT PRIMARY KEY, session_id TEXT NOT NULL, turn_number INTEGER,
    decision TEXT NOT NULL CHECK (decision IN ('store', 'skip', 'defer')), entry_type TEXT,
    entry_id TEXT, context_hash TEXT NOT NULL, confidence REAL NOT NULL, state_features TEXT,
    decided_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE extraction_outcomes (
    id TEXT PRIMARY KEY, decision_id TEXT NOT NULL, entry_id TEXT NOT NULL,
    retrieval_count INTEGER NOT NULL DEFAULT 0, success_count INTEGER NOT NULL DEFAULT 0,
    last_retrieved_at TEXT, outcome_score REAL, evaluated_at TEXT NOT NULL
);
CREATE TABLE consolidation_decisions (
    id TEXT PRIMARY KEY, scope_type TEXT NOT NULL, scope_id TEXT, action TEXT NOT NULL,
    source_entry_ids TEXT NOT NULL, target_entry_id TEXT, similarity_score REAL,
    state_features TEXT, decided_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, decided_by TEXT
);
CREATE TABLE consolidation_outcomes (
    id TEXT PRIMARY KEY, decision_id TEXT NOT NULL, pre_retrieval_rate REAL,
    post_retrieval_rate REAL, pre_success_rate REAL, post_success_rate REAL,
    evaluation_window_days INTEGER NOT NULL, outcome_score REAL, evaluated_at TEXT NOT NULL
);
"""
EXTRACTION_STATE: dict[str, JSON] = {
    "contextFeatures": {
        "turnNumber": 5,
        "tokenCount": 250,
        "toolCallCount": 1,
        "hasError": False,
        "userTurnCount": 3,
        "assistantTurnCount": 2,
    },
    "memoryState": {
        "totalEntries": 9,
        "recentExtractions": 1,
        "similarEntryExists": False,
        "sessionCaptureCount": 0,
    },
    "contentFeatures": {
        "hasDecision": True,
        "hasRule": False,
        "hasFact": True,
        "hasCommand": False,
        "noveltyScore": 0.5,
        "complexity": 0.25,
    },
}
RETRIEVAL_STATE = {
    "queryFeatures": {
        "queryLength": 20,
        "hasKeywords": True,
        "queryComplexity": 0.2,
        "semanticCategory": "question",
    },
    "contextFeatures": {
        "turnNumber": 2,
        "conversationDepth": 2,
        "recentToolCalls": 0,
        "hasErrors": False,
    },
    "memoryStats": {"totalEntries": 10, "recentRetrievals": 0, "avgRetrievalSuccess": 0.5},
}
CONSOLIDATION_STATE = {
    "groupFeatures": {
        "groupSize": 2,
        "avgSimilarity": 0.9,
        "minSimilarity": 0.9,
        "maxSimilarity": 0.9,
        "entryTypes": ["knowledge"],
    },
    "usageStats": {
        "totalRetrievals": 4,
        "avgRetrievalRank": 2,
        "successRate": 0.5,
        "lastAccessedDaysAgo": 3,
    },
    "scopeStats": {"scopeType": "project", "totalEntriesInScope": 30, "duplicateRatio": 0.1},
}


class Original:
    """A database like the original's, to be filled row by row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(SCHEMA)

    def add(self, table: str, **values: object) -> None:
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        row = [json.dumps(value) if isinstance(value, dict) else value for value in values.values()]
        self.run(f"INSERT INTO {table} ({columns}) VALUES ({marks})", *row)

    def run(self, command: str, *parameters: object) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(command, parameters)

    def add_extraction(self, identity: str, **changes: object) -> None:
        values: dict[str, object] = {
            "id": identity,
            "session_id": "s-1",
            "decision": "store",
            "entry_type": "knowledge",
            "context_hash": "h",
            "confidence": 0.8,
            "state_features": EXTRACTION_STATE,
            "decided_at": "2024-05-01T09:30:00.000Z",
        }
        self.add("extraction_decisions", **(values | changes))

    def score_extraction(self, identity: str, score: float | None, at: str, **more: int) -> None:
        number = f"{identity} {at} {score}"
        self.add(
            "extraction_outcomes",
            id=number,
            decision_id=identity,
            entry_id="e",
            outcome_score=score,
            evaluated_at=at,
            **more,
        )

    def link(self, outcome: str, score: float | None, at: str) -> None:
        self.add(
            "retrieval_outcomes",
            id=f"{outcome} {at} {score}",
            retrieval_id="r-1",
            outcome_id=outcome,
            contribution_score=score,
            created_at=at,
        )


@pytest.fixture
def original(tmp_path: Path) -> Original:
    return Original(tmp_path / "memory.db")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with open_store(tmp_path / "feedback.db", create=True) as store:
        yield store


class TestExtraction:
    def test_a_decision_keeps_all_that_was_recorded(
        self, original: Original, store: FeedbackStore
    ) -> None:
        original.add_extraction("x-1")
        original.score_extraction("x-1", 0.5, "2024-06-01", retrieval_count=4, success_count=2)
        import_original(original.path, store)
        assert list(store.decisions()) == [
            Decision(
                "x-1",
                "extraction",
                "s-1",
                datetime(2024, 5, 1, 9, 30, tzinfo=UTC),
                EXTRACTION_STATE,
                {"decision": "store", "entryType": "knowledge"},
                confidence=0.8,
                reward=0.5,
                outcome={"retrievalCount": 4, "successCount": 2},
            )
        ]

    def test_a_skip_has_no_entry_type_and_may_have_no_outcome(
        self, original: Original, store: FeedbackStore
    ) -> None:
        original.add_extraction("x-1", decision="skip", entry_type=None)
        import_original(original.path, store)
        (decision,) = store.decisions()
        assert decision.action == {"decision": "skip"}
        assert not decision.has_outcome

    def test_sqlite_default_times_are_utc(self, original: Original, store: FeedbackStore) -> None:
        original.add_extraction("x-1", decided_at="2024-05-01 09:30:00")
        import_original(original.path, store)
        assert next(store.decisions()).decided_at == datetime(2024, 5, 1, 9, 30, tzinfo=UTC)

    def test_the_last_evaluation_counts_whatever_the_form_of_its_time(
        self, original: Original, store: FeedbackStore
    ) -> None:
        original.add_extraction("x-1")
        original.score_extraction("x-1", 0.25, "2024-06-01 18:00:00")
        original.score_extraction("x-1", 1.0, "2024-06-01T09:00:00.000Z")
        original.score_extraction("x-1", None, "2024-07-01 00:00:00")
        import_original(original.path, store)
        assert [item.reward for item in store.decisions()] == [0.25]

    @pytest.mark.parametrize(("score", "reward"), [(0.0, 0.0), (-3.5, -1.0), (1.5, 1.0)])
    def test_zero_is_kept_and_wide_scores_are_clamped_and_counted(
        self, original: Original, store: FeedbackStore, score: float, reward: float
    ) -> None:
        original.add_extraction("x-1")
        original.score_extraction("x-1", score, "2024-06-01")
        report = import_original(original.path, store)
        assert [item.reward for item in store.decisions()] == [reward]
        assert report.clamped["extraction"] == (score != reward)


class TestRetrieval:
    @pytest.fixture
    def patched(self, original: Original) -> Original:
        original.run("ALTER TABLE memory_retrievals ADD COLUMN state_features TEXT")
        original.add(
            "memory_retrievals",
            id="r-1",
            session_id="s-1",
            entry_type="tool",
            entry_id="e",
            retrieval_rank=1,
            retrieval_score=0.5,
            state_features=RETRIEVAL_STATE,
            retrieved_at="2024-05-01",
        )
        for name, kind, at in (("o-1", "failure", "2024-05-03"), ("o-2", "success", "2024-05-02")):
            values = {"session_id": "s-1", "outcome_signal": "inferred"}
            original.add("task_outcomes", id=name, outcome_type=kind, outcome_at=at, **values)
        return original

    def test_a_retrieval_is_a_decision_to_retrieve_its_type(
        self, patched: Original, store: FeedbackStore
    ) -> None:
        import_original(patched.path, store)
        (decision,) = store.decisions()
        assert decision.action == {"shouldRetrieve": True, "types": ["tool"]}
        assert decision.confidence is None
        assert not decision.has_outcome

    def test_reward_is_the_mean_over_outcomes_each_counted_once(
        self, patched: Original, store: FeedbackStore
    ) -> None:
        patched.link("o-1", -0.5, "2024-05-03")
        patched.link("o-2", 0.9, "2024-05-02 01:00:00")  # replaced by the next
        patched.link("o-2", 0.7, "2024-05-02T02:00:00Z")
        patched.link("gone", None, "2024-05-09")
        import_original(patched.path, store)
        (decision,) = store.decisions()
        assert decision.reward == pytest.approx(0.1)
        outcome = {"taskOutcomeType": "failure", "contributionScore": decision.reward}
        assert decision.outcome == outcome

    def test_a_link_to_a_lost_outcome_keeps_its_score(
        self, patched: Original, store: FeedbackStore
    ) -> None:
        patched.link("gone", 0.0, "2024-05-02")
        import_original(patched.path, store)
        (decision,) = store.decisions()
        assert decision.reward == 0
        assert decision.outcome == {"contributionScore": 0.0}

    def test_rewards_do_not_compare_the_sizes_of_sessions(
        self, patched: Original, store: FeedbackStore
    ) -> None:
        """Linear attribution gave each of four retrievals a quarter; the whole is the reward."""
        patched.link("o-2", 0.2, "2024-05-02")
        for number in range(3):
            patched.add(
                "retrieval_outcomes",
                id=f"other-{number}",
                retrieval_id=f"not there {number}",
                outcome_id="o-2",
                contribution_score=0.2,
                created_at="2024-05-02",
            )
        import_original(patched.path, store)
        assert next(store.decisions()).reward == pytest.approx(0.8)
        patched.run("UPDATE retrieval_outcomes SET attribution_method = 'last_touch'")
        with open_store(patched.path.with_name("again.db"), create=True) as again:
            import_original(patched.path, again)
            assert next(again.decisions()).reward == pytest.approx(0.2)


class TestConsolidation:
    @pytest.mark.parametrize(("scope", "session"), [("p-1", "project:p-1"), (None, "project")])
    def test_the_scope_stands_in_for_the_session(
        self, original: Original, store: FeedbackStore, scope: str | None, session: str
    ) -> None:
        original.add(
            "consolidation_decisions",
            id="c-1",
            scope_type="project",
            scope_id=scope,
            action="merge",
            source_entry_ids="not json",
            target_entry_id="e-9",
            state_features=CONSOLIDATION_STATE,
            decided_at="2024-05-01",
        )
        original.add(
            "consolidation_outcomes",
            id="o",
            decision_id="c-1",
            pre_retrieval_rate=0.5,
            evaluation_window_days=14,
            outcome_score=0.25,
            evaluated_at="2024-06-01",
        )
        import_original(original.path, store)
        (decision,) = store.decisions()
        assert decision.session_id == session
        assert decision.action == {"action": "merge", "targetEntries": ["e-9"]}
        assert (decision.reward, decision.outcome) == (0.25, {"preRetrievalRate": 0.5})


class TestReport:
    def test_rows_without_a_usable_state_are_counted_and_left_out(
        self, original: Original, store: FeedbackStore
    ) -> None:
        original.add_extraction("good")
        original.add_extraction("bare-1", state_features=None)
        original.add_extraction("bare-2", state_features=None)
        original.add_extraction("text", state_features="{oops")
        original.add_extraction("old", state_features={"contextFeatures": {"turnNumber": -1}})
        original.add_extraction("number", state_features=3)
        original.add_extraction("type", entry_type="colour")
        original.add_extraction("sure", confidence=1.5)
        original.add_extraction("when", decided_at="yesterday")
        original.score_extraction("bare-1", 1.0, "2024-06-01")
        report = import_original(original.path, store)
        assert [item.id for item in store.decisions()] == ["good"]
        assert (report.read["extraction"], report.imported["extraction"]) == (9, 1)
        assert report.with_outcome["extraction"] == 0
        bare, faulty = report.skipped
        reason = "no state_features, the state was not recorded"
        assert bare == SkippedRows("extraction", reason, 2, "id 'bare-1'")
        assert faulty.rows == 6
        assert faulty.first.startswith("id 'text': state_features: malformed JSON: ")

    def test_the_originals_retrievals_lack_the_column_altogether(
        self, original: Original, store: FeedbackStore
    ) -> None:
        original.add(
            "memory_retrievals",
            id="r-1",
            session_id="s-1",
            entry_type="tool",
            entry_id="e",
            retrieval_rank=1,
            retrieval_score=0.5,
        )
        report = import_original(original.path, store)
        assert [(item.policy, item.rows) for item in report.skipped] == [("retrieval", 1)]
        assert store.count() == 0

    def test_text_says_what_became_of_the_rows(
        self, original: Original, store: FeedbackStore
    ) -> None:
        for name, score in (("x-1", 2.0), ("x-2", None)):
            original.add_extraction(name)
            original.score_extraction(name, score, "2024-06-01")
        original.add_extraction("x-3", state_features=None)
        import_original(original.path, store)
        original.add_extraction("x-4")
        nothing = "0 rows read, 0 imported, 0 already there, 0 left out; 0 have an outcome"
        assert list(import_original(original.path, store).lines()) == [
            "extraction: 4 rows read, 1 imported, 2 already there, 1 left out; 1 have an outcome",
            "  1 scores outside [-1, 1] were clamped",
            "  1 left out: no state_features, the state was not recorded; the first: id 'x-3'",
            *(f"{policy}: {nothing}" for policy in ("retrieval", "consolidation")),
        ]

    def test_importing_again_brings_later_scores(
        self, original: Original, store: FeedbackStore
    ) -> None:
        original.add_extraction("x-1")
        original.score_extraction("x-1", -1.0, "2024-06-01")
        import_original(original.path, store)
        original.score_extraction("x-1", 0.5, "2024-06-15")
        report = import_original(original.path, store)
        assert report.imported["extraction"] == 0
        assert [item.reward for item in store.decisions()] == [0.5]


class TestTrouble:
    def test_the_database_is_not_changed(self, original: Original, store: FeedbackStore) -> None:
        original.add_extraction("x-1")
        before = original.path.read_bytes()
        import_original(original.path, store)
        assert original.path.read_bytes() == before

    def test_a_missing_file_is_named(self, tmp_path: Path, store: FeedbackStore) -> None:
        with pytest.raises(InputError, match=r"none.db: no such file"):
            import_original(tmp_path / "none.db", store)

    @pytest.mark.parametrize("table", TABLES)
    def test_a_missing_table_is_named(
        self, original: Original, store: FeedbackStore, table: str
    ) -> None:
        original.run(f"DROP TABLE {table}")
        with pytest.raises(InputError, match=rf"not an agent-memory .* no table {table}$"):
            import_original(original.path, store)

    def test_a_corrupt_file_is_named(self, tmp_path: Path, store: FeedbackStore) -> None:
        path = tmp_path / "broken.db"
        path.write_bytes(b"no database at all " * 1000)
        with pytest.raises(InputError, match=r"broken.db: not a usable SQLite file: file is not"):
            import_original(path, store)

    def test_undecodable_text_is_named(self, original: Original, store: FeedbackStore) -> None:
        original.add_extraction("x-1")
        original.run("UPDATE extraction_decisions SET session_id = CAST(x'ff' AS TEXT)")
        with pytest.raises(InputError, match=r"memory.db: .*Could not decode to UTF-8"):
            import_original(original.path, store)


def test_a_database_without_any_state_is_refused_before_a_store_is_made(original: Original) -> None:
    original.add_extraction("x-1", state_features=None)
    with pytest.raises(InputError, match="no decision has state_features, so there is nothing"):
        check_original(original.path)
    original.add_extraction("x-2")
    check_original(original.path)
