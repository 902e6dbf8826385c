"""Models, the text around a request, adapters and training: what several parts of a sweep file share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PlainSerializer, field_validator, model_validator

from safecl.base import Json, Strict, expanded, later, literal

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


# A path or URL: `~` and `$NAME` stand for what they do in a shell; what is dumped is read again as what it was.
Place = Annotated[str, AfterValidator(expanded), PlainSerializer(literal)]


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
    # Of a judge's model, as its engine packs the weights while it boots (on GPUs alone): half or a quarter of the memory, and
    # other answers, so that it is part of the identity of every verdict. A model whose files are packed needs no word.
    quantization: Literal["fp8", "bitsandbytes"] | None = later(None)

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
    last_layers: Count | None = (
        None  # adapt only the last N layers: backward passes end there and lower layers pass a row once
    )


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
