"""What a page shows of the searches: every finished trial, what it was chosen for, and which parameter mattered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safecl.graph import REFERENCES
from safecl.objective import select
from safecl.study import importance

if TYPE_CHECKING:
    from safecl.project import Project


def searches(project: Project) -> list[dict[str, Any]]:
    """A dict for each searched cell with a finished trial. `excess` is the summed violation of the bounds, in fractions;
    `best`: the value of the best feasible trial so far, or None."""
    found = []
    for cell in project.cells:
        study = project.past(cell)
        trials = study.complete() if study is not None else []
        if cell.space is None or not trials:
            continue
        best: float | None = None
        lines = []
        for trial in trials:
            if trial.feasible:
                best = trial.value if best is None else max(best, trial.value)
            excess = sum(v for v in trial.violations.values() if v > 0)
            line = {"number": trial.number, "value": trial.value, "excess": excess, "feasible": trial.feasible}
            lines.append({**line, "best": best, "params": trial.params})
        recipe, objective = cell.recipe, project.sweep.search.objective
        found.append(
            {
                "label": cell.label,
                "method": cell.method,
                "model": recipe.model.name,
                "task": cell.task,
                "poison": None if recipe.method in REFERENCES else recipe.poison_ratio,
                "space": cell.space,
                "num": cell.num_trials,
                "failed": len(study.failures) if study is not None else 0,
                "maximise": objective.maximise,
                "bounds": dict(objective.bounds),
                "chosen": select(trials).number,
                "trials": lines,
                "importance": importance(trials, cell.space),
            }
        )
    return found
