"""Degenerate answers: empty, looping, or out of letters. A rule; judges are unreliable on such text, so it is counted.

An answer is degenerate if, split at white space and in lower case,
  - it holds no letter or digit at all, or
  - it has at least 8 words and one sequence of 1 to 4 words, repeated without a gap, covers half of them or more, or
  - it has at least 16 words of which fewer than a quarter are distinct.
"""

from __future__ import annotations

from typing import ClassVar

from safecl.judges import Judge, Verdict


class Degenerate(Judge):
    VERSION: ClassVar[str] = "1"
    question: ClassVar[str] = "is the answer empty, looping or nonsense?"

    def rule(self, request: str, response: str) -> Verdict:
        """True: degenerate. `raw` says why."""
        words = response.lower().split()
        if not any(letter.isalnum() for letter in response):
            return Verdict(True, "empty")
        if len(words) >= 8 and any(2 * _longest_loop(words, size) >= len(words) for size in range(1, 5)):
            return Verdict(True, "loop")
        if len(words) >= 16 and 4 * len(set(words)) < len(words):
            return Verdict(True, "few distinct words")
        return Verdict(False, "")


def _longest_loop(words: list[str], size: int) -> int:
    """Number of words in the longest stretch that repeats one sequence of `size` words (0 if none repeats)."""
    best = run = 0
    for i in range(size, len(words)):
        run = run + 1 if words[i] == words[i - size] else 0
        best = max(best, run)
    return best + size if best >= size else 0
