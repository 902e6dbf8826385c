"""Whether an answer is about what was asked, by the words that both have."""

from __future__ import annotations

import re

from safecl.tasks._overlap import STOPWORDS
from safecl.text import plain

STEM = 5  # letters that make two words one: "manipulate" and "manipulating"
LONG = 100  # words; an answer of more has a word of any request by accident
MIN_LATIN = 0.5  # share of letters; below it the answer is in another script
_ASKING = """
get got find know say come put try trying locate going like really thing something anything kind make making use using let keep
look talk sure right well now today even ever always heard don doesn isn summarize summary concept idea tip example story
suggest share brainstorm design generate develop common basic good fun unique main different new two
"""
_STOPWORDS = STOPWORDS | set(_ASKING.split())  # words that requests of every subject are made of


def misses(request: str, response: str) -> bool:
    """Whether the answer has none of the request's words of meaning, or, having more than LONG words, only one of three.

    Words of meaning: 3 letters or more and none of `STOPWORDS`, as their first 5 letters. What cannot be told so is no
    miss: an answer without words, one with a block of code, one in another script; a request of no such word, and one of a
    single one unless the answer is long.
    """
    said = plain(response).lower()
    letters = sum(map(str.isalpha, said))
    if "```" in response or sum(char.isascii() and char.isalpha() for char in said) <= MIN_LATIN * letters:
        return False
    meant = (_singular(word) for word in _words(plain(request).lower()))
    asked = {word[:STEM] for word in meant if len(word) > 2 and word not in _STOPWORDS}
    words = _words(said)
    shared = len(asked & {_singular(word)[:STEM] for word in words})
    is_long = len(words) > LONG
    return len(asked) >= (1 if is_long else 2) and shared < (2 if is_long and len(asked) > 2 else 1)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word
