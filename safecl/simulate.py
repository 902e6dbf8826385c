"""Simulates a run on a virtual clock: how long a grid takes on nodes that need not exist.

The rules of a real run decide which group holds devices (devices.py) and which stage is next (order.py). Stages take
their estimated time, and nodes come and go. Stages are numbers into arrays, so that a hundred thousand of them take
seconds.

Four simplifications: an engine works on one stage after the other, while a real engine overlaps them (the estimates
include this overlap); a stage takes the same time whatever else its node does; any number of light stages run at once; and
who has the devices is decided at most once a tick. A holder that has more work loses no time by this: its next stage begins
when the one before it ended.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from safecl import devices
from safecl.base import PrerequisiteError
from safecl.devices import IDLE_S, Devices, Holder, Start
from safecl.order import NUM_RANKS, Claim, Queue
from safecl.workload import LIGHT, TRAINERS, Bound, Bounds, Grid, Node

UNASKED, WAITS, READY, RUNS, DONE = range(5)  # a stage's state
_OVER, _UP, _GONE, _TAKEN, _BACK = range(5)  # kinds of events
_STUCK_S = 30 * 86400.0
_NUM_TICKS = 10_000  # in the least time that any schedule takes
_STOP_S = 1.0  # seconds until a stopped holder has given its units back


@dataclass
class Schedule:
    """The result of a simulation. `use`: unit-seconds by purpose, out of `unit_s`, the unit-seconds of all present
    nodes. `most_under_way`: largest number of trials at once."""

    makespan_s: float
    use: dict[str, float]
    unit_s: float
    price: float
    num_preempted: int
    lost_s: float
    num_boots: dict[str, int]
    most_under_way: int
    bound: Bound

    @property
    def ratio(self) -> float:
        """The makespan as a multiple of its lower bound."""
        return self.makespan_s / self.bound.seconds if self.bound.seconds else 1.0


class _Run:
    """One simulation."""

    def __init__(
        self, grid: Grid, nodes: Sequence[Node], num_trials_at_once: int, seed: int, bounds: Bounds | None
    ) -> None:
        self.grid, self.nodes, self.at_once = grid, nodes, num_trials_at_once
        bounds = bounds or Bounds(grid)
        self.bound = bounds.on(nodes)
        self.random = random.Random(seed)
        self.now = 0.0
        self.events: list[
            tuple[float, int, int, int, Holder | None]
        ] = []  # (when, number, what, stage or node, holder)
        self.num_events = 0
        self.waits = [len(needs) for needs in grid.needs]
        self.above: list[list[int]] = [[] for _ in grid.needs]
        for stage, needs in enumerate(grid.needs):
            for other in needs:
                self.above[other].append(stage)
        # Seconds left of each stage; of a stage that lost its node, from its checkpoint on.
        self.left = list(grid.seconds)
        self.chain = bounds.chains
        self.turn: list[tuple[int, int, float, float, int] | None] = [None] * len(grid.seconds)
        self.state = bytearray(len(grid.seconds))  # UNASKED ... DONE
        self.training = Queue[int]()
        self.queues: list[list[tuple[tuple[int, int, float, float, int], int]]] = [
            [] for _ in grid.groups
        ]  # of the others
        self.idle: list[dict[Holder, int]] = [
            {} for _ in grid.groups
        ]  # open holders, and the number of their free places
        self.num_working = [0] * len(grid.groups)
        self.num_ready = [0] * len(grid.groups)
        self.num_coming = [0] * len(grid.groups)  # asked for, and waiting for other stages
        self.coming_s: defaultdict[int, float] = defaultdict(float)  # by group: seconds of such work for engines
        self.training_s = 0.0  # seconds of trainers for training that is asked for and has not begun
        # For stages that wait for an engine or have one: how many ask for each weights.
        self.asking: list[Counter[int]] = [Counter() for _ in grid.groups]
        self.changed: set[int] = set()  # groups whose work changed since the devices were told
        self.finished: list[tuple[Holder, float]] = []  # whose work was done in this tick, and when
        self.number = {group.name: number for number, group in enumerate(grid.groups)}
        # Devices, and where they are.
        self.is_up = [True] * len(nodes)
        self.free = [float(node.units) for node in nodes]
        self.by_free: defaultdict[float, dict[int, None]] = defaultdict(dict)
        for number, node in enumerate(nodes):
            self.by_free[node.units][number] = None
        self.on: list[dict[Holder, None]] = [{} for _ in nodes]
        self.node_of: dict[Holder, int] = {}
        self.does: dict[Holder, dict[int, float]] = {}  # stage -> when it began
        self.began: dict[Holder, float] = {}
        units = float(sum(node.units for node in nodes))
        self.devices = Devices(units, room=self._room)
        for number, group in enumerate(grid.groups):
            if number != LIGHT:
                self.devices.add(group.name, group.size, group.at_most, IDLE_S)
        self.trainers = self.devices.groups[grid.groups[TRAINERS].name]
        self.use: defaultdict[str, float] = defaultdict(float)
        self.down_since: dict[int, float] = {}
        self.down_s = [0.0] * len(nodes)
        self.num_preempted = 0
        self.lost_s = 0.0
        self.num_boots: Counter[str] = Counter()
        # Trials.
        self.turns: list[tuple[int, int, float, int]] = []
        self.num_given = [0] * len(grid.cells)
        self.given: list[list[tuple[int, ...]]] = [[] for _ in grid.cells]  # of the current batch
        self.open_of = [0] * len(grid.cells)  # unfinished trials of the current batch
        self.batch = [-1] * len(grid.cells)
        self.num_under_way = self.num_asked = 0
        self.wanted_by: defaultdict[int, list[int]] = defaultdict(list)  # stage -> trials
        self.lacks: list[int] = []  # for each trial, the number of its stages that are not there
        self.cell_of: list[int] = []
        self.most_under_way = 0
        self.num_left = sum(len(batch) for cell in grid.cells for batch in cell.batches) + bool(grid.beside)

    def _at(self, when: float, what: int, number: int, holder: Holder | None = None) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (when, self.num_events, what, number, holder))

    # -- trials --------------------------------------------------------------------------------------------------------

    def _next_batch(self, cell: int) -> None:
        self.batch[cell] += 1
        batches = self.grid.cells[cell].batches
        if self.batch[cell] < len(batches):
            self.given[cell] = list(reversed(batches[self.batch[cell]]))
            self.open_of[cell] = len(self.given[cell])
            self._wake(cell)

    def _wake(self, cell: int) -> None:
        if self.given[cell]:
            claim = self._claim(cell)
            heapq.heappush(self.turns, (-claim.priority, claim.rank, claim.round, cell))

    def _claim(self, cell: int) -> Claim:
        its = self.grid.cells[cell]
        return Claim(its.priority, int(not its.searched), self.num_given[cell] / its.share)

    def _admit(self) -> None:
        while self.turns and self.num_under_way < self.at_once:
            cell = heapq.heappop(self.turns)[-1]
            claim, targets = self._claim(cell), self.given[cell].pop()
            self.num_given[cell] += 1
            self._wake(cell)
            self.num_under_way += 1
            self.most_under_way = max(self.most_under_way, self.num_under_way)
            self._want(cell, targets, claim)

    def _want(self, cell: int, targets: Sequence[int], claim: Claim) -> None:
        """Start a trial of a cell. A cell below 0 stands for stages that no cell wants."""
        trial = len(self.lacks)
        self.cell_of.append(cell)
        wanted = [stage for stage in targets if self.state[stage] != DONE]
        self.lacks.append(len(wanted))
        for stage in wanted:
            self.wanted_by[stage].append(trial)
        self._ask(wanted, claim)
        if not wanted:
            self._trial_over(trial)

    def _trial_over(self, trial: int) -> None:
        cell = self.cell_of[trial]
        self.num_left -= 1
        if cell < 0:
            return
        self.num_under_way -= 1
        self.open_of[cell] -= 1
        if not self.open_of[cell]:
            self._next_batch(cell)

    def _ask(self, targets: Sequence[int], claim: Claim) -> None:
        """Like Broker.ensure: queue the missing stages, and move queued ones forward if this turn is lower."""
        self.num_asked += 1
        first, rank, rounds, number = -claim.priority, claim.rank, claim.round, self.num_asked
        stack = list(targets)
        needs, turns, chain, state = self.grid.needs, self.turn, self.chain, self.state
        while stack:
            stage = stack.pop()
            if state[stage] >= RUNS:
                continue
            turn, known = (first, rank, rounds, -chain[stage], number), turns[stage]
            if known is not None and known <= turn:
                continue
            turns[stage] = turn
            if state[stage] == UNASKED:
                state[stage] = WAITS
                self.num_coming[self.grid.group[stage]] += self.grid.ranks[stage]
                if self.grid.group[stage] == TRAINERS:
                    self.training_s += self.grid.seconds[stage]
                elif self.grid.weights[stage] >= 0:
                    self.coming_s[self.grid.group[stage]] += self.grid.seconds[stage]
            if not self.waits[stage]:
                self._ready(stage)  # if it was already ready, the queue entry with its old turn is skipped
            stack.extend(needs[stage])

    def _ready(self, stage: int) -> None:
        turn, group = self.turn[stage], self.grid.group[stage]
        assert turn is not None
        if group == LIGHT:
            self.state[stage] = RUNS
            self._at(self.now + self.left[stage], _OVER, stage)
            return
        if self.state[stage] == WAITS:
            self.num_coming[group] -= self.grid.ranks[stage]
            self.num_ready[group] += self.grid.ranks[stage]
            if (weights := self.grid.weights[stage]) >= 0:
                self.asking[group][weights] += 1
                self.coming_s[group] -= self.grid.seconds[stage]
        self.state[stage] = READY
        self.changed.add(group)
        if group == TRAINERS:
            self.training.put(stage, turn)
        else:
            heapq.heappush(self.queues[group], (turn, stage))

    # -- work ----------------------------------------------------------------------------------------------------------

    def _first(self, group: int) -> int | None:
        """The next stage of a queue."""
        if group == TRAINERS:
            coming_s = max([s / self.grid.groups[number].at_most for number, s in self.coming_s.items()], default=0.0)
            return self.training.first(self.training_s / max(1, self.trainers.num_present), coming_s)
        queue, turns, state = self.queues[group], self.turn, self.state
        while queue:
            turn, stage = queue[0]
            if state[stage] == READY and turns[stage] == turn:
                return stage
            heapq.heappop(queue)
        return None

    def _give(self, number: int) -> None:
        """Give a group's queue to those of its holders that have a free place."""
        idle, free_since = self.idle[number], dict(self.finished)
        while idle and (stage := self._first(number)) is not None:
            places = self.grid.ranks[stage]
            for holder, free in idle.items():
                if free >= places and holder.open:
                    break
            else:
                return
            begins = free_since.get(holder, self.now)
            ends = begins + self.left[stage] / self.nodes[self.node_of[holder]].pace
            idle[holder] -= places
            if not idle[holder]:
                del idle[holder]
            self.does[holder][stage] = begins
            self.devices.work(holder, 1, self.now, ends)
            self._at(ends, _OVER, stage, holder)
            if number == TRAINERS:
                self.training.remove(stage)
                self.training_s -= self.grid.seconds[stage]
            else:
                heapq.heappop(self.queues[number])
            self.state[stage] = RUNS
            self.num_ready[number] -= self.grid.ranks[stage]
            self.num_working[number] += self.grid.ranks[stage]

    def _over(self, stage: int, holder: Holder | None) -> None:
        if holder is not None:  # it is not a light stage
            began = self.does.get(holder, {}).pop(stage, None)
            if began is None or self.state[stage] != RUNS:
                return  # its node is gone
            number, places = self.grid.group[stage], self.grid.ranks[stage]
            group = self.grid.groups[number]
            self.use[group.role] += (self.now - began) * group.size * places / group.at_once
            self.finished.append((holder, self.now))
            self.idle[number][holder] = self.idle[number].get(holder, 0) + places
            self._worked(stage, number)
        self.state[stage] = DONE
        for above in self.above[stage]:
            self.waits[above] -= 1
            if not self.waits[above] and self.state[above] == WAITS:
                self._ready(above)
        for trial in self.wanted_by.pop(stage, ()):
            self.lacks[trial] -= 1
            if not self.lacks[trial]:
                self._trial_over(trial)

    def _worked(self, stage: int, number: int) -> None:
        self.num_working[number] -= self.grid.ranks[stage]
        self.changed.add(number)
        if (weights := self.grid.weights[stage]) >= 0:
            self.asking[number][weights] -= 1
            if not self.asking[number][weights]:
                del self.asking[number][weights]

    # -- devices -------------------------------------------------------------------------------------------------------

    def _room(self, group: devices.Group) -> bool:
        return any(free >= group.size and numbers for free, numbers in self.by_free.items())

    def _take(self, node: int, units: float) -> None:
        """Take units of a node; below 0: give them back."""
        self.by_free[self.free[node]].pop(node, None)
        self.free[node] -= units
        if self.is_up[node]:
            self.by_free[self.free[node]][node] = None

    def _start(self, holder: Holder) -> None:
        number = self.number[holder.group]
        fitting = min(free for free, numbers in self.by_free.items() if free >= holder.size and numbers)
        node = next(iter(self.by_free[fitting]))
        self._take(node, holder.size)
        self.node_of[holder], self.on[node][holder] = node, None
        self.began[holder] = self.now
        self.does[holder] = {}
        self.num_boots[self.grid.groups[number].role] += 1
        self._at(self.now + self.grid.groups[number].boot_s, _UP, number, holder)

    def _up(self, number: int, holder: Holder) -> None:
        if holder not in self.node_of:
            return
        self.use["booting"] += (self.now - self.began[holder]) * holder.size
        self.began[holder] = self.now
        self.devices.up(holder, self.now)
        self.idle[number][holder] = self.grid.groups[number].at_once
        self.changed.add(number)

    def _gone(self, holder: Holder) -> None:
        node = self.node_of.pop(holder, None)
        if node is None:
            return
        number = self.number[holder.group]
        what = "booting" if holder.state == "starting" else "held"
        self.use[what] += (self.now - self.began.pop(holder)) * holder.size
        self.idle[number].pop(holder, None)
        del self.on[node][holder]
        for stage, began in self.does.pop(holder).items():
            self._lost(stage, began, number, self.nodes[node].pace)
        self.devices.gone(holder, self.now)
        self._take(node, -holder.size)
        self.changed.add(number)

    def _lost(self, stage: int, began: float, number: int, pace: float) -> None:
        """A stage lost its node: queue it again. It continues from its last checkpoint, if it can resume."""
        group = self.grid.groups[number]
        spent = self.now - began
        kept = spent - spent % self.grid.checkpoint_s if self.grid.resumes[stage] else 0.0
        self.left[stage] -= min(kept * pace, 0.99 * self.left[stage])
        self.use[group.role] += spent * group.size * self.grid.ranks[stage] / group.at_once
        self.lost_s += (spent - kept) * group.size
        self.state[stage] = WAITS
        self._worked(stage, number)
        self.num_coming[number] += self.grid.ranks[stage]
        if number == TRAINERS:
            self.training_s += self.grid.seconds[stage]
        elif self.grid.weights[stage] >= 0:
            self.coming_s[number] += self.grid.seconds[stage]
        self._ready(stage)

    def _node_taken(self, node: int) -> None:
        self.is_up[node] = False
        self.by_free[self.free[node]].pop(node, None)
        for holder in list(self.on[node]):
            self._gone(holder)
        self.num_preempted += 1
        self.devices.resize(self.devices.num_units - self.nodes[node].units)
        self.down_s[node] -= self.now
        self._at(self.now + self.nodes[node].back_s, _BACK, node)

    def _node_back(self, node: int) -> None:
        self.is_up[node] = True
        self.down_s[node] += self.now
        self.by_free[self.free[node]][node] = None
        self.devices.resize(self.devices.num_units + self.nodes[node].units)
        self._expect_loss(node)

    def _expect_loss(self, node: int) -> None:
        if (rate := self.nodes[node].preempted_per_h) > 0:
            self._at(self.now + self.random.expovariate(rate) * 3600, _TAKEN, node)

    def _settle(self) -> None:
        """After the events of one tick: give out work, report what there is to do, and let the devices change
        holders."""
        self._admit()
        lender, groups = self.devices, self.grid.groups
        for number in self.changed:
            self._give(number)
        # After the next stage was given, so that a holder that continues never counts as idle.
        for holder, _ in self.finished:
            if holder in self.node_of:
                lender.work(holder, -1, self.now)
        self.finished.clear()
        for number in self.changed:
            group = groups[number]
            there = self.num_ready[number] + self.num_working[number]
            first = self._first(number)
            turn = None if first is None else self.turn[first]
            rank = 0 if turn is None else NUM_RANKS * turn[0] + turn[1]
            wanted = len(self.asking[number]) or -(-there // group.at_once)
            if number == TRAINERS:  # as trainers report it
                wanted = min(wanted, group.at_most)
            coming = min(self.num_coming[number], group.at_most)
            lender.ask(group.name, wanted, self.now, rank, coming)
        self.changed.clear()
        for act in lender.step(self.now):
            if isinstance(act, Start):
                self._start(act.holder)
            else:
                self.idle[self.number[act.holder.group]].pop(act.holder, None)
                self._at(self.now + _STOP_S, _GONE, 0, act.holder)
        for number, idle in enumerate(self.idle):  # groups that need fewer holders give way
            if idle and self.num_ready[number]:
                self._give(number)

    def run(self) -> Schedule:
        for node in range(len(self.nodes)):
            self._expect_loss(node)
        for cell in range(len(self.grid.cells)):
            self._next_batch(cell)
        if self.grid.beside:
            self._want(-1, self.grid.beside, Claim(min((cell.priority for cell in self.grid.cells), default=0), rank=2))
        self._settle()
        at_work, tick_s = 0.0, self.bound.seconds / _NUM_TICKS
        while self.num_left:
            when = min(self.events[0][0] if self.events else math.inf, self.devices.next_at)
            if any(self.num_working) or self.devices.held:
                at_work = self.now
            elif when > at_work + _STUCK_S:
                raise PrerequisiteError(self._stuck())
            self.now = max(self.now, when)
            while self.events and self.events[0][0] <= when + tick_s:
                at, _, what, number, holder = heapq.heappop(self.events)
                self.now = max(self.now, at)
                if what == _OVER:
                    self._over(number, holder)
                elif what == _TAKEN:
                    self._node_taken(number)
                elif what == _BACK:
                    self._node_back(number)
                elif holder is not None:
                    self._up(number, holder) if what == _UP else self._gone(holder)
            self._settle()
        return self._result()

    def _stuck(self) -> str:
        waiting = {self.grid.groups[number].name: num for number, num in enumerate(self.num_ready) if num}
        most = max((free for free, numbers in self.by_free.items() if numbers), default=0)
        size = max((self.grid.groups[self.number[name]].size for name in waiting), default=0)
        return (
            f"this cluster can never run {', '.join(waiting) or 'what is left'}: {size:g} devices of one node are "
            f"needed at once, and none has more than {most:g}"
        )

    def _result(self) -> Schedule:
        for holder in list(self.node_of):
            self._gone(holder)
        for node, is_up in enumerate(self.is_up):
            self.down_s[node] += 0.0 if is_up else self.now
        up_s = [self.now - down for down in self.down_s]
        capacity = sum(node.units * up for node, up in zip(self.nodes, up_s, strict=True))
        use = dict(self.use)
        held = use.pop("held", 0.0)
        use["idle"] = max(0.0, held - sum(seconds for what, seconds in use.items() if what != "booting"))
        use["free"] = max(0.0, capacity - held - use.get("booting", 0.0))
        return Schedule(
            makespan_s=self.now,
            use=use,
            unit_s=capacity,
            price=sum(node.price_per_h * up / 3600 for node, up in zip(self.nodes, up_s, strict=True)),
            num_preempted=self.num_preempted,
            lost_s=self.lost_s,
            num_boots=dict(self.num_boots),
            most_under_way=self.most_under_way,
            bound=self.bound,
        )


def simulate(
    grid: Grid, nodes: Sequence[Node], num_trials_at_once: int, seed: int = 0, bounds: Bounds | None = None
) -> Schedule:
    """Run a grid on these nodes. `seed`: of the times when spot nodes are taken away. `bounds`: the grid's bounds, if
    they are already computed.

    Raises:
        PrerequisiteError: the grid can never be finished on these nodes.
    """
    return _Run(grid, nodes, num_trials_at_once, seed, bounds).run()
