"""The state that a run's progress display shows at each tick. Nothing that is derived from the sweep is built twice, and the
times of finished stages soon correct the time left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.cost import Forecast, Open, Remaining, Todo, missing, slots
from safecl.grid import Job
from safecl.schedule import Schedule
from safecl.stages import load
from safecl.store import Stage, Store, below

EVERY_S = 5.0  # seconds between two recounts of the time left, at least


class Eta:
    """Counts a run's time left.

    Args:
        num_devices: GPUs, or CPUs without `use_gpu`.
        instruments: stages that the run needs beside its jobs.
        models: models' names by the key of the model stage, for labels.
    """

    def __init__(
        self,
        store: Store,
        forecast: Forecast,
        num_devices: int,
        instruments: Sequence[Stage] = (),
        models: dict[str, str] | None = None,
    ) -> None:
        self.store, self.forecast, self.models = store, forecast, models or {}
        self.slots = slots(forecast.execution, num_devices)
        self._of_job: dict[Job, list[Todo]] = {}  # stages that were missing when the job was first seen
        self._instruments = tuple(instruments)
        self._beside = forecast.todo(missing(instruments, store))
        self._known = {item.stage.key: item.stage for item in self._beside}
        self._labels: dict[str, str] = {}
        self._finished: set[str] = set()  # in this run
        self._num_seen = 0  # how many stages that the Broker finished were read
        self._seen: object = None  # what the last `Remaining` was made of
        self._at = 0.0  # when it was made
        self._remaining = Remaining(forecast, self._beside, (), self.slots)
        self._counted: set[Job] | None = None  # jobs that `_remaining` includes

    def state(self, schedule: Schedule, snapshot: dict[str, Any], now: float) -> dict[str, Any]:
        """Return what Display shows. `snapshot`: the Broker's snapshot. `now`: seconds since the epoch."""
        jobs, searching = schedule.open_jobs(), schedule.searching()
        self._update(jobs, searching, schedule.sweep.seeds, snapshot["finished"], now)
        running = {}
        for stage in snapshot["running"]:
            ends = None if stage["ends"] is None else stage["ends"] - now
            running[stage["key"]] = (now - stage["start"], ends)
        own_pace = max((ends for _, ends in running.values() if ends is not None), default=0.0)
        boots = [s for s in snapshot["running"] if str(s["kind"]).startswith("engine")]
        boot_s = max((self.forecast.estimator.boot_s - (now - stage["start"]) for stage in boots), default=0.0)
        unasked = sum(num + len(schedule.sweep.seeds) for _, num in searching)
        return {
            "running": [{**stage, "label": self._label(stage)} for stage in snapshot["running"]],
            "num_finished": len(snapshot["finished"]),
            "failed": snapshot["failed"],
            "trials_done": len(schedule.done),
            "trials": len(schedule.done) + len(jobs) + unasked,
            "eta_s": max(self._remaining.seconds(running, max(0.0, boot_s)), own_pace),
            "now": now,
        }

    def left(self, schedule: Schedule) -> tuple[int, float]:
        """Return (trials, seconds) still to do after a run has stopped, by what is finished in the store."""
        self._of_job.clear()
        self._counted = None
        self._beside, self._seen = self.forecast.todo(missing(self._instruments, self.store)), None
        jobs, searching = schedule.open_jobs(), schedule.searching()
        self._update(jobs, searching, schedule.sweep.seeds, (), 0.0)
        num = len(jobs) + sum(num + len(schedule.sweep.seeds) for _, num in searching)
        return num, self._remaining.seconds({}, self.forecast.estimator.boot_s)

    def _update(
        self,
        jobs: list[Job],
        searching: list[tuple[Any, int]],
        seeds: tuple[int, ...],
        finished: Sequence[dict[str, Any]],
        now: float,
    ) -> None:
        has = None
        for job in jobs:
            if job not in self._of_job:
                has = has or self.store.listed()  # the store is listed once for all jobs
                self._of_job[job] = self.forecast.todo(below(job.evidence.targets, has))
                self._known.update((item.stage.key, item.stage) for item in self._of_job[job])
        new = [(stage["key"], float(stage["seconds"])) for stage in finished[self._num_seen :]]
        seen = (len(finished), [id(job) for job in jobs], searching)
        if seen == self._seen or (self._seen is not None and now - self._at < EVERY_S):
            return
        self._seen, self._at, self._num_seen = seen, now, max(self._num_seen, len(finished))
        self._finished.update(key for key, _ in new)
        self.forecast.finished([(self._known[key], seconds) for key, seconds in new if key in self._known], now)
        open_cells = [Open(cell, num, seeds) for cell, num in searching]
        if self._goes_on(set(jobs)):
            self._remaining.finish(key for key, _ in new)
            self._remaining.settle(open_cells)
            return
        of_jobs = (self._beside, *(self._of_job[job] for job in jobs))
        todo = {item.stage.key: item for of_job in of_jobs for item in of_job}
        for key in self._finished & todo.keys():
            del todo[key]
        self._remaining = Remaining(self.forecast, list(todo.values()), open_cells, self.slots)
        self._counted = set(jobs)

    def _goes_on(self, jobs: set[Job]) -> bool:
        """Whether what is left is as it was counted, except for stages that were finished since: no job is new, none failed."""
        if self._counted is None or not jobs <= self._counted:
            return False
        gone = self._counted - jobs
        self._counted = jobs
        return all(item.stage.key in self._finished for job in gone for item in self._of_job[job])

    def _label(self, stage: dict[str, Any]) -> str:
        key = stage["key"]
        if key not in self._labels and key in self._known:
            self._labels[key] = load(stage["kind"]).label(self._known[key], self.models)
        return self._labels.get(key, str(stage["kind"]))  # an engine has no other name
