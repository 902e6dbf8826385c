"""The best row of a finished sweep as a version of a registered model, under an alias."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl.base import ConfigError, PrerequisiteError
from safecl.export import export
from safecl.graph import REFERENCES
from safecl.objective import Trial, bounds, select, violations
from safecl.report.facts import readable
from safecl.tracking import messages
from safecl.tracking.logbook import label, place_of
from safecl.tracking.messages import EXPERIMENT, LEVELS
from safecl.tracking.names import Names
from safecl.tracking.server import client
from safecl.tracking.trials import name_of

if TYPE_CHECKING:
    from safecl.grid import Job
    from safecl.project import Project


class Promoted(NamedTuple):
    """The registered model version. `feasible`: whether the row meets the sweep's bounds on test prompts."""

    title: str
    name: str
    version: str
    feasible: bool


def promote(project: Project, uri: str, words: str, name: str | None, alias: str, merged: bool = False) -> Promoted:
    """Register the best finished row whose label holds all `words` as a model version in MLflow.

    The weights of the first seed are written to MLflow. Calling it again changes nothing.

    Raises:
        ConfigError: no such row is finished, or the rows have several models, tasks or poison ratios and cannot be compared.
        PrerequisiteError: the row's trial was not tracked.
    """
    job, place, feasible = best(project, words)
    path = messages.path_of((project.sweep.name, label(job.cell, place), name_of(job)))
    read = client(uri)
    experiment = read.get_experiment_by_name(EXPERIMENT)
    wanted = " and ".join(f"tags.`safecl.{level}` = '{part}'" for level, part in zip(LEVELS, path, strict=True))
    found = read.search_runs([experiment.experiment_id], wanted, max_results=1) if experiment is not None else []
    outputs = found[0].outputs.model_outputs if found and found[0].outputs else []
    if not outputs:
        raise PrerequisiteError(f"{path[1]} is not in MLflow at {uri} yet: `safecl run` sends what was not sent")
    model_id, final = outputs[0].model_id, job.graph.final
    assert final is not None
    folder = "model" if merged else "adapter"
    whole = f"safecl.written.{folder}"  # this tag is set last, so that an interrupted write is repeated
    if whole not in read.get_logged_model(model_id).tags:
        with tempfile.TemporaryDirectory(prefix="safecl-") as temporary:
            out = export(project.store, final.key, Path(temporary) / folder, merged)
            read.log_model_artifacts(model_id, str(out), folder)
        read.set_logged_model_tags(model_id, {whole: "yes"})
    name = name or f"safecl-{project.sweep.name}"
    version = _version(read, name, model_id, found[0].info.run_id, Names(project.cells).trial(job))
    read.set_registered_model_alias(name, alias, version)
    return Promoted(Names(project.cells).trial(job), name, version, feasible)


def best(project: Project, words: str) -> tuple[Job, int | None, bool]:
    """(trial of the first seed, index on the cell's front, whether it meets the bounds) of the best row.

    The best row is found with the rule of the search, applied to the numbers of the table (test prompts).
    """
    objective = project.sweep.search.objective
    rows, _ = readable(project)
    candidates: list[tuple[Job, Any]] = []
    for (cell, _, jobs, _), row in zip(project.finals(), rows, strict=True):
        told = f"{cell.label} {row['method']}".replace("/", " ").split()
        whole = jobs and len(row["seeds"]) == len(jobs) and objective.maximise in row["metrics"]
        if cell.recipe.method not in REFERENCES and whole and all(word in told for word in words.split()):
            candidates.append((jobs[0], row))
    if not candidates:
        raise ConfigError(
            f"no row{f' with the words {words!r}' if words else ''} is finished on every seed; `safecl status` says"
        )
    groups = dict.fromkeys((row["model"], row["task"], row["poison"]) for _, row in candidates)
    if len(groups) > 1:
        several = "; ".join(f"{model} {task} p={poison:g}" for model, task, poison in groups)
        raise ConfigError(
            f"rows of several models, tasks or poison ratios are finished ({several}): name one with --row WORDS"
        )
    [(model, task, _)] = groups
    safe = next(row for row in rows if (row["model"], row["task"], row["method"]) == (model, task, "aligned"))
    try:
        limits = bounds(objective, _values(safe))
        told_apart = [
            Trial(number, {}, _values(row)[objective.maximise], violations(_values(row), limits))
            for number, (_, row) in enumerate(candidates)
        ]
        taken = select(told_apart)
    except ValueError as error:
        raise ConfigError(f"the best row cannot be told: {error}") from None
    job = candidates[taken.number][0]
    return job, place_of(project, job), taken.feasible


def _values(row: Any) -> dict[str, float]:
    return {name: entry["value"] for name, entry in row["metrics"].items()}


def _version(read: Any, name: str, model_id: str, run_id: str, title: str) -> str:
    """The version of the registered model for this model. Both are created if they do not exist."""
    if not read.search_registered_models(f"name = '{name}'"):
        read.create_registered_model(name, description="Registered by `safecl promote`.")
    # Not `models:/ID`, which MLflow looks up at its global address. An existing version is also found by this source.
    source = read.get_logged_model(model_id).artifact_location
    for version in read.search_model_versions(f"name = '{name}'"):
        if version.source == source:
            return str(version.version)
    made = read.create_model_version(name, source, run_id, description=title, model_id=model_id)
    return str(made.version)
