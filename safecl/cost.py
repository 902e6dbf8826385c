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

from safecl.config import Execution
from safecl.estimate import BOOT_S, Estimate, Estimator
from safecl.grid import Cell, Job
from safecl.store import Stage, Store, below

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
    return below(targets, store.has)


class Forecast:
    """Seconds of stages on this machine, corrected by what past ones took."""

    def __init__(self, store: Store, execution: Execution, estimator: Estimator) -> None:
        self.store, self.execution, self.estimator = store, execution, estimator
        self._estimates: dict[str, Estimate] = {}
        self._ratios: dict[tuple[str, str], list[float]] = {}  # measured / estimated
        self._of_kind: dict[str, list[float]] = {}
        self._engine: list[tuple[float, float, float]] = []  # (began, ended, estimated seconds)
        self._prior = 1.0 / execution.num_candidate_engines
        self._engine_ratio = self._prior
        self._factors: dict[tuple[str, str], float] = {}
        self.checked: dict[str, Checked] = {}
        self._inputs: dict[str, Stage | None] = {}  # of past stages
        self._learn_from_store()

    def estimate(self, stage: Stage) -> Estimate:
        if stage.key not in self._estimates:
            self._estimates[stage.key] = self.estimator(stage)
        return self._estimates[stage.key]

    def seconds(self, stage: Stage) -> float:
        """How long a stage will take: of one that needs an engine, how long it adds to the engine's work."""
        estimate = self.estimate(stage)
        return estimate.seconds * self.factor(estimate)

    def finished(self, stages: Iterable[tuple[Stage, float]], now: float) -> None:
        """Learn from stages of this run: each with the seconds it took; they ended at `now`."""
        for stage, seconds in stages:
            self._learn(self.estimate(stage), now - seconds, now)
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
            Todo(stage, self.estimate(stage), tuple(s.key for s in stage.inputs.values() if s.key in keys))
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
        for kind in (
            "model",
            "tokenizer",
            "data",
            "memory",
            "fisher",
            "finetune",
            "finalize",
            "generate",
            "likelihood",
            "judge",
            "metrics",
        ):
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
        for name in ("rows", "model", "memory", "replay", "generations", "safe"):
            if name in record["inputs"]:
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
    stages compute at once."""

    def __init__(self, forecast: Forecast, todo: Sequence[Todo], open_cells: Sequence[Open], slots: int) -> None:
        self.forecast, self.slots = forecast, slots
        self.kinds: dict[str, float] = defaultdict(float)  # seconds by kind
        self.later: Counter[str] = Counter()  # stages by kind of trials that are not suggested yet
        self._engine = 0.0  # of `kinds`, what engines do
        self._of = {item.stage.key: item for item in todo}
        waits: dict[str, float] = {}  # seconds of the longest chain of stages that waits for one
        chains: list[tuple[float, str]] = []  # of those that wait for none: the longest begins with one of them
        kinds, factor, of = self.kinds, forecast.factor, self._of
        for key in reversed(of):
            stage, estimate, needs = of[key]
            seconds = estimate.seconds * factor(estimate)
            kinds[stage.kind] += seconds
            if estimate.on_engine:
                self._engine += seconds
            chain = waits.get(key, 0.0) + seconds
            is_first = True
            for other in needs:
                if other in of:
                    is_first = False
                    if waits.get(other, 0.0) < chain:
                        waits[other] = chain
            if is_first:
                chains.append((chain, key))
        self._waits, self._chains = waits, sorted(chains, reverse=True)
        self._later_s = max((self._open(cell) for cell in open_cells), default=0.0)

    def _open(self, cell: Open) -> float:
        """Adds a cell's trials to come; gives the seconds of the chain they make: one after the other, then the finals."""
        first = cell.cell.trial({}).own
        finals = [cell.cell.job({}, seed, "final").own for seed in cell.seeds]
        for stages, num in ((first, cell.num_trials), *((own, 1) for own in finals)):
            for stage in stages:
                seconds = num * self.forecast.seconds(stage)
                self.kinds[stage.kind] += seconds
                self._engine += seconds if self.forecast.estimate(stage).on_engine else 0.0
                self.later[stage.kind] += num
        return cell.num_trials * self._chain(first) + max(map(self._chain, finals))

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
            if (item := self._of.get(key)) is None:
                continue
            whole = self.forecast.seconds(item.stage)
            left = max(whole - age, 0.1 * whole) if left is None else max(left, 0.0)
            if item.estimate.on_engine:
                engine -= whole - min(whole, left)  # its own pace counts the others' turns
            else:
                compute += left - whole
            longest = max(longest, left + self._waits.get(key, 0.0))
        longest = max(longest, next((chain for chain, key in self._chains if key not in running), 0.0))
        if self._engine:
            engine += boot_s
        local_cpu = not self.forecast.execution.use_gpu and self.forecast.execution.address == "local"
        shared = compute + (engine if local_cpu else 0.0)  # there the engine computes on the same cores
        return max(longest + self._later_s, engine, shared / self.slots, 0.0)


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
    uses: Counter[str] = Counter()
    stages: dict[str, Stage] = {}
    targets: list[Stage] = list(instruments)
    tops = list(instruments[-1:])
    for job in jobs:
        targets += job.evidence.targets
        tops.append(job.evidence.metrics)
    for top in tops:
        needed = top.walk()
        stages.update((stage.key, stage) for stage in needed)
        uses.update(stage.key for stage in needed)
    to_run = missing(targets, store)
    remaining = Remaining(forecast, forecast.todo(to_run), open_cells, slots(forecast.execution, num_devices))
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
    estimates = [forecast.estimate(stage) for stage in to_run]
    gib = sum(estimate.states_gib for estimate in estimates), sum(estimate.disk_gib for estimate in estimates)
    return Cost(table, remaining.seconds({}, BOOT_S) / 3600, *gib)
