"""The recipes of a sweep. `cells(sweep)` gives the rows of its tables. A `Job` is a cell with its searched values and seed set.

What is derived from a job (its graph, its stages, their keys) is made once: `cell.job(...)` returns the same object for the
same values, and the graphs of a sweep share their common stages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, get_args

from safecl import methods
from safecl.base import ConfigError, Json, Strict
from safecl.config import Evaluate, Method, Model, Some, Standing, Sweep, UserTask
from safecl.graph import REFERENCES, Evidence, Graph, Recipe
from safecl.memo import Shared
from safecl.store import SharedConfig, Stage, canonical
from safecl.tasks._source import sha256

# A searched trial that may be pruned goes by steps, the cheap and decisive ones first (`search.prune`). For each step: the
# role of its job, and the roles of its prompts. The pilot's prompts are some of the utility step's, which asks them again.
STEPS: dict[str, tuple[str, ...]] = {
    "search: attack": ("attack",),
    "search: pilot": ("utility",),
    "search: utility": ("attack", "utility"),
}
_PRUNED = {"none": [], "bounds": ["search: attack", "search: utility"], "wilcoxon": list(STEPS)}
_USUAL = Standing()  # of a cell that no entry of `execution.turns` names
PILOT = 4  # the pilot asks one of so many utility prompts


@dataclass(frozen=True, eq=False)
class Cell:
    """A recipe without seed and searched values: one row of the tables. `space` is None if nothing is searched."""

    recipe: Recipe
    space: dict[str, Json] | None
    shared: Shared = field(repr=False)
    search_seeds: tuple[int, int]  # of a search: the seed of its trials, and the seed of the alignment they start from
    aligned: Cell | None = field(default=None, repr=False)  # the aligned reference; None: this cell is it
    num_trials: int = 0  # trials of the search
    at_once: int = 1  # trials of the search that run at once
    _jobs: dict[tuple[str, int, str], Job] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell, (
            self.recipe,
            self.space,
            self.shared,
            self.search_seeds,
            self.aligned,
            self.num_trials,
            self.at_once,
        )

    def job(self, params: dict[str, Json], seed: int, role: str) -> Job:
        """Return the trial with these values; the same object for the same values.

        `role`: `final` uses test prompts; `search` and each role of STEPS use validation prompts.
        """
        name = (canonical(params), seed, role)
        if name not in self._jobs:
            self._jobs[name] = Job(self, params, seed, role)
        return self._jobs[name]

    def trial(self, params: dict[str, Json], role: str = "search") -> Job:
        """Return the searched trial with these values.

        It runs on the search's own seed, which no row of a table reports. So the luck of the best trial's seed is in no table.
        """
        return self.job(params, self.search_seeds[0], role)

    @cached_property
    def label(self) -> str:
        """The cell's name, as in `smollm2 / mini / p=0.1 / der`."""
        recipe = self.recipe
        if recipe.method in REFERENCES:
            return f"{recipe.model.name} / {self.task} / {recipe.method}"
        return f"{recipe.model.name} / {self.task} / p={recipe.poison_ratio:g} / {self.method}"

    @property
    def method(self) -> str:
        """The method's name, with the settings in which it differs from other entries of the same name."""
        return self.recipe.names[0] or self.recipe.method

    @property
    def task(self) -> str:
        """The task's name, with the settings in which it differs from other entries of the same name."""
        return self.recipe.names[1] or self.recipe.task.task

    @cached_property
    def key(self) -> str:
        """Hash of the recipe without seed and searched values. It tells the cells of a sweep apart."""
        recipe, evaluate = self.recipe, self.recipe.evaluate
        open_values = set(self.space or {})
        asked = self.shared.once("cell", evaluate, lambda: _asked(evaluate))
        identity: dict[str, Json] = {
            "model": self._plain(recipe.model),
            "adapter": recipe.adapter,
            "lora": self._plain(recipe.lora),
            "align": self._plain(recipe.align),
            "task": self._plain(recipe.task),
            "poison": {"task": recipe.poison_task, "ratio": recipe.poison_ratio},
            **({"keep_task_rows": True} if recipe.keep_task_rows else {}),
            **({} if recipe.memory_mix == "refusals" else {"memory_mix": recipe.memory_mix}),
            "method": recipe.method,
            "params": {name: value for name, value in recipe.params.items() if name not in open_values},
            "evaluate": asked,
        }
        return hashlib.sha256(canonical(identity).encode()).hexdigest()

    def _plain(self, config: Strict) -> SharedConfig:
        """A config as JSON, made once for all cells that share it."""
        return self.shared.once("cell", config, lambda: SharedConfig(config.model_dump(mode="json")))

    @property
    def memory_key(self) -> str:
        """Name of the hyperparameter that sets how many safety rows the method keeps; as the method's class names it."""
        return methods.load(self.recipe.method).memory_key

    @cached_property
    def defaults(self) -> dict[str, Json]:
        """The method's hyperparameters if nothing is searched: the sweep file's `config`, and the method's defaults for the
        rest. Empty for references."""
        if self.recipe.method in REFERENCES:
            return {}
        kind = methods.load(self.recipe.method)
        resolved: dict[str, Json] = kind.Config(**self.recipe.params).model_dump(mode="json")
        return resolved


@dataclass(frozen=True, eq=False)
class Job:
    """One trial: a cell with its searched values and seed set. Made by `Cell.job`."""

    cell: Cell
    params: dict[str, Json]
    seed: int
    role: str

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell.job, (self.cell, self.params, self.seed, self.role)

    @cached_property
    def graph(self) -> Graph:
        """The stages of this trial and how they depend on each other."""
        recipe = self.cell.recipe
        params = {**recipe.params, **self.params} if self.params else recipe.params
        align_seed = self.seed if self.role == "final" else self.cell.search_seeds[1]
        return Graph(replace(recipe, params=params, seed=self.seed, align_seed=align_seed), self.cell.shared)

    @cached_property
    def evidence(self) -> Evidence:
        """The stages this job needs in the store to count as done."""
        if (roles := STEPS.get(self.role)) is not None:
            return self.graph.part("validation", roles, self._num_utility)
        return self.graph.evidence(self.split)

    @property
    def split(self) -> str:
        """The split of the prompts on which it is measured: "test" or "validation"."""
        return "test" if self.role == "final" else "validation"

    @property
    def is_bounded(self) -> bool:
        """Whether its metrics are compared with those of theta_safe on the same prompts."""
        return self.role not in ("final", "search: pilot")

    @property
    def _num_utility(self) -> int | None:
        num = self.graph.num_utility("validation")
        return max(1, num // PILOT) if self.role == "search: pilot" and num is not None else None

    @property
    def aligned(self) -> Job:
        """The job of the aligned reference: same model, task, seed and prompts, no finetune."""
        return (self.cell.aligned or self.cell).job({}, self.seed, self.role)

    @cached_property
    def own(self) -> list[Stage]:
        """The stages that only trials of this configuration need: the one whose weights are served, and all that depend on it."""
        final = self.graph.final
        above: dict[str, bool] = {}

        def rests_on_it(stage: Stage) -> bool:
            if stage.key not in above:
                above[stage.key] = stage is final or any(rests_on_it(other) for other in stage.inputs.values())
            return above[stage.key]

        return [stage for stage in self.evidence.metrics.walk() if rests_on_it(stage)]


def steps(sweep: Sweep) -> list[str]:
    """Return the roles of a searched trial's jobs, in order. The last one measures it completely."""
    return [*_PRUNED[sweep.search.prune], "search"]


def cells(sweep: Sweep, folder: Path | None = None, planned: bool = False) -> list[Cell]:
    """Return every row of the sweep's tables; for each model and task the references come first.

    Args:
        folder: of local data files.
        planned: the cells are not to be run, so that the hub need not be asked for its data sets.
    """
    grid: list[Cell] = []
    shared = Shared(folder, sweep.data, planned)
    methods_of_rows = [row for method in sweep.methods for row in grid_rows(method)]
    method_names = _told_apart(method_entries(sweep))
    task_names = _told_apart(task_entries(sweep))
    own = sweep.search.seed
    seeds = own, own if sweep.search.realign else sweep.seeds[0]

    @cache
    def for_rows(place: int, of_task: int) -> tuple[Method, dict[str, Json] | None, int]:
        """A method for a task, its space, and how many trials its search has: the same for all models and poison ratios."""
        method = for_task(methods_of_rows[place], sweep.tasks[of_task])
        space = space_of(method)
        return method, space, len(points(space)) if space and sweep.search.sampler == "grid" else sweep.search.trials

    for model in sweep.models:
        for of_task, (task, task_name) in enumerate(zip(sweep.tasks, task_names, strict=True)):

            def recipe(
                method: Method, ratio: float, name: str = "", model: Model = model, task: UserTask = task,
                task_name: str = task_name,
            ) -> Recipe:  # fmt: skip
                return Recipe(
                    model, sweep.adapter, sweep.lora, sweep.align, task, sweep.poison.task, ratio, method.name,
                    method.config, sweep.seeds[0], sweep.evaluate, sweep.poison.keep_task_rows, sweep.memory_mix,
                    names=(name, task_name),
                )  # fmt: skip

            aligned = Cell(recipe(Method(name="aligned"), 0.0), None, shared, seeds)
            # A model that is aligned already has no `base` row: before its alignment it was another model.
            base = [Cell(recipe(Method(name="base"), 0.0), None, shared, seeds, aligned)] if sweep.align.train else []
            chosen = [
                (ratio, place)
                for ratio in sweep.poison.ratios
                for place, method in enumerate(methods_of_rows)
                if not sweep.only or any(named(some, model, task, ratio, method) for some in sweep.only)
            ]
            if chosen:
                grid += [*base, aligned]
            for ratio, place in chosen:
                method, space, num_trials = for_rows(place, of_task)
                its = recipe(method, ratio, method_names[place])
                grid.append(Cell(its, space, shared, seeds, aligned, num_trials, sweep.search.at_once))
    return grid


def standing(sweep: Sweep, cell: Cell) -> Standing:
    """Return a cell's place in the order of a run (`execution.turns`).

    The last entry that names the cell decides. A cell that no entry names gets the default. So do references, which all
    rows share.
    """
    recipe, turns = cell.recipe, sweep.execution.turns
    if not turns or recipe.method in REFERENCES:
        return _USUAL
    method = Method(name=recipe.method, label=recipe.names[0] or None)
    found = (its for its in reversed(turns) if named(its, recipe.model, recipe.task, recipe.poison_ratio, method))
    return next(found, _USUAL)


def named(some: Some, model: Model, task: UserTask, ratio: float, method: Method) -> bool:
    """Return whether an entry of `only` or `execution.turns` names this row."""
    pairs = (
        (some.models, model.name),
        (some.tasks, task.task),
        (some.ratios, ratio),
        (some.methods, method.label or method.name),
    )
    return all(wanted is None or its in wanted for wanted, its in pairs)


def grid_rows(method: Method) -> list[Method]:
    """Return the rows of the table that an entry of `methods` makes: one, or one for each combination of its `grid`."""
    plain = method.model_copy(update={"grid": {}})
    return [plain.model_copy(update={"config": {**method.config, **point}}) for point in points(method.grid)]


def points(lists: Mapping[str, Any]) -> list[dict[str, Json]]:
    """Return every combination of the lists' values. The last list varies fastest. Without lists there is one, empty combination.

    >>> points({"a": [1, 2], "b": [3]})
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def share_of(value: Json) -> float | None:
    """Return 0.05 for the text `5%`; None for anything that is not a percentage."""
    found = _SHARE.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else float(found[1]) / 100


def for_task(method: Method, task: UserTask) -> Method:
    """Return the method with each share of the user's rows (`memory_size: 5%`) replaced by a number of this task's rows.

    The number is rounded, and at least 1.

    Raises:
        ConfigError: there is a share, and the task's number of rows is not given.
    """
    kind = methods.load(method.name)
    whole = {name for name, field in kind.Config.model_fields.items() if _is_whole(field.annotation)}

    def number(value: Json) -> Json:
        if isinstance(value, list | tuple):
            return list(dict.fromkeys(map(number, value)))
        if isinstance(value, dict):
            return {key: number(each) for key, each in value.items()}
        if (share := share_of(value)) is None:
            return value
        if task.num_rows is None:
            raise ConfigError(f"{value} of the rows of {task.task}: how many those are is not given (num_rows: null)")
        return max(1, round(share * task.num_rows))

    def numbers(given: Mapping[str, Json]) -> dict[str, Json]:
        return {name: number(value) if name in whole else value for name, value in given.items()}

    search = None if method.search is None else numbers(method.search)
    return method.model_copy(update={"config": numbers(method.config), "search": search})


def method_entries(sweep: Sweep) -> list[tuple[str, dict[str, Json]]]:
    """Return (name, all settings) of each row that the methods of a sweep make."""
    rows = [row for method in sweep.methods for row in grid_rows(method)]
    return [(row.label or row.name, _settings(row, sweep.tasks[0])) for row in rows]


def task_entries(sweep: Sweep) -> list[tuple[str, dict[str, Json]]]:
    """Return (name, all settings) of each task of a sweep."""
    return [(task.task, task.model_dump(mode="json")) for task in sweep.tasks]


def _settings(method: Method, task: UserTask) -> dict[str, Json]:
    """All settings of a method's row. A share (`5%`) stays a share, because it is a different number for every task."""
    kind, known = methods.load(method.name), for_task(method, task)
    config: dict[str, Json] = kind.Config(**known.config).model_dump(mode="json")
    shares = {name: value for name, value in method.config.items() if known.config[name] != value}
    return {**config, **shares, "search": space_of(known)}


def _asked(evaluate: Evaluate) -> SharedConfig:
    """The part of an evaluation's config that is in a cell's key."""
    found: Any = _anywhere(evaluate.model_dump(mode="json", exclude={"unsafe_code"}))
    return SharedConfig(found)


def _anywhere(given: Json) -> Json:
    """A config as JSON, without its endpoints' addresses and how they are asked. A tokenizer is replaced by its hash."""
    if isinstance(given, list):
        return [_anywhere(each) for each in given]
    if not isinstance(given, dict):
        return given
    if given.get("endpoint") is None:
        return {name: _anywhere(each) for name, each in given.items()}
    tokenizer = given.get("tokenizer")
    read = None if tokenizer is None else sha256(Path(str(tokenizer)).absolute() / "tokenizer.json")
    places = {"endpoint", "at_once", "key_variable"}
    return {**{name: each for name, each in given.items() if name not in places}, "tokenizer": read}


def _told_apart(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """For each entry (name, settings): its name with the settings in which it differs from other entries of the same name, as in
    `der weight=9`."""
    found = []
    for name, settings in entries:
        others = [other for its, other in entries if its == name and other != settings]
        differ = [key for key in settings if any(other.get(key) != settings[key] for other in others)]
        texts = [f"{key}={_short(settings[key])}" for key in differ]
        found.append(f"{name} {', '.join(texts)}".strip())
    return found


def _short(value: Json) -> str:
    """The text of a setting in a label. A search space is written as the names that it searches."""
    if isinstance(value, dict):
        return "+".join(value)
    return "none" if value is None else str(value)


def space_of(method: Method) -> dict[str, Json] | None:
    """Return the search space of a method of a sweep file; None if nothing is searched.

    An empty `search: {}` gives the method's default space. A range of a whole-number hyperparameter gets `step: 1`.
    """
    if method.search is None:
        return None
    kind = methods.load(method.name)
    space = method.search or kind.search_space(kind.Config(**method.config))
    fields = kind.Config.model_fields
    return {name: _whole(form) if name in fields and _is_whole(fields[name].annotation) else form
            for name, form in space.items()}  # fmt: skip


def _is_whole(annotation: Any) -> bool:
    return annotation is int or (int in get_args(annotation) and float not in get_args(annotation))


def _whole(form: Json) -> Json:
    return {**form, "step": 1} if isinstance(form, dict) and "step" not in form else form
