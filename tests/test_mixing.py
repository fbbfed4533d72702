import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.errors import InputError
from dpo.mixing import MixConfig, count_rows, describe_share, mix, named, set_names
from dpo.pair import PreferencePair


def ids(name: str, count: int) -> list[str]:
    return [f"{name}/{row}" for row in range(count)]


sizes = st.lists(st.integers(1, 10_000), min_size=1, max_size=5)


@given(sizes)
def test_without_options_every_row_is_taken_once(sizes: list[int]) -> None:
    assert count_rows(sizes, MixConfig()) == sizes


@given(sizes, st.floats(0.1, 100), st.none() | st.integers(1, 100_000))
def test_counts_are_the_shares_rounded_and_their_sum_is_exact(
    sizes: list[int], temperature: float, total: int | None
) -> None:
    counts = count_rows(sizes, MixConfig(temperature=temperature, rows=total))
    assert sum(counts) == (total or sum(sizes))
    weights = [size ** (1 / temperature) for size in sizes]
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - sum(counts) * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (MixConfig(temperature=1.0), [5000, 500]),
        # 5000^(1/2) : 500^(1/2) = 3.1623 : 1, of 5500
        (MixConfig(temperature=2.0), [4179, 1321]),
        (MixConfig(temperature=math.inf), [2750, 2750]),
        (MixConfig(temperature=0.01), [5500, 0]),  # 5000^100 is no float
        (MixConfig(temperature=1e-310), [5500, 0]),
        (MixConfig(temperature=math.inf, rows=2000), [1000, 1000]),
        (MixConfig(weights=(3.0, 1.0)), [4125, 1375]),
        (MixConfig(weights=(1.5e308, 0.5e308), rows=4), [3, 1]),
        (MixConfig(weights=(1.0, 1.0), rows=3), [2, 1]),
    ],
)
def test_counts_by_hand(options: MixConfig, counts: list[int]) -> None:
    assert count_rows([5000, 500], options) == counts


def test_rows_are_repeated_as_often_as_their_share_asks_for() -> None:
    mixed = mix({"a": ids("a", 9), "b": ids("b", 4)}, MixConfig(weights=(1, 2), rows=15), seed=0)
    assert {name: [len(rows) for rows in times] for name, times in mixed.items()} == {
        "a": [5],
        "b": [4, 4, 2],
    }
    for rows in (*mixed["a"], *mixed["b"]):
        assert rows.tolist() == sorted({*rows.tolist()})


def test_choice_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    def chosen(names: list[str], seed: int) -> set[str]:
        (rows,) = mix({"a": names}, MixConfig(rows=20), seed=seed)["a"]
        return {names[row] for row in rows}

    names = ids("a", 50)
    assert chosen(names, 0) == chosen(names[::-1], 0)
    assert chosen(names, 0) != chosen(names, 1)


@pytest.mark.parametrize(
    ("size", "fault"), [(9, "of b, 0 of 9 rows would be"), (0, "of b, 0 of 0 rows would be")]
)
def test_set_that_gives_no_row_is_refused(size: int, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        mix({"a": ids("a", 9), "b": ids("b", size)}, MixConfig(rows=1), seed=0)


def test_share_is_told_exactly() -> None:
    assert describe_share("a", 1000, 5000) == "a: 1,000 of 5,000 rows"
    assert describe_share("b", 1000, 500) == "b: 1,000 rows, 2.0 times its 500"


def test_sets_are_named_by_their_files_unless_two_are_called_so() -> None:
    assert set_names(["x/a.jsonl.gz", "me/chats"]) == ["a", "chats"]
    assert set_names(["x/train.jsonl", "y/train.jsonl"]) == ["x/train.jsonl", "y/train.jsonl"]


def test_name_goes_before_ids_and_is_the_source_of_rows_without_one() -> None:
    pairs = [
        PreferencePair("p", "c", "r", id="1"),
        PreferencePair("p", "c", "r", source="own", id="2"),
    ]
    renamed = [named("a", pair) for pair in pairs]
    assert [(pair.id, pair.source) for pair in renamed] == [("a/1", "a"), ("a/2", "own")]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"weights": (1.0, 0.0)}, r"mix\.weights must be above 0 and finite, got \[1\.0, 0\.0\]"),
        ({"weights": (math.inf,)}, r"mix\.weights must be above 0 and finite, got \[inf\]"),
        ({"temperature": 0.0}, r"mix\.temperature must be above 0, got 0\.0"),
        ({"temperature": math.nan}, r"mix\.temperature must be above 0, got nan"),
        ({"rows": 0}, r"mix\.rows must be at least 1, got 0"),
        ({"weights": (1.0,), "temperature": 2.0}, r"mix\.weights and mix\.temperature: give one"),
    ],
)
def test_options_are_checked(options: dict[str, object], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        MixConfig(**options)  # type: ignore[arg-type]  # wrong values are what is tested
