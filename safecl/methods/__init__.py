"""Methods: one file each. A method is plain SFT plus the functions that it overrides. The loop (training/loop.py)
owns accumulation, clipping, schedule, stepping and checkpoints.

The order of calls:

    requires, rows      once, in the driver and in the data path; they must not import torch
    prepare             on every worker, once, before the first step
    before_step         once per optimizer step
    loss                once per micro-batch
    after_backward      once per optimizer step; the whole gradient, summed over ranks, can be read and written
    after_step          once per optimizer step

A post-hoc method trains nothing. `trains_as` names the method whose adapter it takes. `read` is given the inputs that
`requires` asked for. Then `finalize` makes the final weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from safecl import registry
from safecl.base import ConfigError, Json, Strict
from safecl.tasks import Row

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.config import Model, Template
    from safecl.sizes import Size
    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.given import Given
    from safecl.training.run import Run
    from safecl.training.weights import Dense, LoRA, Weights


MEMORY_SIZE = 250  # default number of safety rows that a method keeps: the paper's m, 5 % of its 5,000 user rows


class Needs(Protocol):
    """The parts of an experiment that a method may build its own stages from. `graph.Graph` implements it for a
    sweep, `Asked` without one."""

    @property
    def base(self) -> Stage: ...  # the base model
    @property
    def tokenizer(self) -> Stage: ...
    @property
    def theta_safe(self) -> Stage | None: ...  # None: the base model itself is aligned
    @property
    def safety_rows(self) -> Stage: ...  # of stage one
    @property
    def user_rows(self) -> Stage: ...  # task and poison
    @property
    def held_out(self) -> dict[str, Stage]: ...  # inputs `exclude_*`: rows made here must not resemble these prompts

    def memory(self, num_rows: int, positions: str | None = None) -> Stage:
        """A stage with `num_rows` of the safety rows. With `positions` it also holds theta_safe's hidden states
        there."""

    def fisher(self, num_rows: int, labels: str) -> Stage:
        """The diagonal Fisher information of theta_safe's adapter on safety rows; ConfigError for a fresh adapter."""

    def teacher(self, positions: str) -> Stage:
        """theta_safe's hidden states on the user rows."""

    def generate(self, final: Stage | None, rows: Stage, max_new_tokens: int, **more: Json) -> Stage:
        """A model's answers to the prompts of `rows`. `more` may hold `sampling` and another `template`."""

    def verdicts(self, inputs: dict[str, Stage]) -> Stage:
        """Verdicts of the sweep's judge of harm on `generations` to `rows`; without `generations`, on the rows' own
        answers."""

    def step(self, kind: str, config: dict[str, Json], inputs: dict[str, Stage]) -> Stage:
        """A stage of the kind `kind` (a file of safecl/stages)."""

    def model(self, model: Model) -> Stage:
        """The stage of another model."""

    def once(self, make: Callable[[Needs, Any], Stage], config: Any) -> Stage:
        """`make(needs, config)`, made once for all recipes with the same stage one. It may depend on stage one only."""

    @property
    def seed(self) -> int: ...  # of stage one and of every stage made from it
    @property
    def template(self) -> Template: ...
    @property
    def max_new_tokens(self) -> int: ...  # longest answer to attack and benign prompts, in tokens
    @property
    def fits(self) -> dict[str, Json]: ...  # setting with which a stage leaves out rows too long for training


class Contract(NamedTuple):
    """What the tests of safecl.testing must know about a method."""

    # Settings at which runs that differ only by rounding stay close. (Where an element's gradient is only a rounding
    # error, Adam's first step still moves it as far as every other element.) They fit 12 memory rows and 7 steps of 5
    # rows.
    params: Mapping[str, Json] = {}
    variants: tuple[Mapping[str, Json], ...] = ()  # settings with a default search space of their own
    zero_at_start: tuple[str, ...] = ()  # logged figures that are 0 at theta_safe and grow from there
    in_bfloat16: bool = False  # whether ranks and engines are compared in bfloat16 too


class Method:
    """A method. The defaults are SFT: cross-entropy on the user rows."""

    class Config(Strict):
        """Hyperparameters. Each method has its own class in place of this one."""

    MUST: ClassVar[tuple[str, ...]] = ("equation",)  # what every method declares
    VERSION: ClassVar[str] = "1"
    source: ClassVar[str] = ""  # paper or code, in a few words; the module's docstring gives it in full
    equation: ClassVar[str] = ""
    cost: ClassVar[str] = "1x"  # time of a finetune relative to SFT
    trains_as: ClassVar[str | None] = None  # post-hoc methods: "sft", then finalize only
    contract: ClassVar[Contract] = Contract()
    space: ClassVar[dict[str, Json]] = {}  # default search space at the default config, in the sweep file's form
    # Name of the hyperparameter that says how many safety rows the method keeps, if it has one. `--limit` lowers it.
    memory_key: ClassVar[str] = "memory_size"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs_base(self) -> bool:
        """Whether `finalize` works on what the alignment changed, theta_safe - theta_0. With `align: none` this
        change is known only if the model names its base (`aligned_from`). A method that does not need it is given
        zero."""
        return True

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer that the method's own stages generate; 0 if they generate none."""
        return 0

    # The cost of a step, for estimates of time and of the memory of a forward. In one pass rows go through the model
    # forward and backward.

    @property
    def passes(self) -> float:
        """How many times the user rows of a step pass through the model."""
        return 1.0

    @property
    def draws(self) -> float:
        """How many times a step draws memory rows (`run.draw`); 1 by default if the config has `memory_batch_size`."""
        return 1.0 if hasattr(self.config, "memory_batch_size") else 0.0

    def draw_size(self, batch_size: int) -> int:
        """Rows of one draw over all ranks: the config's `memory_batch_size`, or as many as user rows."""
        return getattr(self.config, "memory_batch_size", None) or batch_size

    def num_trained(self, user: int, kept: int) -> int:
        """How many rows `rows` returns for `user` user rows and `kept` memory rows."""
        return user

    def looks(self, size: Size) -> float:
        """Post-hoc: number of rows that a model of this size reads in `finalize`. A row that is read twice counts
        twice."""
        return 0.0

    def check_steps(self, num_steps: int) -> None:
        """Raise ConfigError if `num_steps` optimizer steps are too few for this config."""

    def requires(self, needs: Needs) -> dict[str, Stage]:
        """Inputs beyond theta_safe and the user rows, by name. Build them with `needs.memory(...)` and the like."""
        return {}

    def rows(self, user: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
        """The rows to train on, made from the user rows and the memory rows."""
        return list(user)

    def prepare(self, run: Run) -> None:
        """Called once on every worker, before the first step."""

    def before_step(self, run: Run, batch: Batch) -> None:
        """Called before the first backward of an optimizer step. `batch` is this rank's part of the global batch."""

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Loss of a micro-batch (scalar), divided by the global batch's count; gradients add up over micro-batches."""
        return run.cross_entropy(batch)

    def after_backward(self, run: Run, batch: Batch) -> None:
        """Called after the last backward of an optimizer step, before clipping."""

    def after_step(self, run: Run) -> None:
        """Called after the optimizer has updated the parameters."""

    def read(self, given: Given) -> None:
        """Post-hoc: called once before `finalize`, with the rows and models that `requires` asked for."""

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        """Post-hoc: yield (module name, final delta from the base), module by module. `safe` and `tuned` are the
        deltas of theta_safe and of the tuned adapter, both from the base. Write figures worth reporting into `log`."""
        raise NotImplementedError(f"{type(self).__name__} is no post-hoc method")

    @classmethod
    def search_space(cls, config: Any) -> dict[str, Json]:
        """The default search space for the fixed settings in `config`, without hyperparameters that have no effect
        there."""
        return cls.space

    @classmethod
    def neutral(cls) -> Strict | None:
        """Settings with which the method equals SFT bit for bit (a test checks it); None if there are none."""
        return None


def names() -> tuple[str, ...]:
    """Names of all methods, sorted, without importing any."""
    return registry.names("methods")


def load(name: str) -> type[Method]:
    """The method class called `name` (`der` -> `safecl/methods/der.py`, class `Der`)."""
    return registry.load("methods", name)


def of_stage(config: Mapping[str, Any]) -> Method:
    """The method of a finetune or merge stage, by the stage's config. Plain `Method` (the values of SFT) if this
    process does not know the method: for example a record of another sweep's plugin, or settings that the method no
    longer has."""
    from pydantic import ValidationError

    try:
        kind = load(config["method"])
        return kind(kind.Config(**config["params"]))
    except (ConfigError, ValidationError):
        return Method(Strict())


def needed(kind: type[Method], adapter: str = "continue") -> dict[str, str]:
    """The inputs that a method asks for at its defaults: {name: kind}, with kinds such as `memory` and `fisher`.

    Raises:
        ConfigError: the method cannot work with this kind of adapter.
    """
    return {name: stage.kind for name, stage in kind(kind.Config()).requires(Asked(adapter)).items()}


class Asked:
    """A `Needs` without a sweep: every stage has a kind and no content."""

    def __init__(self, adapter: str = "continue") -> None:
        from safecl.config import Template

        self.adapter = adapter
        self.seed, self.max_new_tokens, self.template = 0, 1, Template()
        self.base, self.tokenizer, self.safety_rows, self.user_rows = map(
            _named, ("model", "tokenizer", "data", "data")
        )
        self.theta_safe: Stage | None = _named("finetune")
        self.held_out: dict[str, Stage] = {}
        self.fits: dict[str, Json] = {}

    def memory(self, num_rows: int, positions: str | None = None) -> Stage:
        return _named("memory")

    def fisher(self, num_rows: int, labels: str) -> Stage:
        if self.adapter == "stack":
            raise ConfigError("the Fisher information of a fresh adapter's A is zero")
        return _named("fisher")

    def teacher(self, positions: str) -> Stage:
        return _named("teacher")

    def generate(self, final: Stage | None, rows: Stage, max_new_tokens: int, **more: Json) -> Stage:
        return _named("generate")

    def verdicts(self, inputs: dict[str, Stage]) -> Stage:
        return _named("verdicts")

    def step(self, kind: str, config: dict[str, Json], inputs: dict[str, Stage]) -> Stage:
        return _named(kind)

    def model(self, model: Model) -> Stage:
        return _named("model")

    def once(self, make: Callable[[Needs, Any], Stage], config: Any) -> Stage:
        return make(self, config)


def _named(kind: str) -> Stage:
    from safecl.store import Stage

    return Stage(kind, {})
