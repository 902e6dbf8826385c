"""Methods: one file each. A method is plain SFT plus what it overrides; the loop (training/loop.py) owns accumulation,
clipping, schedule, stepping and checkpoints.

Life of a method: `requires` and `rows` declare (in the driver and the data path, no torch); then on every worker
`prepare` once, and per optimizer step `before_step`, per micro-batch `loss`, `after_backward` when whole averaged
gradients are readable and writable, and `after_step`. Post-hoc methods train nothing: `trains_as` names the method whose
adapter they take, and `finalize` maps its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from safecl import registry
from safecl.base import Json, Strict
from safecl.tasks import Row

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.plan import Graph
    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run
    from safecl.training.weights import Dense, LoRA, Weights


MEMORY_SIZE = 250  # safety rows that a method keeps unless told otherwise: the paper's m, 5 % of its 5,000 user rows


class Method:
    """Defaults are SFT: cross-entropy on the user rows."""

    class Config(Strict):
        """Hyperparameters; subclasses replace it."""

    MUST: ClassVar[tuple[str, ...]] = ("equation",)  # what every method declares
    VERSION: ClassVar[str] = "1"
    equation: ClassVar[str] = ""
    cost: ClassVar[str] = "1x"  # time of a finetune relative to SFT
    trains_as: ClassVar[str | None] = None  # post-hoc methods: "sft", then finalize only
    space: ClassVar[dict[str, Json]] = {}  # default search space at the default config, in the sweep file's form

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs_base(self) -> bool:
        """Whether `finalize` works on what the alignment changed, theta_safe - theta_0. With `align: none` that is known only
        where the model names its base (`aligned_from`); a method that does without gets zero for it."""
        return True

    def check_steps(self, num_steps: int) -> None:
        """Raise ConfigError where a finetune of so many optimizer steps is too short for this config."""

    def requires(self, graph: Graph) -> dict[str, Stage]:
        """Declare: inputs beyond theta_safe and the user rows, by name, built with `graph.memory(...)` and the like."""
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
