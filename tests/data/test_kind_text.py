import pytest

from dpo.data.kinds.text import (
    bracket_depth,
    capped_total,
    count_fenced_blocks,
    count_identifiers,
    split_sentences,
    words_pattern,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it USES sqlite", True),
        ("this causes trouble", False),
        ("our guidelines", True),
        ("they went  with", False),
        ("they went with it", True),
    ],
)
def test_words_are_found_where_a_word_begins(text: str, found: bool) -> None:
    pattern = words_pattern("uses guideline", "went with")

    assert (pattern.search(text) is not None) == found


def test_identifiers_are_names_in_camel_case() -> None:
    assert count_identifiers("TokenStore and HttpClient, not Token nor tokenStore nor HTTP") == 2


def test_fences_come_in_twos() -> None:
    assert count_fenced_blocks("```py\nx\n``` and ```\ny\n``` and ```") == 2


def test_sentences_are_split_at_runs_of_marks_and_keep_their_empty_end() -> None:
    assert split_sentences("Really?! Yes. ") == ["Really", " Yes", " "]


@pytest.mark.parametrize(("text", "depth"), [("", 0), ("f(x)", 1), ("{[()]}", 3), ("))((", 2)])
def test_brackets_are_counted_by_nesting(text: str, depth: int) -> None:
    assert bracket_depth(text) == depth


def test_gains_are_added_from_left_to_right_and_capped() -> None:
    assert capped_total(0.1, 0.2, 0.3) == 0.1 + 0.2 + 0.3 != 0.6
    assert capped_total(0.5, 0.4, 0.3) == 1.0
