"""Logbook: decides when which run is sent to MLflow.

A sweep and its open cells are sent when the sweep begins, a trial when it ends, a cell when its last seed is finished, and the
sweep again with its table at the end. Content that was sent before is not sent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from safecl.objective import chosen
from safecl.store import canonical
from safecl.tracking import cells, sweeps, trials
from safecl.tracking.messages import Status
from safecl.tracking.names import Names

if TYPE_CHECKING:
    from safecl.grid import Cell, Job
    from safecl.project import Project
    from safecl.schedule import Done
    from safecl.tracking.tracker import Tracker

VERSION = 2  # version of the runs' content; if it is raised, the next run of a sweep sends everything again


class Logbook:
    """Sends the runs of one sweep to MLflow during one run of it. No method raises."""

    def __init__(self, tracker: Tracker, project: Project) -> None:
        self._tracker, self._project = tracker, project
        self._names = Names(project.cells)
        self._begun = False
        self._finished: set[tuple[str, ...]] = set()  # paths of rows that were sent
        self._complete: set[Cell] = set()  # cells that were finished before this run

    def begin(self) -> None:
        """Send the sweep and its open cells. Called when there is something to run."""
        self._begun = True
        with self._never_raises():
            project, store = self._project, self._project.store
            self._put((), {"state": "under way"}, lambda: sweeps.under_way(project), now=True)
            has = store.listed()
            self._complete = {
                cell for cell, _, jobs, _ in project.finals() if jobs and all(has(job.evidence.metrics) for job in jobs)
            }
            for cell in project.cells:
                if cell not in self._complete:
                    self._open(cell, "RUNNING")

    def done(self, done: Done) -> None:
        """Send a trial that finished, failed or was pruned. A trial that failed because of the machine is run again; its MLflow
        run then shows the result."""
        with self._never_raises():
            job = done.job
            place = place_of(self._project, job) if job.role == "final" else None
            path = self._path(job.cell, place)
            made_of = {"key": job.evidence.metrics.key, "role": job.role, "error": done.error, "pruned": done.pruned}
            self._put((*path, trials.name_of(job)), {**made_of, "name": self._names.trial(job)},
                      lambda: trials.trial(self._project, self._names, done))  # fmt: skip
            if job.role == "final":
                self._row(job, place, path)

    def end(self, missing: Sequence[str] | None) -> None:
        """Send the final state of the sweep. `missing`: one line for each row that is incomplete because of a failure. None: the
        run was interrupted."""
        with self._never_raises():
            project, names = self._project, self._names
            for cell in project.cells if missing is not None or self._begun else ():
                if self._path(cell) not in self._finished and cell not in self._complete:
                    why = [line for line in missing or () if line.startswith(f"{cell.label} (")]
                    self._open(cell, "FAILED" if why else "KILLED", why)
            if missing is None:
                if self._begun:
                    self._put((), {"state": "interrupted"}, lambda: sweeps.under_way(project, "KILLED"), now=True)
                return
            has = project.store.listed()
            tops = [job.evidence.metrics for _, _, jobs, _ in project.finals() for job in jobs]
            found = sorted({top.key for top in tops if has(top)})
            self._put((), {"rows": found, "missing": list(missing), "about": project.sweep.about},
                      lambda: sweeps.finished(project, names, missing), now=True)  # fmt: skip

    @contextmanager
    def _never_raises(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a database is away, or this file has an error: the sweep must go on
            self._tracker.problem = f"{self._project.sweep.name} was not tracked whole: {error!r}"

    def _open(self, cell: Cell, status: Status, why: Sequence[str] = ()) -> None:
        """Send a cell without a complete row."""
        made = cells.incomplete(self._names, cell, status, why)
        self._put(self._path(cell), {"state": status, "why": list(why)}, lambda: made)

    def _put(self, path: Sequence[str], made_of: dict[str, Any], make: Any, now: bool = False) -> None:
        whole = (self._project.sweep.name, *path)
        self._tracker.put(whole, {**made_of, "version": VERSION}, make, now)

    def _row(self, job: Job, place: int | None, path: tuple[str, ...]) -> None:
        """Send the row of a final trial, if all its seeds are finished."""
        cell, project = job.cell, self._project
        jobs = [cell.job(job.params, seed, "final") for seed in project.sweep.seeds]
        if not all(project.store.has(each.evidence.metrics) for each in jobs):
            return
        self._finished |= {path, self._path(cell)}
        made_of = {"keys": [each.evidence.metrics.key for each in jobs], "params": canonical(job.params)}
        whole = (project.sweep.name, *path)
        if self._tracker.knows(whole, {**made_of, "version": VERSION}):
            return
        search = None
        with suppress(Exception):  # only the driver's thread may read the study
            search = cells.searched(project, cell)
        self._put(path, made_of, lambda: cells.row(project, self._names, jobs, place, search))
        if place is not None:  # the search itself, if its front has several rows
            self._put(self._path(cell), {**made_of, "search": True}, lambda: cells.front(self._names, cell, search))

    @staticmethod
    def _path(cell: Cell, place: int | None = None) -> tuple[str, ...]:
        return (label(cell, place),)


def label(cell: Cell, place: int | None) -> str:
    """The label by which a cell's run is found. `place`: index of the row on the cell's front, None if there is one row."""
    return cell.label if place is None else f"{cell.label} #{place + 1}"


def place_of(project: Project, job: Job) -> int | None:
    """Index of a final trial's row on its cell's front. None if the cell has only one row."""
    objective = project.sweep.search.objective
    if job.cell.space is None or not objective.pareto or objective.choose != "front":
        return None
    study = project.past(job.cell)
    taken = chosen(study.complete(), objective) if study is not None else []
    if len(taken) < 2:
        return None
    return next((place for place, trial in enumerate(taken) if trial.params == job.params), None)
