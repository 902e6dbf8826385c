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

# A sweep file's path, or the contents of one as a mapping. In a mapping, paths of plugins are relative to the working directory.
Given = str | Path | Mapping[str, Any]
# As `--set` on the command line: a list of `path=value` texts, or a mapping from path to value.
Settings = Sequence[str] | Mapping[str, Json]


@dataclass(frozen=True)
class Planned:
    """One cell of the sweep, which is one row of its tables.

    Attributes:
        label: the row's name, as in `smollm2-135m / mini / p=0.1 / der`.
        searched: names of the hyperparameters that a search chooses; empty if nothing is searched.
        trials: number of trials, those of the search and one for each seed.
    """

    label: str
    searched: tuple[str, ...]
    trials: int


@dataclass(frozen=True)
class Stages:
    """Counts of the stages of one kind.

    Attributes:
        to_run: stages that must run.
        later: stages of trials that a search has yet to suggest.
        cached: stages that are finished in the store.
        shared: uses that need no run of their own. A stage that three trials need counts 2 here.
        hours: time of all stages that are still to run, those of `later` included.
    """

    to_run: int
    later: int
    cached: int
    shared: int
    hours: float


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        name: the sweep's name.
        cells: one entry for each row of the tables.
        stages: counts by kind of stage, as `finetune`.
        hours: estimated time until everything is finished, on this machine.
        gib: GiB of theta_safe's hidden states that will be written (LwF's teacher, DER's memory).
        dtypes: the dtype that each model computes in, by the model's name.
        warnings, notes: lines for a person to read.
    """

    name: str
    cells: tuple[Planned, ...]
    stages: dict[str, Stages]
    hours: float
    gib: float
    dtypes: dict[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def trials(self) -> int:
        """Number of trials of all cells."""
        return sum(cell.trials for cell in self.cells)


def plan(sweep: Given, *, set: Settings = (), limit: int | None = None) -> Plan:
    """Return what `safecl plan` prints. Runs no stage; at most it measures this machine's speed (about a second).

    Raises:
        ConfigError: the sweep is wrong. The message lists every error.
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
    """Run what is missing of a sweep, as `safecl run` does, and return the project.

    Args:
        max_hours: stop after so many hours. The same call continues.
        show: called with each line of progress; the default prints it to the standard error stream.

    Each row that failed gives one Python warning. The same call tries it again.

    Raises:
        ConfigError: the sweep is wrong. The message lists every error.
        PrerequisiteError: the machine lacks something, or another driver runs this sweep.
    """
    from safecl import driver

    project = driver.open_to_run(read(sweep, set, limit))
    for line in driver.run(project, show, max_hours):
        warnings.warn(f"missing: {line}", stacklevel=2)
    return project


def read(sweep: Given, set: Settings = (), limit: int | None = None) -> Sweep:
    """Return the sweep as `safecl` reads it, with the settings of `set` in place. Raises ConfigError."""
    from safecl import sweepfile

    settings = [f"{path}={json.dumps(value)}" for path, value in set.items()] if isinstance(set, Mapping) else list(set)
    if isinstance(sweep, Mapping):
        return sweepfile.from_raw(deepcopy(dict(sweep)), settings, limit, Path.cwd() / "a sweep")
    return sweepfile.load(Path(sweep), settings, limit)
