"""What a run would do and how long it takes: which stages must run, are finished or are shared, hours by kind, time left.

A stage's time is the estimate of estimate.py times a factor learnt from past stages. The factor is the median of measured /
estimated time over stages of the same kind and method (or judge), or, without these, of the same kind. The value 1 (the
estimate itself) counts as one more stage. Stages that wait for one engine overlap. For them the factor is the time in which
any of them ran, divided by the sum of all their estimates.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safecl.config import Execution
from safecl.estimate import Estimate, Estimator
from safecl.grid import Cell, Job
from safecl.stages import load, names
from safecl.store import Stage, Store, below

Places = NDArray[np.int64]
_LAST = 500  # an engine's pace is read from so many stages, the latest
# The first stage that an engine finishes has waited for it together with others, so its time says little. The estimate
# therefore counts like so many seconds of finished work.
PRIOR_S = 30.0


class Open(NamedTuple):
    """A cell whose search goes on. The search may still suggest `num_trials` trials; then come the final trials, one on each
    of `seeds`."""

    cell: Cell
    num_trials: int
    seeds: tuple[int, ...]


class Count(NamedTuple):
    """Counts of the stages of one kind.

    Attributes:
        to_run: stages that must run.
        later: stages of trials that a search has yet to suggest.
        cached: stages that are finished in the store.
        shared: uses beyond the first. A stage that three trials need counts 2 here.
        hours: time of all stages that are still to run, those of `later` included.
    """

    to_run: int
    later: int
    cached: int
    shared: int
    hours: float


class Cost(NamedTuple):
    """What a run takes.

    Attributes:
        kinds: counts by kind of stage.
        hours: time until everything is finished, on this machine.
        states_gib: GiB of hidden states that will be written (LwF's teacher, DER's memory).
        disk_gib: GiB of hidden states and of weights that will be written. The rest of a store is small beside these.
    """

    kinds: dict[str, Count]
    hours: float
    states_gib: float
    disk_gib: float = 0.0


class Checked(NamedTuple):
    """Estimated and recorded seconds of the `num` stages of one kind that this store holds.

    All stages that need an engine count as one kind. Their recorded time is the time in which at least one of them ran.
    """

    num: int
    estimated_s: float
    recorded_s: float


def missing(targets: Iterable[Stage], store: Store) -> list[Stage]:
    """Return the stages that must run so that every target is finished, inputs first.

    Inputs of a finished stage are not needed, and may have been pruned from the store.
    """
    return below(targets, store.listed())


class Forecast:
    """Predicts the seconds of stages on this machine, corrected by what past stages took."""

    def __init__(self, store: Store, execution: Execution, estimator: Estimator, learns: bool = True) -> None:
        """`learns`: learn from the records of the store. False for estimates of other machines."""
        self.store, self.execution, self.estimator = store, execution, estimator
        self._ratios: dict[tuple[str, str], list[float]] = {}  # measured / estimated
        self._of_kind: dict[str, list[float]] = {}
        self._engine: list[tuple[float, float, float]] = []  # (began, ended, estimated seconds)
        self._prior = 1.0 / execution.num_candidate_engines
        self._engine_ratio = self._prior
        self._factors: dict[tuple[str, str], float] = {}
        self.checked: dict[str, Checked] = {}
        self._inputs: dict[str, Stage | None] = {}  # of past stages
        if learns:
            self._learn_from_store()

    def seconds(self, stage: Stage) -> float:
        """Return the seconds that a stage will take. For a stage that needs an engine: the seconds of work that it adds to it."""
        estimate = self.estimator(stage)
        return estimate.seconds * self.factor(estimate)

    def finished(self, stages: Iterable[tuple[Stage, float]], now: float) -> None:
        """Learn from stages of this run. Each comes with the seconds it took; all ended at `now` (seconds since the epoch)."""
        for stage, seconds in stages:
            self._learn(self.estimator(stage), now - seconds, now)
        self._settle()

    def factor(self, estimate: Estimate) -> float:
        """Return the number by which the estimate must be multiplied, learnt from the records so far."""
        if estimate.on_engine:
            return self._engine_ratio
        group = estimate.group
        if group not in self._factors:
            past = self._ratios.get(group) or self._of_kind.get(group[0])
            self._factors[group] = median([1.0, *past]) if past else 1.0  # the estimate is one of them
        return self._factors[group]

    def todo(self, stages: Sequence[Stage]) -> list[Todo]:
        """Return stages that must all be run, inputs first, in the form that `Remaining` takes."""
        keys = {stage.key for stage in stages}
        return [
            Todo(stage, self.estimator(stage), tuple([s.key for s in stage.inputs.values() if s.key in keys]))
            for stage in stages
        ]

    def _learn(self, estimate: Estimate, began: float, ended: float) -> None:
        if estimate.on_engine:
            self._engine.append((began, ended, estimate.seconds))
        else:
            ratio = (ended - began) / estimate.seconds
            self._ratios.setdefault(estimate.group, []).append(ratio)
            self._of_kind.setdefault(estimate.group[0], []).append(ratio)

    def _settle(self) -> None:
        self._factors.clear()
        self._engine = sorted(self._engine)[-_LAST:]
        if self._engine:
            estimated = sum(estimated for _, _, estimated in self._engine)
            self._engine_ratio = (busy(self._engine) + self._prior * PRIOR_S) / (estimated + PRIOR_S)

    def _learn_from_store(self) -> None:
        for kind in names():
            pairs = []
            for record in self.store.records(kind):
                stage = self._remembered(record)
                if stage is None:
                    continue
                estimate, ended = self.estimator(stage), datetime.fromisoformat(record["created"]).timestamp()
                self._learn(estimate, ended - record["seconds"], ended)
                if not estimate.on_engine:
                    pairs.append((estimate.seconds, float(record["seconds"])))
            if pairs:
                self.checked[kind] = Checked(len(pairs), *(sum(column) for column in zip(*pairs, strict=True)))
        if self._engine:
            estimated = sum(estimated for _, _, estimated in self._engine)
            self.checked["engine"] = Checked(len(self._engine), estimated, busy(self._engine))
        self._settle()

    def _remembered(self, record: dict[str, Any]) -> Stage | None:
        """A stage of the store with the inputs that an estimate reads; None if one of these was pruned."""
        inputs = {}
        for name in record["inputs"]:
            if name.partition(".")[0] in load(record["kind"]).reads:
                found = self._input(record["inputs"][name])
                if found is None:
                    return None
                inputs[name] = found
        return Stage.of(record, inputs)

    def _input(self, key: str) -> Stage | None:
        if key not in self._inputs:
            record = self.store.by_key(key)
            self._inputs[key] = None
            if record is not None:
                inputs = {
                    name: self._input(record["inputs"][name]) for name in record["inputs"].keys() & {"rows", "model"}
                }
                self._inputs[key] = Stage.of(
                    record, {name: stage for name, stage in inputs.items() if stage is not None}
                )
        return self._inputs[key]


def busy(intervals: Iterable[tuple[float, float, float]]) -> float:
    """Return the seconds in which at least one of these intervals (began, ended, ...) was under way."""
    total, until = 0.0, float("-inf")
    for began, ended, _ in sorted(intervals):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


class Todo(NamedTuple):
    """A stage to be run. `needs`: keys of the inputs that must be run before it."""

    stage: Stage
    estimate: Estimate
    needs: tuple[str, ...]


class Remaining:
    """The time of stages still to be run and of trials that searches have yet to suggest.

    `finish` and `settle` follow a run. Each takes milliseconds for thousands of stages.

    Args:
        todo: the stages, inputs first.
        open_cells: cells whose search goes on.
        slots: how many stages compute at once.
    """

    def __init__(self, forecast: Forecast, todo: Sequence[Todo], open_cells: Sequence[Open], slots: int) -> None:
        self.forecast, self.slots = forecast, slots
        self._items = list(todo)
        self._at = {item.stage.key: place for place, item in enumerate(todo)}
        at = self._at
        self._left = np.ones(len(todo), dtype=bool)  # whether it is still to be run
        self._estimated = np.array([item.estimate.seconds for item in todo])
        self._steps = _steps([[at[key] for key in item.needs if key in at] for item in todo])
        groups: dict[tuple[str, str, bool], int] = {}  # (kind, method or judge, whether on an engine) -> number
        of = [groups.setdefault((*item.estimate.group, item.estimate.on_engine), len(groups)) for item in todo]
        one_of = dict(zip(reversed(of), reversed(self._items), strict=True))
        self._group = np.array(of, dtype=np.int64)
        self._groups = [one_of[group] for group in range(len(groups))]  # one item of each group
        self.settle(open_cells)

    def finish(self, keys: Iterable[str]) -> None:
        """Mark these stages as done."""
        for key in keys:
            if (place := self._at.get(key)) is not None:
                self._left[place] = False

    def settle(self, open_cells: Sequence[Open]) -> None:
        """Count what is left again, with what the forecast has learnt since."""
        self.kinds: dict[str, float] = defaultdict(float)  # seconds by kind
        self.later: Counter[str] = Counter()  # stages of trials that are not suggested yet, by kind
        self._engine = 0.0  # the seconds of `kinds` that engines work
        left, factors = self._left, np.array([self.forecast.factor(item.estimate) for item in self._groups])
        seconds = self._estimated * factors[self._group] * left if len(left) else self._estimated
        waits = np.zeros(len(left))  # seconds of the longest chain of stages that waits for a stage
        is_first = left.copy()  # whether it waits for no other stage
        for stages, others in self._steps:
            np.maximum.at(waits, others, (waits + seconds)[stages] * left[stages])
            is_first[stages[left[others]]] = False
        sums = np.bincount(self._group, seconds, len(factors)).tolist()
        for item, of_group in zip(self._groups, sums, strict=True):
            self.kinds[item.stage.kind] += of_group
            self._engine += of_group if item.estimate.on_engine else 0.0
        first = np.flatnonzero(is_first)
        chains = (waits + seconds)[first]
        order = np.argsort(-chains)
        # Only of stages that wait for no other: the longest chain begins with one of them.
        self._waits, self._chains = waits, list(zip(chains[order].tolist(), first[order].tolist(), strict=True))
        self._later_s = max((self._open(cell) for cell in open_cells), default=0.0)

    def _open(self, cell: Open) -> float:
        """Add the trials that a cell still gets to the counts. Returns the seconds of their chain: the search's trials, batch
        after batch, then the longest final trial."""
        first = cell.cell.trial({}).own
        finals = [cell.cell.job({}, seed, "final").own for seed in cell.seeds]
        for stages, num in ((first, cell.num_trials), *((own, 1) for own in finals)):
            for stage in stages:
                seconds = num * self.forecast.seconds(stage)
                self.kinds[stage.kind] += seconds
                self._engine += seconds if self.forecast.estimator(stage).on_engine else 0.0
                self.later[stage.kind] += num
        return rounds(cell, self.forecast.execution) * self._chain(first) + max(map(self._chain, finals))

    def _chain(self, stages: Sequence[Stage]) -> float:
        ends: dict[str, float] = {}
        for stage in stages:
            before = max((ends.get(other.key, 0.0) for other in stage.inputs.values()), default=0.0)
            ends[stage.key] = before + self.forecast.seconds(stage)
        return max(ends.values(), default=0.0)

    def seconds(self, running: Mapping[str, tuple[float, float | None]], boot_s: float = 0.0) -> float:
        """Return the seconds until everything is finished.

        Args:
            running: by key of a stage under way, (seconds since it began, seconds left at its own pace). None as the second
                where the pace is not known.
            boot_s: seconds until an engine can answer.
        """
        engine, compute, longest = self._engine, sum(self.kinds.values()) - self._engine, 0.0
        for key, (age, left) in running.items():
            place = self._at.get(key)
            if place is None or not self._left[place]:
                continue
            item = self._items[place]
            whole = self.forecast.seconds(item.stage)
            left = max(whole - age, 0.1 * whole) if left is None else max(left, 0.0)
            if item.estimate.on_engine:
                engine -= whole - min(whole, left)  # its own pace includes the engine's work for other stages
            else:
                compute += left - whole
            longest = max(longest, left + float(self._waits[place]))
        longest = max(
            longest, next((chain for chain, place in self._chains if self._items[place].stage.key not in running), 0.0)
        )
        if self._engine:
            engine += boot_s
        local_cpu = not self.forecast.execution.use_gpu and self.forecast.execution.address == "local"
        shared = compute + (engine if local_cpu else 0.0)  # on a local CPU the engine computes on the same cores
        return max(longest + self._later_s, engine, shared / self.slots, 0.0)


def _steps(needs: Sequence[Sequence[int]]) -> list[tuple[Places, Places]]:
    """Pairs (stages, stages that these wait for), in batches. A stage is the first of a pair only in a later batch than all
    pairs in which it is the second.

    Args:
        needs: for each stage the places of the stages it waits for. All of them come before it.
    """
    depth = [0] * len(needs)  # number of stages in the longest chain that waits for this stage
    pairs: dict[int, tuple[list[int], list[int]]] = {}
    for place in range(len(needs) - 1, -1, -1):
        stages, others = pairs.setdefault(depth[place], ([], []))
        for other in needs[place]:
            depth[other] = max(depth[other], depth[place] + 1)
            stages.append(place)
            others.append(other)
    return [(np.array(pairs[at][0], np.int64), np.array(pairs[at][1], np.int64)) for at in sorted(pairs)]


def rounds(cell: Open, execution: Execution) -> int:
    """Return how many batches of a cell's remaining trials run one after the other. Trials that fill a batch which has already
    begun run beside it."""
    at_once, num = min(cell.cell.at_once, execution.num_trials_at_once), cell.cell.num_trials
    return -(-num // at_once) - -(-(num - cell.num_trials) // at_once)


def slots(execution: Execution, num_devices: int) -> int:
    """Return how many finetunes compute at once on `num_devices` CPUs (GPUs): the number of trainers (trainers.py)."""
    engines = execution.num_candidate_engines + execution.num_judge_replicas if execution.use_gpu else 0
    return max(1, min((num_devices - engines) // execution.num_workers, execution.num_trials_at_once))


def cost(
    jobs: Iterable[Job],
    open_cells: Sequence[Open],
    store: Store,
    forecast: Forecast,
    num_devices: int,
    instruments: Sequence[Stage] = (),
) -> Cost:
    """Return what these jobs and the searches still open take.

    Args:
        num_devices: GPUs, or CPUs without `use_gpu`.
        instruments: stages that measure the judges.
    """
    targets: list[Stage] = list(instruments)
    tops = list(instruments[-1:])
    for job in jobs:
        targets += job.evidence.targets
        tops.append(job.evidence.metrics)
    stages, uses = _uses(tops)
    to_run = missing(targets, store)
    todo = forecast.todo(to_run)
    remaining = Remaining(forecast, todo, open_cells, slots(forecast.execution, num_devices))
    keys = {stage.key for stage in to_run}
    by_kind: dict[str, list[str]] = {}
    for key, stage in stages.items():
        by_kind.setdefault(stage.kind, []).append(key)
    table = {}
    for kind, of_kind in by_kind.items():
        num_run = sum(key in keys for key in of_kind)
        shared = sum(uses[key] - 1 for key in of_kind)
        hours = remaining.kinds[kind] / 3600
        table[kind] = Count(num_run, remaining.later[kind], len(of_kind) - num_run, shared, hours)
    states_gib = weights_gib = 0.0
    for item in todo:
        states_gib += item.estimate.states_gib
        weights_gib += item.estimate.weights_gib
    return Cost(table, remaining.seconds({}, forecast.estimator.boot_s) / 3600, states_gib, states_gib + weights_gib)


def _uses(tops: Iterable[Stage]) -> tuple[dict[str, Stage], Counter[str]]:
    """All stages at or below `tops`, and for how many of the tops each stage is needed."""
    stages: dict[str, Stage] = {}
    uses: Counter[str] = Counter()
    below: dict[str, frozenset[str]] = {}  # of stages met again: most of a trial is shared, and is counted as a whole

    def all_below(stage: Stage) -> frozenset[str]:
        if stage.key not in below:
            below[stage.key] = frozenset([stage.key]).union(*map(all_below, stage.inputs.values()))
        return below[stage.key]

    def visit(stage: Stage, found: set[str]) -> None:
        """Collect the stages below one that was not met before."""
        for other in stage.inputs.values():
            key = other.key
            if key not in found:
                if key in stages:
                    found |= all_below(other)
                else:
                    visit(other, found)
        stages[stage.key] = stage
        found.add(stage.key)

    for top in tops:
        found: set[str] = set()
        if top.key in stages:
            found |= all_below(top)
        else:
            visit(top, found)
        uses.update(found)
    return stages, uses
