"""A sweep's results and answers as pandas frames, for notebooks. They are read from the store alone; nothing is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from safecl import metrics
from safecl.api import Given, Settings, read
from safecl.base import Damaged
from safecl.graph import REFERENCES
from safecl.report.answers import answers
from safecl.report.facts import by_guard, doubt
from safecl.report.rows import by_metric, entry

if TYPE_CHECKING:
    import pandas as pd

    from safecl.grid import Cell, Job
    from safecl.project import Project

RESULTS = (
    "model", "task", "poison", "method", "seed", "split", "metric", "value", "low", "high", "num", "unparsed", "unit",
    "better", "params", "keys",
)  # fmt: skip
GENERATIONS = (
    "model",
    "task",
    "poison",
    "method",
    "seed",
    "role",
    "set",
    "id",
    "prompt",
    "reference",
    "answer",
    "finish",
)


def results(
    sweep: Given | Project,
    *,
    set: Settings = (),
    limit: int | None = None,
    searched: bool = False,
    accept_judge: bool = False,
) -> pd.DataFrame:
    """Return every number of a sweep as a frame.

    It has one row for each trial and metric, and one row for each cell and metric over the cell's seeds (there `seed` is
    <NA>). Columns:

    - `value`, `low`, `high`: the macro mean over sets with its 95 % interval; for a trial over its prompts, for a cell over
      seeds and prompts. They are fractions in [0, 1], or as `unit` says.
    - `num`, `unparsed`: number of parsed outcomes, and of outcomes that could not be parsed.
    - `better`: "low", "high" or "".
    - `params`: a dict of all hyperparameters.
    - `keys`: for a trial a dict of the keys of its stage `metrics` and of the `weights` that were served
      (`safecl show KEY`, `safecl export KEY`); empty for a cell.

    Args:
        sweep: a sweep file, its contents as a mapping, or a Project (as `safecl.run` returns it).
        set, limit: as in `safecl.plan`.
        searched: also include the finished trials of searches, which are measured on validation prompts (see `split`).
        accept_judge: keep verdicts of a guard that is no better than chance. Without it these rows are left out, with a
            warning.

    Raises:
        ConfigError, PrerequisiteError: the sweep file is wrong, or data or a model is missing.

    Example:
        >>> import safecl
        >>> frame = safecl.results("sweep.yaml")
        >>> cells = frame[frame.seed.isna() & (frame.metric == "asr")]
        >>> list(cells.method)
        ['base', 'aligned', 'sft']
        >>> frame.groupby(["method", "metric"]).value.mean().unstack().columns.name
        'metric'
    """
    import pandas as pd

    project = _opened(sweep, set, limit)
    lines: list[dict[str, Any]] = []
    for cell, params, jobs, _ in project.finals():
        read = {job: found for job in jobs if (found := _outcomes(project, job)) is not None}
        measured = by_metric({job.seed: found for job, found in read.items()})
        known = {**cell.defaults, **params}
        for name, of_seeds in measured.items():
            lines += _line(cell, name, of_seeds, {"seed": None, "split": "test", "params": known, "keys": {}})
        lines += [line for job, found in read.items() for line in _trial(job, found, "test", known)]
        for job in _searched(project, cell) if searched else ():
            if (found := _outcomes(project, job)) is not None:
                lines += _trial(job, found, "validation", {**cell.defaults, **job.params})
    if told := doubt(project, accept_judge):
        warnings.warn(told, stacklevel=2)
        hidden = [] if accept_judge else by_guard(project, dict.fromkeys(line["metric"] for line in lines))
        lines = [line for line in lines if line["metric"] not in hidden]
    return pd.DataFrame(lines, columns=list(RESULTS)).astype({"seed": "Int64"})


def generations(sweep: Given | Project, *, set: Settings = (), limit: int | None = None) -> pd.DataFrame:
    """Return every answer to a test prompt of a sweep's final trials: one row for each answer, one column for each metric.

    Columns beside those that name the trial:

    - `role`: attack, benign or utility.
    - `set`: the task that the prompt belongs to.
    - `reference`: the row's own answer, if it has one.
    - `finish`: "stop", or "length" if the answer was cut.
    - each metric: the value of this answer. It is 1.0 or 0.0 for a judge's True or False (`asr`, `degenerate`, ...), or a
      score of the task (`utility`, ...). It is NaN if it could not be parsed, or is not measured on such prompts.

    Args:
        sweep, set, limit: as in `results`.

    Example:
        >>> import safecl
        >>> answers = safecl.generations("sweep.yaml")
        >>> answers[answers.asr == 1][["method", "prompt", "answer"]].columns.to_list()
        ['method', 'prompt', 'answer']
    """
    import pandas as pd

    project = _opened(sweep, set, limit)
    lines: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for cell, _, jobs, _ in project.finals():
        for job in jobs:
            if (outcomes := _outcomes(project, job)) is None:
                continue
            measured: dict[tuple[str, str], dict[str, float | None]] = {}
            for outcome in outcomes:
                measured.setdefault((outcome["set"], outcome["id"]), {})[outcome["metric"]] = outcome["value"]
            names |= dict.fromkeys(outcome["metric"] for outcome in outcomes)
            for line in answers(project, job):
                kept = {name: value for name, value in line.items() if name in GENERATIONS}
                lines.append({**_of(cell), "seed": job.seed, **kept}
                             | measured.get((f"{line['role']}/{line['set']}", line["id"]), {}))  # fmt: skip
    if told := doubt(project, accepted=True):
        warnings.warn(told, stacklevel=2)
    columns = [*GENERATIONS, *(metric.name for metric in metrics.ordered(names))]
    return pd.DataFrame(lines, columns=columns).astype({"seed": "Int64", **dict.fromkeys(names, float)})


def _opened(sweep: Given | Project, set: Settings, limit: int | None) -> Project:
    from safecl.project import Project

    return sweep if isinstance(sweep, Project) else Project(read(sweep, set, limit), reads=True)


def _outcomes(project: Project, job: Job) -> list[dict[str, Any]] | None:
    """A trial's outcomes; None if it is not finished or is damaged (a report says which)."""
    with suppress(Damaged):
        return project.outcomes(job)
    return None


def _searched(project: Project, cell: Cell) -> list[Job]:
    study = project.past(cell)
    return [cell.trial(trial.params) for trial in study.complete()] if study is not None else []


def _of(cell: Cell) -> dict[str, Any]:
    recipe = cell.recipe
    poison = None if recipe.method in REFERENCES else recipe.poison_ratio
    return {"model": recipe.model.name, "task": cell.task, "poison": poison, "method": cell.method}


def _trial(job: Job, found: list[dict[str, Any]], split: str, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    final = job.graph.final
    keys = {"metrics": job.evidence.metrics.key, **({} if final is None else {"weights": final.key})}
    for name, of_seed in by_metric({job.seed: found}).items():
        yield from _line(job.cell, name, of_seed, {"seed": job.seed, "split": split, "params": params, "keys": keys})


def _line(cell: Cell, name: str, of_seeds: dict[int, list[Any]], more: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if (found := entry(name, of_seeds)) is not None:
        metric = metrics.of(name)
        told = {field: found[field] for field in ("value", "low", "high", "num", "unparsed")}
        unit = "fraction" if metric.unit == "%" else metric.unit
        yield {**_of(cell), "metric": name, **told, "unit": unit, "better": metric.better, **more}
