"""When MLflow is told what: a sweep and its open cells as it begins, each trial as it ends, a cell with the last of its seeds,
the sweep with its table at the end. What was told before is not told again."""

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

VERSION = 2  # of what a run is told; raised, everything is sent again by the next run of a sweep


class Logbook:
    """Of one run of one sweep. No method raises."""

    def __init__(self, tracker: Tracker, project: Project) -> None:
        self._tracker, self._project = tracker, project
        self._names = Names(project.cells)
        self._begun = False
        self._finished: set[tuple[str, ...]] = set()  # rows that were told, by path
        self._complete: set[Cell] = set()  # cells that were finished before

    def begin(self) -> None:
        """There is something to run."""
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
        """A trial is over, by its result or a failure, or was ended early. One that the machine failed is asked again, and
        its run then shows its result."""
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
        """The run is over. `missing`: a line for each row that is not complete for a failure; None: it was interrupted."""
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
        except Exception as error:  # a database is away, or this file has a fault: a run of hours goes on
            self._tracker.problem = f"{self._project.sweep.name} was not tracked whole: {error!r}"

    def _open(self, cell: Cell, status: Status, why: Sequence[str] = ()) -> None:
        """Tells of a cell without a complete row."""
        made = cells.incomplete(self._names, cell, status, why)
        self._put(self._path(cell), {"state": status, "why": list(why)}, lambda: made)

    def _put(self, path: Sequence[str], made_of: dict[str, Any], make: Any, now: bool = False) -> None:
        whole = (self._project.sweep.name, *path)
        self._tracker.put(whole, {**made_of, "version": VERSION}, make, now)

    def _row(self, job: Job, place: int | None, path: tuple[str, ...]) -> None:
        """Tells of the row that a final trial is of, if every seed of it is finished."""
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
        with suppress(Exception):  # the study is read here: the driver's thread alone may
            search = cells.searched(project, cell)
        self._put(path, made_of, lambda: cells.row(project, self._names, jobs, place, search))
        if place is not None:  # the search itself, whose front has several rows
            self._put(self._path(cell), {**made_of, "search": True}, lambda: cells.front(self._names, cell, search))

    @staticmethod
    def _path(cell: Cell, place: int | None = None) -> tuple[str, ...]:
        return (label(cell, place),)


def label(cell: Cell, place: int | None) -> str:
    """What a cell's run is found by; `place`: which of several rows on its front."""
    return cell.label if place is None else f"{cell.label} #{place + 1}"


def place_of(project: Project, job: Job) -> int | None:
    """Which of several rows on its cell's front a final trial is of; None where the cell has one row."""
    objective = project.sweep.search.objective
    if job.cell.space is None or not objective.pareto or objective.choose != "front":
        return None
    study = project.past(job.cell)
    taken = chosen(study.complete(), objective) if study is not None else []
    if len(taken) < 2:
        return None
    return next((place for place, trial in enumerate(taken) if trial.params == job.params), None)
