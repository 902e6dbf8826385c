"""Which trial comes next: references, then each cell's search on validation prompts, then its choice on test prompts.

The same object serves a run (Ray Tune asks it), a rerun (everything is in the store: no Ray is started) and a report
(nothing may be asked). A job whose evidence lies in the store is finished from there, whoever made it.

Of a search as many trials run at once as its study gives out (`search.at_once`, study.py). A searched trial that failed for
a fault of its own counts, and is never suggested from. One that the machine or the configuration failed does not: it is
asked again, with its parameters, by the next run, and its search waits until then (others would be suggested without its
result); trials of the same search that are under way are finished and told.

With `search.prune` a searched trial is given out step by step (grid.STEPS), and goes no further once it cannot be chosen: it
is told as pruned, with what is known of it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from safecl import metrics as declared
from safecl.base import Damaged, Json, json_lines
from safecl.config import Sweep
from safecl.faults import Kind
from safecl.grid import STEPS, Cell, Job, standing
from safecl.objective import Trial, bounds, chosen, goals, hopeless, select, violations
from safecl.order import Claim
from safecl.store import Store, canonical

Metrics = dict[str, float | None]


class Study(Protocol):
    """What a schedule needs of study.CellStudy."""

    @property
    def remaining(self) -> int: ...
    @property
    def ready(self) -> bool: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def failures(self) -> list[str]: ...
    @property
    def pruned(self) -> list[str]: ...
    def ask(self) -> tuple[int, dict[str, Json]]: ...
    def tell(self, number: int, value: float | Mapping[str, float], violations: Mapping[str, float]) -> None: ...
    def fail(self, number: int, why: str) -> None: ...
    def before(self, number: int) -> list[Trial]: ...
    def prune(self, number: int, why: str, violations: Mapping[str, float], value: float | None = None) -> None: ...
    def release(self, number: int) -> None: ...
    def complete(self) -> list[Trial]: ...


class Done(NamedTuple):
    """A finished job: the metrics stage's result, or why there is none and what kind of failure that is. `pruned`: why it
    was ended early, with the result of its last step."""

    job: Job
    result: dict[str, Any] | None
    error: str
    kind: Kind | None = None
    pruned: str = ""


@dataclass
class _Queue:
    cell: Cell
    study: Study | None
    waiting: deque[Job] = field(default_factory=deque)  # jobs that are known and not yet given out
    # Metrics key of a searched job under way -> its trials' numbers: two trials of a batch may be one configuration.
    asked: dict[str, list[int]] = field(default_factory=dict)
    under_way: list[Job] = field(default_factory=list)
    chosen: list[Trial] = field(default_factory=list)
    finals_given: bool = False
    stalled: bool = False  # its search goes on in the next run
    priority: int = 0  # 0 the highest of the sweep's, others below
    share: float = 1.0
    num_given: int = 0
    turn: tuple[int, int, float, int] | None = None  # its place in Schedule._turns; None: it has no job to give

    @property
    def claim(self) -> Claim:
        """Of the job that is given out next."""
        return Claim(self.priority, int(self.cell.space is None), self.num_given / self.share)


class Schedule:
    """`next` gives a job out, `finish` takes its result; both only from the driver."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        cells: Sequence[Cell],
        study_of: Callable[[Cell], Study | None],
        on_done: Callable[[Done], None] | None = None,
    ) -> None:
        self.sweep, self.store, self.on_done = sweep, store, on_done
        self.done: list[Done] = []
        self.queues = [_Queue(cell, study_of(cell)) for cell in cells]
        standings = [standing(sweep, cell) for cell in cells]
        highest = max((its.priority for its in standings), default=0)
        for queue, its in zip(self.queues, standings, strict=True):
            queue.priority, queue.share = its.priority - highest, its.share
        # Cells that may have a job to give, in their turn. A search is a chain of trials, each of which waits for the one
        # before: what takes longest begins first.
        self._turns: list[tuple[int, int, float, int]] = []
        self._claims: dict[Job, Claim] = {}
        self._of_cell = {queue.cell: queue for queue in self.queues}
        self._number = {queue.cell: number for number, queue in enumerate(self.queues)}
        for queue in self.queues:
            for trial in queue.study.complete() if queue.study else ():
                queue.waiting.append(queue.cell.trial(trial.params))
            if queue.cell.space is None:
                self._give_finals(queue, {})
        for number in range(len(self.queues)):
            self._wake(number)

    @property
    def is_done(self) -> bool:
        return all((q.finals_given or q.stalled) and not q.waiting and not q.under_way for q in self.queues)

    def next(self) -> Job | None:
        """The next job that must really run, given out to the caller; None if none can start now. Jobs whose evidence
        is in the store are finished on the way."""
        while self._turns:
            turn = heapq.heappop(self._turns)
            queue = self.queues[number := turn[-1]]
            if turn != queue.turn:
                continue  # it has another one since
            queue.turn = None
            if (job := self._take(queue)) is None:
                continue  # until one of its jobs is finished
            self._claims[job] = queue.claim
            queue.num_given += 1
            queue.under_way.append(job)
            self._wake(number)
            if not self._is_stored(job):
                return job
            self.finish(job, "")
        return None

    def claim(self, job: Job) -> Claim:
        """Of a job given out by `next`: whose turn it is where devices are short."""
        return self._claims[job]

    def _wake(self, number: int) -> None:
        priority, rank, rounds = self.queues[number].claim
        turn = (-priority, rank, rounds, number)
        if turn != self.queues[number].turn:
            self.queues[number].turn = turn
            heapq.heappush(self._turns, turn)

    def finish(self, job: Job, error: str, kind: Kind = "infrastructure") -> None:
        """A job given out by `next` is over; its result is read from the store, unless it failed (`kind`)."""
        queue = self._of_cell[job.cell]
        queue.under_way.remove(job)
        metrics_stage = job.evidence.metrics
        result = None if error else self.store.record(metrics_stage)["result"]
        numbers, why = queue.asked.pop(metrics_stage.key, []), ""
        for number in numbers:
            assert queue.study is not None
            if result is not None and job.role in STEPS:
                error, kind, why = self._step(queue, number, job, values(result))
            elif result is not None:
                error, kind = self._tell(queue.study, number, job, values(result))
            if error and kind == "trial":
                queue.study.fail(number, error)
            elif error:
                queue.study.release(number)
                queue.stalled = True
        if job.role in STEPS and not error and not why:
            following = self._steps[self._steps.index(job.role) + 1]
            self._give(queue, queue.cell.trial(job.params, following), numbers)
            self._wake(self._number[queue.cell])
            return
        self._wake(self._number[queue.cell])
        self.done.append(Done(job, result, error, kind if error else None, why))
        if self.on_done is not None:
            self.on_done(self.done[-1])

    @property
    def _steps(self) -> list[str]:
        """What a searched trial goes through, in order; the last measures it whole."""
        steps = {"none": [], "bounds": ["search: attack", "search: utility"], "wilcoxon": list(STEPS)}
        return [*steps[self.sweep.search.prune], "search"]

    def _give(self, queue: _Queue, job: Job, numbers: Sequence[int]) -> bool:
        """Put a step of these trials next in turn; False where it is under way for others of the same values."""
        waits = job.evidence.metrics.key in queue.asked
        queue.asked.setdefault(job.evidence.metrics.key, []).extend(numbers)
        if not waits:
            queue.waiting.appendleft(job)
        return not waits

    def _step(self, queue: _Queue, number: int, job: Job, metrics: Metrics) -> tuple[str, Kind, str]:
        """After a step: whether its trial is pruned, and why; or why that cannot be said, and whose fault that is."""
        study, objective = queue.study, self.sweep.search.objective
        assert study is not None
        before, known = study.before(number), metrics
        limits: dict[str, float] = {}
        if job.is_bounded:
            limits, error, kind = self._limits(job)
            if error:
                return error, kind, ""
            # What is measured of other prompts too is not known yet.
            known = {name: value for name, value in metrics.items() if {*declared.of(name).roles} <= {*STEPS[job.role]}}
            why = hopeless(known, limits, objective.maximise, before)
        else:
            why = self._pilot(queue, job, before)
        if why:
            told = {name: limit for name, limit in limits.items() if known.get(name) is not None}
            study.prune(number, why, violations(known, told), known.get(objective.maximise))
        return "", "trial", why

    def _pilot(self, queue: _Queue, job: Job, before: Sequence[Trial]) -> str:
        from safecl.suggest import is_worse

        within = [trial for trial in before if trial.feasible]
        if not within:
            return ""
        best = select(within)
        answers = [self._utility(one) for one in (job, queue.cell.trial(best.params))]
        worse = None not in answers and is_worse(answers[0] or {}, answers[1] or {})
        return (
            f"its answers to {len(answers[0] or {})} utility prompts are worse than those of trial {best.number}"
            if worse
            else ""
        )

    def _utility(self, job: Job) -> dict[str, float] | None:
        """The maximised metric by utility prompt; None where the store does not hold it any more."""
        wanted = self.sweep.search.objective.maximise
        try:
            lines = json_lines(self.store.file(job.evidence.metrics, "outcomes.jsonl"))
        except (KeyError, Damaged):
            return None
        return {f"{o['set']} {o['id']}": o["value"] for o in lines
                if o["metric"] == wanted and o["value"] is not None}  # fmt: skip

    def _limits(self, job: Job) -> tuple[dict[str, float], str, Kind]:
        """The bounds of a job's metrics, which are measured from theta_safe's own on the same prompts; or why there are none,
        and whose fault that is."""
        safe = job.aligned.evidence.metrics
        if not self.store.sound(safe):
            return {}, "theta_safe's metrics were damaged, and are made again by the next run", "infrastructure"
        known = values(self.store.record(safe)["result"])
        objective = self.sweep.search.objective
        if job.role in STEPS:  # of the others nothing is known of theta_safe either
            kept = {name: bound for name, bound in objective.bounds.items() if name in known}
            objective = objective.model_copy(update={"bounds": kept})
        try:
            return bounds(objective, known), "", "trial"
        except ValueError as error:
            return {}, str(error), "configuration"

    def _tell(self, study: Study, number: int, job: Job, metrics: Metrics) -> tuple[str, Kind]:
        """Give a study its result; or why it can have none, and whose fault that is."""
        objective = self.sweep.search.objective
        limits, error, kind = self._limits(job)
        if error:
            return error, kind
        found = {name: metrics.get(name) for name in goals(objective)}
        told = {name: float("nan") if value is None else value for name, value in found.items()}
        try:
            study.tell(number, told if objective.pareto else told[objective.maximise], violations(metrics, limits))
        except ValueError as failed:
            return str(failed), "trial"
        return "", "trial"

    def missing(self) -> list[str]:
        """A line for every cell whose row is not complete for a failure, now or in an earlier run: what and why."""
        found = []
        for queue in self.queues:
            errors: dict[str, list[str]] = {}
            for done in self.done:
                is_missed = done.job.role == "final" or (queue.stalled and done.kind != "trial")
                if done.job.cell is queue.cell and done.error and is_missed:
                    at = (
                        f"seed {done.job.seed}" if done.job.role == "final" else f"search, {canonical(done.job.params)}"
                    )
                    errors.setdefault(done.error, []).append(at)
            if not errors and queue.study is not None and queue.study.is_done and not queue.study.complete():
                failures = queue.study.failures
                errors[failures[-1]] = [f"all {len(failures)} trials of its search failed, the last"]
            found += [f"{queue.cell.label} ({', '.join(where)}): {error}" for error, where in errors.items()]
        return found

    def close(self) -> None:
        """The run is over: searched trials that are still under way are asked again by the next one."""
        for queue in self.queues:
            for numbers in queue.asked.values():
                for number in numbers:
                    assert queue.study is not None
                    queue.study.release(number)
            queue.asked.clear()

    def give_back(self, job: Job) -> None:
        """Undo `next`: the job is given out again, first in its cell."""
        queue = self._of_cell[job.cell]
        queue.under_way.remove(job)
        queue.waiting.appendleft(job)
        queue.num_given -= 1
        self._wake(self._number[job.cell])

    def open_jobs(self) -> list[Job]:
        """Jobs under way and waiting. Trials that a search has yet to suggest are not known."""
        return [job for queue in self.queues for job in (*queue.under_way, *queue.waiting)]

    def searching(self) -> list[tuple[Cell, int]]:
        """Cells whose search goes on, each with how many trials it may still suggest; its final trials wait for them."""
        return [(q.cell, q.study.remaining) for q in self.queues if q.study and not (q.finals_given or q.stalled)]

    def num_unasked(self) -> int:
        """Trials that searches may still suggest, plus the final trials that wait for them."""
        return sum(remaining + len(self.sweep.seeds) for _, remaining in self.searching())

    def _take(self, queue: _Queue) -> Job | None:
        if queue.waiting:
            return queue.waiting.popleft()
        if queue.finals_given or queue.stalled or queue.study is None:
            return None
        while queue.study.remaining and queue.study.ready:
            number, params = queue.study.ask()
            if self._give(queue, queue.cell.trial(params, self._steps[0]), [number]):
                return queue.waiting.popleft()
        if not queue.study.is_done:
            return None  # what is under way decides what comes next
        finished = queue.study.complete()
        if not finished:
            queue.finals_given = True  # every trial failed: there is nothing to report but the failures
            return None
        queue.chosen = chosen(finished, self.sweep.search.objective)
        for trial in queue.chosen:
            self._give_finals(queue, trial.params)
        return queue.waiting.popleft()

    def _give_finals(self, queue: _Queue, params: dict[str, Json]) -> None:
        queue.finals_given = True
        queue.waiting.extend(queue.cell.job(params, seed, "final") for seed in self.sweep.seeds)

    def _is_stored(self, job: Job) -> bool:
        stages = [*job.evidence.targets, *([job.aligned.evidence.metrics] if job.is_bounded else [])]
        return all([self.store.sound(stage) for stage in stages])  # each: damaged ones make way


def values(result: Mapping[str, Any]) -> Metrics:
    """{metric: value} of a metrics stage's result."""
    return {name: entry["value"] for name, entry in result.items()}
