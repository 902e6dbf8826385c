"""The work of a sweep as arrays, and the least time that any schedule of it takes (simulate.py makes one schedule)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safecl.order import chains

Floats = NDArray[np.float64]

TRAINERS, LIGHT = 0, 1  # groups that every grid has


class Group(NamedTuple):
    """A group of workers: the trainers, the process of light stages (which holds no device), or the engines of one
    model in one role. Each holder has `size` units, starts in `boot_s` seconds, and does `at_once` pieces of work at
    the same time."""

    name: str
    role: str
    size: float
    at_most: int
    boot_s: float
    at_once: int = 1


class Node(NamedTuple):
    """A node. `units`: GPUs, or CPUs if it has none. `pace`: speed, as a multiple of the speed for which `Grid.seconds`
    holds. `preempted_per_h`: how often per hour it is taken away; it is back after `back_s` seconds."""

    kind: str
    units: int
    pace: float = 1.0
    price_per_h: float = 0.0
    preempted_per_h: float = 0.0
    back_s: float = 0.0


@dataclass
class Cell:
    """A row of the table with its trials in batches. A trial is a tuple of the stages that it wants. A batch begins
    after all trials of the previous batch."""

    batches: list[list[tuple[int, ...]]]
    searched: bool = False
    priority: int = 0
    share: float = 1.0


@dataclass
class Grid:
    """Stages that must be run, inputs first, as arrays indexed by stage number."""

    groups: list[Group]
    group: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)  # number of ranks of a trainer that it takes
    resumes: list[bool] = field(default_factory=list)  # whether it can continue from a checkpoint
    # Number of the weights for which it asks an engine, which holds one at a time; -1: it asks no engine.
    weights: list[int] = field(default_factory=list)
    needs: list[tuple[int, ...]] = field(default_factory=list)  # the stages it waits for
    # Number in `gates` of the batch that must end before this stage is asked for; -1: none. Needed for a lower bound.
    after: list[int] = field(default_factory=list)
    gates: list[list[int]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    beside: list[int] = field(default_factory=list)  # stages that no row wants: they measure the judges
    checkpoint_s: float = 60.0

    def add(
        self, group: int, seconds: float, needs: Iterable[int], *, ranks: int = 1, resumes: bool = False,
        weights: int = -1, after: int = -1,
    ) -> int:  # fmt: skip
        """Add one stage. Returns its number."""
        self.group.append(group)
        self.seconds.append(seconds)
        self.needs.append(tuple(needs))
        self.ranks.append(ranks)
        self.resumes.append(resumes)
        self.weights.append(weights)
        self.after.append(after)
        return len(self.group) - 1

    def chains(self) -> list[float]:
        """See order.chains, for stages that are asked for together."""
        return chains(self.seconds, self.needs)


class Bound(NamedTuple):
    """A lower bound in seconds of any schedule, and the reason (`why`): the critical path, all devices, or a group that
    may have no more holders. `path`: the critical path, as stage numbers. `group_s`: the lower bound by each group's
    holders."""

    seconds: float
    why: str
    path_s: float
    path: list[int]
    devices_s: float
    group_s: dict[str, float]


class Bounds:
    """Lower bounds of any schedule of a grid, on any nodes."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        num = len(grid.seconds)
        self.starts, before = [0.0] * num, [-1] * num  # earliest start, and the input that it waits for longest
        ends = [0.0] * num
        gates: dict[int, int] = {}  # gate -> its last stage
        for stage, seconds in enumerate(grid.seconds):
            last, gate = -1, grid.after[stage]
            if gate >= 0:
                if gate not in gates:
                    gates[gate] = max(grid.gates[gate], key=ends.__getitem__, default=-1)
                last = gates[gate]
            for other in grid.needs[stage]:
                if last < 0 or ends[other] > ends[last]:
                    last = other
            before[stage] = last
            self.starts[stage] = ends[last] if last >= 0 else 0.0
            ends[stage] = self.starts[stage] + seconds
        self.path: list[int] = []
        at = max(range(num), key=ends.__getitem__, default=-1)
        self.path_s = ends[at] if at >= 0 else 0.0
        while at >= 0:
            self.path.append(at)
            at = before[at]
        self.path.reverse()
        of_unit = [0.0 if number == LIGHT else group.size / group.at_once for number, group in enumerate(grid.groups)]
        self.chains = grid.chains()
        alone, group, ranks = np.array(grid.seconds), np.array(grid.group, dtype=int), np.array(grid.ranks)
        heads, tails, units = np.array(self.starts), np.array(self.chains) - alone, ranks * np.array(of_unit)[group]
        self.of_all = _Load(heads, tails, alone, units)
        self.unit_s = self.of_all.work
        self.of_group = {
            number: _Load(heads[mine], tails[mine], alone[mine], ranks[mine])
            for number in range(len(grid.groups))
            if number != LIGHT and (mine := group == number).any()
        }

    def on(self, nodes: Sequence[Node]) -> Bound:
        """The lower bound on these nodes."""
        fastest, power = max(node.pace for node in nodes), sum(node.units * node.pace for node in nodes)
        # In seconds of the fastest node: no stage is faster, and a slower device is a part of one.
        devices_s = self.of_all.least(power / fastest, self.path_s) / fastest
        group_s = {}
        for number, load in self.of_group.items():
            group = self.grid.groups[number]
            group_s[group.name] = load.least(group.at_most * group.at_once, self.path_s) / fastest
        reasons = {"the critical path": self.path_s / fastest, "all devices": devices_s, **group_s}
        why = max(reasons, key=reasons.__getitem__)
        return Bound(reasons[why], why, self.path_s / fastest, self.path, devices_s, group_s)


class _Load:
    """Stages that share a number of places, such as all devices. `heads`: seconds before each stage can begin. `tails`:
    seconds of the stages that wait for it. `alone`: its own seconds. `places`: how many places it takes."""

    def __init__(self, heads: Floats, tails: Floats, alone: Floats, places: Floats) -> None:
        self.work = float(alone @ places)
        self.first, self.last = _most(heads, alone, places), _most(tails, alone, places)

    def least(self, num_places: float, path_s: float) -> float:
        """The least seconds in which so many places do this work, and stand idle as long as they must: at the beginning
        until enough stages can begin, and at the end. `path_s`: seconds of the critical path. The beginning and the end
        are together no longer than it, so that none of the time counts twice."""
        (begins, idle), (ends, idle_last) = [(at, num_places * at - most) for at, most in (self.first, self.last)]
        most_last = np.maximum.accumulate(idle_last)  # of any end up to this long
        found = np.searchsorted(ends, path_s - begins, side="right") - 1
        return float(self.work + (idle + most_last[np.maximum(found, 0)]).max()) / num_places


def _most(heads: Floats, alone: Floats, places: Floats) -> tuple[Floats, Floats]:
    """Times, and the most work that can be done until each of them, if every stage begins at its head."""
    times, change = np.append(heads, heads + alone), np.append(places, -places)
    order = np.argsort(times)
    times, at_work = times[order], np.cumsum(change[order])
    work = np.cumsum(at_work[:-1] * np.diff(times))
    return np.append(0.0, times), np.append([0.0, 0.0], work)
