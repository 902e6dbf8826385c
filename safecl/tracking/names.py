"""Readable names of runs, such as `der w=4.5 m=20 · sst2 p=.1 · seed 0`, and their params.

A hyperparameter is abbreviated to as few letters as distinguish it from the others of its method. Params are the settings that
differ between any two rows of the sweep, under plain names, and always those in CORE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safecl.graph import REFERENCES
from safecl.store import canonical

if TYPE_CHECKING:
    from safecl.grid import Cell, Job

CORE = ("model", "task", "poison", "method", "learning_rate")
_APART = re.compile(r"(?:^| |, )(\w+)=(.*?)(?=, \w+=|$)")


class Names:
    """Names and params of the runs of one sweep."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self._several_models = len({cell.recipe.model.name for cell in cells}) > 1

    def cell(self, cell: Cell, params: Mapping[str, Any], place: int | None = None) -> str:
        """A row's name. `params`: the values that its search chose. `place`: its index on the front, if there are several."""
        number = "" if place is None else f" #{place + 1}"
        return " · ".join([f"{self._method(cell, params)}{number}", *self._where(cell)])

    def trial(self, job: Job) -> str:
        """A trial's name."""
        which = f"seed {job.seed}" if job.role == "final" else "search"
        return " · ".join([self._method(job.cell, job.params), *self._where(job.cell), which])

    def params(self, cell: Cell, params: Mapping[str, Any]) -> dict[str, Any]:
        """The params of a row or a trial: those that differ anywhere in the sweep, and those in CORE."""
        flat = {**_flat(cell), **{_own(cell, name): value for name, value in params.items()}}
        return {
            name: value
            for name, value in flat.items()
            if value is not None and (name in CORE or name in self._differing)
        }

    @cached_property
    def _differing(self) -> set[str]:
        """Names of settings that differ between rows, and of hyperparameters that are searched or set in the sweep file."""
        values: dict[str, set[str]] = {}
        found = set()
        for cell in self._cells:
            for name, value in _flat(cell).items():
                values.setdefault(name, set()).add(canonical(value))
            if cell.recipe.method not in REFERENCES:
                found |= {_own(cell, name) for name in (*cell.recipe.params, *(cell.space or ()))}
        return found | {name for name, having in values.items() if len(having) > 1}

    def _where(self, cell: Cell) -> list[str]:
        """Task and poison ratio, and the model if the sweep has several."""
        recipe = cell.recipe
        poison = "" if recipe.method in REFERENCES else f" p={number(recipe.poison_ratio)}"
        return [f"{cell.task}{poison}", *([recipe.model.name] if self._several_models else [])]

    def _method(self, cell: Cell, params: Mapping[str, Any]) -> str:
        """A method with the settings that distinguish its row from other rows of the method, and those that were searched."""
        if cell.recipe.method in REFERENCES:
            return cell.recipe.method
        told = {**_told(cell), **params}
        name = _APART.sub(lambda found: "" if found[1] in {*told, "search"} else found[0], cell.method).strip(" ,")
        short = self._short[cell.recipe.method]
        order = sorted(told, key=[*cell.defaults].index) if told.keys() <= cell.defaults.keys() else list(told)
        return " ".join([name, *(f"{short.get(key, key)}={number(told[key])}" for key in order)])

    @cached_property
    def _short(self) -> dict[str, dict[str, str]]:
        """For each method, abbreviations of the hyperparameters that names show."""
        shown: dict[str, dict[str, None]] = {}
        for cell in self._cells:
            if cell.recipe.method not in REFERENCES:
                shown.setdefault(cell.recipe.method, {}).update(dict.fromkeys([*_told(cell), *(cell.space or ())]))
        return {method: abbreviated(keys) for method, keys in shown.items()}


def _told(cell: Cell) -> dict[str, Any]:
    """The settings that a cell's label gives in addition to its method."""
    return {
        name: value
        for name, value in _APART.findall(cell.method)
        if name in cell.defaults and name not in (cell.space or ())
    }


def _flat(cell: Cell) -> dict[str, Any]:
    """All settings of a row by plain names. If two have the same name, the hyperparameter gets its method's name (`_own`)."""
    recipe = cell.recipe
    its_own = {} if recipe.method in REFERENCES else {_own(cell, name): value for name, value in cell.defaults.items()}
    name = recipe.method if recipe.method in REFERENCES else cell.method.partition(" ")[0]
    trained = recipe.method not in REFERENCES
    return {
        **{f"model.{key}": value for key, value in recipe.model.model_dump(mode="json").items() if key != "name"},
        **({key: value for key, value in _task(cell).items() if key != "task"} if trained else {}),
        **its_own,
        "model": recipe.model.name,
        "task": recipe.task.task,
        "poison": recipe.poison_ratio if trained else None,
        "method": name,
    }


def _task(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = cell.recipe.task.model_dump(mode="json")
    return found


def _own(cell: Cell, name: str) -> str:
    """The param name of a hyperparameter: its own name, with the method before it if the task's settings have that name too."""
    return f"{cell.recipe.method}.{name}" if name in {*_task(cell), *CORE} else name


def abbreviated(names: Iterable[str]) -> dict[str, str]:
    """Abbreviate names. Each gets the shortest of its first letter, initials and whole name that no other name has.

    >>> abbreviated(["weight", "memory_size", "memory_batch"])
    {'weight': 'w', 'memory_size': 'ms', 'memory_batch': 'mb'}
    """
    known = list(names)
    firsts = [name[0] for name in known]
    initials = ["".join(part[0] for part in name.split("_") if part) for name in known]

    def short(name: str, both: str) -> str:
        if firsts.count(name[0]) == 1:
            return name[0]
        return both if len(both) > 1 and initials.count(both) == 1 else name

    return {name: short(name, both) for name, both in zip(known, initials, strict=True)}


def number(value: Any) -> str:
    """A value as short text for a name.

    >>> number(0.1), number("0.25"), number(4.5123456), number(1e-05), number(True), number("refusals")
    ('.1', '.25', '4.512', '1e-5', 'true', 'refusals')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return str(value)
    if not isinstance(value, int | float):
        return str(value)
    text: str = re.sub(r"^(-?)0\.", r"\1.", f"{value:.4g}")
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text
