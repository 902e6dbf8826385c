"""The recipe of one table row, and how a stage gets its version."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import safecl.judges as judges
import safecl.methods as methods
from safecl import registry
from safecl.base import Json
from safecl.config import Align, Evaluate, Lora, Model, UserTask
from safecl.store import Stage

REFERENCES = ("base", "aligned")  # table rows without a finetune: the base model, and theta_safe


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the numbers of one table row. `method` is a method's name or one of REFERENCES."""

    model: Model
    adapter: str
    lora: Lora
    align: Align
    task: UserTask
    poison_task: str
    poison_ratio: float
    method: str
    params: dict[str, Json]
    seed: int
    evaluate: Evaluate
    keep_task_rows: bool = False
    memory_mix: str = "refusals"
    align_seed: int = 0  # of stage one and stages made from it; equal to `seed`, except in some searches
    names: tuple[str, str] = ("", "")  # labels of method and task in tables; not part of the identity


class Evidence(NamedTuple):
    """The stages behind a table row: the metrics stage, and every judge stage below it."""

    metrics: Stage
    judged: tuple[Stage, ...]

    @property
    def targets(self) -> tuple[Stage, ...]:
        """The stages that must be in the store."""
        return (*self.judged, self.metrics)


# The fields of a recipe that a stage may depend on. MODEL: those of the sweep and the model. SEED: also the seed of
# stage one. USER: also the user rows.
MODEL = ("model", "adapter", "lora", "align", "poison_task", "evaluate", "memory_mix")
SEED = (*MODEL, "align_seed")
USER = (*SEED, "seed", "task", "poison_ratio", "keep_task_rows")


def make(kind: str, config: dict[str, Json], inputs: dict[str, Stage], *versions: str) -> Stage:
    """A stage of this kind. Its version joins the version of its file and those of the classes it uses."""
    version = _version(kind, *versions)
    return Stage(kind, config, inputs, version, registry.hints(version))


@cache
def _version(kind: str, *versions: str) -> str:
    own: str = importlib.import_module(f"safecl.stages.{kind}").VERSION
    return "+".join([own, *versions])


def resolved(kind: type[methods.Method] | type[judges.Judge], params: dict[str, Json]) -> dict[str, Json]:
    """A config with the defaults filled in."""
    resolved: dict[str, Json] = kind.Config(**params).model_dump(mode="json")
    return resolved
