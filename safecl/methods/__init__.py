"""Methods: one file each. A method is plain SFT plus what it overrides; the loop (training/loop.py) owns accumulation,
clipping, schedule, stepping and checkpoints.

Life of a method: `requires` and `rows` declare (in the driver and the data path, no torch); then on every worker
`prepare` once, and per optimizer step `before_step`, per micro-batch `loss`, `after_backward` when whole averaged
gradients are readable and writable, and `after_step`. Post-hoc methods train nothing: `trains_as` names the method whose
adapter they take, and `finalize` maps its weights, after `read` has been given what `requires` asked for.
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


MEMORY_SIZE = 250  # safety rows that a method keeps unless told otherwise: the paper's m, 5 % of its 5,000 user rows


class Needs(Protocol):
    """What a method may be built of: the experiment below it. `graph.Graph` is one, `Asked` another."""

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
    def held_out(self) -> dict[str, Stage]: ...  # inputs `exclude_*`: prompts that no row made here may be like

    def memory(self, num_rows: int, positions: str | None = None) -> Stage:
        """So many of the safety rows; with `positions`, theta_safe's hidden states there."""

    def fisher(self, num_rows: int, labels: str) -> Stage:
        """How much safety depends on each factor of theta_safe's adapter; ConfigError where that is fresh."""

    def teacher(self, positions: str) -> Stage:
        """theta_safe's hidden states on the user rows."""

    def generate(self, final: Stage | None, rows: Stage, max_new_tokens: int, **more: Json) -> Stage:
        """A model's answers to rows' prompts; `more`: `sampling`, another `template`."""

    def verdicts(self, inputs: dict[str, Stage]) -> Stage:
        """What the sweep's judge of harm says of `generations` to `rows`, or without them of the rows' own answers."""

    def step(self, kind: str, config: dict[str, Json], inputs: dict[str, Stage]) -> Stage:
        """A stage of this kind (a file of safecl/stages)."""

    def model(self, model: Model) -> Stage:
        """Another model."""

    def once(self, make: Callable[[Needs, Any], Stage], config: Any) -> Stage:
        """`make(needs, config)`, made once for all recipes with one stage one, on which alone it may depend."""

    @property
    def seed(self) -> int: ...  # of stage one and what is made of it
    @property
    def template(self) -> Template: ...
    @property
    def max_new_tokens(self) -> int: ...  # of answers to attack and benign prompts
    @property
    def fits(self) -> dict[str, Json]: ...  # the setting of a stage that leaves out rows too long to be trained on


class Contract(NamedTuple):
    """What the contract (safecl.testing) must know of a method."""

    # Settings at which runs that differ by rounding alone stay close: where an element's gradient is rounding and nothing
    # else, Adam's first step moves it as far as all others. They fit 12 memory rows and 7 steps of 5 rows.
    params: Mapping[str, Json] = {}
    variants: tuple[Mapping[str, Json], ...] = ()  # settings with a default search space of their own
    zero_at_start: tuple[str, ...] = ()  # figures it logs that are 0 at theta_safe and grow from there
    in_bfloat16: bool = False  # whether ranks and engines are compared in bfloat16 too


class Method:
    """Defaults are SFT: cross-entropy on the user rows."""

    class Config(Strict):
        """Hyperparameters; subclasses replace it."""

    MUST: ClassVar[tuple[str, ...]] = ("equation",)  # what every method declares
    VERSION: ClassVar[str] = "1"
    source: ClassVar[str] = ""  # paper or code, in a few words; the module's docstring has it whole
    equation: ClassVar[str] = ""
    cost: ClassVar[str] = "1x"  # time of a finetune relative to SFT
    trains_as: ClassVar[str | None] = None  # post-hoc methods: "sft", then finalize only
    contract: ClassVar[Contract] = Contract()
    space: ClassVar[dict[str, Json]] = {}  # default search space at the default config, in the sweep file's form
    # The hyperparameter that says how many safety rows it keeps, where it has such a one: `--limit` cuts it.
    memory_key: ClassVar[str] = "memory_size"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs_base(self) -> bool:
        """Whether `finalize` works on what the alignment changed, theta_safe - theta_0. With `align: none` that is known only
        where the model names its base (`aligned_from`); a method that does without gets zero for it."""
        return True

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer that its own stages ask of a model; 0 where they ask for none."""
        return 0

    # What it costs beside the user rows of a step, for estimates and for what a forward must hold. Rows pass through the model
    # forward and back.

    @property
    def passes(self) -> float:
        """Passes of the user rows of a step."""
        return 1.0

    @property
    def draws(self) -> float:
        """Draws of memory rows in a step (`run.draw`); one, where the config says how large a draw is."""
        return 1.0 if hasattr(self.config, "memory_batch_size") else 0.0

    def draw_size(self, batch_size: int) -> int:
        """Rows of a draw, over all ranks: the config's `memory_batch_size`, else as many as user rows."""
        return getattr(self.config, "memory_batch_size", None) or batch_size

    def num_trained(self, user: int, kept: int) -> int:
        """How many rows `rows` makes of so many user rows and rows of its memory."""
        return user

    def looks(self, size: Size) -> float:
        """Post-hoc: rows that a model of this size is given, once for each time."""
        return 0.0

    def check_steps(self, num_steps: int) -> None:
        """Raise ConfigError where a finetune of so many optimizer steps is too short for this config."""

    def requires(self, needs: Needs) -> dict[str, Stage]:
        """Declare: inputs beyond theta_safe and the user rows, by name, built with `needs.memory(...)` and the like."""
        return {}

    def rows(self, user: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
        """Declare: what is trained on."""
        return list(user)

    def prepare(self, run: Run) -> None:
        """Once, on every worker, before the first step."""

    def before_step(self, run: Run, batch: Batch) -> None:
        """Before the first backward of an optimizer step; `batch` is this rank's share of the global batch."""

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Loss of a micro-batch, normalised over the global batch (scalar; gradients add up over micro-batches)."""
        return run.cross_entropy(batch)

    def after_backward(self, run: Run, batch: Batch) -> None:
        """After the last backward of an optimizer step, before clipping."""

    def after_step(self, run: Run) -> None:
        """After the optimizer's step: the parameters are new."""

    def read(self, given: Given) -> None:
        """Post-hoc: once before `finalize`, with the rows and models that `requires` asked for."""

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        """Post-hoc: the final deltas from the base, module by module, from those of theta_safe and of the tuned adapter
        (both from the base). Figures worth reporting go into `log`."""
        raise NotImplementedError(f"{type(self).__name__} is no post-hoc method")

    @classmethod
    def search_space(cls, config: Any) -> dict[str, Json]:
        """The default search space under what a sweep file fixes: what has no effect there is not searched."""
        return cls.space

    @classmethod
    def neutral(cls) -> Strict | None:
        """The setting under which this IS SFT, held bit for bit by a test; None where there is none."""
        return None


def names() -> tuple[str, ...]:
    """Names of all methods, sorted, without importing any."""
    return registry.names("methods")


def load(name: str) -> type[Method]:
    """The method class called `name` (`der` -> `safecl/methods/der.py`, class `Der`)."""
    return registry.load("methods", name)


def of_stage(config: Mapping[str, Any]) -> Method:
    """The method of a finetune or merge as its stage has it. Of one that this process does not know (a record of another
    sweep's plugin, or of other settings than the method has now) what SFT says holds."""
    from pydantic import ValidationError

    try:
        kind = load(config["method"])
        return kind(kind.Config(**config["params"]))
    except (ConfigError, ValidationError):
        return Method(Strict())


def needed(kind: type[Method], adapter: str = "continue") -> dict[str, str]:
    """What a method at its defaults asks for: the inputs it names, each with what it is (`memory`, `fisher`, ...).

    Raises:
        ConfigError: it cannot do its work with this kind of adapter.
    """
    return {name: stage.kind for name, stage in kind(kind.Config()).requires(Asked(adapter)).items()}


class Asked:
    """A `Needs` that knows no sweep: every stage is a name without content."""

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
