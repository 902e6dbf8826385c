"""The schema of a sweep file: every key with its type, its default and its trade-off. Imports no heavy library.

Keys that determine a result (`models` ... `evaluate`, `search`) are kept apart from keys that say where and how fast
it is computed (`execution`). `execution` is never part of a stage's identity.
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
    """A method of the sweep: one row of its tables. `config` fixes hyperparameters. `search` gives hyperparameters to
    search (`{}`: the method's default space): a list is a choice, `{low, high, log}` a range (of whole numbers if the
    hyperparameter is one), `{low, high, step}` a range of whole numbers. `grid` makes one row for each combination of
    its lists' values. A whole number may be given as a percentage of the task's rows: `5%`.

    Example:
        {name: der, label: DER, config: {memory_size: 5%}, grid: {weight: [0.3, 1.0, 3.0]}}     three rows
        sft                                                                        short for {name: sft}
    """

    name: str
    config: dict[str, Json] = {}
    search: dict[str, Json] | None = None
    grid: dict[str, Annotated[tuple[Json, ...], Field(min_length=1)]] = later({})
    # Name in tables; null: the method's name, followed by its settings where two entries share one method.
    label: Annotated[str, Field(pattern=r"^[^/\n]+$")] | None = later(None)


class _OrName:
    """Accepts a name alone in place of an entry without settings."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        named = core_schema.no_info_after_validator_function(lambda name: source(name=name), core_schema.str_schema())
        tagged = {"name": named, "entry": handler(source)}
        return core_schema.tagged_union_schema(tagged, lambda given: "name" if isinstance(given, str) else "entry")


class Align(Training):
    """Stage one: SFT of the base model on safety rows gives theta_safe.

    Use `train: false` if the model is aligned already. The model itself is then theta_safe: stage one trains nothing,
    and stage two trains a fresh adapter on it. `align: none` is short for `align: {train: false}`. With `train:
    false`, methods with a memory draw from the rows of `safety` (answers cut to `max_tokens`). Or `safety_from` names
    a method that makes such rows with the model itself.

    `method` is the method of stage one, by default plain SFT. It must need no theta_safe, such as `sam`.

    Example:
        align: {safety: [{task: mini, num_rows: 600}], method: {name: sam, config: {rho: 0.1}}}
        align: {train: false, safety: [{task: safety_tuned, num_rows: 500}]}
        align: {train: false, safety_from: {name: grsap, config: {num_rows: 250}}}
    """

    train: bool = later(True)
    safety: tuple[Rows, ...] = ()
    # Benign requests that the base model itself answers. Use it if the safety rows have no benign requests: such rows
    # teach over-refusal.
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
    """Accepts `none` in place of `{train: false}`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        given = core_schema.literal_schema(["none"])
        made = core_schema.no_info_after_validator_function(lambda _: Align(train=False), given)
        return core_schema.union_schema([handler(source), made])


class UtilityRows(Strict):
    """Number of utility prompts of one task, per split; null: as in `evaluate`."""

    validation: Count | None = None
    test: Count | None = None


class UserTask(Training):
    """Stage two: the task that the user fine-tunes on. `utility_rows`: number of utility prompts of this task, if
    other than in `evaluate`. `template`: the text around a request in this task's rows, if other than the model's."""

    task: str
    num_rows: Count | None = 5000
    utility_rows: UtilityRows | None = later(None)
    template: Around = later(None)


class Poison(Strict):
    """`floor(ratio * N)` of the N user rows are replaced by harmful ones, so the total stays N. With `keep_task_rows`
    the harmful rows are added to all N user rows instead: a poisoned model then sees as many task rows as a clean
    one, in more steps."""

    task: str
    ratios: tuple[Fraction, ...] = (0.0, 0.1)
    keep_task_rows: bool = False


class Some(Strict):
    """Some rows of the whole grid, by the names of models and tasks, by poison ratios, and by methods (by their
    labels, if they have them). A key that is left out selects all."""

    models: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    ratios: tuple[Fraction, ...] | None = None
    methods: tuple[str, ...] | None = None


class Standing(Some):
    """Which rows go first when devices are short. Rows of a higher `priority` go before all others. Among rows of one
    priority, every row's first trial goes before any row's second one, and a row with `share: 2` gets two trials for
    each trial of a row with `share: 1`."""

    priority: Annotated[int, Field(ge=-9, le=9)] = 0
    share: Annotated[float, Field(gt=0)] = 1.0


class Prompts(Strict):
    """The evaluation prompts of one split."""

    attack: Annotated[tuple[Rows, ...], Field(min_length=1)]
    # benign prompts that look harmful, to measure over-refusal
    benign: Annotated[tuple[Rows, ...], Field(min_length=1)]
    utility_rows: Count | None = None  # number of utility prompts of the cell's own task; null: all


class Evaluate(Strict):
    """What is measured. The search reads `validation` only; the tables read `test` only."""

    validation: Prompts
    test: Prompts
    judges: Judges
    metrics: tuple[str, ...] = later(())  # metrics beyond those that are always measured (metrics.py)
    max_new_tokens: Count = 128  # longest answer to attack and benign prompts; a utility task sets its own
    max_prompt_tokens: Count = 1024  # a longer prompt loses the beginning of its request, never its template
    # The text around every request at evaluation, if other than the model's: for example a safety prompt that training
    # did not use (PTST, arXiv 2402.18540). It applies to all rows, base and aligned too.
    template: Around = later(None)
    # Consent to run programs that a model wrote (task `code`) with only rlimits, if this machine cannot isolate them.
    unsafe_code: bool = False


class Objective(Strict):
    """Maximise `maximise` within bounds. The bound `safe + x` is theta_safe's own value on the same prompts, plus x."""

    maximise: str = "utility"
    bounds: dict[str, str | float] = {"asr": "safe + 0.05", "over_refusal": "safe + 0.10", "degenerate": 0.05}
    # Several objectives, with `maximise` among them; each is improved towards its better end. TPE then looks for the
    # Pareto front within the bounds: trials for which no other trial is better in one objective and at least as good in
    # the rest.
    pareto: tuple[str, ...] = later(())
    # Which trials of the front run on the reported seeds. bounds: the one with the largest `maximise`, as without a
    # front; nearest: the one with the least distance to perfect values (Euclidean, fractions not rescaled); front: all,
    # one row each.
    choose: Literal["bounds", "nearest", "front"] = later("bounds")


class Search(Strict):
    """The search of each cell: one Optuna study. Trial 0 has the default values. Every method gets the same number of
    trials."""

    trials: Count = 20
    # The seed of every trial; no reported row uses it. If trials used a reported seed, the values chosen for that
    # seed's luck would be reported with it.
    seed: int = 1000
    # false: trials start from the alignment of the first reported seed. This saves one alignment per model, but values
    # chosen to fit that alignment are then reported on it too.
    realign: bool = True
    # `grid`: every combination of values; everything searched must then be a list, and `trials` is not used.
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    # Trials of one study that run at the same time. With n of them the study waits n times less. With `tpe` they are
    # suggested in batches, without the results of the other trials in the batch. The choice is then somewhat worse
    # (docs/search.md has measurements).
    at_once: Count = 1
    # End trials early that cannot be chosen: attack prompts are answered first, then utility prompts, then the rest.
    # bounds: a trial that breaks a bound, or is no better than the best trial of earlier batches that met all bounds
    # (this never loses the best trial); wilcoxon: also a trial whose answers to a fourth of the utility prompts are
    # worse than that trial's, by a Wilcoxon test at 5 %.
    prune: Literal["none", "bounds", "wilcoxon"] = "none"
    objective: Objective = Objective()


class Execution(Strict):
    """Where and how fast results are computed. Never part of a stage's identity: no key here can change which results
    exist."""

    root: Place = "runs"  # folder (or fsspec URL that every node can reach) of store, study, tracking and logs
    # GiB of each node's cache, if root is a URL; null: half of its disk
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    data_dir: Place | None = None  # folder of local data files; null: load them from the Hugging Face hub
    address: str = "local"  # Ray: "local" starts its own cluster, "auto" joins a running one
    num_trials_at_once: Count = 3  # most trials that run at the same time, over all cells
    turns: tuple[Standing, ...] = later(())  # whose trials go first; if several entries name a row, the last one counts
    num_workers: Count = 1  # data-parallel ranks of one finetune
    # Training engine. auto: DeepSpeed with several workers, plain PyTorch with one, where there is nothing to shard.
    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    zero: Literal[0, 1, 2, 3] = 1  # ZeRO stage of DeepSpeed
    micro_batch_size: Count = 8  # most rows per forward on one worker; fewer if they do not fit in memory
    # Compute layers again in the backward instead of keeping their states: a third slower, with a fraction of the
    # memory. auto: on if the memory estimate says that it is needed.
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 60.0  # seconds between checkpoints of a finetune
    max_failures: Annotated[int, Field(ge=0)] = 2  # restarts of a finetune whose worker died
    # Most engines of one candidate model at the same time. An engine starts when it has work and a device is free.
    # Trainers and engines take turns on the devices, so any number of models can share one GPU.
    num_candidate_engines: Count = 1
    # Most engines of one judge's model at the same time. 0: judges use, in turn, the engines of candidates with the
    # same base, which saves the memory and the start of an engine.
    num_judge_replicas: Annotated[int, Field(ge=0)] = 1
    # seconds that a trainer or an engine keeps its device while another waits
    turn_s: Annotated[float, Field(ge=1)] = 600.0
    # Ray's name of the resource that trainers and engines hold; null: GPU with `use_gpu`, else CPU
    unit: str | None = None
    # units that autoscaling may add; null: what the autoscaler says
    may_bring: Annotated[int, Field(ge=0)] | None = None
    # units of one training rank; below 1 ranks of several finetunes share a device
    worker_units: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Units of one engine: a part of a device, or several devices of one node (the engine is then tensor-parallel).
    engine_units: Annotated[float, Field(gt=0)] = 1.0
    # KV cache of one engine on each of its GPUs, in GiB. null: with `use_gpu` what `engine_gpu_memory` leaves, else 1
    # GiB.
    engine_memory_gib: Annotated[float, Field(gt=0)] | None = None
    # Fraction of a GPU's memory that one engine uses. null: .9 times `engine_units`, at most .9.
    engine_gpu_memory: Annotated[float, Field(gt=0, lt=1)] | None = None
    engine_max_seqs: Count | None = None  # requests decoded together; null: 256 on a GPU, 64 on a CPU
    engine_max_tokens: Count = 2048  # prompt + answer, in tokens; checked to be enough for `evaluate`
    # Make answers the same bit for bit whatever else is decoded at the same time. On a CPU this decodes one request
    # after another.
    batch_invariant: bool = False
    use_gpu: bool = False  # true: trainers and engines run on GPUs; false: on CPUs
    # price of a GPU-hour (without use_gpu: of a CPU-hour); `status` adds up the cost
    device_price: Annotated[float, Field(ge=0)] | None = None
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
    """Published numbers that a report prints beside this sweep's (see report/published.py). `models` maps the name of
    a model in this sweep to its name in the file."""

    file: Place  # from the folder of the sweep file
    models: dict[str, str] = {}


class Sweep(Strict):
    """A whole sweep file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    about: str = ""
    published: PublishedNumbers | None = None
    # Python files with your own methods, tasks or judges, relative to this file. Their content is part of the identity
    # of everything that uses them. They run with your permissions, like any program that you start.
    plugins: tuple[Place, ...] = ()
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    # continue: stage two trains theta_safe's adapter further; stack: it folds that adapter into the base and trains a
    # fresh one on top. The paper does not say which it did; every report prints it.
    adapter: Literal["continue", "stack"] = "continue"
    lora: Lora = Lora()
    data: tuple[Data, ...] = ()  # your own tasks
    align: Annotated[Align, _OrNone()]
    # The safety rows that a method's memory is drawn from: refusals only, or every kind (each source's harmful and
    # benign requests) in proportion. The method sets the memory's size (`memory_size`).
    memory_mix: Literal["refusals", "stratified"] = "refusals"
    tasks: Annotated[tuple[UserTask, ...], Field(min_length=1)]
    poison: Poison
    methods: Annotated[tuple[Annotated[Method, _OrName()], ...], Field(min_length=1)]
    # Run only the rows that one of these entries selects, in place of every model x task x ratio x method.
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
        object.__setattr__(self, "adapter", "stack")  # the name for a fresh adapter on theta_safe; the config is frozen
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
