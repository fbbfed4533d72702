import gzip
import json
import os
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpo.data.records import Decision
from dpo.data.stores import open_store
from dpo.errors import InputError

DAY = datetime(2024, 5, 1, tzinfo=UTC)
LINE = (
    '{"id":"d-1","policy":"extraction","session_id":"s-1",'
    '"decided_at":"2024-05-01T00:00:00.000000Z","state":{},"action":{}}\n'
)


def decision(identity: str, reward: float | None = None) -> Decision:
    return Decision(identity, "extraction", "s-1", DAY, {}, {}, reward=reward)


@pytest.fixture(params=["jsonl", "jsonl.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"log.{request.param}"


def lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return text.decode().splitlines()


def ids(path: Path) -> list[str]:
    with open_store(path) as store:
        return [item.id for item in store.decisions()]


class TestLines:
    def test_a_decision_and_a_later_outcome_are_lines_of_the_documented_form(
        self, path: Path
    ) -> None:
        with open_store(path, create=True) as store:
            store.record_decision(decision("d-1"))
            store.record_outcome("d-1", {"é": "\N{GRINNING FACE}"}, 0.5, DAY)
        assert [json.loads(line) for line in lines(path)] == [
            json.loads(LINE),
            {
                "decision_id": "d-1",
                "at": "2024-05-01T00:00:00.000000Z",
                "reward": 0.5,
                "outcome": {"é": "\N{GRINNING FACE}"},
            },
        ]

    def test_the_same_records_give_the_same_bytes(self, tmp_path: Path, path: Path) -> None:
        for folder in ("a", "b"):
            with open_store(tmp_path / folder / path.name, create=True) as store:
                store.record_decisions([decision("d-1", 0.5), decision("d-2")])
        one, other = (tmp_path / folder / path.name for folder in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()

    def test_recording_what_is_known_writes_nothing(self, path: Path) -> None:
        with open_store(path, create=True) as store:
            store.record_decision(decision("d-1", 0.5))
            before = path.read_bytes()
            store.record_decision(decision("d-1", 0.5))
            store.record_outcome("d-1", reward=0.5, at=DAY)
        assert path.read_bytes() == before

    def test_a_log_written_by_hand_is_read(self, path: Path) -> None:
        text = "\n" + LINE.replace("d-1", "d-2") + "  \r\n" + LINE.strip()
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        assert ids(path) == ["d-1", "d-2"]

    def test_a_line_after_a_last_line_without_newline_begins_anew(self, path: Path) -> None:
        text = LINE.strip().encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        with open_store(path) as store, open_store(path) as other:
            store.record_decision(decision("d-2"))
            assert other.count() == 2
            store.record_decision(decision("d-3"))
            assert [item.id for item in other.decisions()] == ["d-1", "d-2", "d-3"]
            assert store.warnings == other.warnings == []
        assert ids(path) == ["d-1", "d-2", "d-3"]

    def test_a_decision_told_twice_is_one_with_its_outcome(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        again = json.dumps(json.loads(LINE) | {"reward": 0.5})
        path.write_text(LINE + again + "\n" + LINE)
        with open_store(path) as store:
            assert list(store.decisions()) == [decision("d-1", 0.5)]


class TestFaults:
    def test_malformed_lines_are_named_together(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        other = LINE.replace('"action":{}', '"action":{"decision":"skip"}')
        outcome = '{"decision_id": "d-9", "at": "2024-05-01", "reward": 1}\n'
        path.write_text("\n" + LINE + "{oops\n" + other + outcome + LINE.replace("id", "di", 1))
        with pytest.raises(InputError) as error:
            open_store(path)
        third, fourth, fifth, sixth = str(error.value).splitlines()
        assert third.startswith(f"{path}:3: malformed JSON: ")
        assert fourth == f"{path}:4: decision 'd-1' has other content further up"
        assert fifth == f"{path}:5: outcome of decision 'd-9', which is not further up"
        assert sixth.startswith(f'{path}:6: unknown key "di", expected only id, policy')

    def test_not_more_than_twenty_faults_are_listed(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        path.write_text("?\n" * 50)
        with pytest.raises(InputError, match=r":20: [^\n]*\n\.\.\. and perhaps more$"):
            open_store(path)

    def test_line_numbers_go_on_after_what_this_process_wrote(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        path.write_text(LINE.strip())
        with open_store(path) as store:
            store.record_decisions([decision("d-2"), decision("d-3")])
            with path.open("a") as file:
                file.write("?\n")
            for _ in range(2):
                with pytest.raises(InputError, match=f"^{path}:4: malformed JSON"):
                    store.record_decision(decision("d-4"))
        assert path.read_text().endswith("?\n")

    def test_contradicting_outcomes_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        outcome = '{"decision_id": "d-1", "at": "2024-05-01", "reward": 1}\n'
        path.write_text(LINE + outcome + outcome.replace("1}", "0}"))
        with pytest.raises(
            InputError, match=rf"^{path}:3: decision 'd-1' has another outcome as of"
        ):
            open_store(path)

    @pytest.mark.parametrize(
        ("damage", "fault"),
        [
            (lambda raw: raw[: len(raw) // 2], "the gzip file breaks off"),
            (lambda raw: raw[:30] + b"\0" * 20 + raw[50:], "damaged gzip file at byte 0: "),
            (lambda raw: raw + b"rubbish", r"damaged gzip file at byte \d+: "),
            (lambda raw: b"no gzip", "damaged gzip file at byte 0: "),
        ],
    )
    def test_damaged_gzip_is_refused(
        self, tmp_path: Path, damage: Callable[[bytes], bytes], fault: str
    ) -> None:
        path = tmp_path / "log.jsonl.gz"
        path.write_bytes(damage(gzip.compress((LINE * 30).encode())))
        with pytest.raises(InputError, match=rf"^{path}: {fault}"):
            open_store(path)


class TestInterruptedWriters:
    def test_every_unfinished_end_is_left_out_and_then_set_aside(self, path: Path) -> None:
        with open_store(path, create=True) as store:
            store.record_decision(decision("d-1"))
            sound = path.stat().st_size
            store.record_decision(
                Decision("d-2", "extraction", "s-1", DAY, {"text": "longer" * 30}, {})
            )
        whole = path.read_bytes()
        complete = len(whole) - (path.suffix != ".gz")  # a line that lacks but its newline
        aside = path.with_name(path.name + ".torn")
        for end in range(sound + 1, complete, 11):
            path.write_bytes(whole[:end])
            with open_store(path) as store:
                assert [item.id for item in store.decisions()] == ["d-1"]
                note = f"{path}: the last line is unfinished and left out ({end - sound} bytes)"
                assert store.warnings == [note]
                assert path.read_bytes() == whole[:end]  # reading changes nothing
                store.record_decision(decision("d-3"))
                moved = f"{path}: 1 unfinished line ({end - sound} bytes) was moved to {aside}"
                assert store.warnings == [moved]
            assert ids(path) == ["d-1", "d-3"]
            assert aside.read_bytes() == whole[sound:end] + b"\n"
            aside.unlink()

    def test_a_writer_that_fails_leaves_the_log_as_it_was(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with open_store(path, create=True) as store:
            store.record_decision(decision("d-1"))
            before = path.read_bytes()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                with pytest.raises(OSError, match="No space left"):
                    store.record_decision(decision("d-2"))
                with pytest.raises(OSError, match="No space left"):
                    store.delete_before("9999-01-01")
            assert path.read_bytes() == before
            assert list(path.parent.iterdir()) == [path]
            assert store.record_decision(decision("d-2"))
        assert ids(path) == ["d-1", "d-2"]

    def test_the_first_record_of_a_gzip_log_may_be_cut_off_too(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl.gz"
        with open_store(path, create=True) as store:
            store.record_decision(decision("d-1"))
        path.write_bytes(path.read_bytes()[:-1])
        assert ids(path) == []


class TestReplacedFiles:
    def test_a_shortened_log_is_read_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        path.write_text(LINE + LINE.replace("d-1", "d-2"))
        with open_store(path) as store:
            path.write_text(LINE.replace("d-1", "d-3"))
            assert [item.id for item in store.decisions()] == ["d-3"]
            store.record_decision(decision("d-4"))
        assert ids(path) == ["d-3", "d-4"]

    def test_a_log_that_is_gone_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        with open_store(path, create=True) as store:
            path.unlink()
            with pytest.raises(FileNotFoundError):
                store.record_decision(decision("d-1"))

    def test_deletion_keeps_lines_and_permissions(self, path: Path) -> None:
        with open_store(path, create=True) as store:
            store.record_decisions([decision("d-1"), decision("d-2", 0.5)])
            store.record_decision(
                Decision("d-0", "extraction", "s-1", datetime(2024, 4, 1, tzinfo=UTC), {}, {})
            )
            store.record_outcome("d-1", reward=0, at=datetime(2024, 5, 2, tzinfo=UTC))
            store.record_outcome("d-1", reward=1, at=datetime(2024, 5, 3, tzinfo=UTC))
            path.chmod(0o640)
            before = lines(path)
            assert store.delete_before(DAY) == 1
        assert lines(path) == [before[0], before[1], before[4]]
        assert path.stat().st_mode & 0o777 == 0o640
        assert list(path.parent.iterdir()) == [path]


def test_plain_gzip_tools_read_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    with open_store(path, create=True) as store:
        for number in range(5):
            store.record_decision(decision(f"d-{number}"))
    assert [json.loads(line)["id"] for line in lines(path)] == [f"d-{n}" for n in range(5)]
    assert zlib.decompressobj(31).decompress(path.read_bytes()) == b""  # the first member is empty
