"""The schema of a sweep file. Every key is here, with its default and what it trades; nothing heavy is imported.

What determines a number (`models` ... `evaluate`, `search`) is kept apart from where and how fast it is computed
(`execution`), which never enters a stage's identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema

from safecl.base import Json, Strict, expanded, later

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


# A path or URL: `~` and `$NAME` stand for what they do in a shell.
Place = Annotated[str, AfterValidator(expanded)]


def _holds_prompt(text: str | None) -> str | None:
    if text is not None and text.count("{prompt}") != 1:
        raise ValueError(f"must hold {{prompt}} exactly once, got {text!r}")
    return text


class Template(Strict):
    """How a request becomes text. `prompt` holds `{prompt}` once; the answer follows it and ends with `end`. Special tokens
    in a request or an answer stay plain text."""

    prompt: str = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    end: str = "<|im_end|>"  # one control token; where a sweep file gives a prompt alone, the tokenizer's EOS
    # Further tokens that end generation, beside `end` and the model's own EOS tokens.
    stop: tuple[str, ...] = ("<|endoftext|>",)
    lead: str = ""  # written before every answer and read with its first word: Llama-2's space
    strip: bool = False  # take whitespace off both ends of a request, as many chat templates do
    # Of conversations, each "" where the template cannot write it. They stand in the configs of those stages alone whose
    # rows may be conversations.
    system: Annotated[str, Field(exclude=True)] = (
        ""  # with {system}: what stands before a first request in place of its head
    )
    between: Annotated[str, Field(exclude=True)] = (
        ""  # between an earlier answer and the next request, its end included
    )
    past: Annotated[str | None, Field(exclude=True)] = (
        None  # between an earlier request and its answer; None: as the last
    )

    @property
    def conversation(self) -> dict[str, Json]:
        """The parts that only conversations need."""
        return {"system": self.system, "between": self.between, "past": self.past}

    @field_validator("system")
    @classmethod
    def _holds_system_once(cls, value: str) -> str:
        if value and value.count("{system}") != 1:
            raise ValueError(f"must hold {{system}} exactly once, got {value!r}")
        return value

    @field_validator("prompt")
    @classmethod
    def _holds_prompt_once(cls, value: str) -> str:
        _holds_prompt(value)
        return value


# The text around a request where it is not the model's own: `prompt` of a template, whose end and rest stay the model's.
Around = Annotated[str | None, AfterValidator(_holds_prompt)]

Named = Literal["chatml", "alpaca", "llama2", "gemma"]


class Origin(Strict):
    """Where a model comes from, in the words of `Model`."""

    source: Place
    revision: str | None = None


class Model(Strict):
    """A model. `source`: `wheel:PACKAGE` (a GGUF file inside an installed package), a folder (beside the sweep file, else from
    where the command is run), or a hub id."""

    name: str
    source: Place
    revision: str | None = None  # commit of a hub id; required for one, so that a result stays what it was
    # Of the frozen base; LoRA factors are always float32. `auto`: bfloat16 where the device that computes multiplies it
    # natively (GPUs from Ampere on; CPUs with AVX512_BF16, AMX_BF16 or ARM's BF16), else float32. What it became is part
    # of the identity of every result: two kinds of machine share none by accident.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # `auto`: the tokenizer's own chat template, with whatever system prompt it writes. A base model without one needs one
    # named or written out. What it became is checked token by token, printed, and part of every result's identity.
    template: Literal["auto"] | Named | Template = "auto"
    # Whether every prompt begins with the tokenizer's BOS (exactly once). `auto`: as the tokenizer's rule or the template
    # says.
    bos: Literal["auto"] | bool = "auto"
    # With `align: none`: the base model that this one was aligned from. Methods that work on what the alignment changed
    # (SafeLoRA, MagMax, ...) need it.
    aligned_from: Origin | None = later(None)

    @field_validator("template")
    @classmethod
    def _holds_a_prompt(cls, value: str | Template) -> str | Template:
        if isinstance(value, Template) and value.model_fields_set and "prompt" not in value.model_fields_set:
            raise ValueError(
                f"expected a `prompt` that holds {{prompt}}, got only {', '.join(sorted(value.model_fields_set))}"
            )
        return value

    @property
    def text(self) -> Template:
        """The template that `auto` or a name became; it must be resolved (templates.py)."""
        assert isinstance(self.template, Template), f"model {self.name!r}: its template is not resolved"
        return self.template


class Lora(Strict):
    """The adapter's shape (PEFT's names). The paper: rank 8, alpha 4, dropout .1; target modules unsaid."""

    rank: Count = 8
    alpha: Count = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    last_layers: Count | None = None  # adapt only the last N layers: backward passes end there, so steps are cheaper


class Training(Strict):
    """One finetune. The paper: 3 epochs, batch 5, lr 5e-5 cosine, 10 % warm-up, weight decay .1."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    batch_size: Count = 5  # global: rows per optimizer step over all workers
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup_ratio: Fraction = 0.1
    # After the warm-up: down to 0 (`cosine`, `linear`), to `min_rate` of the peak (`cosine_with_min_lr`), or not at all.
    schedule: Literal["cosine", "linear", "constant", "cosine_with_min_lr"] = later("cosine")
    min_rate: Fraction = later(0.1)  # of `cosine_with_min_lr`: the last rate as a share of the peak (HF's min_lr_rate)
    # The first of n warm-up steps has a rate of 1/n of the peak; true: of 0, and the n-th (n-1)/n, as Hugging Face's.
    warmup_from_zero: bool = later(False)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=8)] = 512  # prompt + answer; see `stages/data.py` for what is longer
    shuffle: bool = True  # a new order each epoch; false keeps the rows' own

    @model_validator(mode="after")
    def _has_a_schedule_that_ends_there(self) -> Self:
        if self.min_rate != 0.1 and self.schedule != "cosine_with_min_lr":
            raise ValueError(f"min_rate goes with `schedule: cosine_with_min_lr`; {self.schedule} would not look at it")
        return self


class Rows(Strict):
    """So many rows of a task; `num_rows: null` takes all there are. The split follows from where it stands.

    Example:
        {task: wildjailbreak, num_harmful: 5000, num_benign: 5000}     so many rows of each kind of request
    """

    task: str
    num_rows: Count | None = None
    num_harmful: Count | None = later(None)
    num_benign: Count | None = later(None)

    @model_validator(mode="after")
    def _counts_once(self) -> Self:
        if self.kinds and self.num_rows is not None:
            raise ValueError("give `num_rows`, or `num_harmful` and `num_benign`, not both")
        return self

    @property
    def kinds(self) -> dict[str, int]:
        """Rows of each kind, where they are counted by kind; a kind that is not named has none."""
        given = {"harmful": self.num_harmful, "benign": self.num_benign}
        return {kind: num for kind, num in given.items() if num is not None}

    @property
    def total(self) -> int | None:
        """Of all kinds."""
        return sum(self.kinds.values()) if self.kinds else self.num_rows


class Method(Strict):
    """A row of the table. `config` fixes hyperparameters, `search` opens some (`{}`: the method's default space):
    a list is a choice, `{low, high, log}` a range (of ints where the hyperparameter is one), `{low, high, step}` an int range.
    `grid` makes a row of each combination of its lists' values. A whole number may be a share of the task's rows: `5%`.

    Example:
        {name: der, label: DER, config: {memory_size: 5%}, grid: {weight: [0.3, 1.0, 3.0]}}     three rows
        sft                                                                        short for {name: sft}
    """

    name: str
    config: dict[str, Json] = {}
    search: dict[str, Json] | None = None
    grid: dict[str, Annotated[tuple[Json, ...], Field(min_length=1)]] = later({})
    # What tables call it; two entries of one method with other settings are told apart by those without one.
    label: Annotated[str, Field(pattern=r"^[^/\n]+$")] | None = later(None)


class _OrName:
    """Lets a name alone stand for an entry without settings."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        named = core_schema.no_info_after_validator_function(lambda name: source(name=name), core_schema.str_schema())
        tagged = {"name": named, "entry": handler(source)}
        return core_schema.tagged_union_schema(tagged, lambda given: "name" if isinstance(given, str) else "entry")


class Align(Training):
    """Stage one: SFT of the base model on safety rows gives theta_safe.

    `train: false` where the model is aligned already: it *is* theta_safe, nothing is trained, and stage two trains a fresh
    adapter on it. `align: none` is short for that alone. Its `safety` rows (answers cut to `max_tokens`) are what methods
    with a memory draw from; or `safety_from` names a method that makes such rows from the model itself.

    `method` trains it another way than plain SFT: one that needs no theta_safe, such as `sam`.

    Example:
        align: {safety: [{task: mini, num_rows: 600}], method: {name: sam, config: {rho: 0.1}}}
        align: {train: false, safety: [{task: safety_tuned, num_rows: 500}]}
        align: {train: false, safety_from: {name: grsap, config: {num_rows: 250}}}
    """

    train: bool = later(True)
    safety: tuple[Rows, ...] = ()
    # Benign requests answered by the base model itself, for safety sets that hold none (they teach over-refusal).
    self_answered: tuple[Rows, ...] = ()
    safety_from: Method | None = later(None)
    method: Annotated[Method, _OrName()] = later(Method(name="sft"))

    @model_validator(mode="after")
    def _has_what_it_trains_on(self) -> Self:
        if self.train:
            if not self.safety:
                raise ValueError("`safety` is required (or `align: none`, for a model that is aligned already)")
            if self.safety_from is not None:
                raise ValueError(
                    "`safety_from` goes with `train: false` alone: what is aligned here is aligned on `safety`"
                )
        elif unused := sorted(self.model_fields_set - {"train", "safety", "safety_from", "max_tokens"}):
            raise ValueError(f"nothing is trained with `train: false`, so {', '.join(unused)} would do nothing")
        elif self.safety and self.safety_from is not None:
            raise ValueError("give `safety` or `safety_from`, not both")
        return self


class _OrNone:
    """Lets `none` stand for `{train: false}`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        given = core_schema.literal_schema(["none"])
        made = core_schema.no_info_after_validator_function(lambda _: Align(train=False), given)
        return core_schema.union_schema([handler(source), made])


class UtilityRows(Strict):
    """Prompts of one task; what is left out is as `evaluate` says."""

    validation: Count | None = None
    test: Count | None = None


class UserTask(Training):
    """Stage two: what the user fine-tunes on. `utility_rows`: of this task, where it is not as `evaluate` says. `template`: the
    text around a request in its rows, where it is not the model's."""

    task: str
    num_rows: Count | None = 5000
    utility_rows: UtilityRows | None = later(None)
    template: Around = later(None)


class Poison(Strict):
    """`floor(ratio * N)` user rows are replaced by harmful ones; the total stays N. `keep_task_rows`: they are added to
    all N, so that a poisoned model has seen as much of its task as a clean one, in more steps."""

    task: str
    ratios: tuple[Fraction, ...] = (0.0, 0.1)
    keep_task_rows: bool = False


class Some(Strict):
    """Some rows of the whole grid, by the names of their models, tasks, poison ratios and methods (their labels, where they
    have them); what is left out is all of them."""

    models: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    ratios: tuple[Fraction, ...] | None = None
    methods: tuple[str, ...] | None = None


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


Role = Literal["user", "safety", "poison", "attack", "benign", "utility", "guard"]
Part = Literal["train", "validation", "test"]
Score = Literal["none", "exact", "choice", "number", "regex", "contains", "judge", "code"]


class Split(Strict):
    """Which rows of one file are trained on, searched with and reported on: by a hash of the prompt and `seed`, so that equal
    prompts stay together and no row moves when others are added. Shares of parts that no role uses go to the others. Without
    a `split`, data with the role `attack` or `benign` are shared .4, .2, .4."""

    train: Fraction = 0.8
    validation: Fraction = 0.1
    test: Fraction = 0.1
    seed: int = 0


class Data(Strict):
    """A task written in the sweep file: rows of a file or hub data set, what they may be used for, and how answers are
    scored. `name` then stands wherever a task may.

    `file`: one, or one a part (`{train: a.jsonl, test: b.jsonl}`); what has no file of its own is taken out of `train`.
    Places are relative to the sweep file, or to `execution.data_dir`. `columns`: the format's fields by the file's names
    (`{prompt: question, response: reply}`), and of any format `system`, `harmful`, `answer`, `tests`, `split` (train,
    validation or test).

    Example:
        {name: support, file: support.jsonl, format: messages}                       `tasks: [{task: support, ...}]`
        {name: reviews, file: reviews.csv, columns: {prompt: text, response: label}, score: choice, choices: [good, bad]}
        {name: refusals, file: refusals.jsonl, roles: safety, columns: {harmful: is_harmful}}
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    file: Place | dict[Part, Place] | None = None
    hub: str | None = None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = (
        None  # commit, so that the rows stay what they were
    )
    subset: str | None = None  # the hub's `config`
    hub_split: str | dict[Part, str] = "train"
    format: Literal["prompt_response", "alpaca", "messages", "sharegpt"] = "prompt_response"
    columns: dict[str, str] = {}
    roles: Role | Annotated[tuple[Role, ...], Field(min_length=1)] = "user"  # `user` has its utility prompts with it
    train_on: Literal["last", "all"] = "last"  # answers of a dialogue; `all`: a row each, behind what came before it
    harmful_values: tuple[str, ...] = ()  # of the `harmful` column; none: true or 1
    # `none`: no answer is generated; utility is the probability of a token of the held-out answers (1 / perplexity).
    score: Score = "none"
    choices: tuple[str, ...] = ()  # of `choice`: an answer is right that names the row's and no other
    pattern: str | None = (
        None  # of `regex`: its first group's last match in the answer must be that of the row's answer
    )
    judge: str | Judge | None = (
        None  # of `judge`: its True is a good answer; a model's is judges.guard_model or an `endpoint`
    )
    max_new_tokens: Count = 128  # of an answer to utility prompts
    split: Split | None = None

    @property
    def used_as(self) -> tuple[Role, ...]:
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


class Prompts(Strict):
    """Evaluation sets of one split."""

    attack: Annotated[tuple[Rows, ...], Field(min_length=1)]
    benign: Annotated[tuple[Rows, ...], Field(min_length=1)]  # look-alike benign prompts, for over-refusal
    utility_rows: Count | None = None  # prompts of the cell's own task


class Evaluate(Strict):
    """The search reads `validation` only; the tables read `test` only."""

    validation: Prompts
    test: Prompts
    judges: Judges
    metrics: tuple[str, ...] = later(())  # what is measured beside what always is (metrics.py)
    max_new_tokens: Count = 128  # for attack and benign prompts; a utility task has its own length
    max_prompt_tokens: Count = 1024  # of longer ones the request loses its beginning, inside the template
    # The text around every request that is answered, where it is not the model's: a safety prompt that training has not seen
    # (PTST, arXiv 2402.18540). Of all rows alike, base and aligned too.
    template: Around = later(None)
    # Consent to run a model's programs (task `code`) with rlimits alone where this machine cannot isolate them.
    unsafe_code: bool = False


class Objective(Strict):
    """`maximise` subject to bounds. A bound `safe + x` is relative to theta_safe's own value on the same prompts."""

    maximise: str = "utility"
    bounds: dict[str, str | float] = {"asr": "safe + 0.05", "over_refusal": "safe + 0.10", "degenerate": 0.05}


class Search(Strict):
    """Optuna's study per searched cell. Trial 0 is the defaults; every method gets the same number of trials."""

    trials: Count = 20
    # Of every trial, and of no row: on a reported seed the chosen values would carry their luck with it into the table.
    seed: int = 1000
    # false: trials start from the alignment of the first reported seed. Saves an alignment a model; what the chosen values
    # owe to that alignment stays in its rows.
    realign: bool = True
    # `grid`: every combination of lists, which all that is searched must then be; `trials` does not count there.
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    objective: Objective = Objective()


class Execution(Strict):
    """Where and how fast. Never part of a stage's identity: changing it cannot change which results exist."""

    root: Place = "runs"  # folder (or any fsspec URL every node reaches) of store, study, tracking and logs
    data_dir: Place | None = None  # folder of local data files; null: the hub
    address: str = "local"  # Ray: "local" starts a cluster of its own, "auto" joins a running one
    num_trials_at_once: Count = 3
    num_workers: Count = 1  # data-parallel ranks of one finetune
    # Of a finetune. auto: DeepSpeed where there are several workers, plain PyTorch where one has nothing to share.
    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    zero: Literal[0, 1, 2, 3] = 1
    micro_batch_size: Count = 8  # rows per forward on one worker, at most: fewer where they do not fit into memory
    # Compute layers again in the backward in place of keeping them: a third slower, a fraction of the memory. auto: where
    # the estimate says that it is needed.
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 60.0
    max_failures: Annotated[int, Field(ge=0)] = 2  # restarts of a finetune whose worker died
    num_candidate_engines: Count = 1
    # 0: judges answer from the engines of candidates with the same base, in turn. Saves an engine's memory and boot.
    num_judge_replicas: Annotated[int, Field(ge=0)] = 1
    engine_memory_gib: Annotated[float, Field(gt=0)] = 1.0  # KV cache of one engine
    engine_max_tokens: Count = 2048  # prompt + answer; checked to hold what `evaluate` asks for
    # Answers that do not depend on what else is decoded at the time, to the bit; on a CPU one request after the other.
    batch_invariant: bool = False
    use_gpu: bool = False
    tracking_uri: Place | None = None  # null: SQLite under root
    study_uri: Place | None = None  # null: SQLite under root


class PublishedNumbers(Strict):
    """Numbers that a report prints beside this sweep's: see report/published.py. `models`: what they call a model of ours."""

    file: Place  # from the folder of the sweep file
    models: dict[str, str] = {}


class Sweep(Strict):
    """One sweep file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    about: str = ""
    published: PublishedNumbers | None = None
    # Python files with methods, tasks or judges of your own, relative to this file. Their content is part of the identity of
    # what uses them. They are run like any program that you start.
    plugins: tuple[Place, ...] = ()
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    # Stage two goes on training theta_safe's adapter, or folds it into the base and trains a fresh one on top. The paper
    # does not say which it did; every report prints it.
    adapter: Literal["continue", "stack"] = "continue"
    lora: Lora = Lora()
    data: tuple[Data, ...] = ()  # tasks of your own
    align: Annotated[Align, _OrNone()]
    # Of which safety rows a method's memory is: refusals alone, or every kind (each source's harmful and benign requests)
    # in proportion. Its size is the method's own (`memory_size`).
    memory_mix: Literal["refusals", "stratified"] = "refusals"
    tasks: Annotated[tuple[UserTask, ...], Field(min_length=1)]
    poison: Poison
    methods: Annotated[tuple[Annotated[Method, _OrName()], ...], Field(min_length=1)]
    # Rows that any of these name, in place of every model x task x ratio x method.
    only: tuple[Some, ...] = ()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    evaluate: Evaluate
    search: Search = Search()
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _starts_from_an_aligned_model(self) -> Self:
        if self.align.train:
            if known := [model.name for model in self.models if model.aligned_from is not None]:
                raise ValueError(f"models: {known[0]!r} has `aligned_from`, which goes with `align: none` alone")
            return self
        if self.adapter == "continue" and "adapter" in self.model_fields_set:
            raise ValueError(
                "adapter: `align: none` trains no adapter that stage two could continue; leave `adapter` out"
            )
        object.__setattr__(
            self, "adapter", "stack"
        )  # what a fresh adapter on theta_safe is called; the config is frozen
        return self

    @model_validator(mode="after")
    def _searches_on_a_seed_of_its_own(self) -> Self:
        if self.search.seed in self.seeds:
            raise ValueError(f"search.seed: {self.search.seed} is among `seeds`, which are reported; name another one")
        return self
