"""How answers to a written task's utility prompts are scored: one small rule each, in [0, 1]. The row's own answer (or its
`answer` field) says what is right; reasoning is no answer, and case, blanks, punctuation and Markdown do not count.

    exact      the same words and symbols             contains   the row's answer stands in it, as whole words
    number     the same number, however written       choice     it names the row's choice and no other
    regex      what `pattern` finds last is the same  code       its program passes the row's tests, in the sandbox
    judge      a judge says so (a stage of its own)
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from safecl import metrics
from safecl.base import ConfigError, Json
from safecl.config import Data
from safecl.metrics import Metric
from safecl.tasks import Found, Row
from safecl.text import plain, without_reasoning


def declared(data: Data) -> tuple[Metric, ...]:
    """What `scores` gives beside utility (of `none`: what likelihoods give, of validation prompts too)."""
    more = {"none": ("gold_nll",), "choice": ("invalid",), "code": ("code_timeouts", "no_code")}
    found = map(metrics.load, more.get(data.score, ()))
    return tuple(replace(metric, splits=("validation", "test")) for metric in found)


def scores(data: Data, rows: Sequence[Row], texts: Sequence[str], unsafe_code: bool) -> dict[str, list[float | None]]:
    """metric -> a value a row. Raises what task `code` does."""
    if data.score == "code":
        return _code(rows, texts, unsafe_code)
    if data.score == "choice":
        said = [_chosen(text, data.choices) for text in texts]
        right = [_chosen(_gold(row), data.choices) for row in rows]
        utility = [float(one is not None and one == other) for one, other in zip(said, right, strict=True)]
        return {"utility": [*utility], "invalid": [float(one is None) for one in said]}
    return {"utility": [float(_right(data, _gold(row), text)) for row, text in zip(rows, texts, strict=True)]}


def likelihoods(found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
    """Of each row's own answer: `gold_nll` in nats a token, and `utility` = exp(-gold_nll), 1 / perplexity."""
    nll = [None if gold.logprob is None or not gold.num_tokens else -gold.logprob / gold.num_tokens for [gold] in found]
    return {"utility": [None if each is None else math.exp(-each) for each in nll], "gold_nll": nll}


def unscorable(data: Data, row: Row) -> str | None:
    """Why no answer to a row could ever be right; None where one can."""
    gold = _gold(row)
    if data.score == "choice" and _chosen(gold, data.choices) is None:
        return f"expected an answer that names one of {', '.join(data.choices)} and no other, got {gold[:60]!r}"
    if data.score == "regex" and _matched(str(data.pattern), gold) is None:
        return f"expected an answer in which `pattern` finds something, got {gold[:60]!r}"
    if data.score == "number":
        from safecl.tasks.gsm8k import numeric

        return None if numeric(gold) is not None else f"expected an answer with a number, got {gold[:60]!r}"
    if data.score == "code":
        from safecl.tasks.code import tested_names

        return (
            None if tested_names(str(row.meta["tests"])) else "its tests call no function that an answer would define"
        )
    return None


def _gold(row: Row) -> str:
    return str(row.meta.get("answer", row.response))


def _right(data: Data, gold: str, text: str) -> bool:
    if data.score == "exact":
        return _words(text) == _words(gold)
    if data.score == "contains":
        return f" {_words(_numbered(gold))} " in f" {_words(_numbered(text))} "
    if data.score == "number":
        from safecl.tasks.gsm8k import numeric

        found = numeric(text)
        return found is not None and found == numeric(gold)
    assert data.pattern is not None, "config.Data checks this"
    said = _matched(data.pattern, without_reasoning(text))
    return said is not None and said == _matched(data.pattern, gold)


_WITHIN = "+-#%$\u20ac\u00a3.,_"  # may be part of a word or number


class _Compared(dict[int, str]):
    """Characters (by code) as they are compared: punctuation parts words, a symbol is a word of its own."""

    def __missing__(self, code: int) -> str:
        char, kind = chr(code), unicodedata.category(chr(code))[0]
        is_symbol = kind == "S" or char in "/*&@\\"
        self[code] = char if char in _WITHIN else f" {char} " if is_symbol else " " if kind == "P" else char
        return self[code]


_COMPARED = _Compared()


def _words(text: str) -> str:
    """The text as it is compared: its words, numbers and symbols, in lower case, a blank between two. One of punctuation
    alone is compared as it stands."""
    said = plain(text)
    found = re.sub(r"(?<!\S)\*+(?=\S)|(?<=\S)\*+(?!\S)", "", said)  # what is left of an emphasis
    found = unicodedata.normalize("NFC", found).casefold().replace("!=", "\u2260").translate(_COMPARED)
    found = re.sub(r"[.,](?!\d)|(?<!\S)-+(?!\S)", " ", found)
    return " ".join(found.split()) or said


def _numbered(text: str) -> str:
    """The text with "4." that begins a line as a number: it may be the answer."""
    return re.sub(r"(?m)^([ \t]*\d{1,3})[.)](?=\s)", r"\1", without_reasoning(text))


def _matched(pattern: str, text: str) -> str | None:
    found = [*re.finditer(pattern, text)]
    if not found:
        return None
    last = found[-1]
    return " ".join((last[1] if last.re.groups and last[1] is not None else last[0]).split())


def _chosen(text: str, choices: Sequence[str]) -> str | None:
    """The one choice that a text names as a whole word; None if it names none or several. A choice inside another ("New
    York" in "New York City") is not named by it."""
    left, named = _words(_numbered(text)), []
    for choice in sorted(choices, key=len, reverse=True):
        pattern = rf"(?<!\S){re.escape(_words(_numbered(choice)))}(?!\S)"
        if re.search(pattern, left):
            named.append(choice)
            left = re.sub(pattern, " ", left)
    return named[0] if len(named) == 1 else None


def _code(rows: Sequence[Row], texts: Sequence[str], unsafe_code: bool) -> dict[str, list[float | None]]:
    from safecl.tasks.code import Code, tested_names

    tested = []
    for row in rows:
        test = str(row.meta["tests"])
        needed = tested_names(test)
        if not needed:
            raise ConfigError(f"row {row.id!r}: its tests call no function that an answer would define")
        meta: dict[str, Json] = {"start": "", "names": [*needed], "test": test}
        tested.append(Row(row.id, row.prompt, row.response, False, {**row.meta, **meta}))
    return Code(unsafe_code=unsafe_code).scores(tested, texts)
