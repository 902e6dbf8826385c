"""Near-duplicate prompts: Jaccard similarity of content words, by an inverted index."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from safecl.tasks import Row
from safecl.text import same_characters

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_OF_ANY_SCRIPT = re.compile(r"[^\W_]+(?:'[a-z]+)?")
# Function words, and words of most requests ("explain the steps to ..."). They do not show what a request is about.
_STOPWORDS = """
a an the and or but nor so yet if then else of to in on at by for from with without into onto off out over under
up down about as than that this these those there here it its is are was were be been being am do does did doing
done have has had having i i'm i'd i've me my mine we us our you you're your yours he him his she her hers they
them their who whom whose which what what's when where why how can can't could should would will won't shall may
might must not no any some all each every one ones someone somebody anyone people person s t d ll re ve m also
just very more most much many such only own same too while because during before after again please tell give
show explain describe write provide list teach help outline create way ways best steps step guide instructions
instruction method methods advice want need plan short detailed simple walk through figure begin
"""
STOPWORDS = frozenset(_STOPWORDS.split())


def normalise(prompt: str) -> str:
    """The prompt in lower case, its words (letters, digits, "_") joined by one space. Equal results mean equal prompts."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


@lru_cache(maxsize=1 << 14)  # a plan compares the same prompts for one stage after another
def content_words(prompt: str) -> frozenset[str]:
    """The words of a prompt in lower case without STOPWORDS. A plural's last s is cut: "locks" and "lock" are one word.

    If most letters of the text are ASCII, only ASCII words count. Else words of every script count. In a script without
    spaces, a word is the text between two punctuation marks.
    """
    text = same_characters(prompt).lower()
    found = _WORD.findall(text) if _is_mostly_ascii(text) else _OF_ANY_SCRIPT.findall(_without_accents(text))
    words = (word for word in found if word not in STOPWORDS)
    return frozenset(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words)


def _is_mostly_ascii(text: str) -> bool:
    letters = "" if text.isascii() else [char for char in text if char.isalpha()]
    return 2 * sum(map(str.isascii, letters)) >= len(letters)


def _without_accents(text: str) -> str:
    """The text without accents, and without the vowel signs of Hindi, Arabic or Thai, which would else split words."""
    return "".join(
        char for char in unicodedata.normalize("NFKD", text) if not unicodedata.category(char).startswith("M")
    )


class _Index:
    """An inverted index of prompts that finds similar ones.

    Two prompts are similar if they are equal after `normalise`, or if the Jaccard similarity of their content words is at
    least `threshold` (in (0, 1]). Prefix filtering (Chaudhuri et al. 2006) makes this fast: for any fixed order of words, two
    similar sets share at least one of the first few words of each. Words are ordered from rare to frequent, and only prompts
    that share one of their first words are compared.
    """

    def __init__(self, threshold: float, holding: Counter[str], ignored: frozenset[str] = frozenset()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a number in (0, 1], got {threshold}")
        self.threshold, self.holding, self.ignored = threshold, holding, ignored
        self._exact: dict[str, int] = {}
        self._sets: list[frozenset[str]] = []
        self._holders: dict[str, list[int]] = defaultdict(list)  # one of a set's first words -> indices into `_sets`

    def add(self, prompt: str, words: frozenset[str]) -> int:
        """Add a prompt with these content words. Returns its index, or that of an equal prompt if there is one."""
        words -= self.ignored
        index = self._exact.setdefault(normalise(prompt), len(self._sets))
        if index == len(self._sets):
            for word in self._first(words):
                self._holders[word].append(index)
            self._sets.append(words)
        return index

    def _first(self, words: frozenset[str]) -> list[str]:
        """The rarest words of a set. Every similar set has at least one of them among its own."""
        num = len(words) - math.ceil(self.threshold * len(words) - 1e-9) + 1
        return sorted(words, key=lambda word: (self.holding[word], word))[:num] if words else []

    def like(self, prompt: str) -> Iterator[int]:
        """Indices of similar prompts. An equal one comes first (and may come twice)."""
        if (equal := self._exact.get(normalise(prompt))) is not None:
            yield equal
        words = content_words(prompt) - self.ignored
        for index in dict.fromkeys(index for word in self._first(words) for index in self._holders.get(word, ())):
            both = len(words & self._sets[index])
            # |A and B| / |A or B| >= t, without a division, so that 3/5 counts as .6
            if both >= self.threshold * (len(words) + len(self._sets[index]) - both) - 1e-9:
                yield index


@lru_cache(maxsize=4)  # many sets are compared with the same prompts
def _built(prompts: tuple[str, ...], threshold: float, ignored: frozenset[str]) -> _Index:
    words = {prompt: content_words(prompt) for prompt in prompts}
    index = _Index(threshold, Counter(word for held in words.values() for word in held), ignored)
    for prompt, held in words.items():
        index.add(prompt, held)
    return index


def drop_overlaps(
    rows: Sequence[Row],
    against_prompts: Iterable[str],
    threshold: float = 0.6,
    ignored: frozenset[str] = frozenset(),
    whole: bool = False,
) -> tuple[list[Row], list[str]]:
    """Drop rows whose requests are similar to one of `against_prompts`.

    Returns the rows kept, in order, and the ids of the rows dropped. `threshold` is a Jaccard similarity of content words, in
    (0, 1]. `ignored` are content words that do not count. A conversation is compared as a whole and also by each of its
    requests; with `whole` only as a whole.
    """
    index = _built(tuple(against_prompts) if rows else (), threshold, ignored)
    kept: list[Row] = []
    dropped: list[str] = []
    for row in rows:
        alone = () if whole else (row.prompt, *(text for role, text in row.before if role == "user"))
        if any(True for text in dict.fromkeys([row.asked, *alone]) for _ in index.like(text)):
            dropped.append(row.id)
        else:
            kept.append(row)
    return kept, dropped


def clusters(rows: Sequence[Row], threshold: float = 0.6) -> list[str]:
    """A cluster name for each row. Rows of one cluster are not independent prompts.

    Rows with the same `meta.group` form a cluster. Other rows form a cluster if they are similar, directly or through a chain
    of similar rows. Words that all prompts hold (a task's instruction) do not count.
    """
    every = [content_words(row.asked) for row in rows]
    holding = Counter(word for words in every for word in words)
    index = _Index(threshold, holding, frozenset.intersection(*every) if len(every) > 1 else frozenset())
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    places = []
    for row, words in zip(rows, every, strict=True):
        alike = list(index.like(row.asked))
        place = index.add(row.asked, words)
        parent += [place] if place == len(parent) else []
        for other in alike:
            parent[root(other)] = root(place)
        places.append(place)
    return [str(row.meta.get("group", root(place))) for row, place in zip(rows, places, strict=True)]
