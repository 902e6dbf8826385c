"""The schema of a sweep file. Every key is here, with its default and what it trades; nothing heavy is imported.

What determines a number (`models` ... `evaluate`, `search`) is kept apart from where and how fast it is computed
(`execution`), which never enters a stage's identity.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from safecl.base import Json, Strict, later
from safecl.config.data import Data, Part, Role, Score, Split
from safecl.config.judges import QUESTIONS, Guard, Judge, Judged, Judges, url_problem
from safecl.config.models import Around, Count, Fraction, Lora, Model, Named, Origin, Place, Rows, Template, Training

__all__ = [
    "QUESTIONS",
    "Align",
    "Around",
    "Count",
    "Data",
    "Evaluate",
    "Execution",
    "Fraction",
    "Guard",
    "Judge",
    "Judged",
    "Judges",
    "Lora",
    "Method",
    "Model",
    "Named",
    "Objective",
    "Origin",
    "Part",
    "Place",
    "Poison",
    "Prompts",
    "PublishedNumbers",
    "Role",
    "Rows",
    "Score",
    "Search",
    "Some",
    "Split",
    "Standing",
    "Sweep",
    "Template",
    "Training",
    "UserTask",
    "UtilityRows",
    "url_problem",
]


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


class Standing(Some):
    """How these rows stand among all where devices are short: those of a higher `priority` go first, whatever else waits; of
    one priority each row's first trial goes before any's second, and one with `share: 2` has two for one of the others'."""

    priority: Annotated[int, Field(ge=-9, le=9)] = 0
    share: Annotated[float, Field(gt=0)] = 1.0


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
    # Several objectives, each towards its better end, `maximise` among them: TPE then looks for the whole front within the
    # bounds (trials of which no other is better in one and as good in the rest).
    pareto: tuple[str, ...] = later(())
    # Who of the front is run on the reported seeds. bounds: it with the most of `maximise`, as without a front; nearest: it
    # with the least distance to perfect values (Euclidean, fractions as they are); front: all of it, a row each.
    choose: Literal["bounds", "nearest", "front"] = later("bounds")


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
    # Trials of one study that run beside one another: so many times less waiting. With `tpe` they are suggested in batches,
    # and those of one batch know nothing of one another's results: a somewhat worse choice (docs/search.md has it measured).
    at_once: Count = 1
    # Trials that cannot be chosen are ended early: attack prompts are answered first, then utility's, then the rest. bounds:
    # those that break a bound or are no better than what met all bounds in the batches before (which loses no choice);
    # wilcoxon: also those whose answers to a fourth of the utility prompts are worse than its, by that test at 5 %.
    prune: Literal["none", "bounds", "wilcoxon"] = "none"
    objective: Objective = Objective()


class Execution(Strict):
    """Where and how fast. Never part of a stage's identity: changing it cannot change which results exist."""

    root: Place = "runs"  # folder (or any fsspec URL every node reaches) of store, study, tracking and logs
    cache_gib: Annotated[float, Field(gt=0)] | None = None  # of each node, where root is a URL; null: half of its disk
    data_dir: Place | None = None  # folder of local data files; null: the hub
    address: str = "local"  # Ray: "local" starts a cluster of its own, "auto" joins a running one
    num_trials_at_once: Count = 3
    turns: tuple[Standing, ...] = later(())  # whose trials go first; of several that name a row the last one counts
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
    # What is scarce on the cluster is lent to trainers and engines in turn: any number of models makes progress on one GPU.
    # These are the most engines of one model at once; one is booted when there is work for it and a place.
    num_candidate_engines: Count = 1
    # 0: judges answer from the engines of candidates with the same base, in turn. Saves an engine's memory and boot.
    num_judge_replicas: Annotated[int, Field(ge=0)] = 1
    turn_s: Annotated[float, Field(ge=1)] = 600.0  # how long a trainer or an engine keeps its place while another waits
    unit: str | None = None  # Ray's name of what they hold; null: GPU with `use_gpu`, else CPU
    may_bring: Annotated[int, Field(ge=0)] | None = None  # so many more by autoscaling; null: as the autoscaler says
    worker_units: Annotated[float, Field(gt=0, le=1)] = 1.0  # of one training rank; below 1 several share one
    # Of one engine: a part of one, or several on one node, over which it is then tensor-parallel.
    engine_units: Annotated[float, Field(gt=0)] = 1.0
    # KV cache of one engine (on each of its GPUs). null: with `use_gpu` what `engine_gpu_memory` leaves, else 1 GiB.
    engine_memory_gib: Annotated[float, Field(gt=0)] | None = None
    engine_gpu_memory: Annotated[float, Field(gt=0, lt=1)] | None = None  # an engine's part of a GPU's memory; null: .9
    engine_max_seqs: Count | None = None  # requests decoded together; null: 256 on a GPU, 64 on a CPU
    engine_max_tokens: Count = 2048  # prompt + answer; checked to hold what `evaluate` asks for
    # Answers that do not depend on what else is decoded at the time, to the bit; on a CPU one request after the other.
    batch_invariant: bool = False
    use_gpu: bool = False
    device_price: Annotated[float, Field(ge=0)] | None = (
        None  # of a GPU-hour (without use_gpu: CPU-hour): `status` adds it up
    )
    tracking_uri: Place | None = None  # null: SQLite under root
    study_uri: Place | None = None  # null: SQLite under root

    @model_validator(mode="after")
    def _fits_devices(self) -> Self:
        """Raises ValueError for settings of engines and workers that contradict each other."""
        if self.engine_units > 1 and self.engine_units % 1:
            raise ValueError(
                f"engine_units: expected a part of one, or a whole number of them, got {self.engine_units:g}"
            )
        part = min(self.worker_units, self.engine_units)
        if part < 1 and (self.worker_units != self.engine_units or abs(1 / part - round(1 / part)) > 1e-6):
            raise ValueError(
                f"worker_units and engine_units: parts of one are the same for both, a half, a quarter, a fifth ..., got "
                f"{self.worker_units:g} and {self.engine_units:g}: others leave gaps that nothing fits into"
            )
        if self.worker_units < 1 and self.num_workers > 1:
            raise ValueError(
                f"worker_units: {self.worker_units:g} goes with num_workers 1, got {self.num_workers}: ranks of one finetune "
                "cannot share a device"
            )
        if self.engine_gpu_memory is not None:
            if not self.use_gpu:
                raise ValueError("engine_gpu_memory: goes with `use_gpu`; on CPUs set engine_memory_gib")
            if self.engine_memory_gib is not None:
                raise ValueError("engine_gpu_memory: goes without engine_memory_gib, which sets the KV cache alone")
            if self.engine_gpu_memory > self.engine_units:
                raise ValueError(
                    f"engine_gpu_memory: expected at most engine_units {self.engine_units:g}, its part of a GPU, got "
                    f"{self.engine_gpu_memory:g}"
                )
        if self.address == "local" and (self.unit, self.may_bring) != (None, None):
            raise ValueError("unit and may_bring: go with a cluster that is joined (`address`), not with a local one")
        return self


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
    def _packs_judges_alone(self) -> Self:
        if packed := [model.name for model in self.models if model.quantization is not None]:
            raise ValueError(
                f"models: {packed[0]!r} has `quantization`, which is for models of judges: candidates' weights are swapped into "
                "an engine that runs, and packed ones cannot be"
            )
        for name, model in self.evaluate.judges.models.items():
            if model.quantization is not None and not self.execution.use_gpu:
                raise ValueError(
                    f"evaluate.judges.{name}.quantization: goes with execution.use_gpu, got a sweep on CPUs"
                )
        return self

    @model_validator(mode="after")
    def _searches_on_a_seed_of_its_own(self) -> Self:
        if self.search.seed in self.seeds:
            raise ValueError(f"search.seed: {self.search.seed} is among `seeds`, which are reported; name another one")
        return self
