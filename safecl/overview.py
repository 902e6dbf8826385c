"""Output of the commands that run nothing: plan, status, the page, the lists."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl import methods, registry
from safecl.base import ConfigError, near
from safecl.cost import Open, cost
from safecl.dtypes import warnings
from safecl.grid import Job
from safecl.preflight import lacking_judges
from safecl.project import Project, trials
from safecl.report import page
from safecl.report.answers import chunks
from safecl.report.costs import costs
from safecl.report.facts import readable
from safecl.report.methodology import methodology
from safecl.report.rows import curves
from safecl.report.searches import searches
from safecl.study import is_partial
from safecl.tasks._written import kind_of
from safecl.tasks._written import notes as written_notes
from safecl.trained import notes as trained_notes

if TYPE_CHECKING:
    from safecl.config import Data
    from safecl.judges import Judge


def plan(project: Project) -> dict[str, Any]:
    """Cells, trials, stages by kind, hours and dtypes, as plain data, with the accuracy of past estimates according to
    the records."""
    sweep = project.sweep
    project.expected  # noqa: B018  (refuses what would leave too few rows)
    project.warnings += [f"not checked here, and needed to run: {line}" for line in lacking_judges(sweep)]
    project.warnings += warnings(sweep, project.store, project.auto, project.nodes)
    found: list[dict[str, Any]] = []
    jobs: list[Job] = []
    open_cells: list[Open] = []
    seeds = len(sweep.seeds)
    for row in trials(project):
        cell = row.cell
        found.append(
            {
                "cell": cell.label,
                "searched": ", ".join(cell.space or ()) or "-",
                "trials": seeds + (cell.num_trials if cell.space is not None else 0),
            }
        )
        jobs += row.done + row.known
        if row.num_more is not None:
            open_cells.append(Open(cell, row.num_more, sweep.seeds))
    with ThreadPoolExecutor(1) as beside:  # another process measures the machine's speed
        to_come = beside.submit(project.forecast)
        for job in jobs:
            job.evidence  # noqa: B018  (made here, while that runs)
        forecast = to_come.result()
    found_cost = cost(jobs, open_cells, project.store, forecast, project.num_devices(), project.guard_stages())
    return {
        "cells": found,
        "stages": {
            kind: {
                "to run": count.to_run,
                "later": count.later,
                "cached": count.cached,
                "shared": count.shared,
                "hours": round(count.hours, 4),
            }
            for kind, count in found_cost.kinds.items()
        },
        "open_trials": sum(cell.num_trials + len(cell.seeds) for cell in open_cells),
        "hours": round(found_cost.hours, 4),
        "states_gib": round(found_cost.states_gib, 4),
        "disk_gib": round(found_cost.disk_gib, 4),
        "device_hours": round(sum(count.hours for count in found_cost.kinds.values()), 4),
        "speed": ""
        if forecast.estimator.speeds
        else f", at an assumed {forecast.estimator.typical.forward / 1000:g} TFLOP/s",
        "records": {kind: checked._asdict() for kind, checked in forecast.checked.items()},
        "dtype": {model.name: model.dtype for model in sweep.models},
        "auto": None if project.auto is None else project.auto._asdict(),
        "warnings": project.warnings,
        "templates": {model.name: project.template_of(model) for model in sweep.models},
        "trained": {label: one and one._asdict() for label, one in project.expected.items()},
        "notes": _plan_notes(project),
    }


def _plan_notes(project: Project) -> list[str]:
    """Lines about the training data: templates, and differences from what the sweep asks for."""
    several, found = len(project.sweep.models) > 1, []
    for cell in project.cells:
        one, recipe = project.expected.get(cell.label), cell.recipe
        if one is not None:
            model = f"{recipe.model.name} " if several else ""
            is_aligned = recipe.method == "aligned"
            where = "alignment" if is_aligned else f"{recipe.task.task} p={recipe.poison_ratio:g}"
            found.append((f"{model}{where}", 0.0 if is_aligned else recipe.poison_ratio, one._asdict()))
    told = [f"template of {model.name}: {project.template_of(model)}" for model in project.sweep.models]
    told += written_notes(project.sweep.data, [task.task for task in project.sweep.tasks])
    num_unknown = sum(one is None for one in project.expected.values())
    if num_unknown:
        told.append(f"what {num_unknown} cells are trained on is known once their data is here, which is on the hub")
    return told + trained_notes(found)


def status(project: Project, run: Mapping[str, Any] | None = None) -> list[dict[str, str]]:
    """Progress of each cell, from the store and the studies alone. `weights`: those of its first finished seed, for
    `safecl export`.

    `run`: the notes of the sweep's driver (live.state). They say which cells it works on, and the progress of searches
    whose study this machine cannot read.
    """
    under_way, searched = (run or {}).get("cells", ()), (run or {}).get("searched", {})
    found, has = [], project.store.listed()
    for cell, _, jobs, note in project.finals():
        done = sum(has(job.evidence.metrics) for job in jobs)
        num_seeds = len(project.sweep.seeds)
        if cell.space is None:
            search = "-"
        else:
            study = project.past(cell)
            num = len(study.complete()) if study else 0
            if is_partial(study) and cell.label in searched:
                num, done = searched[cell.label]
            search = f"{num}/{cell.num_trials}"
            search += f" ({len(study.pruned)} pruned)" if study and study.pruned else ""
        state = "done" if done == num_seeds else "searching" if note.startswith("search:") else "to do"
        state = "failed" if not jobs and note.startswith("all ") else state
        state = "under way" if state == "to do" and cell.label in under_way else state
        ready = [job.graph.final for job in jobs if has(job.evidence.metrics)]
        weights = next((final.key[:12] for final in ready if final is not None), "-")
        found.append(
            {
                "cell": cell.label,
                "search": search,
                "final": f"{done}/{num_seeds}",
                "state": state,
                "weights": weights,
            }
        )
    return found


def write_report(project: Project, out: Path | None, accept_judge: bool = False) -> Path:
    """Write the page, and its answers beside it if there are many. Returns the page's path."""
    rows, found = readable(project, accept_judge)
    rows = [row for row in rows if row["metrics"]]
    more = page.More(
        searches=searches(project),
        curves=curves(project),
        costs=costs(project),
        methodology=methodology(project.sweep),
        chunks=chunks(project, {name for row in rows for name in row["metrics"]}),
    )
    return page.write(report_folder(project, out) / "index.html", rows, found, more)


def report_folder(project: Project, out: Path | None = None) -> Path:
    """Folder of a sweep's page."""
    return out or project.store.local / "report" / project.sweep.name


def listing(what: str, data: Sequence[Data] = ()) -> list[dict[str, str]]:
    """Methods, tasks, judges or metrics as rows for `safecl ls`. `data`: tasks that a sweep file writes."""
    from safecl import judges, metrics, tasks

    if what == "methods":
        rows = [
            {
                "method": name,
                "equation": kind.equation,
                "hyperparameters": ", ".join(f"{k}={_short(v.default)}" for k, v in kind.Config.model_fields.items())
                or "-",
                "default search": "; ".join(f"{k} {_form(form)}" for k, form in kind.space.items()) or "-",
                "cost": kind.cost,
                "source": kind.source,
                "needs": ", ".join(_needs(kind)) or "-",
            }
            for name, kind in ((name, methods.load(name)) for name in methods.names())
        ]
    elif what == "tasks":
        rows = [
            {"task": name, "about": _about(kind), "splits": ", ".join(kind.SPLITS)}
            for name, kind in ((name, tasks.load(name)) for name in tasks.names())
        ]
    elif what == "judges":
        rows = [
            {"judge": name, "question": kind.question, "answers": ", ".join(kind.answers), "model": _model_of(kind)}
            for name, kind in ((name, judges.load(name)) for name in judges.names())
        ]
    elif what == "metrics":
        rows = [
            {
                "metric": each.name,
                "column": each.title,
                "better": each.better or "-",
                "unit": each.unit,
                "margin": "-" if each.margin is None else f"{each.margin:g}",
                "of": ", ".join(each.roles) or "labelled pairs",
                "by": "rule" if each.of else each.judge or (f"judges.{each.question}" if each.question else "task"),
                "measured": "always"
                if each.is_always_measured
                else "where named"
                if each.of or each.judge
                else "with its task",
            }
            for each in map(metrics.of, metrics.names())
        ]
    else:
        known = (*registry.KINDS, "metrics")
        raise ConfigError(f"nothing to list called {what!r}.{near(what, known)} Expected one of {', '.join(known)}")
    found = [{**row, "from": registry.origin(what, row[what[:-1]])} for row in rows]
    return found + [_written_task(each) for each in data if what == "tasks"]


def _written_task(data: Data) -> dict[str, str]:
    files = data.file.values() if isinstance(data.file, dict) else [data.file or data.hub]
    about = f"{', '.join(Path(str(file)).name for file in files)}, format {data.format}"
    splits = ", ".join(kind_of(data).SPLITS)
    return {"task": data.name, "about": about, "splits": splits, "from": "data of the sweep file"}


def _about(kind: type) -> str:
    """First paragraph of a class's docstring, or else of its file's."""
    told = vars(kind).get("__doc__") or sys.modules[kind.__module__].__doc__ or "-"
    return " ".join(told.partition("\n\n")[0].split())


def _model_of(kind: type[Judge]) -> str:
    """What answers for a judge, as text."""
    if not kind.served:
        return "none: a rule"
    return "trained here" if kind.trained else ", ".join(kind.published) or "any"


def _short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) and len(value) > 3 else json.dumps(value)


def _form(form: Any) -> str:
    """A search range as text."""
    if isinstance(form, list):
        return "one of " + ", ".join(map(str, form))
    return f"{form['low']:g} to {form['high']:g}{' (log)' if form.get('log') else ''}"


def _needs(kind: type[methods.Method]) -> list[str]:
    """Names of the stages that a method needs with its default config."""
    return sorted({*methods.needed(kind).values(), *([f"{kind.trains_as}'s adapter"] if kind.trains_as else [])})
