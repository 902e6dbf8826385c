"""The MLflow run of a cell: the choice of its search, its numbers over seeds, and the history of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from safecl.base import Damaged
from safecl.graph import REFERENCES
from safecl.report import charts
from safecl.report.forms import markdown_table
from safecl.report.pictures import pictures
from safecl.report.rows import own_seconds
from safecl.report.searches import searched as searched
from safecl.tracking import trials
from safecl.tracking.messages import Run, Status, text
from safecl.tracking.names import Names
from safecl.tracking.trials import numbers, numbers_table, values

if TYPE_CHECKING:
    from safecl.grid import Cell, Job
    from safecl.project import Project


def row(
    project: Project, names: Names, jobs: Sequence[Job], place: int | None, search: Mapping[str, Any] | None
) -> Run:
    """The run of a table row whose seeds are all finished. `place`: its index on the cell's front, None if the cell has one
    row. `search`: see searches.searched."""
    cell, params = jobs[0].cell, jobs[0].params
    of_seeds: dict[int, list[dict[str, Any]]] = {}
    for job in jobs:
        with suppress(Damaged, OSError):
            if (found := project.outcomes(job)) is not None:
                of_seeds[job.seed] = found
    measured = numbers(of_seeds)
    if not measured:
        measured = values(project.store.record(jobs[0].evidence.metrics)["result"])
    settings = {} if cell.recipe.method in REFERENCES else {**cell.defaults, **params}
    lines = [
        f"{len(of_seeds)} seed{'s' if len(of_seeds) > 1 else ''} ({', '.join(map(str, of_seeds))}), test prompts.",
        "",
        *numbers_table(measured),
    ]
    if settings:
        named = [[f"{name}{' (searched)' if name in params else ''}", text(value)] for name, value in settings.items()]
        lines += ["", *markdown_table(["setting", "value"], named)]
    curves = [curve for job in jobs if (curve := _curve(project, names, job))]
    spans = [trials.spent(project, job) for job in jobs]
    first = jobs[0]  # its data, curves and answers represent the row, so that rows can be compared
    drawn = {"curves": charts.curves(curves)}
    if search is not None and place is None:
        drawn["search"] = charts.search(search)
    return Run(
        names.cell(cell, params, place),
        names.params(cell, params),
        {**measured, "seconds": sum(own_seconds(project, job) for job in jobs)},
        tags={"safecl.method": cell.recipe.method, "safecl.seeds": list(of_seeds)},
        note="\n".join([*lines, *_history(search)]),
        data=list(trials.data(project, first)),
        curves=trials.curves(project, first),
        files=pictures(drawn),
        tables=trials.answered(project, first, of_seeds.get(first.seed, [])),
        began=min((began for began, *_ in spans if began is not None), default=None),
        ended=max((ended for _, ended, _ in spans if ended is not None), default=None),
    )


def front(names: Names, cell: Cell, search: Mapping[str, Any] | None) -> Run:
    """The run of a search whose front gives several rows. Each row also has its own run."""
    return Run(
        f"{names.cell(cell, {})} · search",
        names.params(cell, {}),
        tags={"safecl.method": cell.recipe.method},
        note="\n".join(["Every configuration on the front is a row of its own: see the runs `#1`, `#2`, ...", *_history(search)]),
        files=pictures({"search": charts.search(search)}) if search is not None else {},
    )  # fmt: skip


def incomplete(names: Names, cell: Cell, status: Status, why: Sequence[str]) -> Run:
    """The run of a cell without a complete row. `why`: reasons, if it failed."""
    told = "; ".join(line.removeprefix(f"{cell.label} ") for line in why)
    said = {"RUNNING": "Under way.", "KILLED": "Interrupted: the same command continues."}
    return Run(
        names.cell(cell, {}),
        names.params(cell, {}),
        tags={"safecl.method": cell.recipe.method, **({"safecl.error": told} if told else {})},
        status=status,
        note=f"**Not complete**: {told}" if told else said.get(status, ""),
    )


def _history(search: Mapping[str, Any] | None) -> list[str]:
    """Lines that say how the search chose a row. Empty without a search."""
    if search is None:
        return []
    bounds = ", ".join(f"{name} at most {bound}" for name, bound in search["bounds"].items())
    return [
        "",
        f"Searched: {len(search['trials'])} trials on validation prompts ({search['failed']} failed, {search['pruned']} ended "
        f"early); {search['maximise']} maximised subject to {bounds or 'no bound'}; trial {search['chosen']} was chosen.",
    ]


def _curve(project: Project, names: Names, job: Job) -> dict[str, Any] | None:
    if job.cell.recipe.method in REFERENCES:
        return None
    with suppress(Damaged, KeyError, OSError):
        points = project.lines(job.graph.tuned, "curves")
        return {"run": names.trial(job), "method": job.cell.method, "points": points}
    return None
