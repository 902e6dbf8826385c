"""The time that a sweep took, by method, and the time that sharing stages saved, from the records of its stages."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from safecl.base import Damaged

if TYPE_CHECKING:
    from safecl.grid import Job
    from safecl.project import Project


def costs(project: Project) -> dict[str, Any]:
    """Seconds of finished trials.

    `methods`: for each method the number of trials, the seconds of stages that only its trials needed, and the mean for one
    trial. `spent`: seconds of all stages, each counted once. `alone`: seconds if every trial had run all of its stages itself.
    """
    seconds: dict[str, float] = {}

    def of(stage: Any) -> float:
        if stage.key not in seconds:
            seconds[stage.key] = 0.0
            with suppress(KeyError, Damaged):
                seconds[stage.key] = float(project.store.record(stage)["seconds"])
        return seconds[stage.key]

    methods: dict[str, dict[str, Any]] = {}
    alone = 0.0
    for method, job in _finished(project):
        own = {stage.key: of(stage) for stage in job.own}
        alone += sum(of(stage) for stage in job.evidence.metrics.walk())
        entry = methods.setdefault(method, {"method": method, "trials": 0, "finals": 0, "stages": {}})
        entry["finals" if job.role == "final" else "trials"] += 1
        entry["stages"] |= own
    found = []
    for entry in methods.values():
        total = sum(entry.pop("stages").values())
        found.append({**entry, "seconds": total, "mean": total / (entry["trials"] + entry["finals"])})
    return {"methods": found, "spent": sum(seconds.values()), "alone": alone}


def _finished(project: Project) -> list[tuple[str, Job]]:
    """Finished trials of searches and finished final trials. Unfinished trials are not counted."""
    found = []
    for cell, _, jobs, _ in project.finals():
        study = project.past(cell)
        tried = [cell.trial(trial.params) for trial in study.complete()] if study is not None else []
        found += [(cell.method, job) for job in (*tried, *jobs) if project.store.has(job.evidence.metrics)]
    return found
