"""Degenerate text, by rule. True = no readable answer, whatever was asked. Our own rule; no source.

Words are runs of letters or digits in lower case; a text without any is degenerate ("", "...", "!!!"). A text is also
degenerate if

- it loops: its end is one block of 1 to 8 words over and over, at least 4 times (the last time perhaps cut off) and
  at least 8 words in all; or
- it says too little: of any 24 words in a row, fewer than 8 are distinct; or
- it stutters: one character that is neither a digit nor a blank stands 12 times in a row ("aaaaaaaaaaaa"), lines of
  "-", "_", "=", "*", "#", "." and "~" excepted.

Short answers such as "positive" or "Sure." are not degenerate: whether they answer is another question.
"""

from __future__ import annotations

import re
from typing import ClassVar

from safecl.judges import Judge, Verdict

LONGEST_BLOCK = 8
MIN_TIMES = 4
MIN_LOOP = 8
WINDOW = 24
MIN_DISTINCT = 8
_STUTTER = re.compile(r"([^\s\d\-_=*#.~])\1{11}")


class Degenerate(Judge):
    VERSION: ClassVar[str] = "1"
    question: ClassVar[str] = "is the answer degenerate (empty or looping)?"

    def rule(self, request: str, response: str) -> Verdict:
        """`detail.why`: empty, loop, few_distinct, stutter, or null."""
        why = self._why(response)
        return Verdict(why is not None, response, {"why": why})

    def _why(self, response: str) -> str | None:
        words = re.findall(r"[^\W_]+", response.lower())
        if not words:
            return "empty"
        if _STUTTER.search(response):
            return "stutter"
        for size in range(1, LONGEST_BLOCK + 1):
            looped = size + _matching_tail(words, size)
            if looped >= max(MIN_TIMES * size, MIN_LOOP):
                return "loop"
        windows = range(len(words) - WINDOW + 1)
        return "few_distinct" if any(len(set(words[i : i + WINDOW])) < MIN_DISTINCT for i in windows) else None


def _matching_tail(words: list[str], size: int) -> int:
    """How many words at the end equal the word `size` places before them."""
    count = 0
    while count + size < len(words) and words[-1 - count] == words[-1 - count - size]:
        count += 1
    return count
