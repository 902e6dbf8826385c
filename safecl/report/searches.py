"""Data on the searches for a report: every finished trial, the choice, the importance of parameters, and Pareto fronts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safecl import metrics
from safecl.graph import REFERENCES
from safecl.objective import chosen, front, goals, hypervolume, losses
from safecl.study import importance

if TYPE_CHECKING:
    from safecl.grid import Cell
    from safecl.project import Project


def searches(project: Project) -> list[dict[str, Any]]:
    """A dict for each searched cell with a finished trial (see `searched`)."""
    return [found for cell in project.cells if (found := searched(project, cell)) is not None]


def searched(project: Project, cell: Cell) -> dict[str, Any] | None:
    """Data on a cell's search. None if nothing is searched or no trial is finished.

    `excess` is the sum of a trial's violations of the bounds, in fractions. `best` is the value of the best feasible trial so
    far, or None.
    """
    study = project.past(cell)
    trials = study.complete() if study is not None else []
    if cell.space is None or study is None or not trials:
        return None
    best: float | None = None
    lines = []
    for trial in trials:
        if trial.feasible:
            best = trial.value if best is None else max(best, trial.value)
        excess = sum(v for v in trial.violations.values() if v > 0)
        line = {"number": trial.number, "value": trial.value, "excess": excess, "feasible": trial.feasible}
        lines.append({**line, "best": best, "params": trial.params})
    recipe, objective = cell.recipe, project.sweep.search.objective
    return {
        "label": cell.label,
        "method": cell.method,
        "model": recipe.model.name,
        "task": cell.task,
        "poison": None if recipe.method in REFERENCES else recipe.poison_ratio,
        "space": cell.space,
        "num": cell.num_trials,
        "failed": len(study.failures),
        "maximise": objective.maximise,
        "bounds": dict(objective.bounds),
        "pruned": len(study.pruned),
        "chosen": chosen(trials, objective)[0].number,
        "trials": lines,
        "importance": importance(trials, cell.space),
    }


def told(project: Project, cell: Cell) -> dict[str, Any]:
    """Summary of a cell's search, measured on validation prompts: numbers of trials that finished, failed and were pruned.

    With several objectives also each trial (`is_taken`: its values are used by a row), the front, and the front's hypervolume:
    the share of the unit cube of objectives that the front dominates, in [0, 1]. It is None if an objective is not a fraction.
    """
    study, objective = project.past(cell), project.sweep.search.objective
    trials = study.complete() if study else []
    failed, pruned = (len(study.failures), len(study.pruned)) if study else (0, 0)
    found: dict[str, Any] = {"trials": len(trials), "failed": failed, "pruned": pruned}
    if not objective.pareto or not trials:
        return found
    best, taken = ({trial.number for trial in some} for some in (front(trials), chosen(trials, objective)))
    bounded = all(metrics.of(name).bounds == (0.0, 1.0) for name in objective.pareto)
    points = [losses(trial) for trial in trials if trial.number in best and trial.feasible]
    return found | {
        "objectives": list(goals(objective)),
        "tried": [
            {"number": trial.number, "params": trial.params, "values": dict(trial.values), "feasible": trial.feasible,
             "is_front": trial.number in best, "is_taken": trial.number in taken}
            for trial in trials
        ],
        "hypervolume": hypervolume(points) if bounded else None,
    }  # fmt: skip
