import gzip
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.errors import InputError
from dpo.pair import Content, Tokens
from dpo.preferences import (
    JSON,
    Message,
    PreferencePair,
    load_pairs,
    read_pairs,
    stream_pairs,
    write_pairs,
)

ROW: dict[str, JSON] = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
USER: Message = {"role": "user", "content": "2+2?"}
FOUR: Message = {"role": "assistant", "content": "4"}
FIVE: Message = {"role": "assistant", "content": "5"}


def write_rows(path: Path, *rows: Mapping[str, JSON]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_row(tmp_path: Path, row: Mapping[str, JSON]) -> PreferencePair:
    return read_pairs(write_rows(tmp_path / "pairs.jsonl", row))[0]


def fault_of(tmp_path: Path, row: Mapping[str, JSON]) -> str:
    with pytest.raises(InputError) as caught:
        read_row(tmp_path, row)
    return str(caught.value).split("pairs.jsonl:1: ")[1]


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
messages = st.builds(lambda role, content: {"role": role, "content": content}, texts, texts)
answers = st.lists(
    st.builds(lambda content: {"role": "assistant", "content": content}, texts), min_size=1
).map(tuple)
prompts = st.lists(messages, min_size=1).map(tuple)


NO_VARIABLES: st.SearchStrategy[Mapping[str, JSON] | None] = st.none()
VARIABLES = NO_VARIABLES | st.fixed_dictionaries({"enable_thinking": st.booleans()})


def is_answered(pair: PreferencePair) -> bool:
    return not isinstance(pair.prompt, tuple) or pair.prompt[-1]["role"] != "assistant"


def pairs_of(
    prompt: st.SearchStrategy[Content],
    answer: st.SearchStrategy[Content],
    variables: st.SearchStrategy[Mapping[str, JSON] | None] = NO_VARIABLES,
) -> st.SearchStrategy[PreferencePair]:
    """Draw pairs that the checks let through and whose answers do not repeat the prompt."""
    two_answers = st.tuples(answer, answer).filter(lambda both: both[0] != both[1])
    return st.builds(
        lambda prompt, both, **fields: PreferencePair(prompt, *both, **fields),
        prompt,
        two_answers,
        weight=st.floats(0, 1e300),
        margin=st.floats(allow_nan=False, allow_infinity=False),
        label_prob=st.floats(0, 1),
        source=st.none() | texts,
        tools=st.none() | st.lists(st.dictionaries(texts, texts), min_size=1).map(tuple),
        chat_template_kwargs=variables,
    ).filter(is_answered)


def one_answer_of(pair: PreferencePair) -> PreferencePair:
    """Take one of the answers away, by chance."""
    return replace(pair, rejected=None) if len(repr(pair)) % 2 else replace(pair, chosen=None)


token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1).map(lambda ids: Tokens(tuple(ids)))
lists_of_pairs = st.one_of(
    st.lists(pairs_of(token_ids, token_ids), min_size=1, max_size=3),
    st.lists(pairs_of(token_ids, token_ids).map(one_answer_of), min_size=1, max_size=3),
    st.lists(pairs_of(texts, texts), min_size=1, max_size=3),
    st.lists(pairs_of(prompts, answers, VARIABLES), min_size=1, max_size=3),
    st.lists(pairs_of(texts, texts).map(one_answer_of), min_size=1, max_size=3),
    st.lists(pairs_of(prompts, answers).map(one_answer_of), min_size=1, max_size=3),
).map(lambda pairs: [replace(pair, id=f"pair {index}") for index, pair in enumerate(pairs)])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pairs=lists_of_pairs)
def test_pairs_written_are_read_back_the_same(
    tmp_path: Path, suffix: str, pairs: list[PreferencePair]
) -> None:
    path = tmp_path / f"pairs{suffix}"

    write_pairs(pairs, path)
    back = read_pairs(path)

    assert back == pairs
    assert [pair.id for pair in back] == [pair.id for pair in pairs]


def test_row_without_id_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"\n{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")

    assert [pair.id for pair in read_pairs(path)] == ["row-2", "row-4"]


def test_written_file_holds_only_what_is_not_default(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"

    write_pairs([PreferencePair("p", "é", "r", weight=2.0)], path)

    assert path.read_text("utf-8") == (
        '{"prompt": "p", "chosen": "é", "rejected": "r", "weight": 2.0}\n'
    )


def test_gzip_file_holds_no_time(tmp_path: Path) -> None:
    write_pairs([PreferencePair("p", "c", "r")], tmp_path / "pairs.jsonl.gz")
    assert (tmp_path / "pairs.jsonl.gz").read_bytes()[4:8] == bytes(4)


def test_pairs_are_written_to_no_other_type_of_file(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"pairs\.csv: pairs are written to \.jsonl or \.jsonl\.gz"
    ):
        write_pairs([], tmp_path / "pairs.csv")


class TestLayouts:
    def test_text(self, tmp_path: Path) -> None:
        loaded = load_pairs(write_rows(tmp_path / "pairs.jsonl", ROW))
        assert loaded.pairs == [PreferencePair("2+2=", "4", "5")]
        assert loaded.format == "prompt and answers as text"

    def test_messages(self, tmp_path: Path) -> None:
        pair = read_row(tmp_path, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]})
        assert pair == PreferencePair((USER,), (FOUR,), (FIVE,))

    def test_answers_that_hold_the_whole_conversation(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {
            "prompt": [USER],
            "chosen": [USER, FOUR],
            "rejected": [USER, FIVE],
        }
        assert read_row(tmp_path, row) == PreferencePair((USER,), (FOUR,), (FIVE,))

    def test_prompt_as_messages_and_answers_as_text(self, tmp_path: Path) -> None:
        pair = read_row(tmp_path, {"prompt": [USER], "chosen": "4", "rejected": "5"})
        assert pair == PreferencePair((USER,), (FOUR,), (FIVE,))

    def test_prompt_as_text_beside_conversations(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {
            "prompt": "2+2?",
            "chosen": [USER, FOUR],
            "rejected": [USER, FIVE],
            "score_chosen": 8.5,
        }
        loaded = load_pairs(write_rows(tmp_path / "pairs.jsonl", row))
        assert loaded.pairs == [PreferencePair((USER,), (FOUR,), (FIVE,))]
        assert loaded.ignored_columns == ("score_chosen",)

    def test_prompt_as_text_beside_answers_as_messages(self, tmp_path: Path) -> None:
        pair = read_row(tmp_path, {"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]})
        assert pair == PreferencePair((USER,), (FOUR,), (FIVE,))

    def test_shared_messages_are_the_prompt(self, tmp_path: Path) -> None:
        system: Message = {"role": "system", "content": ""}
        row: dict[str, JSON] = {
            "chosen": [system, USER, FOUR],
            "rejected": [system, USER, FIVE],
        }
        assert read_row(tmp_path, row) == PreferencePair((system, USER), (FOUR,), (FIVE,))

    def test_shared_assistant_message_stays_in_the_answers(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {"chosen": [USER, FOUR], "rejected": [USER, FOUR, FIVE]}
        assert read_row(tmp_path, row) == PreferencePair((USER,), (FOUR,), (FOUR, FIVE))

    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [(" ok", " ok then"), (" ok then", " ok"), ("a ", "b"), (" 4", " 5")],
    )
    def test_shared_dialogue_is_split_at_the_last_turn(
        self, tmp_path: Path, chosen: str, rejected: str
    ) -> None:
        prompt = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: 2+2\n\nAssistant:"
        pair = read_row(tmp_path, {"chosen": prompt + chosen, "rejected": prompt + rejected})
        assert pair == PreferencePair(prompt, chosen, rejected)

    def test_openai_preference(self, tmp_path: Path) -> None:
        tool: Message = {"type": "function", "function": {"name": "add"}}
        row: dict[str, JSON] = {
            "input": {"messages": [USER], "tools": [tool]},
            "preferred_output": [FOUR],
            "non_preferred_output": [FIVE],
        }
        loaded = load_pairs(write_rows(tmp_path / "pairs.jsonl", row))
        assert loaded.pairs == [PreferencePair((USER,), (FOUR,), (FIVE,), tools=(tool,))]
        assert (loaded.format, loaded.ignored_columns) == ("OpenAI preference", ())

    def test_columns_name_the_fields_of_other_rows(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "pairs.jsonl", {"question": "2+2=", "good": "4", "bad": "5"})
        columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
        assert read_pairs(path, columns=columns) == [PreferencePair("2+2=", "4", "5")]

    def test_from_and_value_are_role_and_content(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        }
        path = write_rows(tmp_path / "pairs.jsonl", row)
        pairs = read_pairs(path, columns={"prompt": "conversations"})
        assert pairs == [PreferencePair((USER,), (FOUR,), (FIVE,))]

    def test_null_fields_of_a_message_are_absent(self, tmp_path: Path) -> None:
        answer: Message = {**FOUR, "tool_calls": None}
        pair = read_row(tmp_path, {"prompt": [USER], "chosen": [answer], "rejected": [FIVE]})
        assert pair.chosen == (FOUR,)

    def test_optional_fields(self, tmp_path: Path) -> None:
        row = {**ROW, "weight": 2, "margin": -1, "label_prob": 0.8, "source": "s", "id": 7}
        pair = read_row(tmp_path, {**row, "tools": '[{"name": "add"}]'})
        assert pair == PreferencePair(
            "2+2=", "4", "5", 2.0, -1.0, 0.8, "s", tools=({"name": "add"},)
        )
        assert pair.id == "7"

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"enable_thinking": False, "absent": None}, {"enable_thinking": False}),
            ('{"enable_thinking": false}', {"enable_thinking": False}),
            ({}, None),
        ],
    )
    def test_variables_of_the_template(
        self, tmp_path: Path, value: JSON, expected: dict[str, JSON] | None
    ) -> None:
        row: dict[str, JSON] = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
        pair = read_row(tmp_path, {**row, "chat_template_kwargs": value})
        assert pair.chat_template_kwargs == expected

    def test_null_optional_field_is_its_default(self, tmp_path: Path) -> None:
        pair = read_row(tmp_path, {**ROW, "weight": None, "id": None, "tools": None})
        assert (pair.weight, pair.id, pair.tools) == (1.0, "row-1", None)


class TestFaultyRows:
    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"chosen": True}, "chosen must be text or a list of messages, found a boolean"),
            ({"chosen": 4}, "chosen must be text or a list of messages, found a number"),
            ({"prompt": None}, "prompt must be text or a list of messages, found null"),
            ({"chosen": " \n"}, "chosen is empty"),
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt": []}, "prompt is empty"),
            ({"chosen": "5"}, "chosen and rejected are identical"),
            ({"chosen": "\ud800"}, "chosen holds half of a surrogate pair"),
            ({"chosen": [FOUR]}, "chosen is a list and rejected is text"),
            ({"weight": -1}, "weight must be a finite number >= 0, found -1.0"),
            ({"weight": math.nan}, "weight must be a finite number >= 0, found nan"),
            ({"weight": True}, "weight must be a number, found a boolean"),
            ({"weight": 10**400}, "weight must be finite, found 401 digits"),
            ({"margin": math.inf}, "margin must be a finite number, found inf"),
            ({"margin": "1"}, "margin must be a number, found text"),
            ({"label_prob": 1.5}, "label_prob must be a number in [0, 1], found 1.5"),
            ({"source": 1.5}, "source must be text, found a number"),
            ({"source": ""}, "source must be text and not empty, found ''"),
            ({"id": ["x"]}, "id must be text, found a list"),
            ({"tools": "[{"}, "tools is text but not JSON"),
            ({"tools": {"a": 1}}, "tools must be a list, found an object"),
            ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, found a list"),
            ({"chat_template_kwargs": "{"}, "chat_template_kwargs is text but not JSON"),
            ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs are for conversations"),
        ],
    )
    def test_fields(self, tmp_path: Path, change: dict[str, JSON], fault: str) -> None:
        assert fault_of(tmp_path, {**ROW, **change}).startswith(fault)

    @pytest.mark.parametrize(
        ("prompt", "chosen", "fault"),
        [
            ([USER], ["4"], "chosen[0] must be a message {role, content}, found text"),
            ([USER], [{"role": "assistant", "content": None}], "chosen[0].content is null"),
            ([USER], [{"role": "assistant"}], "chosen[0].content is missing"),
            ([USER], [{"role": "assistant", "content": True}], "chosen[0].content must be text or"),
            ([USER], [{"role": "assistant", "content": ""}], "chosen[0] is empty"),
            ([USER], [{"content": "4"}], "chosen[0].role must be text, found null"),
            ([USER], [{**FOUR, "x": math.nan}], "chosen[0] cannot be written as JSON"),
            ([USER], [FOUR, USER], "chosen[1] is a user message, which would be trained on"),
            ([USER], [USER, FOUR], "chosen[0] is a user message, which would be trained on"),
            (
                [{**USER, "content": [{"type": "image"}]}],
                [FOUR],
                "prompt[0].content must be text or",
            ),
        ],
    )
    def test_messages(self, tmp_path: Path, prompt: JSON, chosen: JSON, fault: str) -> None:
        row: dict[str, JSON] = {"prompt": prompt, "chosen": chosen, "rejected": [FIVE]}
        assert fault_of(tmp_path, row).startswith(fault)

    @pytest.mark.parametrize(
        ("row", "fault"),
        [
            ({"prompt": "p", "chosen": "c"}, "missing rejected; the row has prompt, chosen"),
            ({}, "missing chosen and rejected; the row has nothing"),
            ({"chosen": [FOUR], "rejected": [FIVE]}, "the answers share no messages"),
            (
                {"chosen": "a", "rejected": "b"},
                "no prompt, and no '\\n\\nAssistant:' in the answer",
            ),
            (
                {
                    "chosen": "\n\nHuman: a\n\nAssistant: 1",
                    "rejected": "\n\nHuman: b\n\nAssistant: 2",
                },
                "the answers do not share every turn before the last answer",
            ),
            (
                {
                    "chosen": "\n\nHuman: a\n\nAssistant: 1",
                    "rejected": "\n\nHuman: a\n\nAssistant: 2\n\nHuman: b",
                },
                "the answers do not share every turn before the last answer",
            ),
            (
                {"prompt": "other", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
                "prompt is none of the messages that come before the answers",
            ),
            ({"input": {}, "preferred_output": []}, "preferred_output needs input.messages"),
            (
                {"input": {"messages": [USER]}, "preferred_output": [FOUR]},
                "preferred_output needs non_preferred_output",
            ),
        ],
    )
    def test_layouts(self, tmp_path: Path, row: Mapping[str, JSON], fault: str) -> None:
        assert fault_of(tmp_path, row).startswith(fault)

    @pytest.mark.parametrize(
        ("line", "fault"),
        [
            (b"{", "malformed JSON: "),
            (b"[" * 100_000, "malformed JSON: "),
            (b'{"chosen": "a", "chosen": "b"}', "malformed JSON: an object has one key twice"),
            (b"[1]", "expected a JSON object, found a list"),
            (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 13"),
        ],
    )
    def test_lines(self, tmp_path: Path, line: bytes, fault: str) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(line)
        with pytest.raises(InputError) as caught:
            read_pairs(path)
        assert f"{path}:1: {fault}" in str(caught.value)

    def test_every_fault_of_a_row_is_named(self, tmp_path: Path) -> None:
        fault = fault_of(tmp_path, {**ROW, "prompt": " ", "weight": -1})
        assert fault == "prompt is empty; weight must be a finite number >= 0, found -1.0"

    def test_all_faulty_rows_are_reported_together(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "pairs.jsonl", *[{**ROW, "chosen": ""}, ROW] * 22)
        with pytest.raises(InputError) as caught:
            read_pairs(path)
        lines = str(caught.value).split("\n")
        assert lines[0] == f"{path}: 22 faulty rows"
        assert lines[1:21] == [f"{path}:{line}: chosen is empty" for line in range(1, 41, 2)]
        assert lines[21:] == ["and 2 more"]

    def test_skipped_rows_are_listed(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "pairs.jsonl", ROW, {"prompt": "p"}, {**ROW, "prompt": "3="})
        loaded = load_pairs(path, on_bad_row="skip")
        assert [pair.id for pair in loaded.pairs] == ["row-1", "row-3"]
        assert loaded.skipped == (f"{path}:2: missing chosen and rejected; the row has prompt",)

    def test_source_of_faulty_rows_alone_is_refused_even_if_they_may_be_skipped(
        self, tmp_path: Path
    ) -> None:
        path = write_rows(tmp_path / "pairs.jsonl", {"prompt": "p"})
        with pytest.raises(InputError, match="1 faulty row\n"):
            load_pairs(path, on_bad_row="skip")

    def test_layouts_are_not_mixed(self, tmp_path: Path) -> None:
        other: dict[str, JSON] = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
        path = write_rows(tmp_path / "pairs.jsonl", ROW, other)
        with pytest.raises(
            InputError, match=r"pairs\.jsonl:2: layout 'prompt and answers as messages'"
        ):
            read_pairs(path)

    def test_ids_are_not_shared(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "pairs.jsonl", {**ROW, "id": "a"}, {**ROW, "id": "a"})
        with pytest.raises(InputError, match=f"pairs.jsonl:2: id 'a' is already that of {path}:1"):
            read_pairs(path)


class TestFiles:
    def test_json_array(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps([ROW, {**ROW, "prompt": "3="}], indent=1))
        assert [pair.id for pair in read_pairs(path)] == ["row-1", "row-2"]

    def test_gzipped_json_array_with_faulty_row(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.json.gz"
        path.write_bytes(gzip.compress(json.dumps([ROW, 3]).encode()))
        with pytest.raises(InputError, match="row 2: expected a JSON object, found a number"):
            read_pairs(path)

    def test_json_lines_under_the_name_of_an_array(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "pairs.json", ROW, {**ROW, "prompt": "3="})
        assert len(read_pairs(path)) == 2

    def test_malformed_array(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.json"
        path.write_text("[{}")
        with pytest.raises(InputError, match=r"pairs\.json: malformed JSON"):
            read_pairs(path)

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(ROW), encoding="utf-8-sig")
        assert len(read_pairs(path)) == 1

    def test_line_separators_of_unicode_end_no_row(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps({**ROW, "prompt": "a\u2028b"}, ensure_ascii=False), "utf-8")
        assert read_pairs(path)[0].prompt == "a\u2028b"

    def test_parquet(self, tmp_path: Path) -> None:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows: list[dict[str, JSON]] = [
            {"chosen": [USER, FOUR], "rejected": [USER, {**FIVE, "name": "x"}], "weight": None}
        ]
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
        assert read_pairs(tmp_path / "pairs.parquet") == [
            PreferencePair((USER,), (FOUR,), ({**FIVE, "name": "x"},))
        ]

    def test_damaged_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.parquet"
        path.write_bytes(b"PAR1")
        with pytest.raises(InputError, match="damaged Parquet file"):
            read_pairs(path)

    def test_parquet_without_its_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "pairs.parquet").touch()
        monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(InputError, match=r"pip install 'dpo-engine\[parquet\]'"):
            read_pairs(tmp_path / "pairs.parquet")

    @pytest.mark.parametrize(
        "content",
        [gzip.compress(json.dumps(ROW).encode() + b"\n")[:-12], b"no gzip"],
        ids=["cut off", "no gzip"],
    )
    def test_damaged_gzip(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "pairs.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged gzip file after"):
            read_pairs(path)

    def test_folder_gives_its_train_split(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train-00000-of-00002.jsonl", ROW)
        write_rows(tmp_path / "train-00001-of-00002.jsonl", {**ROW, "prompt": "3="})
        write_rows(tmp_path / "test.jsonl", {**ROW, "prompt": "4="})
        assert [pair.id for pair in read_pairs(tmp_path)] == ["row-1", "row-2"]
        assert read_pairs(tmp_path, split="test")[0].prompt == "4="

    @pytest.mark.parametrize("content", [b"", b"\n \n"])
    def test_empty_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(content)
        with pytest.raises(InputError, match="no rows; expected at least one preference pair"):
            read_pairs(path)

    def test_unknown_type(self, tmp_path: Path) -> None:
        (tmp_path / "pairs.csv").touch()
        with pytest.raises(
            InputError, match=r"pairs\.csv: unknown type of file; known are \.jsonl"
        ):
            read_pairs(tmp_path / "pairs.csv")

    @pytest.mark.parametrize("name", ["data/pairs.jsonl", "pairs", "./a/b", Path("a/b")])
    def test_absent_file(self, name: str | Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            read_pairs(name)

    def test_options_that_would_be_ignored(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "pairs.jsonl", ROW)
        with pytest.raises(InputError, match="split 'test' has no meaning for the local"):
            read_pairs(path, split="test")
        with pytest.raises(InputError, match="revision 'main' has no meaning for the local"):
            read_pairs(tmp_path, revision="main")
        with pytest.raises(
            InputError, match="columns: a pair has no answer; it has prompt, chosen"
        ):
            read_pairs(path, columns={"answer": "a"})
        with pytest.raises(
            InputError, match=r"missing column 'a' \(for chosen\); the row has prompt"
        ):
            read_pairs(path, columns={"chosen": "a"})
        for columns in ({"answers": "prompt"}, {"completion": "prompt", "answers": "prompt"}):
            with pytest.raises(
                InputError, match=r"column 'prompt' \(for answers\) would not be read: the row has"
            ):
                read_pairs(path, columns=columns)
        with pytest.raises(InputError, match="on_bad_row must be 'error' or 'skip', got 'drop'"):
            read_pairs(path, on_bad_row="drop")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"prompt": [USER]}, "prompt must be text or a tuple of messages, found a list"),
        ({"prompt": (USER,)}, "prompt, chosen, rejected must all be text, messages or token ids"),
        ({"prompt": ("hi",)}, r"prompt\[0\] must be a message"),
        ({"tools": [USER]}, "tools must be a tuple, found a list"),
        ({"tools": ({"a": {1}},)}, "tools cannot be written as JSON: found a set"),
        ({"weight": None}, "weight must be a finite number >= 0, found null"),
        (
            {"chat_template_kwargs": {"tools": [], "messages": []}},
            "chat_template_kwargs: messages, tools is given by the row itself",
        ),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping, found a list"),
        ({"chat_template_kwargs": {"a": {1}}}, "chat_template_kwargs cannot be written as JSON"),
        ({"chosen": None, "rejected": None}, "chosen and rejected are both missing"),
        ({"chosen": None, "prompt": (USER,)}, "prompt, rejected must all be text, messages or"),
        ({"chosen": None, "rejected": " "}, "rejected is empty"),
    ],
)
def test_pair_made_in_code_is_checked_too(fields: dict[str, JSON], fault: str) -> None:
    values: dict[str, JSON] = {"prompt": "p", "chosen": "c", "rejected": "r", **fields}
    with pytest.raises(InputError, match=fault):
        PreferencePair(**values)  # type: ignore[arg-type]  # wrong types are what is tested


class TestRankedAnswers:
    ROW: ClassVar[dict[str, Any]] = {
        "prompt": "2+2=",
        "answers": ["5", "4", "four", "22"],
        "scores": [1, 3, 3, 0.5],
        "weight": 2,
        "id": "q",
    }

    def test_every_two_answers_of_different_scores_are_a_pair(self, tmp_path: Path) -> None:
        loaded = load_pairs(write_rows(tmp_path / "ranked.jsonl", self.ROW))
        assert loaded.format == "ranked answers"
        assert loaded.ignored_columns == ()
        assert [(pair.id, pair.chosen, pair.rejected) for pair in loaded.pairs] == [
            ("q/1-0", "4", "5"), ("q/1-3", "4", "22"), ("q/2-0", "four", "5"),
            ("q/2-3", "four", "22"), ("q/0-3", "5", "22"),
        ]  # fmt: skip
        assert {pair.weight for pair in loaded.pairs} == {2.0}

    def test_the_best_against_each_worse_one(self, tmp_path: Path) -> None:
        pairs = read_pairs(write_rows(tmp_path / "ranked.jsonl", self.ROW), ranked="best")
        assert [(pair.chosen, pair.rejected) for pair in pairs] == [("4", "5"), ("4", "22")]

    def test_a_list_is_each_with_the_next_worse_one(self, tmp_path: Path) -> None:
        row = {**self.ROW, "scores": [1, 3, 2, 0.5]}
        pairs = read_pairs(write_rows(tmp_path / "ranked.jsonl", row), ranked="list")
        assert [(pair.chosen, pair.rejected) for pair in pairs] == [
            ("4", "four"),
            ("four", "5"),
            ("5", "22"),
        ]

    def test_a_list_with_a_tie_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"answers 1 and 2 have the score 3\.0: a list needs"):
            read_pairs(write_rows(tmp_path / "ranked.jsonl", self.ROW), ranked="list")

    def test_other_names_of_columns(self, tmp_path: Path) -> None:
        row: dict[str, Any] = {"question": "q", "completions": ["a", "b"], "ratings": [0, 1]}
        columns = {"prompt": "question", "answers": "completions", "scores": "ratings"}
        (pair,) = read_pairs(write_rows(tmp_path / "ranked.jsonl", row), columns=columns)
        assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "b", "a")
        assert pair.id == "row-1/1-0"

    def test_answers_may_be_messages(self, tmp_path: Path) -> None:
        answers = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": "q"}],
            "answers": answers,
            "scores": [2, 1],
        }
        (pair,) = read_pairs(write_rows(tmp_path / "ranked.jsonl", row))
        assert pair.chosen == ({"role": "assistant", "content": "a"},)

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"scores": [1, 2]}, "4 answers and 2 scores: expected a score for each"),
            ({"answers": ["a"], "scores": [1]}, "1 answers and 1 scores"),
            ({"scores": [1, 1, 1, 1]}, "all 4 answers have the score 1.0: none is better"),
            ({"scores": [1, True, 1, 1]}, r"scores\[1\] must be a number, found a boolean"),
            ({"scores": "high"}, "scores must be a list, found text"),
            ({"answers": ["a", "b", "", "d"]}, "is empty"),
            ({"answers": ["a", "b", "b", "a"]}, "chosen and rejected are identical"),
        ],
    )
    def test_faulty_rankings_are_refused(
        self, changes: dict[str, Any], fault: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=fault):
            read_pairs(write_rows(tmp_path / "ranked.jsonl", self.ROW | changes))

    def test_pairs_and_rankings_do_not_mix(self, tmp_path: Path) -> None:
        pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
        with pytest.raises(InputError, match="layout 'prompt and answers as text', but the rows"):
            read_pairs(write_rows(tmp_path / "ranked.jsonl", self.ROW, pair))

    def test_an_unknown_choice_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="must be one of 'all', 'best', 'list', got 'worst'"):
            read_pairs(write_rows(tmp_path / "ranked.jsonl", self.ROW), ranked=cast("Any", "worst"))


class TestUnpairedRows:
    ROW: ClassVar[dict[str, Any]] = {"prompt": "2+2=", "completion": "4", "label": True}

    @pytest.mark.parametrize("label", [True, 1, 1.0])
    def test_good_answer_is_chosen_and_bad_one_rejected(
        self, tmp_path: Path, label: bool | float
    ) -> None:
        rows = [self.ROW | {"label": label}, self.ROW | {"label": type(label)(0), "weight": 2}]
        loaded = load_pairs(write_rows(tmp_path / "unpaired.jsonl", *rows))
        assert loaded.format == "unpaired, prompt and answers as text"
        assert loaded.ignored_columns == ()
        assert loaded.pairs == [
            PreferencePair("2+2=", "4", None),
            PreferencePair("2+2=", None, "4", weight=2.0),
        ]
        assert all(pair.is_unpaired for pair in loaded.pairs)

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": [USER], "completion": [FOUR]},
            {"prompt": [USER], "completion": "4"},
            {"prompt": "2+2?", "completion": [FOUR]},
            {"prompt": [USER], "completion": [USER, FOUR]},
            {"completion": [USER, FOUR]},
            {"conversations": [{"from": "human", "value": "2+2?"}], "completion": FOUR},
        ],
    )
    def test_conversations(self, tmp_path: Path, row: dict[str, JSON]) -> None:
        pair = read_row(tmp_path, {**row, "label": False})
        assert pair == PreferencePair((USER,), None, (FOUR,))

    def test_dialogue_as_text_is_split_at_the_last_turn(self, tmp_path: Path) -> None:
        prompt = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: 2+2\n\nAssistant:"
        pair = read_row(tmp_path, {"completion": f"{prompt} 4", "label": True})
        assert pair == PreferencePair(prompt, " 4", None)

    def test_other_names_of_columns(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {"q": "2+2=", "answer": "4", "thumbs_up": 1, "reward": 0.3}
        columns = {"prompt": "q", "completion": "answer", "label": "thumbs_up"}
        loaded = load_pairs(write_rows(tmp_path / "unpaired.jsonl", row), columns=columns)
        assert loaded.pairs == [PreferencePair("2+2=", "4", None)]
        assert loaded.ignored_columns == ("reward",)

    def test_row_of_two_answers_stays_a_pair(self, tmp_path: Path) -> None:
        loaded = load_pairs(write_rows(tmp_path / "pairs.jsonl", {**ROW, "label": 1}))
        assert loaded.pairs == [PreferencePair("2+2=", "4", "5")]
        assert loaded.ignored_columns == ("label",)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"label": None}, "label must be true or false (or 1 or 0), found null"),
            ({"label": "yes"}, "label must be true or false (or 1 or 0), found text"),
            ({"label": 2}, "label must be true or false (or 1 or 0), found 2"),
            ({"label": math.nan}, "label must be true or false (or 1 or 0), found nan"),
            ({"completion": None}, "completion must be text or a list of messages, found null"),
            ({"completion": " "}, "chosen is empty"),
            ({"completion": " ", "label": 0}, "rejected is empty"),
            ({"prompt": [USER], "completion": [FOUR, USER]}, "chosen[1] is a user message"),
        ],
    )
    def test_faulty_rows(self, tmp_path: Path, change: dict[str, JSON], fault: str) -> None:
        assert fault_of(tmp_path, {**self.ROW, **change}).startswith(fault)

    @pytest.mark.parametrize(
        ("row", "fault"),
        [
            ({"prompt": "p", "completion": "c"}, "missing label; the row has prompt, completion"),
            ({"prompt": "p", "label": 1}, "missing chosen and rejected; the row has prompt, label"),
            ({"completion": "c", "label": 1}, "no prompt, and no '\\n\\nAssistant:' in the answer"),
            ({"completion": [FOUR], "label": 1}, "the answers share no messages to be the prompt"),
        ],
    )
    def test_what_is_missing(self, tmp_path: Path, row: dict[str, JSON], fault: str) -> None:
        assert fault_of(tmp_path, row).startswith(fault)

    def test_pairs_and_unpaired_rows_do_not_mix(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="layout 'unpaired, prompt and answers as text', but"):
            read_pairs(write_rows(tmp_path / "mixed.jsonl", ROW, self.ROW))

    def test_written_file_holds_completion_and_label(self, tmp_path: Path) -> None:
        write_pairs([PreferencePair("p", None, "r", source="s")], tmp_path / "unpaired.jsonl")
        assert (tmp_path / "unpaired.jsonl").read_text("utf-8") == (
            '{"prompt": "p", "completion": "r", "label": false, "source": "s"}\n'
        )


class TestTokenIds:
    ROW: ClassVar[dict[str, Any]] = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}

    def test_pairs(self, tmp_path: Path) -> None:
        loaded = load_pairs(write_rows(tmp_path / "ids.jsonl", self.ROW | {"weight": 2, "x": 1}))
        assert loaded.format == "token ids"
        assert loaded.ignored_columns == ("x",)
        assert loaded.pairs == [
            PreferencePair(Tokens((5, 6)), Tokens((7,)), Tokens((8,)), weight=2.0)
        ]

    def test_unpaired_rows(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {"prompt_ids": [5, 6], "completion_ids": [7], "label": 0}
        loaded = load_pairs(write_rows(tmp_path / "ids.jsonl", row))
        assert loaded.format == "unpaired, token ids"
        assert loaded.pairs == [PreferencePair(Tokens((5, 6)), None, Tokens((7,)))]

    def test_other_names_of_columns(self, tmp_path: Path) -> None:
        row: dict[str, JSON] = {"prompt_input_ids": [5], "a": [7], "b": [8]}
        columns = {"prompt_ids": "prompt_input_ids", "chosen_ids": "a", "rejected_ids": "b"}
        path = write_rows(tmp_path / "ids.jsonl", row)
        assert read_pairs(path, columns=columns) == [
            PreferencePair(Tokens((5,)), Tokens((7,)), Tokens((8,)))
        ]

    def test_texts_go_before_ids(self, tmp_path: Path) -> None:
        loaded = load_pairs(write_rows(tmp_path / "both.jsonl", self.ROW | ROW))
        assert loaded.pairs == [PreferencePair("2+2=", "4", "5")]
        assert loaded.ignored_columns == tuple(self.ROW)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"chosen_ids": []}, "chosen is empty"),
            ({"chosen_ids": "5 6"}, "chosen_ids must be a list of token ids, found text"),
            ({"chosen_ids": 5}, "chosen_ids must be a list of token ids, found a number"),
            ({"chosen_ids": [5, "6"]}, "chosen[1] must be a token id, found text"),
            ({"chosen_ids": [5, 6.0]}, "chosen[1] must be a token id, found 6.0"),
            ({"chosen_ids": [5, -1]}, "chosen[1] must be a token id, found -1"),
            ({"chosen_ids": [True]}, "chosen[0] must be a token id, found a boolean"),
            ({"prompt_ids": [2**31]}, "prompt[0] must be a token id, found 2147483648"),
            ({"prompt_ids": None}, "prompt_ids must be a list of token ids, found null"),
            ({"chosen_ids": [8]}, "chosen and rejected are identical"),
        ],
    )
    def test_faulty_rows(self, tmp_path: Path, change: dict[str, JSON], fault: str) -> None:
        assert fault_of(tmp_path, {**self.ROW, **change}) == fault

    @pytest.mark.parametrize(
        ("row", "fault"),
        [
            ({"prompt": "p", "chosen_ids": [1], "rejected_ids": [2]}, "missing prompt_ids; the"),
            (
                {"prompt_ids": [3], "chosen_ids": [1]},
                "missing rejected_ids; the row has prompt_ids",
            ),
            ({"prompt_ids": [3], "completion_ids": [1]}, "missing label; the row has prompt_ids"),
            ({"prompt_ids": [3], "chosen": "a", "rejected": "b"}, "no prompt, and no"),
        ],
    )
    def test_what_is_missing(self, tmp_path: Path, row: dict[str, JSON], fault: str) -> None:
        assert fault_of(tmp_path, row).startswith(fault)

    def test_ids_and_texts_do_not_mix_in_code(self) -> None:
        with pytest.raises(InputError, match="must all be text, messages or token ids"):
            PreferencePair("p", Tokens((1,)), Tokens((2,)))


class TestTurns:
    ROW: ClassVar[dict[str, Any]] = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "chosen": [
            {"role": "assistant", "content": "calc"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "It is 4"},
        ],
        "rejected": [{"role": "assistant", "content": "five"}],
    }

    def test_row_says_which_turns_are_trained_on(self, tmp_path: Path) -> None:
        row = {**self.ROW, "answer_turns": "last"}
        (pair,) = read_pairs(write_rows(tmp_path / "turns.jsonl", row))
        assert pair.answer_turns == "last"
        write_pairs([pair], tmp_path / "again.jsonl")
        assert read_pairs(tmp_path / "again.jsonl") == [pair]

    def test_option_says_it_for_rows_that_do_not(self, tmp_path: Path) -> None:
        rows = [self.ROW, {**self.ROW, "answer_turns": "all"}]
        pairs = read_pairs(write_rows(tmp_path / "turns.jsonl", *rows), answer_turns="last")
        assert [pair.answer_turns for pair in pairs] == ["last", "all"]

    def test_option_is_checked(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "turns.jsonl", self.ROW)
        with pytest.raises(InputError, match="answer_turns must be 'all' or 'last', got 'first'"):
            read_pairs(path, answer_turns="first")  # type: ignore[arg-type]  # what is tested

    def test_option_is_checked_before_the_source_is_sought(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="answer_turns must be 'all' or 'last', got 'first'"):
            read_pairs(tmp_path / "missing.jsonl", answer_turns="first")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({}, r"chosen\[1\] is a tool message, .* or with answer_turns begin and end with them"),
            ({"answer_turns": "first"}, "answer_turns must be all or last, found 'first'"),
            (
                {"answer_turns": "all", "chosen": [{"role": "user", "content": "?"}]},
                r"chosen\[0\] is a user message",
            ),
            (
                {"answer_turns": "all", "prompt": "q", "chosen": "a", "rejected": "b"},
                "answer_turns is for conversations, and the prompt is none",
            ),
        ],
    )
    def test_faulty_rows(self, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
        path = write_rows(tmp_path / "turns.jsonl", {**self.ROW, **changes})
        with pytest.raises(InputError, match=fault):
            read_pairs(path)


class TestStream:
    RANKED: ClassVar[dict[str, JSON]] = {
        "prompt": "2+2=",
        "answers": ["4", "5", "6"],
        "scores": [3, 2, 1],
    }

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
    def test_pairs_are_those_of_loading_as_often_as_they_are_read(
        self, tmp_path: Path, name: str
    ) -> None:
        rows = [{**ROW, "id": f"r{number}"} for number in range(3)]
        path = tmp_path / name
        if name.endswith("parquet"):
            arrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(arrow.Table.from_pylist(rows), path)
        else:
            text = json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows))
            path.write_bytes(gzip.compress(text.encode()) if "gz" in name else text.encode())
        seen: list[PreferencePair] = []
        stream = stream_pairs(path, visit=seen.append)
        assert len(stream) == 3
        for pairs in (seen, list(stream), list(stream), read_pairs(path)):
            assert [pair.id for pair in pairs] == ["r0", "r1", "r2"]
            assert pairs == read_pairs(path)

    def test_what_is_told_is_told_of_a_stream_too(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.jsonl", {**ROW, "x": 1}, {"prompt": "p"})
        stream, loaded = (read(path, on_bad_row="skip") for read in (stream_pairs, load_pairs))
        for told in ("format", "skipped", "ignored_columns", "revision"):
            assert getattr(stream, told) == getattr(loaded, told)
        assert stream.ignored_columns == ("x",)

    def test_pairs_of_some_numbers_are_read_alone(self, tmp_path: Path) -> None:
        rows = (self.RANKED, {"prompt": "p"}, self.RANKED, self.RANKED)
        path = write_rows(tmp_path / "rows.jsonl", *rows)
        stream = stream_pairs(path, on_bad_row="skip")
        assert len(stream) == 9
        found = [pair.id for pair in stream.read(np.array([1, 6, 8]))]
        assert found == ["row-1/0-2", "row-4/0-1", "row-4/1-2"]
        assert list(stream.read(np.arange(0))) == []

    def test_file_that_changes_is_refused(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.jsonl", ROW, ROW)
        stream = stream_pairs(path)
        begun = iter(stream)
        next(begun)
        write_rows(path, ROW)
        for reading in (begun, iter(stream)):
            with pytest.raises(InputError, match=r"rows\.jsonl: changed while it was used: start"):
                list(reading)

    def test_pipe_is_read_once_and_refused_the_second_time(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        os.mkfifo(path)
        with ThreadPoolExecutor() as pool:
            pool.submit(write_rows, path, ROW)
            stream = stream_pairs(path)
        assert len(stream) == 1
        with pytest.raises(InputError, match="can be read once only: give a file"):
            list(stream)
