"""Models, templates, adapters and training: parts that several places of a sweep file share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PlainSerializer, field_validator, model_validator

from safecl.base import Json, Strict, expanded, later, literal

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


# A path or URL. `~` and `$NAME` are expanded as in a shell. A dumped value is read again as the same path.
Place = Annotated[str, AfterValidator(expanded), PlainSerializer(literal)]


def _holds_prompt(text: str | None) -> str | None:
    if text is not None and text.count("{prompt}") != 1:
        raise ValueError(f"must hold {{prompt}} exactly once, got {text!r}")
    return text


class Template(Strict):
    """How a request becomes text. `prompt` holds `{prompt}` once. The answer follows it and ends with `end`. Text in
    a request or an answer that looks like a special token stays plain text."""

    prompt: str = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    end: str = "<|im_end|>"  # one control token; if a sweep file gives only `prompt`, the tokenizer's EOS
    # Further tokens that end generation, besides `end` and the model's own EOS tokens.
    stop: tuple[str, ...] = ("<|endoftext|>",)
    lead: str = ""  # text before every answer, tokenised with its first word: Llama-2's space
    strip: bool = False  # remove whitespace at both ends of a request, as many chat templates do
    # For conversations; "" where the template cannot write it. Only configs of stages whose rows may be conversations
    # have these keys. Holds {system}: the text before a first request, in place of the usual one.
    system: Annotated[str, Field(exclude=True)] = ""
    # Text between an earlier answer and the next request, with the end of the answer.
    between: Annotated[str, Field(exclude=True)] = ""
    # Text between an earlier request and its answer; None: as before the last answer.
    past: Annotated[str | None, Field(exclude=True)] = None

    @property
    def conversation(self) -> dict[str, Json]:
        """The keys that only conversations need."""
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


# Another text around a request: `prompt` of a template. `end` and the other keys stay those of the model's template.
Around = Annotated[str | None, AfterValidator(_holds_prompt)]

Named = Literal["chatml", "alpaca", "llama2", "gemma"]


class Origin(Strict):
    """Where a model comes from: the same keys as in `Model`."""

    source: Place
    revision: str | None = None


class Model(Strict):
    """A model. `source`: `wheel:PACKAGE` (a GGUF file inside an installed package), a folder (relative to the sweep
    file, or else to where the command runs), or a hub id."""

    name: str
    source: Place
    revision: str | None = None  # commit of a hub id; required for one, so that results stay reproducible
    # Number type of the frozen base; LoRA factors are always float32. `auto`: bfloat16 if the device that computes
    # multiplies it natively (GPUs from Ampere on; CPUs with AVX512_BF16, AMX_BF16 or ARM's BF16), else float32. The
    # chosen type is part of every result's identity, so machines that choose different types share no results.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # `auto`: the tokenizer's own chat template, with the system prompt that it writes. A base model without a chat
    # template needs a template here, by name or written out. The resulting template is checked token by token, printed,
    # and part of every result's identity.
    template: Literal["auto"] | Named | Template = "auto"
    # Whether every prompt begins with the tokenizer's BOS (exactly once). `auto`: as the tokenizer's own rule or the
    # template says.
    bos: Literal["auto"] | bool = "auto"
    # With `align: none`: the base model from which this model was aligned. Methods that work on what the alignment
    # changed (SafeLoRA, MagMax, ...) need it.
    aligned_from: Origin | None = later(None)
    # Only for a judge's model, on GPUs: how its engine quantizes the weights when it starts. This takes half or a
    # quarter of the memory and changes answers, so it is part of every verdict's identity. A model whose files are
    # quantized already needs no value here.
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
        """The template, after `auto` or a name has been resolved (templates.py)."""
        assert isinstance(self.template, Template), f"model {self.name!r}: its template is not resolved"
        return self.template


class Lora(Strict):
    """The adapter's shape, with PEFT's names. The paper: rank 8, alpha 4, dropout .1; it does not give the target
    modules."""

    rank: Count = 8
    alpha: Count = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    # Adapt only the last N layers. Backward passes end there, and a row passes the lower layers only once; null: all
    # layers.
    last_layers: Count | None = None


class Training(Strict):
    """The settings of one finetune. The paper: 3 epochs, batch 5, lr 5e-5 cosine, 10 % warm-up, weight decay .1."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    batch_size: Count = 5  # rows per optimizer step, over all workers
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup_ratio: Fraction = 0.1
    # The learning rate after the warm-up: falls to 0 (`cosine`, `linear`), falls to `min_rate` of the peak
    # (`cosine_with_min_lr`), or stays.
    schedule: Literal["cosine", "linear", "constant", "cosine_with_min_lr"] = later("cosine")
    # of `cosine_with_min_lr`: the last rate as a fraction of the peak (HF's min_lr_rate)
    min_rate: Fraction = later(0.1)
    # false: the first of n warm-up steps has 1/n of the peak rate. true: the first has 0 and the n-th (n-1)/n, as in
    # Hugging Face.
    warmup_from_zero: bool = later(False)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # prompt + answer, in tokens; `stages/data.py` says what happens to longer rows
    max_tokens: Annotated[int, Field(ge=8)] = 512
    shuffle: bool = True  # true: a new order each epoch; false: the rows' own order

    @model_validator(mode="after")
    def _has_a_schedule_that_ends_there(self) -> Self:
        if self.min_rate != 0.1 and self.schedule != "cosine_with_min_lr":
            raise ValueError(f"min_rate goes with `schedule: cosine_with_min_lr`; {self.schedule} would not look at it")
        return self


class Rows(Strict):
    """Rows of a task. `num_rows: null` takes all of them. The split follows from where the entry stands in the sweep
    file.

    Example:
        {task: wildjailbreak, num_harmful: 5000, num_benign: 5000}     counts for each kind of request
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
        """Number of rows of each kind, if rows are counted by kind; a kind without a count has none."""
        given = {"harmful": self.num_harmful, "benign": self.num_benign}
        return {kind: num for kind, num in given.items() if num is not None}

    @property
    def total(self) -> int | None:
        """Number of rows over all kinds; None: all rows."""
        return sum(self.kinds.values()) if self.kinds else self.num_rows
