"""How answers to a written task's utility prompts are scored: one small rule each, in [0, 1]. The row's own answer (or its
`answer` field) says what is right; reasoning is no answer, and case, blanks and Markdown do not count.

    exact      the same text                          contains   the row's answer stands in it, as whole words
    number     the same number, however written       choice     it names the row's choice and no other
    regex      what `pattern` finds last is the same  code       its program passes the row's tests, in the sandbox
    judge      a judge says so (a stage of its own)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from safecl.base import ConfigError, Json
from safecl.config import Data
from safecl.tasks import Found, Row
from safecl.text import plain, without_reasoning


def names(data: Data) -> tuple[str, ...]:
    """The metrics that `scores` gives (of `none`: that likelihoods give)."""
    more = {"none": ("gold_nll",), "choice": ("invalid",), "code": ("code_timeouts", "no_code")}
    return ("utility", *more.get(data.score, ()))


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
    nll = [None if gold.logprob is None else -gold.logprob / gold.num_tokens for [gold] in found]
    return {"utility": [None if each is None else math.exp(-each) for each in nll], "gold_nll": nll}


def _gold(row: Row) -> str:
    return str(row.meta.get("answer", row.response))


def _right(data: Data, gold: str, text: str) -> bool:
    if data.score == "exact":
        return _words(text) == _words(gold)
    if data.score == "contains":
        return f" {_words(gold)} " in f" {_words(text)} "
    if data.score == "number":
        from safecl.tasks.gsm8k import numeric

        found = numeric(text)
        return found is not None and found == numeric(gold)
    assert data.pattern is not None, "config.Data checks this"
    said = _matched(data.pattern, without_reasoning(text))
    return said is not None and said == _matched(data.pattern, gold)


def _words(text: str) -> str:
    """The text as it is compared: its words and numbers, in lower case."""
    return " ".join(re.findall(r"[\w.,%$€£+-]*\w[%]?", plain(text).casefold()))


def _matched(pattern: str, text: str) -> str | None:
    found = [*re.finditer(pattern, text)]
    if not found:
        return None
    last = found[-1]
    return " ".join((last[1] if last.re.groups and last[1] is not None else last[0]).split())


def _chosen(text: str, choices: Sequence[str]) -> str | None:
    """The one choice that a text names as a whole word; None if it names none or several. A choice inside another ("New
    York" in "New York City") is not named by it."""
    left, named = plain(text).casefold(), []
    for choice in sorted(choices, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(choice.casefold())}(?!\w)"
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
