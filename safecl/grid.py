"""Which recipes a sweep has: `cells(sweep)` are the rows of its tables, a `Job` is a cell with its values set.

What is derived of a job (its graph, its stages, their keys) is made once: `cell.job(...)` gives the same object for the
same values, and the graphs of a sweep share what they have in common.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safecl import methods
from safecl.base import Json
from safecl.config import Method, Model, Sweep, UserTask
from safecl.memo import Shared
from safecl.plan import REFERENCES, Evidence, Graph, Recipe
from safecl.store import Stage, canonical


@dataclass(frozen=True, eq=False)
class Cell:
    """A recipe minus seed and searched values. `space` is None where nothing is searched."""

    recipe: Recipe
    space: dict[str, Json] | None
    shared: Shared = field(repr=False)
    search_seeds: tuple[int, int]  # of a search: its own, and that of the alignment it starts from
    aligned: Cell | None = field(default=None, repr=False)  # same model and task, no finetune; None: this is it
    _jobs: dict[tuple[str, int, str], Job] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell, (self.recipe, self.space, self.shared, self.search_seeds, self.aligned)

    def job(self, params: dict[str, Json], seed: int, role: str) -> Job:
        """The trial with these values; always the same object. `role`: `search` reads validation, `final` test prompts."""
        name = (canonical(params), seed, role)
        if name not in self._jobs:
            self._jobs[name] = Job(self, params, seed, role)
        return self._jobs[name]

    def trial(self, params: dict[str, Json]) -> Job:
        """The searched trial with these values: on a seed that no row reports, so that what the best trial owes to its
        seed is in no table."""
        return self.job(params, self.search_seeds[0], "search")

    @cached_property
    def label(self) -> str:
        """What people call it: `smollm2 / mini / p=0.1 / der`."""
        recipe = self.recipe
        if recipe.method in REFERENCES:
            return f"{recipe.model.name} / {recipe.task.task} / {recipe.method}"
        return f"{recipe.model.name} / {recipe.task.task} / p={recipe.poison_ratio:g} / {recipe.method}"

    @cached_property
    def key(self) -> str:
        """Hash of the recipe minus seed and searched values; names the cell's study and MLflow run."""
        recipe = self.recipe
        open_values = set(self.space or {})
        identity: dict[str, Json] = {
            "model": recipe.model.model_dump(mode="json"),
            "adapter": recipe.adapter,
            "lora": recipe.lora.model_dump(mode="json"),
            "align": recipe.align.model_dump(mode="json"),
            "task": recipe.task.model_dump(mode="json"),
            "poison": {"task": recipe.poison_task, "ratio": recipe.poison_ratio},
            **({"keep_task_rows": True} if recipe.keep_task_rows else {}),
            **({} if recipe.memory_mix == "refusals" else {"memory_mix": recipe.memory_mix}),
            "method": recipe.method,
            "params": {name: value for name, value in recipe.params.items() if name not in open_values},
            "evaluate": recipe.evaluate.model_dump(mode="json", exclude={"unsafe_code"}),
        }
        return hashlib.sha256(canonical(identity).encode()).hexdigest()

    @cached_property
    def defaults(self) -> dict[str, Json]:
        """The method's hyperparameters where nothing is searched: its own defaults under the sweep file's `config`."""
        if self.recipe.method in REFERENCES:
            return {}
        kind = methods.load(self.recipe.method)
        resolved: dict[str, Json] = kind.Config(**self.recipe.params).model_dump(mode="json")
        return resolved


@dataclass(frozen=True, eq=False)
class Job:
    """One trial: a cell with its values set. Made by `Cell.job`."""

    cell: Cell
    params: dict[str, Json]
    seed: int
    role: str

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell.job, (self.cell, self.params, self.seed, self.role)

    @cached_property
    def graph(self) -> Graph:
        recipe = self.cell.recipe
        params = {**recipe.params, **self.params} if self.params else recipe.params
        align_seed = self.cell.search_seeds[1] if self.role == "search" else self.seed
        return Graph(replace(recipe, params=params, seed=self.seed, align_seed=align_seed), self.cell.shared)

    @cached_property
    def evidence(self) -> Evidence:
        """The stages this job needs in the store to count as done."""
        return self.graph.evidence("validation" if self.role == "search" else "test")

    @property
    def aligned(self) -> Job:
        """The aligned reference of a job: same model, task, seed and prompts, no finetune."""
        return (self.cell.aligned or self.cell).job({}, self.seed, self.role)

    @cached_property
    def own(self) -> list[Stage]:
        """The stages that no trial of another configuration needs: what is served, and all that is made of it."""
        final = self.graph.final
        above: dict[str, bool] = {}

        def rests_on_it(stage: Stage) -> bool:
            if stage.key not in above:
                above[stage.key] = stage is final or any(rests_on_it(other) for other in stage.inputs.values())
            return above[stage.key]

        return [stage for stage in self.evidence.metrics.walk() if rests_on_it(stage)]


def cells(sweep: Sweep, folder: Path | None = None) -> list[Cell]:
    """Every row of the sweep's tables, references first per model and task. `folder`: of local data files."""
    grid: list[Cell] = []
    shared = Shared(folder)
    own = sweep.search.seed
    seeds = own, own if sweep.search.realign else sweep.seeds[0]
    for model in sweep.models:
        for task in sweep.tasks:

            def recipe(method: Method, ratio: float, model: Model = model, task: UserTask = task) -> Recipe:
                return Recipe(
                    model, sweep.adapter, sweep.lora, sweep.align, task, sweep.poison.task, ratio, method.name,
                    dict(method.config), sweep.seeds[0], sweep.evaluate, sweep.poison.keep_task_rows, sweep.memory_mix,
                )  # fmt: skip

            aligned = Cell(recipe(Method(name="aligned"), 0.0), None, shared, seeds)
            grid += [Cell(recipe(Method(name="base"), 0.0), None, shared, seeds, aligned), aligned]
            for ratio in sweep.poison.ratios:
                grid += [
                    Cell(recipe(method, ratio), _space(method), shared, seeds, aligned) for method in sweep.methods
                ]
    return grid


def _space(method: Method) -> dict[str, Json] | None:
    if method.search is None or method.search:
        return method.search
    kind = methods.load(method.name)
    return kind.search_space(kind.Config(**method.config))
