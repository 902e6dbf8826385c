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
# Function words and the words every request is made of ("explain the steps to ..."): they say nothing of its subject.
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
    """The prompt in lower case with runs of anything but letters and digits as one space: equal prompts are equal."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def content_words(prompt: str) -> frozenset[str]:
    """Its words in lower case less STOPWORDS, a plural's last s cut ("locks" and "lock" are one word). A text of which most
    letters are not ASCII has all its words, of any script; where a script writes no blanks, what stands between two marks."""
    text = same_characters(prompt).lower()
    found = _WORD.findall(text) if _is_mostly_ascii(text) else _OF_ANY_SCRIPT.findall(_without_accents(text))
    words = (word for word in found if word not in STOPWORDS)
    return frozenset(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words)


def _is_mostly_ascii(text: str) -> bool:
    letters = "" if text.isascii() else [char for char in text if char.isalpha()]
    return 2 * sum(map(str.isascii, letters)) >= len(letters)


def _without_accents(text: str) -> str:
    """Also without the vowel signs of Hindi, Arabic or Thai, which else would part its words."""
    return "".join(
        char for char in unicodedata.normalize("NFKD", text) if not unicodedata.category(char).startswith("M")
    )


class _Index:
    """Prompts, by what they hold. Alike: equal after `normalise`, or a Jaccard similarity of content words of at least
    `threshold` (in (0, 1]). In any order of words, two sets that are alike share one of the first few of each (Chaudhuri et
    al. 2006, prefix filtering): the rarest go first, by how many prompts hold them, and only prompts that share one are
    compared."""

    def __init__(self, threshold: float, holding: Counter[str], ignored: frozenset[str] = frozenset()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a number in (0, 1], got {threshold}")
        self.threshold, self.holding, self.ignored = threshold, holding, ignored
        self._exact: dict[str, int] = {}
        self._sets: list[frozenset[str]] = []
        self._holders: dict[str, list[int]] = defaultdict(list)  # one of a set's first words -> indices into `_sets`

    def add(self, prompt: str, words: frozenset[str]) -> int:
        """The index of a prompt with these content words; that of an equal one if there is one."""
        words -= self.ignored
        index = self._exact.setdefault(normalise(prompt), len(self._sets))
        if index == len(self._sets):
            for word in self._first(words):
                self._holders[word].append(index)
            self._sets.append(words)
        return index

    def _first(self, words: frozenset[str]) -> list[str]:
        """As many words as no set alike can do without."""
        num = len(words) - math.ceil(self.threshold * len(words) - 1e-9) + 1
        return sorted(words, key=lambda word: (self.holding[word], word))[:num] if words else []

    def like(self, prompt: str) -> Iterator[int]:
        """Indices of what is alike, an equal one first."""
        if (equal := self._exact.get(normalise(prompt))) is not None:
            yield equal
        words = content_words(prompt) - self.ignored
        for index in dict.fromkeys(index for word in self._first(words) for index in self._holders.get(word, ())):
            both = len(words & self._sets[index])
            # |A and B| / |A or B| >= t, in whole numbers on one side so that 3/5 counts as .6
            if both >= self.threshold * (len(words) + len(self._sets[index]) - both) - 1e-9:
                yield index


@lru_cache(maxsize=4)  # many sets keep clear of the same prompts
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
    """The rows that ask nothing like `against_prompts`, in order, and the ids of the others. `ignored`: content words that
    make nothing alike. Of a conversation each request counts alone too, unless it is compared as a `whole`."""
    index = _built(tuple(against_prompts), threshold, ignored)
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
    """A name for each row, equal for those that are not independent prompts: of one `meta.group`, or without one alike, or
    linked by others that are. What all prompts say (a task's instruction) makes none of them alike."""
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
