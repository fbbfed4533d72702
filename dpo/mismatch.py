"""Answers beside prompts that they do not belong to, from which KTO estimates a divergence."""

from __future__ import annotations

import numpy as np

from dpo.errors import InputError
from dpo.sampling import permuted
from dpo.tokenized_pairs import TokenizedPair, TokenizedPairs, columns_of


def mismatched_rows(pairs: TokenizedPairs, *, seed: int) -> TokenizedPairs:
    """Return for each row its prompt with an answer from a row with another prompt.

    The rows stand in a seeded circle; each takes the first answer of the next one around that has
    another prompt, cut to what keeps the row no longer than the longest of ``pairs``. Who is beside
    whom does not change during a run, so that a cache can hold the reference's log-probs.

    Returns:
        Rows as unpaired ones, with a chosen answer alone, in the order of ``pairs``.

    Raises:
        InputError: all rows have one prompt.
    """
    groups, count = pairs.prompt_groups, len(pairs)
    if (groups == groups[0]).all():
        raise InputError(
            "kto estimates its reference point from answers to other prompts, but all rows have "
            "one prompt: choose kto_pair or bco"
        )
    places = np.array([permuted(row, count, seed=(seed, 0)) for row in range(count)])
    circle = np.argsort(places)  # row at each place
    longest = int(pairs.lengths().sum(axis=1).max())
    rows = []
    for row, place in enumerate(places.tolist()):
        other = next(
            int(circle[(place + step) % count])
            for step in range(1, count)
            if groups[circle[(place + step) % count]] != groups[row]
        )
        rows.append(_beside(pairs[row], pairs[other], longest))
    return columns_of(rows)


def _beside(pair: TokenizedPair, other: TokenizedPair, longest: int) -> TokenizedPair:
    """Put the answer of ``other`` behind the prompt of ``pair``."""
    answer = other.chosen_ids if len(other.chosen_ids) else other.rejected_ids
    room = max(1, longest - len(pair.prompt_ids))
    return TokenizedPair(
        pair.prompt_ids, answer[:room], np.empty(0, np.int32), weight=pair.weight, id=pair.id
    )
