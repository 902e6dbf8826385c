"""Which trial runs next: references, then each cell's search on validation prompts, then the chosen trials on test
prompts.

The same object serves a run (Ray Tune asks it), a rerun (all stages are in the store, so Ray is not started) and a
report (which may ask nothing). A job whose evidence is in the store is finished from there, whichever run made it.

The study limits how many trials of a search run at once (`search.at_once`, study.py). A searched trial that failed by
an error of its own counts as a trial, and no suggestion is based on it. A trial that failed by the machine or the
configuration does not count. The next run asks it again, with the same parameters. Its search waits until then, because
other suggestions would lack its result. Running trials of the same search are finished and told.

With `search.prune` a searched trial runs in steps (grid.STEPS). It stops as soon as it can no longer be chosen. The
study is then told that it was pruned, with what was measured.
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
from safecl.grid import STEPS, Cell, Job, standing, steps
from safecl.objective import Trial, bounds, chosen, goals, hopeless, select, violations
from safecl.order import Claim
from safecl.store import Store, canonical

Metrics = dict[str, float | None]


class Study(Protocol):
    """The part of study.CellStudy that a schedule uses."""

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
    """A finished job: the result of its metrics stage, or the error and its kind. `pruned`: why it was ended early;
    `result` is then that of its last step."""

    job: Job
    result: dict[str, Any] | None
    error: str
    kind: Kind | None = None
    pruned: str = ""


@dataclass
class _Queue:
    cell: Cell
    study: Study | None
    waiting: deque[Job] = field(default_factory=deque)  # known jobs that are not given out yet
    # Metrics key of a running searched job -> its trials' numbers. Two trials of a batch may have the same
    # configuration.
    asked: dict[str, list[int]] = field(default_factory=dict)
    under_way: list[Job] = field(default_factory=list)
    chosen: list[Trial] = field(default_factory=list)
    finals_given: bool = False
    stalled: bool = False  # its search continues in the next run
    priority: int = 0  # 0 is the sweep's highest priority; lower ones are negative
    share: float = 1.0
    num_given: int = 0
    turn: tuple[int, int, float, int] | None = None  # its entry in Schedule._turns; None: it has no job to give

    @property
    def claim(self) -> Claim:
        """Claim of its next job."""
        return Claim(self.priority, int(self.cell.space is None), self.num_given / self.share)


class Schedule:
    """The jobs of a sweep in order. `next` gives a job out, `finish` takes its result. Only the driver may call
    them."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        cells: Sequence[Cell],
        study_of: Callable[[Cell], Study | None],
        on_done: Callable[[Done], None] | None = None,
    ) -> None:
        self.sweep, self.store, self.on_done = sweep, store, on_done
        self._steps = steps(sweep)
        self.done: list[Done] = []
        self.queues = [_Queue(cell, study_of(cell)) for cell in cells]
        standings = [standing(sweep, cell) for cell in cells]
        highest = max((its.priority for its in standings), default=0)
        for queue, its in zip(self.queues, standings, strict=True):
            queue.priority, queue.share = its.priority - highest, its.share
        # Cells that may have a job to give, in order. A search is a chain of trials, each of which waits for the one
        # before. It takes longest, so it begins first.
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
        """Whether no job is left to give out or running. A search that waits for the next run does not count."""
        return all((q.finals_given or q.stalled) and not q.waiting and not q.under_way for q in self.queues)

    def next(self) -> Job | None:
        """The next job that must run, given out to the caller. None if none can start now. Jobs whose evidence is in
        the store are finished here, without running."""
        while self._turns:
            turn = heapq.heappop(self._turns)
            queue = self.queues[number := turn[-1]]
            if turn != queue.turn:
                continue  # an outdated entry: the queue has a newer one
            queue.turn = None
            if (job := self._take(queue)) is None:
                continue  # it gets a new entry when one of its jobs is finished
            self._claims[job] = queue.claim
            queue.num_given += 1
            queue.under_way.append(job)
            self._wake(number)
            if not self._is_stored(job):
                return job
            self.finish(job, "")
        return None

    def claim(self, job: Job) -> Claim:
        """Claim of a job that `next` gave out: it orders jobs where devices are short."""
        return self._claims[job]

    def _wake(self, number: int) -> None:
        priority, rank, rounds = self.queues[number].claim
        turn = (-priority, rank, rounds, number)
        if turn != self.queues[number].turn:
            self.queues[number].turn = turn
            heapq.heappush(self._turns, turn)

    def finish(self, job: Job, error: str, kind: Kind = "infrastructure") -> None:
        """End a job that `next` gave out. Its result is read from the store, unless it failed (`error`, `kind`)."""
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

    def _give(self, queue: _Queue, job: Job, numbers: Sequence[int]) -> bool:
        """Queue a step of these trials first. False if the same step already runs for trials with the same values."""
        waits = job.evidence.metrics.key in queue.asked
        queue.asked.setdefault(job.evidence.metrics.key, []).extend(numbers)
        if not waits:
            queue.waiting.appendleft(job)
        return not waits

    def _step(self, queue: _Queue, number: int, job: Job, metrics: Metrics) -> tuple[str, Kind, str]:
        """After a step: why its trial is pruned ("" if it is not). Or an error and its kind, if that cannot be
        decided."""
        study, objective = queue.study, self.sweep.search.objective
        assert study is not None
        before, known = study.before(number), metrics
        limits: dict[str, float] = {}
        if job.is_bounded:
            limits, error, kind = self._limits(job)
            if error:
                return error, kind, ""
            # Metrics that also need other prompts are not known yet.
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
        """The maximised metric by utility prompt. None if the store does not hold it any more."""
        wanted = self.sweep.search.objective.maximise
        try:
            lines = json_lines(self.store.file(job.evidence.metrics, "outcomes.jsonl"))
        except (KeyError, Damaged):
            return None
        return {f"{o['set']} {o['id']}": o["value"] for o in lines
                if o["metric"] == wanted and o["value"] is not None}  # fmt: skip

    def _limits(self, job: Job) -> tuple[dict[str, float], str, Kind]:
        """The bounds of a job's metrics as numbers, relative to theta_safe's metrics on the same prompts. Or an error
        and its kind."""
        safe = job.aligned.evidence.metrics
        if not self.store.sound(safe):
            return {}, "theta_safe's metrics were damaged, and are made again by the next run", "infrastructure"
        known = values(self.store.record(safe)["result"])
        objective = self.sweep.search.objective
        if job.role in STEPS:  # theta_safe's other metrics are not known yet either
            kept = {name: bound for name, bound in objective.bounds.items() if name in known}
            objective = objective.model_copy(update={"bounds": kept})
        try:
            return bounds(objective, known), "", "trial"
        except ValueError as error:
            return {}, str(error), "configuration"

    def _tell(self, study: Study, number: int, job: Job, metrics: Metrics) -> tuple[str, Kind]:
        """Tell a study its trial's result. Returns an error and its kind if it can have none."""
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
        """One line for each cell whose row is incomplete after a failure in this or an earlier run: what failed and
        why."""
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
        """End the run. Searched trials that still run are released; the next run asks them again."""
        for queue in self.queues:
            for numbers in queue.asked.values():
                for number in numbers:
                    assert queue.study is not None
                    queue.study.release(number)
            queue.asked.clear()

    def give_back(self, job: Job) -> None:
        """Undo `next`: the job is given out again, as the first of its cell."""
        queue = self._of_cell[job.cell]
        queue.under_way.remove(job)
        queue.waiting.appendleft(job)
        queue.num_given -= 1
        self._wake(self._number[job.cell])

    def open_jobs(self) -> list[Job]:
        """Running and waiting jobs. Trials that a search has yet to suggest are not included."""
        return [job for queue in self.queues for job in (*queue.under_way, *queue.waiting)]

    def searching(self) -> list[tuple[Cell, int]]:
        """Cells whose search continues, each with the number of trials it may still suggest. Their final trials wait
        for these."""
        return [(q.cell, q.study.remaining) for q in self.queues if q.study and not (q.finals_given or q.stalled)]

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
            return None  # the running trials decide what comes next
        finished = queue.study.complete()
        if not finished:
            queue.finals_given = True  # every trial failed: only the failures can be reported
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
        return all([self.store.sound(stage) for stage in stages])  # a list, so that each damaged stage is moved away


def values(result: Mapping[str, Any]) -> Metrics:
    """{metric: value} of a metrics stage's result."""
    return {name: entry["value"] for name, entry in result.items()}
