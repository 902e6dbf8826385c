"""What a notebook or program calls: the verbs of the command line, with typed answers.

>>> import safecl
>>> plan = safecl.plan("sweeps/quickstart.yaml", set={"execution.root": folder}, limit=8)
>>> plan.name, plan.trials, [cell.label for cell in plan.cells][:2]
('quickstart', 12, ['smollm2-135m / mini / base', 'smollm2-135m / mini / aligned'])
>>> plan.stages["finetune"].cached
0

project = safecl.run("sweeps/quickstart.yaml")      # what `safecl run` does; a second call runs what is missing
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.base import Json

if TYPE_CHECKING:
    from safecl.config import Sweep
    from safecl.project import Project

# A sweep file, or what one holds as plain values; plugins then lie relative to the working directory.
Given = str | Path | Mapping[str, Any]
# `--set`: `path=value` each, or values by path.
Settings = Sequence[str] | Mapping[str, Json]


@dataclass(frozen=True)
class Planned:
    """A row of the table. `searched`: hyperparameters; `trials`: of its search and of every seed."""

    label: str
    searched: tuple[str, ...]
    trials: int


@dataclass(frozen=True)
class Stages:
    """Of one kind: how many are to run, will be suggested by a search, are in the store, and are used by several trials; and
    what is missing in hours."""

    to_run: int
    later: int
    cached: int
    shared: int
    hours: float


@dataclass(frozen=True)
class Plan:
    """What a run would do. `hours` of this machine for what is missing; `gib`: hidden states of theta_safe to be written."""

    name: str
    cells: tuple[Planned, ...]
    stages: dict[str, Stages]
    hours: float
    gib: float
    dtypes: dict[str, str]  # by model
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def trials(self) -> int:
        """Of all cells."""
        return sum(cell.trials for cell in self.cells)


def plan(sweep: Given, *, set: Settings = (), limit: int | None = None) -> Plan:
    """What `safecl plan` prints. Spends nothing but what it takes to measure this machine's speed.

    Raises:
        ConfigError: what is wrong with the sweep, all at once.
        PrerequisiteError: data or a model is not here.
    """
    from safecl.overview import plan as found_by
    from safecl.project import Project

    opened = read(sweep, set, limit)
    found = found_by(Project(opened, planned=True))
    return Plan(
        name=opened.name,
        cells=tuple(
            Planned(
                cell["cell"], tuple(cell["searched"].split(", ")) if cell["searched"] != "-" else (), cell["trials"]
            )
            for cell in found["cells"]
        ),
        stages={
            kind: Stages(count["to run"], count["later"], count["cached"], count["shared"], count["hours"])
            for kind, count in found["stages"].items()
        },
        hours=found["hours"],
        gib=found["states_gib"],
        dtypes=found["dtype"],
        warnings=tuple(found["warnings"]),
        notes=tuple(found["notes"]),
    )


def run(
    sweep: Given,
    *,
    set: Settings = (),
    limit: int | None = None,
    max_hours: float | None = None,
    show: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Project:
    """What `safecl run` does: run what is missing and give the project. `show` is told of progress. A row that failed is
    a Python warning; the same call tries it again.

    Raises:
        ConfigError: what is wrong with the sweep, all at once.
        PrerequisiteError: the machine lacks something, or another driver runs this sweep.
    """
    from safecl import driver

    project = driver.open_to_run(read(sweep, set, limit))
    for line in driver.run(project, show, max_hours):
        warnings.warn(f"missing: {line}", stacklevel=2)
    return project


def read(sweep: Given, set: Settings = (), limit: int | None = None) -> Sweep:
    """A sweep as `safecl` would read it, with its settings. Raises ConfigError."""
    from safecl import sweepfile

    settings = [f"{path}={json.dumps(value)}" for path, value in set.items()] if isinstance(set, Mapping) else list(set)
    if isinstance(sweep, Mapping):
        return sweepfile.from_raw(deepcopy(dict(sweep)), settings, limit, Path.cwd() / "a sweep")
    return sweepfile.load(Path(sweep), settings, limit)
