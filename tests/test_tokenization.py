from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.errors import InputError
from dpo.pair import AnswerTurns
from dpo.preferences import Message, PreferencePair, Tokens
from dpo.tokenization import (
    TokenizationReport,
    TokenizedPair,
    TokenizedPairs,
    TokenizeOptions,
    columns_of,
    tokenize_pairs,
)
from dpo.tokenized_pairs import RowNote, model_ids
from dpo.tokenizer import Tokenizer, byte_tokenizer, train_bpe

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_END = 256, 257, 259
PLAIN = byte_tokenizer(SPECIALS, bos="<s>", eos="</s>")
CHAT = byte_tokenizer(SPECIALS, eos="<|im_end|>")
MERGING = train_bpe(["ab ab ab the cat"] * 9, 300, SPECIALS, eos="</s>")
TEXT = PreferencePair("2+2=", "4", "five")
TALK = PreferencePair(
    ({"role": "user", "content": "2+2?"},),
    ({"role": "assistant", "content": "4"},),
    ({"role": "assistant", "content": "five"},),
)
PREFIX = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def tokenize(
    pair: PreferencePair, tokenizer: Tokenizer = PLAIN, options: TokenizeOptions | None = None
) -> TokenizedPair:
    return tokenize_pairs([pair], tokenizer, options).pairs[0]


def report_on(
    *pairs: PreferencePair,
    tokenizer: Tokenizer = PLAIN,
    options: TokenizeOptions | None = None,
    on_bad_row: str = "error",
) -> TokenizationReport:
    return tokenize_pairs(pairs, tokenizer, options, on_bad_row=on_bad_row).report


def said(content: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": content},)


def own_template(source: str) -> Tokenizer:
    return byte_tokenizer(SPECIALS, eos="</s>", chat_template=source)


texts = st.text(min_size=1).filter(str.strip)


class TestPlainText:
    def test_begin_token_then_prompt_then_answer_then_end_token(self) -> None:
        pair = tokenize(TEXT)
        assert pair.prompt_ids.tolist() == [BOS, *b"2+2="]
        assert pair.chosen_ids.tolist() == [*b"4", EOS]
        assert pair.rejected_ids.tolist() == [*b"five", EOS]

    def test_no_begin_token_if_the_tokenizer_uses_none(self) -> None:
        assert tokenize(TEXT, CHAT).prompt_ids.tolist() == [*b"2+2="]

    def test_begin_token_written_out_is_not_doubled(self) -> None:
        pair = tokenize(PreferencePair("<s>2", "4", "5"))
        assert pair.prompt_ids.tolist() == [BOS, *b"2"]

    @pytest.mark.parametrize("chosen", ["4</s>", "4</s></s>"])
    def test_end_token_written_out_is_not_doubled(self, chosen: str) -> None:
        assert tokenize(PreferencePair("2", chosen, "5")).chosen_ids.tolist() == [*b"4", EOS]

    def test_end_token_before_a_line_end_is_not_doubled(self) -> None:
        pair = tokenize(PreferencePair("2", "4</s>\n", "5"))
        assert pair.chosen_ids.tolist() == [*b"4", EOS, *b"\n"]

    def test_end_token_is_there_even_if_it_pads(self) -> None:
        assert PLAIN.pad_id == PLAIN.eos_id
        assert tokenize(TEXT).chosen_ids[-1] == PLAIN.eos_id

    @pytest.mark.parametrize("tokenizer", [PLAIN, MERGING], ids=["bytes", "bpe"])
    @settings(deadline=None, max_examples=50)
    @given(prompt=texts, chosen=texts, rejected=texts)
    def test_tokens_are_those_of_prompt_and_answer_together(
        self, tokenizer: Tokenizer, prompt: str, chosen: str, rejected: str
    ) -> None:
        if chosen == rejected:
            chosen += "!"
        result = tokenize_pairs([PreferencePair(prompt, chosen, rejected)], tokenizer)
        pair, start = result.pairs[0], [BOS] * tokenizer.starts_with_bos
        assert pair.prompt_ids.tolist() == start + tokenizer.encode(prompt)
        for ids, answer in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
            assert tokenizer.decode(ids) == answer + "</s>"
            if not result.report.boundary_merges:
                whole = start + tokenizer.encode(prompt + answer) + [tokenizer.eos_id]
                assert [*pair.prompt_ids, *ids] == whole

    def test_merge_across_the_boundary_is_reported_and_not_made(self) -> None:
        pair = PreferencePair("a", "b", "c", id="merges")
        assert len(MERGING.encode("ab")) == 1
        result = tokenize_pairs([pair, PreferencePair("a", "c", "d")], MERGING)
        assert result.pairs[0].prompt_ids.tolist() == MERGING.encode("a")
        assert result.pairs[0].chosen_ids[:-1].tolist() == MERGING.encode("b")
        assert result.report.boundary_merges == ("merges",)

    def test_tokenizer_without_an_end_token_is_refused(self) -> None:
        files = {"tokenizer.json": CHAT._files["tokenizer.json"]}
        with pytest.raises(InputError, match="endless: no eos_token, so no answer can be ended"):
            tokenize(TEXT, Tokenizer(files, name="endless"))


class TestConversations:
    def test_prompt_is_what_the_model_sees_at_inference(self) -> None:
        assert tokenize(TALK, CHAT).prompt_ids.tolist() == CHAT.encode(PREFIX)

    def test_answer_is_what_the_template_writes_after_it(self) -> None:
        assert tokenize(TALK, CHAT).chosen_ids.tolist() == [*b"4", IM_END, *b"\n"]

    def test_answer_may_hold_several_messages(self) -> None:
        pair = tokenize(replace(TALK, chosen=said("4") + said("!")), CHAT)
        expected = "4<|im_end|>\n<|im_start|>assistant\n!<|im_end|>\n"
        assert pair.chosen_ids.tolist() == CHAT.encode(expected)

    def test_prompt_that_ends_with_the_assistant_is_continued(self) -> None:
        question: Message = {"role": "user", "content": "2+2?"}
        pair = tokenize(replace(TALK, prompt=(question, *said("It is "))), CHAT)
        assert pair.prompt_ids.tolist() == CHAT.encode(PREFIX + "It is ")
        assert pair.chosen_ids.tolist() == CHAT.encode("4<|im_end|>\n")

    def test_tools_reach_the_template(self) -> None:
        source = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
        pair = tokenize(replace(TALK, tools=({"name": "add"},)), own_template(source))
        assert CHAT.decode(pair.prompt_ids) == '[{"name": "add"}]2+2?'

    def test_variables_of_a_row_reach_the_template_for_that_row(self) -> None:
        tokenizer = own_template("{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}")
        marked = replace(TALK, chat_template_kwargs={"mark": "!"})
        goes_on = replace(marked, prompt=({"role": "user", "content": "2+2?"}, *said("4")))
        rows = tokenize_pairs([marked, TALK, goes_on], tokenizer).pairs
        prompts = [tokenizer.decode(row.prompt_ids) for row in rows]
        assert prompts == ["2+2?!", "2+2?", "2+2?!4"]
        assert tokenizer.decode(rows[0].chosen_ids) == "4!</s>"

    def test_template_of_the_tokenizer_goes_before_chatml(self) -> None:
        source = (
            "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>{% endif %}"
        )
        pair = tokenize(TALK, own_template(source))
        assert pair.prompt_ids.tolist() == [BOS, *b"2+2?", EOS, BOS]
        forced = tokenize(TALK, own_template(source), TokenizeOptions(template="chatml"))
        assert forced.prompt_ids.tolist() == CHAT.encode(PREFIX)

    def test_chatml_is_used_if_the_tokenizer_has_no_template(self) -> None:
        bare = byte_tokenizer(SPECIALS, chat_template=None)
        assert tokenize(TALK, bare).prompt_ids.tolist() == CHAT.encode(PREFIX)

    def test_end_token_is_added_where_the_template_marks_no_end(self) -> None:
        tokenizer = own_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        result = tokenize_pairs([replace(TALK, id="x")], tokenizer)
        assert result.pairs[0].chosen_ids.tolist() == [*b"4", *b"\n", EOS]
        assert result.report.end_tokens_added == ("x",)

    def test_end_of_turn_written_out_is_not_doubled(self) -> None:
        pair = tokenize(replace(TALK, chosen=said("4<|im_end|>")), CHAT)
        assert pair.chosen_ids.tolist() == [*b"4", IM_END, *b"\n"]

    def test_conversation_that_does_not_begin_with_its_prompt_is_faulty(self) -> None:
        tokenizer = own_template("{{ messages | length }}{{ messages[-1].content }}")
        with pytest.raises(InputError) as caught:
            tokenize(TALK, tokenizer)
        assert str(caught.value).endswith(
            "row-1: chat template of new tokenizer: the conversation does not begin with its "
            "prompt: after 0 characters it has '24', the prompt '12+2?'"
        )

    def test_rows_that_the_template_refuses_are_listed_or_dropped(self) -> None:
        source = (
            "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('bad word') }}"
            "{% endif %}{{ m.content }}</s>{% endfor %}"
        )
        bad = replace(TALK, chosen=said("bad"))
        with pytest.raises(InputError) as caught:
            report_on(TALK, bad, bad, tokenizer=own_template(source))
        reason = "chat template of new tokenizer: bad word"
        assert str(caught.value) == f"tokens: 2 faulty rows\nrow-2: {reason}\nrow-3: {reason}"
        report = report_on(TALK, bad, tokenizer=own_template(source), on_bad_row="skip")
        assert report.dropped == (("row-2", reason),)

    def test_date_in_the_template_is_reported(self) -> None:
        source = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        report = report_on(TALK, tokenizer=own_template(source))
        assert report.template_date is not None
        assert f"wrote the date of {report.template_date}" in report.describe()[1]

    def test_templates_that_would_be_ignored_are_refused(self) -> None:
        with pytest.raises(InputError, match="template is none, but rows are conversations"):
            tokenize(TALK, CHAT, TokenizeOptions(template="none"))
        with pytest.raises(InputError, match="template is chatml, but no row is a conversation"):
            tokenize(TEXT, CHAT, TokenizeOptions(template="chatml"))


class TestTurns:
    """Answers with messages of others between those of the assistant."""

    TURNS: tuple[Message, ...] = (
        *said("calc"),
        {"role": "tool", "content": "4"},
        *said("It is 4"),
    )
    BETWEEN = "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"

    def pair(self, turns: AnswerTurns) -> PreferencePair:
        return replace(TALK, chosen=self.TURNS, answer_turns=turns)

    def test_all_that_the_assistant_says_is_scored(self) -> None:
        found = tokenize(self.pair("all"), CHAT)
        first, last = CHAT.encode("calc<|im_end|>\n"), CHAT.encode("It is 4<|im_end|>\n")
        context = [-1 - id_ for id_ in CHAT.encode(self.BETWEEN)]
        assert found.chosen_ids.tolist() == [*first, *context, *last]
        assert found.prompt_ids.tolist() == CHAT.encode(PREFIX)
        assert found.rejected_ids.tolist() == CHAT.encode("five<|im_end|>\n")

    def test_the_last_turn_alone_can_be_scored(self) -> None:
        found = tokenize(self.pair("last"), CHAT)
        context = [-1 - id_ for id_ in CHAT.encode("calc<|im_end|>\n" + self.BETWEEN)]
        last = CHAT.encode("It is 4<|im_end|>\n")
        assert found.chosen_ids.tolist() == [*context, *last]

    def test_scored_tokens_are_counted_apart(self) -> None:
        pairs = tokenize_pairs([self.pair("last")], CHAT).pairs
        scored = len(CHAT.encode("It is 4<|im_end|>\n"))
        assert pairs.scored_lengths.tolist() == [[scored, len(pairs[0].rejected_ids)]]
        assert pairs.lengths()[0, 1] == len(pairs[0].chosen_ids) > scored

    def test_model_reads_the_whole_conversation(self) -> None:
        found = tokenize(self.pair("last"), CHAT)
        whole = "calc<|im_end|>\n" + self.BETWEEN + "It is 4<|im_end|>\n"
        assert model_ids(found.chosen_ids).tolist() == CHAT.encode(whole)

    def test_several_turns_of_the_assistant_are_parted_by_what_begins_one(self) -> None:
        turns = replace(TALK, chosen=said("4") + said("!"), answer_turns="all")
        context = [-1 - id_ for id_ in CHAT.encode("<|im_start|>assistant\n")]
        expected = [*CHAT.encode("4<|im_end|>\n"), *context, *CHAT.encode("!<|im_end|>\n")]
        assert tokenize(turns, CHAT).chosen_ids.tolist() == expected

    def test_answer_cut_to_what_is_not_scored_is_dropped(self) -> None:
        limit = TokenizeOptions(max_length=len(CHAT.encode(PREFIX)) + 5, truncation="keep-start")
        pairs = [self.pair("last"), TALK]
        report = tokenize_pairs(
            [replace(pair, id=str(row)) for row, pair in enumerate(pairs)], CHAT, limit
        ).report
        assert report.dropped == (
            RowNote("0", "nothing that is trained on is left of an answer that is cut"),
        )

    def test_they_come_back_from_the_cache(self, tmp_path: Path) -> None:
        first = tokenize_pairs([self.pair("all")], CHAT, cache_dir=tmp_path)
        other = tokenize_pairs([self.pair("last")], CHAT, cache_dir=tmp_path)
        again = tokenize_pairs([self.pair("all")], CHAT, cache_dir=tmp_path)
        assert again.report.cache == "found"
        assert other.report.cache == "stored"
        assert again.pairs[0].chosen_ids.tolist() == first.pairs[0].chosen_ids.tolist()


class TestUnpairedRows:
    @pytest.mark.parametrize(("pair", "tokenizer"), [(TEXT, PLAIN), (TALK, CHAT)])
    def test_the_answer_there_is_has_the_tokens_it_has_in_a_pair(
        self, pair: PreferencePair, tokenizer: Tokenizer
    ) -> None:
        whole = tokenize(pair, tokenizer)
        good = tokenize(replace(pair, rejected=None), tokenizer)
        bad = tokenize(replace(pair, chosen=None), tokenizer)
        for row in (good, bad):
            assert row.prompt_ids.tolist() == whole.prompt_ids.tolist()
        assert good.chosen_ids.tolist() == whole.chosen_ids.tolist()
        assert bad.rejected_ids.tolist() == whole.rejected_ids.tolist()
        assert (good.rejected_ids.size, bad.chosen_ids.size) == (0, 0)

    @pytest.mark.parametrize(
        ("truncation", "prompt", "answer", "cut"),
        [
            ("keep-start", b"2+2=", [*b"fiv"], "rejected 5 to 3 tokens"),
            ("keep-end", b"2=", [*b"five", EOS], "prompt 5 to 3 tokens"),
        ],
    )
    def test_limits_are_of_the_answer_there_is(
        self, truncation: str, prompt: bytes, answer: list[int], cut: str
    ) -> None:
        options = TokenizeOptions(max_length=8, truncation=truncation)  # type: ignore[arg-type]
        result = tokenize_pairs([replace(TEXT, chosen=None)], PLAIN, options)
        assert result.pairs[0].prompt_ids.tolist() == [BOS, *prompt]
        assert result.pairs[0].chosen_ids.tolist() == []
        assert result.pairs[0].rejected_ids.tolist() == answer
        assert result.report.cut == (("row-1", cut),)

    def test_boundary_and_special_tokens_are_reported(self) -> None:
        rows = [PreferencePair("a", "b", None), PreferencePair("a", None, "c</s>")]
        report = report_on(*rows, tokenizer=MERGING)
        assert report.boundary_merges == ("row-1",)
        assert report.special_in_text == ("row-2",)

    def test_they_come_back_from_the_cache(self, tmp_path: Path) -> None:
        rows = [replace(TEXT, chosen=None), replace(TEXT, rejected=None), TEXT]
        made = tokenize_pairs(rows, PLAIN, cache_dir=tmp_path)
        found = tokenize_pairs(rows, PLAIN, cache_dir=tmp_path)
        assert (made.report.cache, found.report.cache) == ("stored", "found")
        assert found.pairs.fingerprint == tokenize_pairs(rows, PLAIN).pairs.fingerprint
        assert found.pairs.is_unpaired.tolist() == [True, True, False]


class TestTokenIds:
    GIVEN = PreferencePair(Tokens((65, 66)), Tokens((67,)), Tokens((68, 69, 70)))

    def test_they_are_used_as_they_are(self) -> None:
        rows = [TEXT, self.GIVEN, replace(self.GIVEN, chosen=None), TEXT]
        pairs = tokenize_pairs(rows, PLAIN).pairs
        assert pairs[0].prompt_ids.tolist() == [BOS, *b"2+2="]
        assert [ids.tolist() for ids in (pairs[1].prompt_ids, pairs[1].chosen_ids)] == [
            [65, 66],
            [67],
        ]
        assert pairs[2].rejected_ids.tolist() == [68, 69, 70]
        assert pairs.is_unpaired.tolist() == [False, False, True, False]

    def test_limits_apply(self) -> None:
        options = TokenizeOptions(max_length=4, truncation="keep-start")
        result = tokenize_pairs([self.GIVEN], PLAIN, options)
        assert result.pairs[0].rejected_ids.tolist() == [68, 69]
        assert result.report.cut == (("row-1", "rejected 3 to 2 tokens"),)

    def test_ids_beyond_the_vocabulary_are_faults(self) -> None:
        bad = replace(self.GIVEN, rejected=Tokens((68, 260)))
        fault = "row-2: rejected has the token 260, but those of new tokenizer go up to 259"
        with pytest.raises(InputError, match=fault):
            report_on(self.GIVEN, bad)
        assert report_on(self.GIVEN, bad, on_bad_row="skip").kept == 1
        assert report_on(replace(self.GIVEN, rejected=Tokens((68, 259)))).kept == 1

    def test_they_have_no_template(self) -> None:
        with pytest.raises(InputError, match="template is chatml, but no row is a conversation"):
            report_on(self.GIVEN, options=TokenizeOptions(template="chatml"))

    def test_they_are_found_in_the_cache(self, tmp_path: Path) -> None:
        for told in ("stored", "found"):
            assert tokenize_pairs([self.GIVEN], PLAIN, cache_dir=tmp_path).report.cache == told


def test_special_tokens_in_texts_are_reported() -> None:
    rows = [replace(TEXT, chosen="4</s>", id="a"), replace(TEXT, id="b")]
    assert report_on(*rows).special_in_text == ("a",)
    talks = [replace(TALK, prompt=({"role": "user", "content": "<s>"},), id="a"), TALK]
    assert report_on(*talks, tokenizer=CHAT).special_in_text == ("a",)


class TestLimits:
    # prompt 5 tokens with its begin token, chosen 2, rejected 5, each with its end token
    def test_rows_over_a_limit_are_refused_unless_another_way_is_chosen(self) -> None:
        assert TokenizeOptions(max_length=9).truncation == "error"

    def test_rows_within_the_limits_stay_whole(self) -> None:
        report = report_on(TEXT, options=TokenizeOptions(max_length=10, max_prompt_length=5))
        assert (report.kept, report.dropped, report.cut) == (1, (), ())

    @pytest.mark.parametrize(
        ("limits", "reason"),
        [
            ({"max_length": 9}, "10 tokens, max_length 9"),
            ({"max_prompt_length": 4}, "prompt of 5 tokens, max_prompt_length 4"),
        ],
    )
    def test_drop_leaves_rows_out_and_error_refuses_them(
        self, limits: dict[str, int], reason: str
    ) -> None:
        short = PreferencePair("2", "4", "5")
        drop = TokenizeOptions(truncation="drop", **limits)  # type: ignore[arg-type]
        report = report_on(short, TEXT, options=drop)
        assert (report.rows, report.kept, report.dropped) == (2, 1, (("row-2", reason),))
        refuse = replace(drop, truncation="error")
        with pytest.raises(InputError, match=f"tokens: 1 faulty row\nrow-2: {reason}"):
            report_on(short, TEXT, options=refuse)
        assert report_on(short, TEXT, options=refuse, on_bad_row="skip") == report

    def test_keep_start_cuts_the_ends_of_answers(self) -> None:
        options = TokenizeOptions(max_length=8, truncation="keep-start")
        result = tokenize_pairs([TEXT], PLAIN, options)
        assert result.pairs[0].prompt_ids.tolist() == [BOS, *b"2+2="]
        assert result.pairs[0].chosen_ids.tolist() == [*b"4", EOS]
        assert result.pairs[0].rejected_ids.tolist() == [*b"fiv"]
        assert result.report.cut == (("row-1", "rejected 5 to 3 tokens"),)

    def test_keep_start_cuts_the_ends_of_prompts_first(self) -> None:
        options = TokenizeOptions(max_length=8, max_prompt_length=3, truncation="keep-start")
        result = tokenize_pairs([TEXT], PLAIN, options)
        assert result.pairs[0].prompt_ids.tolist() == [BOS, *b"2+"]
        assert result.pairs[0].rejected_ids.tolist() == [*b"five", EOS]
        assert result.report.cut == (("row-1", "prompt 5 to 3 tokens"),)

    def test_keep_end_cuts_the_starts_of_prompts_but_not_the_begin_token(self) -> None:
        for limits in ({"max_prompt_length": 3}, {"max_length": 8}):
            options = TokenizeOptions(truncation="keep-end", **limits)  # type: ignore[arg-type]
            result = tokenize_pairs([TEXT], PLAIN, options)
            assert result.pairs[0].prompt_ids.tolist() == [BOS, *b"2="]
            assert result.pairs[0].rejected_ids.tolist() == [*b"five", EOS]
            assert result.report.cut == (("row-1", "prompt 5 to 3 tokens"),)

    def test_keep_end_leaves_the_last_token_if_there_is_room_for_one(self) -> None:
        options = TokenizeOptions(max_length=6, truncation="keep-end")
        assert tokenize(TEXT, options=options).prompt_ids.tolist() == [*b"="]

    @pytest.mark.parametrize(
        ("truncation", "limit", "reason"),
        [
            ("keep-start", 5, "prompt of 5 tokens leaves no room, max_length 5"),
            ("keep-end", 5, "answer of 5 tokens leaves no room, max_length 5"),
        ],
    )
    def test_rows_that_cannot_be_cut_are_dropped(
        self, truncation: str, limit: int, reason: str
    ) -> None:
        options = TokenizeOptions(max_length=limit, truncation=truncation)  # type: ignore[arg-type]
        report = report_on(PreferencePair("2", "4", "5"), TEXT, options=options)
        assert report.dropped == (("row-2", reason),)

    def test_answers_that_are_cut_to_the_same_tokens_are_dropped(self) -> None:
        options = TokenizeOptions(max_length=4, truncation="keep-start")
        same = PreferencePair("2", "abc", "abd")
        report = report_on(same, PreferencePair("2", "4", "5"), options=options)
        assert report.dropped == (("row-1", "chosen and rejected are the same tokens"),)

    @settings(deadline=None, max_examples=50)
    @given(
        sizes=st.lists(st.integers(1, 20), min_size=3, max_size=3),
        max_length=st.integers(2, 30),
        max_prompt_length=st.none() | st.integers(1, 30),
        truncation=st.sampled_from(["keep-start", "keep-end"]),
    )
    def test_cut_rows_are_within_the_limits_and_parts_of_whole_ones(
        self,
        sizes: list[int],
        max_length: int,
        max_prompt_length: int | None,
        truncation: str,
    ) -> None:
        if max_prompt_length is not None:
            max_prompt_length = min(max_prompt_length, max_length - 1)
        options = TokenizeOptions(
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            truncation=truncation,  # type: ignore[arg-type]
        )
        prompt, chosen, rejected = ("pcr"[index] * size for index, size in enumerate(sizes))
        pair = PreferencePair(prompt, chosen, rejected)
        whole = tokenize(pair)
        try:
            kept = tokenize(pair, options=options)
        except InputError:  # there is no room for one of the three
            return
        longest = len(kept.prompt_ids) + max(len(kept.chosen_ids), len(kept.rejected_ids))
        assert longest <= max_length
        assert len(kept.prompt_ids) <= (max_prompt_length or longest)
        for ids, full in (
            (kept.chosen_ids, whole.chosen_ids),
            (kept.rejected_ids, whole.rejected_ids),
        ):
            assert ids.tolist() == full[: len(ids)].tolist()
            assert truncation == "keep-start" or len(ids) == len(full)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "fault"),
        [
            ({"max_length": 1}, "tokenize.max_length must be at least 2, got 1"),
            ({"max_prompt_length": 0}, "tokenize.max_prompt_length must be at least 1, got 0"),
            ({"max_length": 5, "max_prompt_length": 5}, "max_prompt_length, 5, must be below tok"),
            (
                {"truncation": "keep"},
                "tokenize.truncation must be one of error, drop, keep-start, keep-end",
            ),
            (
                {"truncation": "keep-end"},
                "tokenize.truncation = keep-end cuts rows to a limit: give tokenize.max_length or",
            ),
            ({"template": "own"}, "tokenize.template must be one of auto, none, chatml, got 'own'"),
        ],
    )
    def test_values_are_checked(self, options: dict[str, object], fault: str) -> None:
        with pytest.raises(InputError, match=fault):
            TokenizeOptions(**options)  # type: ignore[arg-type]  # wrong values are what is tested

    def test_on_bad_row_is_checked(self) -> None:
        with pytest.raises(InputError, match="on_bad_row must be 'error' or 'skip', got 'drop'"):
            report_on(TEXT, on_bad_row="drop")


class TestRows:
    def test_columns_travel_with_the_tokens(self) -> None:
        pair = replace(TEXT, weight=2.0, margin=-0.5, label_prob=0.75, source="s", id="x")
        row = tokenize(pair)
        assert (row.weight, row.margin, row.label_prob, row.source, row.id) == (
            2,
            -0.5,
            0.75,
            "s",
            "x",
        )

    def test_rows_without_id_are_named_by_their_number(self) -> None:
        assert tokenize_pairs([TEXT, TALK_TEXT], PLAIN).pairs.ids == ["row-1", "row-2"]

    def test_ids_are_not_shared(self) -> None:
        with pytest.raises(InputError, match="2 pairs have only 1 different ids"):
            tokenize_pairs([replace(TEXT, id="x"), replace(TALK_TEXT, id="x")], PLAIN)

    def test_progress_counts_pairs(self) -> None:
        seen: list[tuple[int, int]] = []
        pairs = [PreferencePair(f"{row}", "a", "b") for row in range(600)]
        tokenize_pairs(pairs, PLAIN, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(512, 600), (600, 600)]

    def test_nothing_left_is_an_error_that_says_why(self) -> None:
        with pytest.raises(InputError, match="no row is left: 1 faulty row\nrow-1: 10 tok"):
            report_on(TEXT, options=TokenizeOptions(max_length=2, truncation="drop"))

    def test_report_tells_all(self) -> None:
        dropped = tuple(RowNote(f"r{row}", "long") for row in range(25))
        report = TokenizationReport(
            rows=1030,
            kept=1005,
            dropped=dropped,
            boundary_merges=("a", "b"),
            template_date="2026-01-02",
        )
        first, date, left_out, merges = report.describe()
        assert first == "tokens: 1,005 of 1,030 rows; cache not used"
        assert date == "the chat template wrote the date of 2026-01-02 into the tokens"
        assert left_out.startswith("25 rows dropped: r0 (long), r1 (long), ")
        assert left_out.endswith("r19 (long) and 5 more")
        assert merges == "2 rows merge across the boundary of prompt and answer: a, b"


TALK_TEXT = PreferencePair("3+3=", "6", "7")


class TestColumns:
    def make(self, rows: Sequence[tuple[list[int], list[int], list[int]]]) -> TokenizedPairs:
        return columns_of(
            [
                TokenizedPair(
                    np.array(prompt, dtype=np.int32),
                    np.array(chosen, dtype=np.int32),
                    np.array(rejected, dtype=np.int32),
                    id=f"r{index}",
                )
                for index, (prompt, chosen, rejected) in enumerate(rows)
            ]
        )

    def test_example_of_the_docstring(self) -> None:
        pairs = self.make([([5, 6], [7, 2], [8])])
        assert pairs.tokens.tolist() == [5, 6, 7, 2, 8]
        assert pairs.offsets.tolist() == [0, 2, 4, 5]
        assert pairs.tokens.dtype == np.int32
        assert pairs.offsets.dtype == np.int64
        assert pairs.lengths().tolist() == [[2, 2, 1]]

    def test_masks_tell_which_answers_there_are(self) -> None:
        pairs = self.make([([1], [2], [3]), ([1], [2], []), ([1], [], [3])])
        assert pairs.has_chosen.tolist() == [True, True, False]
        assert pairs.has_rejected.tolist() == [True, False, True]
        assert pairs.is_unpaired.tolist() == [False, True, True]
        assert pairs.take([2])[0].chosen_ids.tolist() == []

    def test_slices_and_choices_are_pairs_again(self) -> None:
        pairs = self.make([([row], [row + 10], [row + 20]) for row in range(5)])
        assert [int(pair.prompt_ids[0]) for pair in pairs[1:4:2]] == [1, 3]
        assert pairs.take([4, 0]).ids == ["r4", "r0"]
        assert pairs[-1].chosen_ids.tolist() == [14]
        assert [pair.id for pair in pairs] == ["r0", "r1", "r2", "r3", "r4"]
        with pytest.raises(IndexError):
            pairs[5]

    def test_fingerprint_is_that_of_the_content(self) -> None:
        rows = [([1], [2], [3]), ([4], [5, 6], [7])]
        pairs = self.make(rows)
        assert pairs.fingerprint == self.make(rows).fingerprint
        assert pairs.fingerprint != self.make([*rows[:1], ([4, 5], [6], [7])]).fingerprint
        other = self.make(rows)
        other.weights[0] = 2
        assert pairs.fingerprint != other.fingerprint
        other = self.make(rows)
        other.sources = ["s", None]
        assert pairs.fingerprint != other.fingerprint

    @pytest.mark.parametrize(
        ("offsets", "fault"),
        [
            ([0, 1, 2, 4], "offsets must rise from 0 to 3"),
            ([0, 2, 1, 3], "offsets must rise from 0 to 3"),
            ([1, 1, 2, 3], "offsets must rise from 0 to 3"),
            ([0, 0, 2, 3], "every row needs tokens of its prompt and of an answer"),
            ([0, 3, 3, 3], "every row needs tokens of its prompt and of an answer"),
            ([0, 1, 2, 3, 3], "5 offsets need 1.33"),
        ],
    )
    def test_columns_that_do_not_fit_are_refused(self, offsets: list[int], fault: str) -> None:
        one = np.ones(1, dtype=np.float32)
        with pytest.raises(ValueError, match=fault):
            TokenizedPairs(
                tokens=np.arange(3, dtype=np.int32),
                offsets=np.array(offsets, dtype=np.int64),
                weights=one,
                margins=one,
                label_probs=one,
                ids=["r0"],
                sources=[None],
            )


class TestCache:
    PAIRS = (replace(TEXT, id="a", source="s"), replace(TALK_TEXT, id="b", weight=2.0, margin=1.0))

    def test_second_time_gives_the_same_from_the_cache(self, tmp_path: Path) -> None:
        fresh = tokenize_pairs(self.PAIRS, PLAIN)
        first = tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path)
        second = tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path)
        assert [first.report.cache, second.report.cache] == ["stored", "found"]
        assert fresh.report == replace(first.report, cache="not used")
        assert fresh.report == replace(second.report, cache="not used")
        assert fresh.pairs.fingerprint == first.pairs.fingerprint == second.pairs.fingerprint
        assert isinstance(second.pairs.tokens.base, np.memmap)

    def test_report_comes_back_whole(self, tmp_path: Path) -> None:
        options = TokenizeOptions(max_length=9, truncation="drop")
        rows = (TEXT, replace(TALK_TEXT, chosen="</s>"), replace(TALK_TEXT, prompt="<s>"))
        reports = [
            tokenize_pairs(rows, PLAIN, options, cache_dir=tmp_path).report for _ in range(2)
        ]
        assert reports[0] == replace(reports[1], cache="stored")
        assert reports[1].dropped == (("row-1", "10 tokens, max_length 9"),)
        assert reports[1].describe() == replace(reports[0], cache="found").describe()

    @pytest.mark.parametrize("file", ["columns.safetensors", "rows.json", "manifest.json"])
    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_damaged_entry_is_made_again_and_this_is_said(
        self, tmp_path: Path, file: str, damage: str
    ) -> None:
        fingerprint = tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path).pairs.fingerprint
        path = next(tmp_path.glob(f"*/{file}"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(content[:-3] if damage == "cut" else content)
        again = tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path)
        assert again.report.cache.startswith(f"made again: {path}: ")
        assert again.pairs.fingerprint == fingerprint
        third = tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path)
        assert third.report.cache == "found"

    def test_all_that_changes_tokens_is_in_the_key(self, tmp_path: Path) -> None:
        runs = [
            (self.PAIRS, PLAIN, None),
            (self.PAIRS[::-1], PLAIN, None),
            ((self.PAIRS[0], replace(self.PAIRS[1], weight=3.0)), PLAIN, None),
            ((self.PAIRS[0], replace(self.PAIRS[1], id="c")), PLAIN, None),
            (self.PAIRS, CHAT, None),
            (self.PAIRS, own_template("x"), None),
            (self.PAIRS, PLAIN, TokenizeOptions(max_length=50)),
        ]
        told = [
            tokenize_pairs(pairs, tokenizer, options, cache_dir=tmp_path).report.cache
            for pairs, tokenizer, options in runs
        ]
        assert told == ["stored"] * len(runs)

    def test_mapped_columns_are_private(self, tmp_path: Path) -> None:
        tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path)
        tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path).pairs.tokens[0] = 7
        assert tokenize_pairs(self.PAIRS, PLAIN, cache_dir=tmp_path).pairs.tokens[0] == BOS
