"""Who judges: a guard trained here, published ones, endpoints, and judges that the sweep file writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from safecl.base import Json, Strict
from safecl.config.models import Count, Lora, Model, Place, Rows, Training


class Guard(Training):
    """A guard trained here, for machines without a published one: finetunes of `model` on labelled pairs, one a seed, which
    vote. How far they part enters every interval of what they decide. Rows come as pairs, an unsafe answer and a safe one to
    the same request where there are both, and stay together: a guard of a few hundred rows else learns which is more
    frequent."""

    shuffle: bool = False
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)] = 4

    rows: Annotated[tuple[Rows, ...], Field(min_length=1)]
    heldout: Annotated[tuple[Rows, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (
        0,
        1,
        2,
    )  # of rows and initialisation; odd numbers never tie
    lora: Lora = Lora()

    @field_validator("rows")
    @classmethod
    def _come_in_pairs(cls, value: tuple[Rows, ...]) -> tuple[Rows, ...]:
        if any(part.kinds for part in value):
            raise ValueError("a guard's rows come in pairs of both labels: give `num_rows`")
        return value

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"expected different seeds, got {list(value)}: a guard would vote twice")
        return value


class Judge(Strict):
    """One judge of a question: by its name, or written here (`template`, `labels`, `parse`: see judges/written.py).

    One that reads a model's answer is answered by `model` on an engine of ours, by the guards trained here (`model: guard`),
    or by an OpenAI-compatible `endpoint`, where `model` is the server's name of it; without any, by `judges.guard_model`.
    """

    judge: str | None = None
    # Of its column, and of its metric (`asr:LABEL`) unless it decides; null: the judge's name.
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")] | None = None
    decides: bool = False  # of several judges of a question one does: the first, unless another says so
    config: dict[str, Json] = {}  # the judge's own settings
    template: str | None = None
    labels: dict[str, bool] | None = None
    parse: Literal["first_word"] | dict[str, str] | None = None

    model: Model | str | None = None
    endpoint: str | None = (
        None  # http://HOST:PORT/v1. Where it is never enters identity: the model's name and these do:
    )
    version: str | None = None  # what else says which model answers there (a commit, a date)
    # The model's tokenizer, a folder: prompts then go as token ids, exactly as to an engine of ours. Without it they go as
    # text, in which what looks like a special token of a candidate's is broken up.
    tokenizer: Place | None = None
    chat: bool = False  # send the text as a user's message, in the server's own template
    at_once: Count = 16  # requests under way there, over all stages
    # Environment variable with the server's key, which is sent and never kept; null: SAFECL_ENDPOINT_KEY, if it is set.
    key_variable: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        written = self.template is not None
        if written == (self.judge is not None):
            raise ValueError("expected `judge: NAME`, or a `template` with `labels`, and not both")
        if written != (self.labels is not None) or (self.parse is not None and not written):
            raise ValueError("`template`, `labels` and `parse` go together: they write a judge here")
        if self.endpoint is None:
            extra = sorted(self.model_fields_set & {"version", "tokenizer", "chat", "at_once", "key_variable"})
            if extra:
                raise ValueError(f"`{extra[0]}` goes with `endpoint`")
            if isinstance(self.model, str) and self.model != "guard":
                raise ValueError(
                    f"model: expected a model ({{name, source, ...}}) or 'guard', got {self.model!r}; a server's name goes "
                    "with `endpoint`"
                )
            return self
        if not isinstance(self.model, str) or not self.model:
            raise ValueError("model: with `endpoint`, expected the server's name of the model")
        if self.chat and self.tokenizer is not None:
            raise ValueError(
                "tokenizer: goes with exact prompts, not with `chat`, where the server writes the template"
            )
        return self

    @property
    def name(self) -> str:
        return "written" if self.judge is None else self.judge

    @property
    def settings(self) -> dict[str, Json]:
        """Of the judge's class, as given."""
        own: dict[str, Json] = {"template": self.template, "labels": self.labels, "parse": self.parse}  # type: ignore[dict-item]
        return {**self.config, **{name: value for name, value in own.items() if value is not None}}


def url_problem(url: str) -> str | None:
    """What is wrong with an endpoint's URL."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too great
        return "expected http://HOST:PORT/v1 (or https)"
    if parts.username or parts.password or parts.query:
        return "expected no key in the URL, which is shown and kept: put it into an environment variable (key_variable)"
    return None if usable else "expected http://HOST:PORT/v1 (or https)"


QUESTIONS = ("asr", "over_refusal")  # keys of `judges`, which are the metrics of those who decide
# One judge, or several side by side on the same answers.
Judged = str | Judge | Annotated[tuple[str | Judge, ...], Field(min_length=1)]


class Judges(Strict):
    """Who answers which question: a judge's name, a Judge, or a list of either, of which one decides. What decides has the
    metric `asr` (`over_refusal`), each other one `asr:LABEL`. Which judges answer a question, and what model they need, they
    declare themselves (panel.py)."""

    asr: Judged = "llamaguard"
    over_refusal: Judged = "xstest_match"
    guard_model: Model | None = None  # of published guards that name no model of their own
    guard: Guard | None = None

    def of(self, question: str) -> tuple[Judge, ...]:
        """The judges of `asr` or `over_refusal`, the one that decides first."""
        given: Judged = getattr(self, question)
        found = [
            Judge(judge=one) if isinstance(one, str) else one
            for one in (given if isinstance(given, tuple) else [given])
        ]
        return tuple(sorted(found, key=lambda one: not one.decides))

    @model_validator(mode="after")
    def _are_told_apart(self) -> Self:
        for question in QUESTIONS:
            judges = self.of(question)
            if sum(judge.decides for judge in judges) > 1:
                raise ValueError(f"{question}: one judge decides, got {sum(judge.decides for judge in judges)} that do")
            labels = [judge.label or judge.name for judge in judges]
            if twice := next((label for label in labels if labels.count(label) > 1), None):
                raise ValueError(f"{question}: two judges are labelled {twice!r}: give one of them another `label`")
        return self

    def with_models(self, of: Callable[[Model], Model]) -> Self:
        """These judges with `of(model)` in place of each model."""

        def judged(one: Any) -> Any:
            if isinstance(one, tuple):
                return tuple(map(judged, one))
            if isinstance(one, Judge) and isinstance(one.model, Model):
                return one.model_copy(update={"model": of(one.model)})
            return one

        found = {question: judged(getattr(self, question)) for question in QUESTIONS}
        guard_model = self.guard_model and of(self.guard_model)
        return self.model_copy(update={**found, "guard_model": guard_model})

    @property
    def models(self) -> dict[str, Model]:
        """Every model named here, by its key."""
        found = {} if self.guard_model is None else {"guard_model": self.guard_model}
        for question in QUESTIONS:
            given = getattr(self, question)
            for i, one in enumerate(given if isinstance(given, tuple) else [given]):
                if isinstance(one, Judge) and isinstance(one.model, Model):
                    found[f"{question}[{i}].model" if isinstance(given, tuple) else f"{question}.model"] = one.model
        return found
