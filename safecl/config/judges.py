"""The judges: guards trained here, published guards, endpoints, and judges that the sweep file writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from safecl.base import Json, Strict
from safecl.config.models import Count, Lora, Model, Place, Rows, Training


class Guard(Training):
    """A guard trained here, for machines without a published one. `model` is finetuned on labelled pairs once per
    seed, and the resulting guards vote. How much they disagree enters every interval of the metrics they decide.

    A pair is an unsafe and a safe answer to the same request, where the data has both. The two stay together in a
    batch. Otherwise a guard trained on a few hundred rows learns only which label is more frequent.
    """

    shuffle: bool = False
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)] = 4

    rows: Annotated[tuple[Rows, ...], Field(min_length=1)]
    heldout: Annotated[tuple[Rows, ...], Field(min_length=1)]
    # of rows and initialisation; an odd number of guards never ties
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
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
    """One judge of a question: by its name (`judge`), or written here (`template`, `labels`, `parse`; see
    judges/written.py).

    A judge may need a model's answer. `model` says which model: one on our own engine, the guards trained here
    (`model: guard`), or the model that an OpenAI-compatible `endpoint` serves under this name. Without `model` it is
    `judges.guard_model`.
    """

    judge: str | None = None
    # Name of its column and of its metric (`asr:LABEL`; the deciding judge's metric is plain `asr`). null: the judge's
    # name.
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")] | None = None
    decides: bool = False  # true: this judge decides the question. Exactly one does; by default the first.
    config: dict[str, Json] = {}  # the judge's own settings
    template: str | None = None
    labels: dict[str, bool] | None = None
    parse: Literal["first_word"] | dict[str, str] | None = None

    model: Model | str | None = None
    # URL of the server, http://HOST:PORT/v1. It is not part of the identity; the model's name and the next keys are.
    endpoint: str | None = None
    version: str | None = None  # anything else that says which model answers there (a commit, a date)
    # Folder of the model's tokenizer. With it, prompts are sent as token ids, exactly as to our own engine. Without it
    # they are sent as text; text in a candidate's answer that looks like a special token is broken up.
    tokenizer: Place | None = None
    chat: bool = False  # send the text as a user message; the server applies its own template
    at_once: Count = 16  # most requests at the server at the same time, over all stages
    # Environment variable with the server's key. The key is sent and never stored. null: SAFECL_ENDPOINT_KEY, if it is
    # set.
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
        """Name of the judge's class: `judge`, or "written" for a judge that the sweep file writes."""
        return "written" if self.judge is None else self.judge

    @property
    def settings(self) -> dict[str, Json]:
        """The judge class's own settings, as the sweep file gives them."""
        own: dict[str, Json] = {"template": self.template, "labels": self.labels, "parse": self.parse}  # type: ignore[dict-item]
        return {**self.config, **{name: value for name, value in own.items() if value is not None}}


def url_problem(url: str) -> str | None:
    """What is wrong with an endpoint's URL; None if nothing is."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or too large
        return "expected http://HOST:PORT/v1 (or https)"
    if parts.username or parts.password or parts.query:
        return "expected no key in the URL, which is shown and kept: put it into an environment variable (key_variable)"
    return None if usable else "expected http://HOST:PORT/v1 (or https)"


QUESTIONS = ("asr", "over_refusal")  # keys of `judges`; also the metric names of the deciding judges
# One judge, or several judges of the same answers.
Judged = str | Judge | Annotated[tuple[str | Judge, ...], Field(min_length=1)]


class Judges(Strict):
    """Which judges answer each question: a judge's name, a Judge, or a list of these of which one decides. The
    deciding judge has the metric `asr` (or `over_refusal`), every other judge `asr:LABEL`. Each judge itself declares
    which questions it answers and what model it needs (panel.py)."""

    asr: Judged = "llamaguard"
    over_refusal: Judged = "xstest_match"
    guard_model: Model | None = None  # model of published guards that name no model of their own
    guard: Guard | None = None

    def of(self, question: str) -> tuple[Judge, ...]:
        """The judges of `asr` or `over_refusal`, the deciding one first."""
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
        """These judges with each model replaced by `of(model)`."""

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
        """Every model named here, by its key in the sweep file."""
        found = {} if self.guard_model is None else {"guard_model": self.guard_model}
        for question in QUESTIONS:
            given = getattr(self, question)
            for i, one in enumerate(given if isinstance(given, tuple) else [given]):
                if isinstance(one, Judge) and isinstance(one.model, Model):
                    found[f"{question}[{i}].model" if isinstance(given, tuple) else f"{question}.model"] = one.model
        return found
