"""Tasks that the sweep file writes: a file or hub data set, how its rows are read, which roles they have, and how
answers are scored."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safecl.base import Strict
from safecl.config.judges import Judge
from safecl.config.models import Count, Fraction, Place

Role = Literal["user", "safety", "poison", "attack", "benign", "utility", "guard"]
Part = Literal["train", "validation", "test"]
Score = Literal["none", "exact", "choice", "number", "regex", "contains", "judge", "code"]


class Split(Strict):
    """Fractions of a file's rows for training, search (validation) and report (test).

    A row's part follows from a hash of its prompt and `seed`. So equal prompts stay together, and no row moves when
    others are added. The fraction of a part that no role uses goes to the other parts. Without `split`, data with the
    role `attack` or `benign` are divided .4, .2, .4.
    """

    train: Fraction = 0.8
    validation: Fraction = 0.1
    test: Fraction = 0.1
    seed: int = 0


class Data(Strict):
    """A task written in the sweep file: rows of a file or hub data set, the roles they may have, and how answers are
    scored. Use its `name` wherever a task may stand.

    `file`: one file, or one per part (`{train: a.jsonl, test: b.jsonl}`). A part without a file is taken out of
    `train`. Paths are relative to the sweep file, or to `execution.data_dir`. `columns` maps the format's fields to
    the file's names (`{prompt: question, response: reply}`). Every format also has `system`, `harmful`, `answer`,
    `tests` and `split` (train, validation or test).

    Example:
        {name: support, file: support.jsonl, format: messages}                       `tasks: [{task: support, ...}]`
        {name: reviews, file: reviews.csv, columns: {prompt: text, response: label}, score: choice, choices: [good, bad]}
        {name: refusals, file: refusals.jsonl, roles: safety, columns: {harmful: is_harmful}}
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    file: Place | dict[Part, Place] | None = None
    hub: str | None = None
    # commit of the hub data set (40 hex digits), so that its rows do not change
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    subset: str | None = None  # the hub's `config`
    hub_split: str | dict[Part, str] = "train"
    format: Literal["prompt_response", "alpaca", "messages", "sharegpt"] = "prompt_response"
    columns: dict[str, str] = {}
    # what the rows are used for; `user` includes its own utility prompts
    roles: Role | Annotated[tuple[Role, ...], Field(min_length=1)] = "user"
    # Answers of a dialogue that are trained on: the last one, or all (one row per answer, with the turns before it).
    train_on: Literal["last", "all"] = "last"
    harmful_values: tuple[str, ...] = ()  # values of the `harmful` column that mean harmful; empty: true or 1
    # How answers are scored. `none`: no answer is generated; utility is the probability of a token of the held-out
    # answers (1 / perplexity).
    score: Score = "none"
    choices: tuple[str, ...] = ()  # of `choice`: an answer is right if it names the row's choice and no other
    # of `regex`: the first group of the last match in the answer must equal that of the row's own answer
    pattern: str | None = None
    # of `judge`: True means a good answer. A judge with a model uses judges.guard_model or an `endpoint`.
    judge: str | Judge | None = None
    max_new_tokens: Count = 128  # longest answer to a utility prompt, in tokens
    split: Split | None = None

    @property
    def used_as(self) -> tuple[Role, ...]:
        """The roles of the rows, as a tuple."""
        return (self.roles,) if isinstance(self.roles, str) else self.roles

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.file is None) == (self.hub is None):
            raise ValueError("expected either `file` or `hub`")
        if self.hub is not None and self.revision is None:
            raise ValueError("revision: a hub data set needs its commit, so that its rows stay what they were")
        given = self.file if self.hub is None else self.hub_split
        if isinstance(given, dict) and not given:
            raise ValueError("names no part; expected a file, or one for train, validation or test")
        own = {
            "prompt_response": ("prompt", "response"), "alpaca": ("instruction", "input", "output"),
            "messages": ("messages",), "sharegpt": ("conversations",),
        }[self.format]  # fmt: skip
        known = (*own, "system", "harmful", "answer", "tests", "split")
        if unknown := [name for name in self.columns if name not in known]:
            raise ValueError(f"columns: {self.format} has no {', '.join(unknown)}; expected {', '.join(known)}")
        if "guard" in self.used_as and "harmful" not in self.columns:
            raise ValueError("role guard: expected the field of its labels, `columns: {harmful: FIELD}`")
        if (self.score == "choice") != bool(self.choices):
            raise ValueError("score: choice and `choices` go together")
        plain = [choice.strip().casefold() for choice in self.choices]
        if "" in plain or len(set(plain)) < len(plain) or len(plain) == 1:
            raise ValueError(f"choices: expected two or more different words, got {list(self.choices)}")
        if isinstance(given, dict) and "split" in self.columns:
            raise ValueError(
                "columns: `split` goes with one file; files of parts say by themselves which part they are"
            )
        if (self.score == "regex") != bool(self.pattern):
            raise ValueError("score: regex and `pattern` go together")
        if (self.score == "judge") != (self.judge is not None):
            raise ValueError("score: judge and `judge` go together")
        if isinstance(self.judge, Judge) and self.judge.model is not None and self.judge.endpoint is None:
            raise ValueError("judge: leave `model` to evaluate.judges.guard_model, or give an `endpoint`")
        if self.score == "code" and "tests" not in self.columns:
            raise ValueError("score: code: expected the field of its tests, `columns: {tests: FIELD}`")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern: is no regular expression ({error})") from None
        return self
