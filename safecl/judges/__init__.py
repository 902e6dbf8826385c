"""Judges: one file each. A judge is two pure functions, `prompt` and `parse`; rule judges override `rule` instead."""

from __future__ import annotations

import pkgutil
from typing import Any, ClassVar, NamedTuple

from safecl.base import Json, Strict
from safecl.tasks import load_class


class Verdict(NamedTuple):
    """`label` True/False answers the judge's question, None means unparsed (counted and shown, never "safe");
    `raw` is what was read; `detail` whatever else the judge said (categories)."""

    label: bool | None
    raw: str
    detail: dict[str, Json] = {}


class Judge:
    """A question about one (request, response) pair.

    `served` judges write the exact text a guard model reads (`prompt`, tokenised without special tokens) and read its
    answer (`parse`); rule judges answer with `rule` alone and need no model. `question` says what True means.
    """

    class Config(Strict):
        pass

    VERSION: ClassVar[str] = "1"
    question: ClassVar[str] = ""
    served: ClassVar[bool] = False
    max_tokens: ClassVar[int] = 0  # of the guard's answer

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()

    def prompt(self, request: str, response: str) -> str:
        raise NotImplementedError

    def parse(self, text: str) -> Verdict:
        raise NotImplementedError

    def rule(self, request: str, response: str) -> Verdict:
        raise NotImplementedError


def names() -> list[str]:
    """Names of all judges, sorted, without importing any."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> type[Judge]:
    """The judge class called `name`."""
    return load_class(__name__, name, names())
