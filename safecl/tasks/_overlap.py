"""Near-duplicate prompts: Jaccard similarity of content words, by an inverted index."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from safecl.tasks import Row

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
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
    """Its words in lower case less STOPWORDS, a plural's last s cut ("locks" and "lock" are one word)."""
    words = (word for word in _WORD.findall(prompt.lower().replace("’", "'")) if word not in STOPWORDS)
    return frozenset(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words)


def drop_overlaps(
    rows: Sequence[Row], against_prompts: Iterable[str], threshold: float = 0.6
) -> tuple[list[Row], list[str]]:
    """The rows whose prompt is like none of `against_prompts`, in order, and the ids of the others.

    Alike: equal after `normalise`, or a Jaccard similarity of content words of at least `threshold` (in (0, 1]).
    Sets that are alike must share one of their rarest words, so that only prompts that do are compared (Chaudhuri et al. 2006,
    prefix filtering).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a number in (0, 1], got {threshold}")
    by_text = {normalise(prompt): content_words(prompt) for prompt in against_prompts}
    sets = list(by_text.values())
    num_holding = Counter(word for words in sets for word in words)

    def rarest(words: frozenset[str]) -> list[str]:
        """As many of the rarest words as no set alike can do without."""
        num = len(words) - math.ceil(threshold * len(words) - 1e-9) + 1
        return sorted(words, key=lambda word: (num_holding[word], word))[:num] if words else []

    holders: dict[str, list[int]] = defaultdict(list)  # rare word -> indices into `sets`
    for index, words in enumerate(sets):
        for word in rarest(words):
            holders[word].append(index)

    def overlaps(prompt: str) -> bool:
        if normalise(prompt) in by_text:
            return True
        words = content_words(prompt)
        for other in {index for word in rarest(words) for index in holders.get(word, ())}:
            both = len(words & sets[other])
            # |A and B| / |A or B| >= t, in whole numbers on one side so that 3/5 counts as .6
            if both >= threshold * (len(words) + len(sets[other]) - both) - 1e-9:
                return True
        return False

    kept: list[Row] = []
    dropped: list[str] = []
    for row in rows:
        if overlaps(row.prompt):
            dropped.append(row.id)
        else:
            kept.append(row)
    return kept, dropped
