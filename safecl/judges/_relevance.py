"""Relevance of an answer: whether it is about the request, by the words that both have in common."""

from __future__ import annotations

import re

from safecl.tasks._overlap import STOPWORDS
from safecl.text import plain

STEM = 5  # words with the same first letters count as one: "manipulate" and "manipulating"
LONG = 100  # words; a longer answer often has one word of any request by chance
MIN_LATIN = 0.5  # share of ASCII letters; up to this the answer is in another script
_ASKING = """
get got find know say come put try trying locate going like really thing something anything kind make making use using let keep
look talk sure right well now today even ever always heard don doesn isn summarize summary concept idea tip example story
suggest share brainstorm design generate develop common basic good fun unique main different new two
"""
_STOPWORDS = STOPWORDS | set(_ASKING.split())  # words that occur in requests of every subject


def misses(request: str, response: str) -> bool:
    """Whether the answer misses the request: it shares no content word with it.

    An answer of more than LONG words must share two content words if the request has three or more. Content words have 3
    letters or more and are not stop words; they are compared by their first 5 letters. These cases are never a miss, because
    words cannot decide them: an answer without words, with a block of code, or in another script; a request without content
    words; and a request with a single content word, unless the answer is long.
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
