from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dpo.eval.token_trie import TokenTrie, build_trie


def spelled(trie: TokenTrie) -> list[list[int]]:
    """Each sequence as its segments spell it; parents come before their children."""
    return [
        [int(token) for segment in path.nonzero()[0] for token in trie.segments[segment]]
        for path in trie.paths
    ]


def chain(trie: TokenTrie, segment: int) -> set[int]:
    parent = trie.parents[segment]
    return {segment} | (set() if parent is None else chain(trie, parent))


def test_worked_example_of_the_docstring() -> None:
    trie = build_trie([[5, 6, 7], [5, 6, 8], [5, 9]])
    assert [segment.tolist() for segment in trie.segments] == [[5], [6], [7], [8], [9]]
    assert trie.parents == (None, 0, 1, 1, 0)
    assert trie.paths.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert (trie.tokens, trie.depth) == (5, 3)


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


@given(sequences)
def test_every_sequence_is_spelled_along_a_path_from_the_top(texts: Sequence[list[int]]) -> None:
    trie = build_trie(texts)
    assert spelled(trie) == texts
    for path in trie.paths:
        on_path = set(path.nonzero()[0].tolist())
        assert on_path == chain(trie, max(on_path))


@given(sequences)
def test_each_beginning_stands_in_the_tree_once(texts: Sequence[list[int]]) -> None:
    beginnings = {tuple(text[: end + 1]) for text in texts for end in range(len(text))}
    trie = build_trie(texts)
    assert trie.tokens == len(beginnings)
    assert all(len(segment) for segment in trie.segments)
