"""What a run would do, and for how long: stages that must run, are finished or are shared; hours of each kind; time left.

A stage's time is estimate.py's, corrected by what past stages took: by the median of measured over estimated among stages
of its kind and method (or judge), else of its kind, the estimate itself (1) among them. Stages that wait for one engine
overlap, so there the time in which any of them ran counts, against all their estimates.
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
from safecl.estimate import BOOT_S, Estimate, Estimator
from safecl.grid import Cell, Job
from safecl.stages import load, names
from safecl.store import Stage, Store, below

Places = NDArray[np.int64]
_LAST = 500  # stages of an engine that its pace is read from
# The first stage that an engine finishes waited with others for it, and says little: estimates weigh as much as this.
PRIOR_S = 30.0


class Open(NamedTuple):
    """A cell whose search goes on: so many trials it may still suggest, and then its final ones on these seeds."""

    cell: Cell
    num_trials: int
    seeds: tuple[int, ...]


class Count(NamedTuple):
    """Stages of one kind: how many must run, come with trials that a search has yet to suggest, are finished, and how often
    one was needed again (shared). `hours` of all that are still to run."""

    to_run: int
    later: int
    cached: int
    shared: int
    hours: float


class Cost(NamedTuple):
    """`hours`: until all is finished, on this machine. `states_gib`: of hidden states that will be written (LwF's teacher,
    DER's memory); `disk_gib`: of these and of weights, beside which the rest of a store is small."""

    kinds: dict[str, Count]
    hours: float
    states_gib: float
    disk_gib: float = 0.0


class Checked(NamedTuple):
    """Estimates against records, in seconds: of stages of one kind that this store holds; all that need an engine are one
    kind, and recorded of them is how long any was under way."""

    num: int
    estimated_s: float
    recorded_s: float


def missing(targets: Iterable[Stage], store: Store) -> list[Stage]:
    """The stages that must run, inputs first, so that every target is finished. A finished stage's inputs are not
    needed: they may have been pruned."""
    return below(targets, store.listed())


class Forecast:
    """Seconds of stages on this machine, corrected by what past ones took."""

    def __init__(self, store: Store, execution: Execution, estimator: Estimator, learns: bool = True) -> None:
        """`learns`: from the records of the store; without, estimates are of other machines."""
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
        """How long a stage will take: of one that needs an engine, how long it adds to the engine's work."""
        estimate = self.estimator(stage)
        return estimate.seconds * self.factor(estimate)

    def finished(self, stages: Iterable[tuple[Stage, float]], now: float) -> None:
        """Learn from stages of this run: each with the seconds it took; they ended at `now`."""
        for stage, seconds in stages:
            self._learn(self.estimator(stage), now - seconds, now)
        self._settle()

    def factor(self, estimate: Estimate) -> float:
        """What the records so far say to multiply an estimate with."""
        if estimate.on_engine:
            return self._engine_ratio
        group = estimate.group
        if group not in self._factors:
            past = self._ratios.get(group) or self._of_kind.get(group[0])
            self._factors[group] = median([1.0, *past]) if past else 1.0  # the estimate is one of them
        return self._factors[group]

    def todo(self, stages: Sequence[Stage]) -> list[Todo]:
        """Stages that must all be run, inputs first, as `Remaining` takes them."""
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
        """A stage of the store, with as much of its inputs as an estimate reads; None where those were pruned."""
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
    """Seconds in which at least one of these (began, ended, ...) was under way."""
    total, until = 0.0, float("-inf")
    for began, ended, _ in sorted(intervals):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


class Todo(NamedTuple):
    """A stage to be run, with the keys of those inputs that must be run before it."""

    stage: Stage
    estimate: Estimate
    needs: tuple[str, ...]


class Remaining:
    """Stages still to be run, inputs first, and trials that searches have yet to suggest, as time. `slots`: how many
    stages compute at once. `finish` and `settle` follow a run; of thousands of stages each is a matter of milliseconds."""

    def __init__(self, forecast: Forecast, todo: Sequence[Todo], open_cells: Sequence[Open], slots: int) -> None:
        self.forecast, self.slots = forecast, slots
        self._items = list(todo)
        self._at = {item.stage.key: place for place, item in enumerate(todo)}
        at = self._at
        self._left = np.ones(len(todo), dtype=bool)  # whether it is still to be run
        self._estimated = np.array([item.estimate.seconds for item in todo])
        self._steps = _steps([[at[key] for key in item.needs if key in at] for item in todo])
        groups: dict[tuple[str, str, bool], int] = {}  # (kind, its part, on an engine) -> number
        of = [groups.setdefault((*item.estimate.group, item.estimate.on_engine), len(groups)) for item in todo]
        one_of = dict(zip(reversed(of), reversed(self._items), strict=True))
        self._group = np.array(of, dtype=np.int64)
        self._groups = [one_of[group] for group in range(len(groups))]  # an item of each
        self.settle(open_cells)

    def finish(self, keys: Iterable[str]) -> None:
        """These are done."""
        for key in keys:
            if (place := self._at.get(key)) is not None:
                self._left[place] = False

    def settle(self, open_cells: Sequence[Open]) -> None:
        """Count anew what is left, by what the forecast has learnt since."""
        self.kinds: dict[str, float] = defaultdict(float)  # seconds by kind
        self.later: Counter[str] = Counter()  # stages by kind of trials that are not suggested yet
        self._engine = 0.0  # of `kinds`, what engines do
        left, factors = self._left, np.array([self.forecast.factor(item.estimate) for item in self._groups])
        seconds = self._estimated * factors[self._group] * left if len(left) else self._estimated
        waits = np.zeros(len(left))  # seconds of the longest chain of stages that waits for one
        is_first = left.copy()  # waits for none
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
        # Of those that wait for none: the longest chain begins with one of them.
        self._waits, self._chains = waits, list(zip(chains[order].tolist(), first[order].tolist(), strict=True))
        self._later_s = max((self._open(cell) for cell in open_cells), default=0.0)

    def _open(self, cell: Open) -> float:
        """Adds a cell's trials to come; gives the seconds of the chain they make: batch after batch, then the finals."""
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
        """Until all is finished. `running`: of stages under way, how long already, and how long still at their own pace
        where that is known; `boot_s`: until an engine can answer."""
        engine, compute, longest = self._engine, sum(self.kinds.values()) - self._engine, 0.0
        for key, (age, left) in running.items():
            place = self._at.get(key)
            if place is None or not self._left[place]:
                continue
            item = self._items[place]
            whole = self.forecast.seconds(item.stage)
            left = max(whole - age, 0.1 * whole) if left is None else max(left, 0.0)
            if item.estimate.on_engine:
                engine -= whole - min(whole, left)  # its own pace counts the others' turns
            else:
                compute += left - whole
            longest = max(longest, left + float(self._waits[place]))
        longest = max(
            longest, next((chain for chain, place in self._chains if self._items[place].stage.key not in running), 0.0)
        )
        if self._engine:
            engine += boot_s
        local_cpu = not self.forecast.execution.use_gpu and self.forecast.execution.address == "local"
        shared = compute + (engine if local_cpu else 0.0)  # there the engine computes on the same cores
        return max(longest + self._later_s, engine, shared / self.slots, 0.0)


def _steps(needs: Sequence[Sequence[int]]) -> list[tuple[Places, Places]]:
    """(stages, those they wait for) in pairs, in an order in which a stage comes as the first of a pair once it has come as
    the second of all of its own. `needs`: places of what each waits for, all before it."""
    depth = [0] * len(needs)  # how many stages at most wait for one, in a row
    pairs: dict[int, tuple[list[int], list[int]]] = {}
    for place in range(len(needs) - 1, -1, -1):
        stages, others = pairs.setdefault(depth[place], ([], []))
        for other in needs[place]:
            depth[other] = max(depth[other], depth[place] + 1)
            stages.append(place)
            others.append(other)
    return [(np.array(pairs[at][0], np.int64), np.array(pairs[at][1], np.int64)) for at in sorted(pairs)]


def rounds(cell: Open, execution: Execution) -> int:
    """How many of a cell's trials to come wait for one another. Those that fill a batch begun run beside it."""
    at_once, num = min(cell.cell.at_once, execution.num_trials_at_once), cell.cell.num_trials
    return -(-num // at_once) - -(-(num - cell.num_trials) // at_once)


def slots(execution: Execution, num_devices: int) -> int:
    """How many finetunes compute at once on so many CPUs (GPUs): the trainers there are (trainers.py)."""
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
    """What running these jobs and the searches still open would take, with the stages that measure the judges."""
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
    states_gib = sum(item.estimate.states_gib for item in todo)
    disk_gib = states_gib + sum(item.estimate.weights_gib for item in todo)
    return Cost(table, remaining.seconds({}, BOOT_S) / 3600, states_gib, disk_gib)


def _uses(tops: Iterable[Stage]) -> tuple[dict[str, Stage], Counter[str]]:
    """All stages at or below these, and for how many of them each is needed."""
    stages: dict[str, Stage] = {}
    uses: Counter[str] = Counter()
    below: dict[str, frozenset[str]] = {}  # of what was met again: most of a trial is shared, and counted as a whole

    def all_below(stage: Stage) -> frozenset[str]:
        if stage.key not in below:
            below[stage.key] = frozenset([stage.key]).union(*map(all_below, stage.inputs.values()))
        return below[stage.key]

    def visit(stage: Stage, found: set[str]) -> None:
        """Of what was not met yet."""
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
