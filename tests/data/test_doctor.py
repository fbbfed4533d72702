"""The data doctor: every check finds its row, and only that; what is done about it."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.cli_text import doctor_text
from dpo.data.doctor import (
    DoctorOptions,
    Lengths,
    examine,
    write_cleaned,
    write_findings,
)
from dpo.data.doctor_checks import CHECKS, NEAR_IDENTICAL, share_in_common
from dpo.data.doctor_page import doctor_page
from dpo.errors import InputError
from dpo.preferences import load_pairs, read_pairs
from dpo.tokenizer import byte_tokenizer, train_bpe

GOOD = {"prompt": "What is one and one?", "chosen": "It is two.", "rejected": "No idea at all."}
DIALOGUE = "\n\nHuman: hi\n\nAssistant:"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def found(path: Path, options: DoctorOptions | None = None) -> list[tuple[str, int]]:
    return [(finding.check, finding.row) for finding in examine([path], options).findings]


# --- each check finds its row --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "rows"),
    [
        ("unreadable", [{"prompt": "p", "completion": "c", "label": "good"}]),
        ("unreadable", [["no object"]]),
        ("unreadable", [{"prompt": "p", "chosen": 3, "rejected": "r"}]),
        ("empty", [GOOD | {"chosen": ""}]),
        ("empty", [GOOD | {"rejected": None}]),
        ("empty", [GOOD | {"rejected": " \n"}]),
        ("empty", [{"chosen": DIALOGUE, "rejected": f"{DIALOGUE} hello"}]),
        ("identical", [GOOD | {"chosen": "No idea at all."}]),
        (
            "different-prompts",
            [{"chosen": f"{DIALOGUE} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{DIALOGUE} d"}],
        ),
        ("near-identical", [GOOD | {"chosen": "It is two.", "rejected": "It is TWO!"}]),
        ("typed-token", [GOOD | {"prompt": "<|im_start|>user"}]),
        ("typed-token", [GOOD | {"rejected": "so it is</s>"}]),
    ],
)
def test_odd_row_is_found_among_good_ones(check: str, rows: list[Any], tmp_path: Path) -> None:
    other = GOOD | {"prompt": "And two and two?"}
    assert found(write(tmp_path / "pairs.jsonl", GOOD, *rows, other)) == [(check, 1)]


def test_unpaired_rows_are_looked_at(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "completion": "2", "label": True}
    rows = [row, row, row | {"label": False}, row | {"completion": ""}, row | {"label": "?"}]
    path = write(tmp_path / "unpaired.jsonl", *rows)
    report = examine([path])
    assert [(each.check, each.row, each.detail) for each in report.findings] == [
        ("duplicate", 1, f"the same as {path}:1"),
        ("contradiction", 2, f"labels the answer otherwise than {path}:1"),
        ("empty", 3, "chosen is empty"),
        ("unreadable", 4, "label must be true or false (or 1 or 0), found text"),
    ]
    assert "no lengths to compare" in report.lengths.describe()


def test_rows_of_token_ids_are_looked_at(tmp_path: Path) -> None:
    row: Any = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    rows = [row, row | {"prompt_ids": [1]}, row]
    assert found(write(tmp_path / "ids.jsonl", *rows)) == [("duplicate", 2)]


def test_good_rows_are_not_found(tmp_path: Path) -> None:
    rows = [GOOD | {"prompt": f"question {i}"} for i in range(5)]
    assert found(write(tmp_path / "pairs.jsonl", *rows)) == []


def test_malformed_line_is_found_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD)
    path.write_text(path.read_text("utf-8") + '{"prompt": \n', "utf-8")
    (finding,) = examine([path]).findings
    assert (finding.check, finding.row, finding.place) == ("unreadable", 1, f"{path}:2")
    assert "malformed JSON" in finding.detail


def test_repeated_and_flipped_rows_name_the_earlier_row(tmp_path: Path) -> None:
    flipped = GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    path = write(tmp_path / "pairs.jsonl", GOOD, GOOD, flipped)
    findings = [(each.check, each.row, each.detail) for each in examine([path]).findings]
    assert findings == [
        ("duplicate", 1, f"the same as {path}:1"),
        ("contradiction", 2, f"prefers the other answer than {path}:1"),
    ]


def test_prompt_in_training_and_evaluation_is_found(tmp_path: Path) -> None:
    train = write(tmp_path / "pairs_train.jsonl", GOOD)
    leaking = GOOD | {"chosen": "Two."}
    evaluation = write(tmp_path / "pairs_eval.jsonl", GOOD | {"prompt": "new"}, leaking)
    for report in (
        examine([evaluation, train]),
        examine([train], DoctorOptions({}, eval_files=[evaluation])),
    ):
        leaks = [each for each in report.findings if each.check == "leak"]
        assert [(each.file, each.row) for each in leaks] == [(str(evaluation), 1)]
        assert leaks[0].detail == f"the prompt of {train}:1"


def test_files_of_other_layouts_are_read(tmp_path: Path) -> None:
    rows = [{"question": "q", "good": "same", "bad": "same"}]
    (tmp_path / "pairs.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    options = DoctorOptions({}, columns=columns)
    assert found(tmp_path / "pairs.json.gz", options) == [("identical", 0)]


def test_conversations_are_examined(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "hello"}]
    rows = [
        {"prompt": prompt, "chosen": answer, "rejected": answer},
        {"chosen": [*prompt, *answer], "rejected": [{"role": "user", "content": "ho"}, *answer]},
        {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": ""}]},
        {
            "input": {"messages": prompt},
            "preferred_output": answer,
            "non_preferred_output": [{"role": "assistant", "content": None}],
        },
    ]
    assert found(write(tmp_path / "pairs.jsonl", *rows)) == [
        ("identical", 0),
        ("different-prompts", 1),
        ("empty", 2),
        ("empty", 3),
    ]


WORDS = st.lists(st.sampled_from("abcd"), max_size=30)


@given(one=WORDS, other=WORDS)
def test_share_in_common_is_the_definition_where_it_matters(
    one: list[str], other: list[str]
) -> None:
    share = share_in_common(one, other)
    assert 0 <= share <= 1
    if one == other and one:
        assert share == 1
    if not set(one) & set(other):
        assert share < NEAR_IDENTICAL


# --- checks that need a tokenizer ----------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    byte_tokenizer().save(tmp_path / "model")
    return str(tmp_path / "model")


def test_rows_over_the_limit_are_found(model: str, tmp_path: Path) -> None:
    long = GOOD | {"rejected": "x" * 100}
    options = DoctorOptions({}, model=model, max_length=80)
    path = write(tmp_path / "pairs.jsonl", GOOD, long)
    (finding,) = examine([path], options).findings
    # 20 bytes of prompt, 100 of the longer answer, and the end token
    assert (finding.check, finding.row) == ("too-long", 1)
    assert finding.detail == "121 tokens, max_length 80"


def test_tokens_of_unpaired_rows_are_looked_at(model: str, tmp_path: Path) -> None:
    row = {"prompt": "2+2=", "completion": "x" * 100, "label": False}
    report = examine(
        [write(tmp_path / "unpaired.jsonl", row)], DoctorOptions({}, model=model, max_length=80)
    )
    assert [each.detail for each in report.findings] == ["105 tokens, max_length 80"]
    assert len(report.lengths.chosen) == 0


def test_special_tokens_are_those_of_the_tokenizer(model: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    special = tokenizer.special_tokens["eos_token"]
    path = write(tmp_path / "pairs.jsonl", GOOD, GOOD | {"chosen": f"It {special} is."})
    checks = found(path, DoctorOptions({}, model=model))
    assert ("typed-token", 1) in checks
    assert ("doubled-special", 1) in checks
    assert (
        found(
            write(tmp_path / "b.jsonl", GOOD | {"chosen": "</s>"}), DoctorOptions({}, model=model)
        )
        == []
    )


def test_template_that_goes_on_after_the_end_token_doubles_nothing(
    model: str, tmp_path: Path
) -> None:
    end = byte_tokenizer().special_tokens["eos_token"]
    messages = "{% for message in messages %}{{ message['content'] }}"
    answers = {
        name: [{"role": role, "content": text} for role in ("assistant", "assistant")]
        for name, text in (("chosen", "yes"), ("rejected", "no"))
    }
    path = write(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "x"}], **answers})
    for ending, expected in ((f"{end}\\n", []), (f"{end}{end}", [("doubled-special", 0)])):
        template = f"{messages}{{{{ '{ending}' }}}}{{% endfor %}}"
        (Path(model) / "chat_template.jinja").write_text(template, "utf-8")
        findings = examine([path], DoctorOptions({}, model=model)).findings
        assert [(each.check, each.row) for each in findings] == expected, ending
    assert findings[0].detail == (
        "chosen has 3 end tokens where 2 would do; rejected has 3 end tokens where 2 would do"
    )


def test_rows_that_the_template_refuses_do_not_hide_others(model: str, tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    (Path(model) / "chat_template.jinja").write_text(template, "utf-8")
    answers = {
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    rows = [{"prompt": [{"role": role, "content": "x"}], **answers} for role in ("system", "user")]
    checks = found(write(tmp_path / "pairs.jsonl", *rows), DoctorOptions({}, model=model))
    assert ("untokenizable", 0) in checks
    assert ("missing-end", 1) in checks
    lone = found(write(tmp_path / "lone.jsonl", rows[0]), DoctorOptions({}, model=model))
    assert lone == [("untokenizable", 0)]


def test_token_over_the_boundary_is_found(tmp_path: Path) -> None:
    train_bpe(["the cat", "the cat"], vocab_size=300).save(tmp_path / "model")
    merging = {"prompt": "the c", "chosen": "at", "rejected": " dog"}
    path = write(tmp_path / "pairs.jsonl", GOOD, merging)
    checks = found(path, DoctorOptions({}, model=str(tmp_path / "model")))
    assert checks == [("boundary-merge", 1)]


# --- length bias ---------------------------------------------------------------------------------


def test_lengths_by_hand() -> None:
    lengths = Lengths("tokens", np.array([3, 5, 2, 4]), np.array([1, 9, 2, 3]))
    assert lengths.mean_difference == (2 - 4 + 0 + 1) / 4
    assert lengths.longer_is_chosen == (1 + 0 + 0.5 + 1) / 4


@pytest.mark.parametrize(
    ("longer", "rows", "is_biased"),
    # beyond 0.6 and beyond two standard errors of 0.5 / sqrt(rows)
    [(61, 100, True), (60, 100, False), (39, 100, True), (12, 16, False), (13, 16, True)],
)
def test_bias_is_more_than_chance(longer: int, rows: int, is_biased: bool) -> None:
    chosen = np.array([2] * longer + [0] * (rows - longer))
    assert Lengths("tokens", chosen, np.ones(rows, np.int64)).is_biased == is_biased


def test_length_bias_can_be_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "a longer one", "rejected": "short"} for i in range(20)]
    path = write(tmp_path / "pairs.jsonl", *rows)
    assert examine([path]).failed() == []
    assert examine([path], DoctorOptions({"length-bias": "error"})).failed() == ["length-bias"]


def test_no_rows_have_no_bias(tmp_path: Path) -> None:
    report = examine([write(tmp_path / "pairs.jsonl", {"prompt": "p"})])
    assert (report.rows, report.lengths.longer_is_chosen, report.lengths.is_biased) == (
        1,
        0.5,
        False,
    )
    assert "No row can be trained on" in doctor_page(report)


# --- what is done --------------------------------------------------------------------------------


def test_ignored_check_is_not_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD | {"chosen": ""})
    report = examine([path], DoctorOptions({"empty": "ignore"}))
    assert not report.findings
    assert "empty" not in report.counts()


def test_rows_that_training_refuses_are_errors_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, GOOD, GOOD | {"chosen": ""})
    assert examine([path]).failed() == ["empty"]


def test_dropped_rows_are_left_out_of_the_copy_and_others_keep_their_bytes(tmp_path: Path) -> None:
    other = '{"prompt":"spaced",   "chosen": "a", "rejected": "b"}\n'
    path = write(tmp_path / "pairs.jsonl", GOOD, GOOD | {"chosen": ""}, GOOD)
    path.write_text(path.read_text("utf-8") + other, "utf-8")
    report = examine([path], DoctorOptions({"empty": "drop", "duplicate": "drop"}))
    left = write_cleaned(report, tmp_path / "clean")
    assert left == {tmp_path / "clean" / "pairs.jsonl": 2}
    text = (tmp_path / "clean" / "pairs.jsonl").read_text("utf-8")
    assert text == f"{json.dumps(GOOD)}\n{other}"


def test_cleaned_array_reads_back(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"prompt": "\u00e9", "chosen": None}, GOOD | {"prompt": "\u00e9"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), "utf-8")
    report = examine([tmp_path / "pairs.json"], DoctorOptions({"empty": "drop"}))
    write_cleaned(report, tmp_path / "clean")
    pairs = read_pairs(tmp_path / "clean" / "pairs.jsonl")
    assert [pair.prompt for pair in pairs] == [GOOD["prompt"], "\u00e9"]


def test_findings_are_written_one_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, GOOD)
    write_findings(examine([path]), tmp_path / "findings.jsonl")
    (line,) = (tmp_path / "findings.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {
        "policy": "warn",
        "check": "duplicate",
        "file": str(path),
        "row": 1,
        "place": f"{path}:2",
        "detail": f"the same as {path}:1",
    }


# --- the page ------------------------------------------------------------------------------------


def test_page_escapes_what_comes_from_files_and_needs_nothing_else(tmp_path: Path) -> None:
    rows = [GOOD | {"prompt": f"{i}"} for i in range(30)]
    bad = {"prompt": "p", "<script>alert(1)</script>": 1}
    page = doctor_page(examine([write(tmp_path / "<b>.jsonl", *rows, bad)]))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;.jsonl" in page
    assert "http" not in page
    assert page.count("<svg") == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_page_opens_in_a_browser(tmp_path: Path) -> None:
    rows = [GOOD | {"prompt": f"{i}"} for i in range(30)]
    page = tmp_path / "page.html"
    page.write_text(
        doctor_page(examine([write(tmp_path / "pairs.jsonl", *rows, GOOD | {"chosen": ""})])),
        "utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    dom = subprocess.run(
        ["chromium", *flags, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert dom.count("<rect") >= 3
    assert "Preference pairs, examined" in dom


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": {"emty": "drop"}}, "no check 'emty', only unreadable, different-prompts"),
        (
            {"policies": {"empty": "shout"}},
            "policy of empty must be one of ignore, warn, drop, error",
        ),
        ({"policies": {"length-bias": "drop"}}, "none can be dropped"),
        ({"policies": {"too-long": "drop"}}, "the check too-long needs a model"),
        ({"policies": {}, "max_length": 100}, "max_length counts tokens and so needs a model"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DoctorOptions(**options)


def test_missing_and_repeated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        examine([tmp_path / "none.jsonl"])
    path = write(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(InputError, match="a file is named twice"):
        examine([path, path])


def test_two_files_of_one_name_are_not_cleaned_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [write(tmp_path / "pairs.jsonl", GOOD), write(tmp_path / "a/pairs.jsonl", GOOD)]
    report = examine(paths, DoctorOptions({"duplicate": "drop"}))
    with pytest.raises(InputError, match=r"another file is already cleaned to pairs\.jsonl"):
        write_cleaned(report, tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_every_check_says_what_is_wrong() -> None:
    assert all(check.summary for check in CHECKS.values())


# --- rows as they are odd in published files ------------------------------------------------------


def test_odd_rows_of_published_dialogues_are_found(tmp_path: Path) -> None:
    """Anthropic/hh-rlhf harmless test: 4 answers that are not there, 5 rows of two dialogues."""
    opening = "\n\nHuman: Where is it?\n\nAssistant:"
    good = {"chosen": f"{opening} In the box.", "rejected": f"{opening} No idea at all."}
    empty = {"chosen": f"{opening} ", "rejected": f"{opening} Ok"}
    differing = [
        (" In the box.\n\nHuman: Which one?\n\nAssistant: The red one.", " No idea at all."),
        (" Human: I think so.\n\nHuman: Do you?\n\nAssistant: Yes.", " In the box, I think."),
        (" Sure, here it is:\n\nAssistant:  Let us go ahead.", " You mean the box, right?"),
        (
            " Human: Okay.\n\nHuman: So?\n\nAssistant: Yes.",
            " Human: Oh.\n\nHuman: And?\n\nAssistant: No.",
        ),
    ]
    odd = [{"chosen": opening + one, "rejected": opening + other} for one, other in differing]
    path = write(tmp_path / "hh.jsonl", good, empty, *odd, empty | {"chosen": f"{opening}"})
    wanted = ["empty", *["different-prompts"] * 4, "empty"]
    assert found(path) == [(check, row) for row, check in enumerate(wanted, start=1)]


def test_repeated_rows_of_published_conversations_are_found(tmp_path: Path) -> None:
    """LLaMA-Factory's dpo_en_demo: 5 exact duplicates among turns with ``from`` and ``value``."""

    def row(number: int) -> dict[str, Any]:
        return {
            "conversations": [{"from": "human", "value": f"What is {number} and one?"}],
            "chosen": {"from": "gpt", "value": f"It is {number + 1}."},
            "rejected": {"from": "gpt", "value": "I would not know that."},
        }

    (tmp_path / "lf.json").write_text(json.dumps([*map(row, range(9)), *map(row, range(5))]))
    assert found(tmp_path / "lf.json") == [("duplicate", number) for number in range(9, 14)]
    assert len(load_pairs(tmp_path / "lf.json").pairs) == 14
    assert load_pairs(tmp_path / "lf.json").ignored_columns == ()


@pytest.mark.parametrize(
    ("chosen", "rejected", "is_found"),
    [
        (
            "北京是中国的首都,人口很多,历史也很悠久。",
            "北京是中国的首都,人口很多,历史也很悠久!",
            True,
        ),
        ("北京是中国的首都。", "上海不是中国的首都。", False),
        ("x = a + b", "x = a - b", False),
        ("x = a + b", "X = a + b.", True),
    ],
)
def test_words_of_any_script_and_signs_count(
    chosen: str, rejected: str, is_found: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD | {"chosen": chosen, "rejected": rejected})
    assert (("near-identical", 0) in found(path)) == is_found


# --- what cannot be examined ----------------------------------------------------------------------


def test_unknown_field_folder_and_nothing_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(InputError, match="a pair has no prmpt; it has prompt, chosen"):
        examine([path], DoctorOptions({}, columns={"prmpt": "question"}))
    with pytest.raises(InputError, match=r"is a folder: name its files.*it has pairs\.jsonl"):
        examine([tmp_path])
    with pytest.raises(InputError, match="no rows; expected at least one pair"):
        examine([write(tmp_path / "empty.jsonl")])


def test_first_unreadable_row_tells_why_and_names_its_columns(tmp_path: Path) -> None:
    report = examine([write(tmp_path / "pairs.jsonl", {"question": "q", "good": "a", "bad": "b"})])
    said = doctor_text(report)
    assert "missing chosen and rejected; the row has question, good, bad" in said
    assert "--columns prompt=...,chosen=..." in said
    assert "No row can be trained on" in said


def test_ranked_answers_are_examined_pair_by_pair(tmp_path: Path) -> None:
    row = {"prompt": "p", "answers": ["a good one", "A good one.", "bad"], "scores": [3, 2, 1]}
    assert found(write(tmp_path / "ranked.jsonl", row)) == [("near-identical", 0)]
    assert found(write(tmp_path / "none.jsonl", row | {"scores": [1, 1, 1]})) == [("unreadable", 0)]
