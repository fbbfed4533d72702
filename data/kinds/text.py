"""What the state builders look for in a text: words, identifiers, code, and sums of small gains.

A word counts only where a word begins (``uses`` is not in ``causes``); its ending is left open, so
that ``guideline`` finds ``guidelines``. Case is ignored, except for identifiers in CamelCase.
"""

import re

_IDENTIFIER = re.compile(r"\b[A-Z][a-z]+[A-Z]\w*", re.ASCII)
_SENTENCE_END = re.compile(r"[.!?]+")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def words_pattern(words: str, *phrases: str) -> re.Pattern[str]:
    """Return a pattern that finds any of the space-separated words, or of the phrases."""
    alternatives = "|".join(map(re.escape, (*words.split(), *phrases)))
    return re.compile(rf"\b(?:{alternatives})", re.ASCII | re.IGNORECASE)


def count_identifiers(text: str) -> int:
    """Count names in CamelCase."""
    return len(_IDENTIFIER.findall(text))


def count_fenced_blocks(text: str) -> int:
    """Count blocks of code between two fences of three backticks."""
    return text.count("```") // 2


def split_sentences(text: str) -> list[str]:
    """Split at runs of full stops, exclamation and question marks; pieces may be blank."""
    return _SENTENCE_END.split(text)


def bracket_depth(text: str) -> int:
    """Return how deep brackets of any kind are nested; stray closing brackets are ignored."""
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + _BRACKETS.get(character, 0))
        deepest = max(deepest, depth)
    return deepest


def capped_total(*gains: float) -> float:
    """Add the gains from left to right and return at most 1.

    The order is part of the definition: in floats ``.1 + .2 + .3`` is not ``.3 + .2 + .1``.
    """
    total = 0.0
    for gain in gains:
        total += gain
    return min(total, 1.0)
