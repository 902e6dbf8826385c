"""What a graph is made of: the recipe of one row, and a stage with its version."""

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

REFERENCES = ("base", "aligned")  # rows of every table that have no finetune


@dataclass(frozen=True)
class Recipe:
    """Everything that determines one row's numbers. `method` is a method's name or one of REFERENCES."""

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
    align_seed: int = 0  # of stage one and what is made of it; that of the rest (`seed`), but for some searches
    names: tuple[str, str] = ("", "")  # of method and task in tables, where their own names are not enough; no identity


class Evidence(NamedTuple):
    """What a table row rests on: the metrics stage and every judged set of generations below it."""

    metrics: Stage
    judged: tuple[Stage, ...]

    @property
    def targets(self) -> tuple[Stage, ...]:
        """What must be in the store."""
        return (*self.judged, self.metrics)


# Which fields of a recipe a stage may depend on: those of a sweep and model, with the seed, and with the user's rows.
MODEL = ("model", "adapter", "lora", "align", "poison_task", "evaluate", "memory_mix")
SEED = (*MODEL, "align_seed")
USER = (*SEED, "seed", "task", "poison_ratio", "keep_task_rows")


def make(kind: str, config: dict[str, Json], inputs: dict[str, Stage], *versions: str) -> Stage:
    """A stage of this kind, with the version of its file and of the classes it uses."""
    version = _version(kind, *versions)
    return Stage(kind, config, inputs, version, registry.hints(version))


@cache
def _version(kind: str, *versions: str) -> str:
    own: str = importlib.import_module(f"safecl.stages.{kind}").VERSION
    return "+".join([own, *versions])


def resolved(kind: type[methods.Method] | type[judges.Judge], params: dict[str, Json]) -> dict[str, Json]:
    """A config with its defaults."""
    resolved: dict[str, Json] = kind.Config(**params).model_dump(mode="json")
    return resolved
