"""Score the answers to a written task's utility prompts, each in [0, 1], by one of these rules.

The row's own answer (or its `answer` field) is the gold answer. Reasoning in an answer is ignored. Case, spaces, punctuation
and Markdown do not count.

    exact      the answer has the same words and symbols as the gold answer
    contains   the gold answer occurs in the answer, as whole words
    number     both give the same number, in any notation
    choice     the answer names the same choice as the gold answer, and no other
    regex      the last match of `pattern` is the same in both
    code       the answer's program passes the row's tests, in the sandbox
    judge      a judge decides (in a stage of its own)
    none       no answer is generated: the likelihood of the row's own answer counts
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
    """The metrics that `scores` (or for `none`, `likelihoods`) gives in addition to utility, on validation and test prompts."""
    more = {"none": ("gold_nll",), "choice": ("invalid",), "code": ("code_timeouts", "no_code")}
    found = map(metrics.load, more.get(data.score, ()))
    return tuple(replace(metric, splits=("validation", "test")) for metric in found)


def scores(data: Data, rows: Sequence[Row], texts: Sequence[str], unsafe_code: bool) -> dict[str, list[float | None]]:
    """Metric -> one value for each row. Raises what `Code.scores` raises, and ConfigError for tests that test nothing."""
    if data.score == "code":
        return _code(rows, texts, unsafe_code)
    if data.score == "choice":
        said = [_chosen(text, data.choices) for text in texts]
        right = [_chosen(_gold(row), data.choices) for row in rows]
        utility = [float(one is not None and one == other) for one, other in zip(said, right, strict=True)]
        return {"utility": [*utility], "invalid": [float(one is None) for one in said]}
    return {"utility": [float(_right(data, _gold(row), text)) for row, text in zip(rows, texts, strict=True)]}


def likelihoods(found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
    """`gold_nll` of each row's own answer, in nats a token, and `utility` = exp(-gold_nll) = 1 / perplexity, in [0, 1]."""
    nll = [None if gold.logprob is None or not gold.num_tokens else -gold.logprob / gold.num_tokens for [gold] in found]
    return {"utility": [None if each is None else math.exp(-each) for each in nll], "gold_nll": nll}


def unscorable(data: Data, row: Row) -> str | None:
    """Why no answer to a row could be right. None if an answer could be right."""
    gold = _gold(row)
    if data.score == "choice" and _chosen(gold, data.choices) is None:
        return f"expected an answer that names one of {', '.join(data.choices)} and no other, got {gold[:60]!r}"
    if data.score == "regex" and _matched(str(data.pattern), gold) is None:
        return f"expected an answer in which `pattern` finds something, got {gold[:60]!r}"
    if data.score == "number":
        from safecl.tasks.gsm8k import numeric

        return None if numeric(gold) is not None else f"expected an answer with a number, got {gold[:60]!r}"
    if data.score == "code":
        from safecl.tasks._program import tested_names

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
    """Map from characters (by code) to their form for comparison. Punctuation separates words; a symbol is its own word."""

    def __missing__(self, code: int) -> str:
        char, kind = chr(code), unicodedata.category(chr(code))[0]
        is_symbol = kind == "S" or char in "/*&@\\"
        self[code] = char if char in _WITHIN else f" {char} " if is_symbol else " " if kind == "P" else char
        return self[code]


_COMPARED = _Compared()


def _words(text: str) -> str:
    """The text for comparison: its words, numbers and symbols in lower case, separated by one space. A text of only
    punctuation stays as it is."""
    said = plain(text)
    found = re.sub(r"(?<!\S)\*+(?=\S)|(?<=\S)\*+(?!\S)", "", said)  # remains of Markdown emphasis
    found = unicodedata.normalize("NFC", found).casefold().replace("!=", "\u2260").translate(_COMPARED)
    found = re.sub(r"[.,](?!\d)|(?<!\S)-+(?!\S)", " ", found)
    return " ".join(found.split()) or said


def _numbered(text: str) -> str:
    """The text without reasoning, with "4." or "4)" at the start of a line changed to "4", because it may be the answer."""
    return re.sub(r"(?m)^([ \t]*\d{1,3})[.)](?=\s)", r"\1", without_reasoning(text))


def _matched(pattern: str, text: str) -> str | None:
    found = [*re.finditer(pattern, text)]
    if not found:
        return None
    last = found[-1]
    return " ".join((last[1] if last.re.groups and last[1] is not None else last[0]).split())


def _chosen(text: str, choices: Sequence[str]) -> str | None:
    """The one choice that a text names as whole words. None if it names none or several. "New York City" does not name the
    choice "New York" if both are choices."""
    left, named = _words(_numbered(text)), []
    for choice in sorted(choices, key=len, reverse=True):
        pattern = rf"(?<!\S){re.escape(_words(_numbered(choice)))}(?!\S)"
        if re.search(pattern, left):
            named.append(choice)
            left = re.sub(pattern, " ", left)
    return named[0] if len(named) == 1 else None


def _code(rows: Sequence[Row], texts: Sequence[str], unsafe_code: bool) -> dict[str, list[float | None]]:
    from safecl.tasks._program import tested_names
    from safecl.tasks.code import Code

    tested = []
    for row in rows:
        test = str(row.meta["tests"])
        needed = tested_names(test)
        if not needed:
            raise ConfigError(f"row {row.id!r}: its tests call no function that an answer would define")
        meta: dict[str, Json] = {"start": "", "names": [*needed], "test": test}
        tested.append(Row(row.id, row.prompt, row.response, False, {**row.meta, **meta}))
    return Code(unsafe_code=unsafe_code).scores(tested, texts)
