"""Plans a sweep on a cluster that need not exist: `plan --cluster`. The stages to run become arrays once; simulate.py
runs them on any number of nodes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from safecl.base import ConfigError
from safecl.clusterfile import Cluster, NodeType
from safecl.config import Execution
from safecl.cost import Forecast
from safecl.estimate import Estimator
from safecl.grid import Cell as Row
from safecl.grid import Job, standing
from safecl.hardware import Speed
from safecl.project import Project, trials
from safecl.report.tables import duration
from safecl.simulate import Schedule, simulate
from safecl.stages import engine_of, load, needs_trainer
from safecl.store import Stage
from safecl.workload import LIGHT, TRAINERS, Bounds, Cell, Grid, Group, Node

TRAINER_S = 20.0  # seconds of a trainer's start: torch, transformers and Ray Train
START_S = 10.0  # seconds of Ray's start, before anything runs
FEW = 200_000  # stages that all rows of the table of GPUs together may simulate, at 30,000 per second


class _Piece(NamedTuple):
    """What the arrays hold of each of many stages that are alike (Estimator.alike)."""

    group: int
    seconds: float
    ranks: int
    resumes: bool
    weights_gib: float
    states_gib: float


class Rehearsal(NamedTuple):
    """A sweep as arrays. `stages`: by number; a trial that a search has yet to suggest is a copy, and has the stages
    that it copies. `weights_gib`, `states_gib`: sizes that will be written. `largest`: the size of each model's weights
    in GiB, by model name."""

    grid: Grid
    stages: list[Stage]
    num_trials: int
    weights_gib: float
    states_gib: float
    largest: dict[str, float]


def rehearsal(project: Project, cluster: Cluster) -> Rehearsal:
    """The part of a sweep that must still be run, as arrays."""
    execution = project.sweep.execution
    return _Builder(project, _forecast(project, cluster), execution, cluster).build()


def _forecast(project: Project, cluster: Cluster) -> Forecast:
    """A forecast for machines like those of the records. If the cluster file gives the nodes' speed, for nodes of that
    speed."""
    execution, told = project.sweep.execution, cluster.nodes[0].tflops
    if told is None:
        return project.forecast()
    speed = {name: Speed(1000 * told, 1000 * told) for name in ("bfloat16", "float32")}
    return Forecast(project.store, execution, Estimator(project.store, execution, speed), learns=False)


class _Builder:
    def __init__(self, project: Project, forecast: Forecast, execution: Execution, cluster: Cluster) -> None:
        self.project, self.forecast, self.execution, self.cluster = project, forecast, execution, cluster
        self.grid = Grid([
            Group("trainers", "training", execution.num_workers * execution.worker_units, 1, TRAINER_S, execution.num_workers),
            Group("light", "light", 0.0, 0, 0.0),
        ], checkpoint_s=execution.checkpoint_every_s)  # fmt: skip
        self.has = project.store.listed()
        self.stages: list[Stage] = []
        self.at: dict[str, int] = {}  # stage's key -> its number; -1: it is in the store
        self.pieces: dict[Hashable, _Piece] = {}
        self.groups: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.largest: dict[str, float] = {}
        self.names: dict[str, str] = {}
        self.weights_gib = self.states_gib = 0.0

    def build(self) -> Rehearsal:
        sweep, project = self.project.sweep, self.project
        for cell in project.cells:
            self.names[cell.job({}, sweep.seeds[0], "final").graph.base.key] = cell.recipe.model.name
        rows = list(trials(project))
        highest = max((standing(sweep, row.cell).priority for row in rows), default=0)
        known = [self.targets(row.known) for row in rows]
        for row, first in zip(rows, known, strict=True):
            its = standing(sweep, row.cell)
            batches = self.batches(row.cell, first, row.num_more)
            if batches:
                searched = row.cell.space is not None
                self.grid.cells.append(Cell(batches, searched, its.priority - highest, its.share))
        guards = [self.place(stage) for stage in project.guard_stages()]
        self.grid.beside = [stage for stage in guards if stage >= 0]
        num_trials = sum(len(batch) for cell in self.grid.cells for batch in cell.batches)
        return Rehearsal(self.grid, self.stages, num_trials, self.weights_gib, self.states_gib, self.largest)

    def targets(self, jobs: Iterable[Job], after: int = -1) -> list[tuple[int, ...]]:
        """The stages that each trial wants, for trials of which some stage must be run."""
        found = []
        for job in jobs:
            wanted = list(job.evidence.targets)
            if job.role == "search":
                wanted += job.aligned.evidence.targets
            numbers = tuple(number for stage in wanted if (number := self.place(stage, after)) >= 0)
            if numbers:
                found.append(numbers)
        return found

    def batches(self, cell: Row, first: list[tuple[int, ...]], num_more: int | None) -> list[list[tuple[int, ...]]]:
        """Batches of a row's trials: the known ones (`first`); for a search then those it may still suggest, `at_once` per
        batch; last the final trials."""
        if num_more is None:  # the row searches nothing, or its search is finished
            return [first] if first else []
        at_once = min(cell.at_once, self.execution.num_trials_at_once)
        found = [first[i : i + at_once] for i in range(0, len(first), at_once)]
        own = cell.trial({}).own
        for begin in range(0, num_more, at_once):
            gate = self.gate(found)
            found.append([self.copy(own, gate) for _ in range(min(at_once, num_more - begin))])
        finals = [cell.job({}, seed, "final") for seed in self.project.sweep.seeds]
        found.append(self.targets(finals, self.gate(found)))
        return [batch for batch in found if batch]

    def gate(self, batches: Sequence[Sequence[Sequence[int]]]) -> int:
        """A gate at the end of the last batch. The next batch must wait for it. -1: there is no batch yet."""
        if not batches:
            return -1
        self.grid.gates.append([stage for wanted in batches[-1] for stage in wanted])
        return len(self.grid.gates) - 1

    def copy(self, own: Sequence[Stage], gate: int) -> tuple[int, ...]:
        """The stages of a trial with other values. They take as long as those of the defaults, and are additional to
        them."""
        made: dict[str, int] = {}
        ends = set[int]()
        for stage in own:
            needs = {made[s.key] if s.key in made else self.place(s) for s in stage.inputs.values()}
            ends -= needs
            weights = stage.inputs.get("weights")
            made[stage.key] = self.append(stage, needs, gate, None if weights is None else f"{made.get(weights.key)}")
            ends.add(made[stage.key])
        return tuple(sorted(ends))

    def place(self, stage: Stage, after: int = -1) -> int:
        """A stage's number. A stage without one gets it, after its inputs. -1: the stage is in the store."""
        at, key = self.at, stage.key
        if key not in at:
            if self.has(stage):
                at[key] = -1
            else:
                others = stage.inputs.values()
                needs = {at[its] if (its := other.key) in at else self.place(other, after) for other in others}
                at[key] = self.append(stage, needs, after, None)
        return at[key]

    def append(self, stage: Stage, needs: set[int], after: int, weights: str | None) -> int:
        alike = self.forecast.estimator.alike(stage)
        if (piece := self.pieces.get(alike)) is None:
            piece = self.pieces[alike] = self.piece(stage)
        asked = -1
        if self.grid.groups[piece.group].role == "candidate":
            own = stage.inputs.get("weights")
            asked = self.weights.setdefault(weights or (own.key if own else ""), len(self.weights))
        self.weights_gib += piece.weights_gib
        self.states_gib += piece.states_gib
        self.stages.append(stage)
        needs.discard(-1)
        return self.grid.add(
            piece.group, piece.seconds, needs, ranks=piece.ranks, resumes=piece.resumes, weights=asked, after=after
        )  # fmt: skip

    def piece(self, stage: Stage) -> _Piece:
        estimate, kind = self.forecast.estimator(stage), load(stage.kind)
        seconds = estimate.seconds * self.forecast.factor(estimate)
        group, ranks = LIGHT, 1
        if estimate.on_engine:
            group = self.engine(stage)
            seconds *= self.execution.num_candidate_engines  # `factor` is for all engines together
        elif needs_trainer(stage):
            group, ranks = TRAINERS, self.execution.num_workers if kind.all_ranks else 1
        seconds += (estimate.weights_gib + estimate.states_gib) / self.cluster.storage_gib_per_s
        return _Piece(group, seconds, ranks, kind.runs_anew, estimate.weights_gib, estimate.states_gib)

    def engine(self, stage: Stage) -> int:
        """The group of engines that a stage asks."""
        role, model, chosen = engine_of(stage), stage.inputs["model"], self.execution
        if role == "judge" and chosen.num_judge_replicas == 0:
            role = "candidate"
        name = f"{role}-{model.key[:8]}"
        if name not in self.groups:
            size = self.forecast.estimator.size(model)
            gib = size.parameters * (4 if model.config["dtype"] == "float32" else 2) / 2**30
            called = self.names.get(model.key) or _called(model)
            self.largest[called] = gib
            units = 0.0 if chosen.address == "local" and not chosen.use_gpu else chosen.engine_units
            most = chosen.num_candidate_engines if role == "candidate" else chosen.num_judge_replicas
            boot_s = self.forecast.estimator.boot_s + gib / self.cluster.storage_gib_per_s
            self.groups[name] = len(self.grid.groups)
            self.grid.groups.append(Group(f"{role} engines of {called}", str(role), units, most, boot_s))
        return self.groups[name]


def _called(model: Stage) -> str:
    source: Any = model.config["source"]
    return f"{next(iter(source.values()), model.key[:8])}".rpartition("/")[2]


# -- on nodes -----------------------------------------------------------------------------------------------------------


def nodes(cluster: Cluster, use_gpu: bool, num_units: int | None = None) -> list[Node]:
    """A cluster's nodes. With `num_units`: nodes with that many devices, repeating the cluster's nodes as needed; the
    last node may be partial."""
    every = [(kind, kind.gpus if use_gpu else kind.cpus) for kind in cluster.nodes for _ in range(kind.count)]
    every = [(kind, units) for kind, units in every if units]
    left = sum(units for _, units in every) if num_units is None else num_units
    found = list[Node]()
    while left > 0:
        kind, units = every[len(found) % len(every)]
        found.append(_node(kind, min(units, left), units, cluster.nodes[0]))
        left -= units
    return found


def _node(kind: NodeType, units: int, of: int, reference: NodeType) -> Node:
    pace = kind.speed if kind.tflops is None else kind.tflops / (reference.tflops or kind.tflops)
    return Node(kind.name, units, pace, kind.price_per_h * units / of, kind.preemptions_per_h, kind.boot_s)


def on_cluster(project: Project, cluster: Cluster, deadline_h: float | None = None) -> dict[str, Any]:
    """The time and resources that a sweep needs on a cluster, as plain data.

    Raises:
        ConfigError: the sweep trains on GPUs, and the cluster has none.
        PrerequisiteError: the sweep can never be finished there.
    """
    execution = project.sweep.execution
    unit = "GPU" if execution.use_gpu else "CPU"
    if not cluster.units(execution.use_gpu):
        raise ConfigError(f"this cluster has no {unit}, which the sweep trains on (execution.use_gpu)")
    made = rehearsal(project, cluster)
    grid, bounds = made.grid, Bounds(made.grid)

    num_units = cluster.units(execution.use_gpu)

    def run(num: int, at_once: int) -> Schedule:
        trainers = max(1, min(num // execution.num_workers, at_once))
        grid.groups[TRAINERS] = grid.groups[TRAINERS]._replace(at_most=trainers)
        return simulate(grid, nodes(cluster, execution.use_gpu, num), at_once, bounds=bounds)

    def enough(num: int) -> int:
        """A number of trials at once that does not leave this many devices idle."""
        return max(execution.num_trials_at_once, 2 * num // execution.num_workers)

    found = run(num_units, execution.num_trials_at_once)
    table = {num: run(num, enough(num)) for num in _points(num_units, len(grid.seconds))}
    scaling = [{"units": num, **_told(at)} for num, at in table.items()]
    is_held_up = enough(num_units) > execution.num_trials_at_once
    return {
        "cluster": cluster.name or ", ".join(f"{kind.count} x {kind.name}" for kind in cluster.nodes),
        "unit": unit,
        "units": num_units,
        "stages": len(grid.seconds),
        "trials": made.num_trials,
        **_told(found),
        "use": {what: round(seconds / found.unit_s, 4) for what, seconds in found.use.items()} if found.unit_s else {},
        "preempted": found.num_preempted,
        "lost_unit_hours": round(found.lost_s / 3600, 3),
        "boots": found.num_boots,
        "most_under_way": found.most_under_way,
        "with_enough_trials_at_once": _told(table[num_units]) if is_held_up else None,
        "storage_gib": round(made.weights_gib + made.states_gib, 3),
        "storage_price_per_month": round((made.weights_gib + made.states_gib) * cluster.storage_price_per_gib_month, 2),
        "bound": {"hours": _hours(found.bound.seconds), "why": found.bound.why},
        "path": _path(made, found.bound.path, _names(project)),
        "path_hours": _hours(found.bound.path_s),
        "stops": _stops(grid, bounds, found),
        "scaling": scaling,
        "deadline": None if deadline_h is None else _cheapest(scaling, deadline_h),
        "notes": _notes(made, cluster, project, enough(num_units), table[num_units] if is_held_up else None),
    }


def _told(found: Schedule) -> dict[str, Any]:
    busy = sum(seconds for what, seconds in found.use.items() if what not in ("idle", "free", "booting"))
    return {
        "hours": _hours(found.makespan_s + START_S),
        "unit_hours": round(found.unit_s / 3600, 3),
        "busy": round(busy / found.unit_s, 4) if found.unit_s else 0.0,
        "price": round(found.price, 2),
        "ratio": round(found.ratio, 4),
    }


def _hours(seconds: float) -> float:
    return round(seconds / 3600, 4)


def _points(num_units: int, num_stages: int) -> list[int]:
    """Numbers of devices for the rows of the table: the cluster's own number, and that times powers of two; as many
    rows as are cheap to simulate."""
    num = max(3, min(9, FEW // max(1, num_stages)))
    shares = [2.0 ** (i - num // 2) for i in range(num) if i - num // 2 <= 2]
    return sorted({max(1, round(num_units * share)) for share in (1.0, *shares)})


def _cheapest(table: Sequence[dict[str, Any]], deadline_h: float) -> dict[str, Any]:
    """The cheapest row that ends within the deadline; without prices, the one with the fewest device-hours."""
    priced = any(row["price"] for row in table)
    in_time = [row for row in table if row["hours"] <= deadline_h]
    best = min(in_time, key=lambda row: (row["price"] if priced else row["unit_hours"], row["hours"]), default=None)
    return {"hours": deadline_h, "units": best and best["units"], "of": best}


def _stops(grid: Grid, bounds: Bounds, found: Schedule) -> dict[str, Any]:
    """The number of devices above which more of them do not help, and what limits the run then."""
    limits = {"the critical path": found.bound.path_s, **found.bound.group_s}
    limits.pop(grid.groups[TRAINERS].name, None)
    why = max(limits, key=limits.__getitem__)
    units = math.ceil(bounds.unit_s / limits[why]) if limits[why] else 0
    role = next((group.role for group in grid.groups if group.name == why), None)
    remedy = {"candidate": "execution.num_candidate_engines", "judge": "execution.num_judge_replicas"}.get(
        str(role), ""
    )
    return {"units": units, "why": why, "hours": _hours(limits[why]), "remedy": remedy}


def _path(made: Rehearsal, path: Sequence[int], names: dict[str, str]) -> list[dict[str, Any]]:
    """The critical path, with similar stages as one line, for lines of at least a hundredth of it."""
    whole = sum(made.grid.seconds[number] for number in path) or 1.0
    found: dict[str, list[float]] = {}
    for number in path:
        stage = made.stages[number]
        found.setdefault(load(stage.kind).label(stage, names), []).append(made.grid.seconds[number])
    lines = [{"what": what, "num": len(each), "hours": _hours(sum(each))} for what, each in found.items()]
    return [line for line in lines if float(str(line["hours"])) >= 0.01 * whole / 3600]


def _names(project: Project) -> dict[str, str]:
    names = {
        cell.job({}, project.sweep.seeds[0], "final").graph.base.key: cell.recipe.model.name for cell in project.cells
    }
    return names if len(names) > 1 else {}


def _notes(made: Rehearsal, cluster: Cluster, project: Project, at_once: int, enough: Schedule | None) -> list[str]:
    execution, found = project.sweep.execution, []
    if enough is not None:
        found.append(
            f"execution.num_trials_at_once: {execution.num_trials_at_once} holds it up; with {at_once}, as in the table, it is "
            f"{_time(_hours(enough.makespan_s + START_S))}"
        )
    for name, gib in made.largest.items():
        for kind in cluster.nodes if execution.use_gpu else ():
            if kind.gpu_memory_gib is not None and gib > 0.85 * kind.gpu_memory_gib:
                found.append(
                    f"{name}: weights of {gib:.0f} GiB do not fit a GPU of {kind.name} ({kind.gpu_memory_gib:g} GiB)"
                )
    if not execution.use_gpu and cluster.num_gpus:
        found.append("execution.use_gpu is false, so that its GPUs stand idle: add --set execution.use_gpu=true")
    return found


# -- as people read it ----------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The result of `on_cluster` as (title, columns, rows)."""
    unit = found["unit"]
    order = ["training", "candidate", "judge", "booting", "idle", "free"]
    words = {
        "training": "training", "candidate": "engines of candidates", "judge": "engines of judges", "booting": "starting",
        "idle": "held, without work", "free": "nobody's",
    }  # fmt: skip
    used = [
        [words.get(what, what), f"{share * found['unit_hours']:,.1f}", f"{100 * share:.1f}%"]
        for what, share in sorted(found["use"].items(), key=lambda item: [*order, item[0]].index(item[0]))
    ]
    scaling = [
        [f"{row['units']:,}", _time(row["hours"]), f"{row['unit_hours']:,.1f}", f"{100 * row['busy']:.0f}%",
         _amount(row["price"]) if row["price"] else "-", f"{row['ratio']:.2f}"]
        for row in found["scaling"]
    ]  # fmt: skip
    path = [[line["what"], str(line["num"]), _time(line["hours"])] for line in found["path"]]
    return [
        (f"{found['cluster']}: what {found['units']:,} {unit}s do", ["", f"{unit}-hours", "share"], used),
        (f"more and fewer {unit}s", [f"{unit}s", "time", f"{unit}-hours", "busy", "price", "x bound"], scaling),
        (f"the critical path, {_time(found['path_hours'])}", ["stage", "times", "time"], path),
    ]


def lines(found: dict[str, Any]) -> list[str]:
    """Lines for a person, printed with the tables of `on_cluster`."""
    unit, bound, stops = found["unit"], found["bound"], found["stops"]
    told = [
        f"{found['trials']:,} trials, {found['stages']:,} stages: {_time(found['hours'])} on {found['units']:,} {unit}s, "
        f"{found['unit_hours']:,.1f} {unit}-hours{_money(found['price'])}; {found['ratio']:.2f} times the least "
        f"({_time(bound['hours'])}: {bound['why']})"
    ]
    if found["preempted"]:
        told.append(
            f"{found['preempted']:,} nodes were taken away, and {found['lost_unit_hours']:,.1f} {unit}-hours of work with them"
        )
    if found["storage_gib"] >= 0.05:
        monthly = f", {found['storage_price_per_month']:,.2f} a month" if found["storage_price_per_month"] else ""
        told.append(f"to be written: about {found['storage_gib']:,.1f} GiB{monthly}")
    told.append(
        f"from about {stops['units']:,} {unit}s on more of them do not help: {stops['why']}, {_time(stops['hours'])}"
        + (f"; raise {stops['remedy']}" if stops["remedy"] else "")
    )
    if (wanted := found["deadline"]) is not None:
        best, fastest = wanted["of"], min(found["scaling"], key=lambda row: float(row["hours"]))
        told.append(
            f"within {wanted['hours']:g} h: none of these numbers of {unit}s; {fastest['units']:,} take {_time(fastest['hours'])}"
            if best is None
            else f"cheapest within {wanted['hours']:g} h: {best['units']:,} {unit}s, {_time(best['hours'])}"
            + _money(best["price"])
        )
    return [*told, *found["notes"]]


def _money(price: float) -> str:
    return f", {_amount(price)} for the nodes" if price else ""


def _amount(price: float) -> str:
    """A sum of money; a small one with its hundredths, for `0` would say that it is free."""
    return f"{price:,.0f}" if price >= 100 else f"{price:.2f}"


def _time(hours: float) -> str:
    return duration(3600 * hours)
