"""Who holds the devices: trainers and engines take turns on them. Pure; it knows time only from its caller.

A *unit* is what is scarce: a GPU, without GPUs a CPU, on one machine's CPUs a GiB of memory. A *group* is who may use units:
the trainers, or the engines of one model in one role. Its *holders* (one trainer, one engine) hold `size` units each, from
their start until they are gone. The rule:

- A group with work and no holder is *starved*. Of those the lowest rank is next, then who has waited longest; nobody else
  is started before it. It takes free units; else those of holders without work; else those of holders whose turn is over:
  such a one is *closed* (it gets no new work), drains, and is stopped. A lower rank never makes way for a higher one.
- Else a group whose work is to come is *warmed*, as long as one holder of every group that will be needed fits.
- Else groups *grow* towards what they want, by what is free or has been without work for as long as a start takes.
- What has been without work for `idle_s`, and has none to come, is stopped.

So one unit suffices for any number of groups, and nobody is started and stopped more often than once a turn, or than its work
comes and goes.

How it is driven. Tell it what happens; after each event, and not later than `next_at`, call `step` and do what it says:

    devices = Devices(units); devices.add("trainers", size=2, at_most=8); devices.add("judge-1", size=1, at_most=2)
    devices.ask("trainers", wanted=3, now=now, rank=0, coming=1)   # at each change of what there is to do
    for act in devices.step(now):          # Start(holder) or Stop(holder)
        ...
    devices.up(holder, now)                # a Start is done: it may be given work
    devices.work(holder, +1, now)          # given, if holder.open; -1: done
    devices.gone(holder, now)              # a Stop is done, or it died: its units are free
    devices.resize(units)                  # nodes came or went

The Broker drives it by the real clock, `plan --cluster` by a virtual one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

TURN_S = 600.0  # an engine of a large model takes a minute or two to boot: a tenth of a turn
LINGER_S = 2.0  # without work for so long: what comes at once after it is still its own
SPARE_S = 30.0  # without work for as long as a start takes: who wants one more has it
IDLE_S = 300.0
_EPS = 1e-6  # of units, which may be fractions


@dataclass(eq=False)
class Holder:
    """A trainer or an engine. `open`: it may be given work."""

    name: str
    group: str
    size: float
    state: str = "starting"  # up, stopping, gone
    closed: bool = False  # it drains, to make way
    num_working: int = 0  # pieces of work that it has
    since: float = 0.0  # when it came up
    free_at: float = 0.0  # when it last had work
    began: float = 0.0  # when it was last given work
    ends: float | None = None  # when that will be done, where it is known

    @property
    def open(self) -> bool:
        return self.state == "up" and not self.closed


@dataclass(eq=False)
class Group:
    """Holders of one kind, and the work that they are for."""

    name: str
    size: float
    at_most: int
    idle_s: float
    wanted: int = 0  # how many holders its work, waiting or under way, could keep busy
    rank: int = 0  # the lowest of that work
    coming: int = 0  # how many holders it will want as well
    since: float = 0.0  # when it became starved
    holders: dict[str, Holder] = field(default_factory=dict)
    idle: dict[Holder, None] = field(default_factory=dict)  # up and without work, who has been so for longest first
    num_present: int = 0  # holders that are there or will be, those included that are asked to make way
    num_starting: int = 0
    num_stopping: int = 0
    num_started: int = 0
    num_warmed: int = 0

    @property
    def starved(self) -> bool:
        return self.wanted > 0 and self.num_present == 0


class Start(NamedTuple):
    """Start this holder, and say `up`, or `gone` if it failed."""

    holder: Holder


class Stop(NamedTuple):
    """Stop this holder, which has no work, and say `gone`."""

    holder: Holder


class Devices:
    """`room(group)`: whether one node has the units that a holder of this group wants together, where it does not suffice to
    count all that are free."""

    def __init__(
        self,
        num_units: float,
        turn_s: float = TURN_S,
        linger_s: float = LINGER_S,
        room: Callable[[Group], bool] = lambda group: True,
    ) -> None:
        self.num_units, self.turn_s, self.linger_s, self.room = num_units, turn_s, linger_s, room
        self.groups: dict[str, Group] = {}
        self.held = 0.0
        self._leaving = 0.0  # of `held`, what is being stopped
        self._draining: dict[Holder, None] = {}
        self._timers: list[float] = []
        self._changed = True

    @property
    def free(self) -> float:
        return self.num_units - self.held

    @property
    def next_at(self) -> float:
        """When `step` may do something though nothing happens until then."""
        return self._timers[0] if self._timers else math.inf

    def add(self, group: str, size: float, at_most: int = 1, idle_s: float = IDLE_S) -> None:
        """Make a group known, or give a known one another bound."""
        known = self.groups.setdefault(group, Group(group, size, at_most, idle_s))
        known.at_most, known.idle_s = at_most, idle_s
        self._changed = True

    def ask(self, group: str, wanted: int, now: float, rank: int = 0, coming: int = 0) -> None:
        """What there is to do for a group, whenever that changes."""
        known = self.groups[group]
        before, now_wanted = (min(num, known.at_most) for num in (known.wanted, wanted))
        if (before, known.rank, known.coming) == (now_wanted, rank, coming):
            known.wanted = wanted  # of a queue that is long anyway: who has the longest matters when a unit comes free
            return
        was_starved = known.starved
        known.wanted, known.rank, known.coming = wanted, rank, coming
        self._settle(known, was_starved, now)

    def up(self, holder: Holder, now: float) -> None:
        if holder.state == "starting":
            self.groups[holder.group].num_starting -= 1
            holder.state, holder.since = "up", now
            self._at(now + self.turn_s)
            self._rest(holder, now)

    def work(self, holder: Holder, num: int, now: float, ends: float | None = None) -> None:
        """It was given so many pieces of work (or, below 0, has done them)."""
        holder.num_working += num
        if holder.num_working <= 0:
            holder.num_working, holder.ends = 0, None
            if holder.state == "up":
                self._rest(holder, now)
        elif num > 0:
            self.groups[holder.group].idle.pop(holder, None)
            holder.began, holder.ends = now, ends

    def gone(self, holder: Holder, now: float) -> None:
        group = self.groups[holder.group]
        was_starved = group.starved
        if group.holders.pop(holder.name, None) is None:
            return
        if holder.state == "starting":
            group.num_starting -= 1
            group.num_warmed = group.at_most  # it failed: it is started again only for work that is there
        if holder.state == "stopping":
            group.num_stopping -= 1
            self._leaving -= holder.size
        else:
            group.num_present -= 1
        self.held = max(0.0, self.held - holder.size)
        group.idle.pop(holder, None)
        self._draining.pop(holder, None)
        holder.state, holder.closed, holder.num_working = "gone", False, 0
        self._settle(group, was_starved, now)

    def resize(self, num_units: float) -> None:
        """Nodes came or went. Who was on one that went is `gone`."""
        self._changed = self._changed or num_units != self.num_units
        self.num_units = num_units

    def waiting(self) -> list[Group]:
        """Starved groups, the next one first; without those that are larger than all there is."""
        starved = [g for g in self.groups.values() if g.starved and g.size <= self.num_units + _EPS]
        return sorted(starved, key=lambda group: (group.rank, group.since))

    def step(self, now: float) -> list[Start | Stop]:
        """What to do now; the caller does all of it."""
        while self._timers and self._timers[0] <= now:
            heapq.heappop(self._timers)
            self._changed = True
        if not self._changed:
            return []
        acts = list(self._step(now))
        self._changed = False
        return acts

    def _step(self, now: float) -> Iterator[Start | Stop]:
        while waiting := self.waiting():
            if not self._fits(waiting[0]):
                yield from self._make_way(waiting[0], now)
                return
            yield self._start(waiting[0])
        self._drain({})  # nobody waits any more
        yield from self._warm()
        yield from self._grow(now)
        for holder in self._spare(now, None):
            yield self._stop(holder, now)

    def _make_way(self, group: Group, now: float) -> Iterator[Stop]:
        """Stop what has nothing to do, and close what has had its turn, as much as lets the group fit."""
        lacking = group.size - self.free - self._leaving
        if lacking <= _EPS:
            if self._leaving > _EPS or self.room(group):
                return  # it will fit
            lacking = 2 * _EPS  # enough in all, but not on one node: one more
        chosen = dict.fromkeys(self._spare(now, self.linger_s))
        if now - group.since >= self.turn_s - _EPS:
            idle = sorted(
                (each for other in self.groups.values() for each in other.idle), key=lambda each: each.free_at
            )
            chosen |= dict.fromkeys(holder for holder in idle if self._is_over(holder, group, now))
            # What drains already goes on, unless another one has become free before it.
            chosen |= dict.fromkeys(holder for holder in self._draining if self._is_over(holder, group, now))
            if sum(holder.size for holder in chosen) < lacking - _EPS:
                everyone = [holder for other in self.groups.values() for holder in other.holders.values()]
                over = [holder for holder in everyone if self._is_over(holder, group, now)]
                chosen |= dict.fromkeys(sorted(over, key=lambda h: (h.ends is None, h.ends or 0.0, h.began)))
        ways: dict[Holder, None] = {}
        for holder in chosen:
            if lacking > _EPS:
                ways[holder] = None
                lacking -= holder.size
        if lacking > _EPS:
            ways = {}  # none of them stands idle until all can be had
        self._drain({holder: None for holder in ways if holder.num_working})
        for holder in ways:
            if not holder.num_working:
                yield self._stop(holder, now)

    def _spare(self, now: float, for_s: float | None) -> list[Holder]:
        """Without work for so long, and not wanted; who has been so for longest first. None: for what its group bears, and none
        is to come."""
        found: list[Holder] = []
        for group in self.groups.values():
            left = group.num_present - group.wanted if group.idle and not (for_s is None and group.coming) else 0
            if left > 0:
                least_s = (group.idle_s if for_s is None else for_s) - _EPS
                for holder in islice(group.idle, left):
                    if now - holder.free_at < least_s:
                        break  # all others have worked since
                    found.append(holder)
        return sorted(found, key=lambda holder: holder.free_at)

    def _is_over(self, holder: Holder, waiting: Group, now: float) -> bool:
        """Its turn, by whoever waits; a lower rank never makes way."""
        group = self.groups[holder.group]
        ranks_first = group.wanted > 0 and group.rank < waiting.rank
        return holder.state == "up" and not ranks_first and now - holder.since >= self.turn_s - _EPS

    def _warm(self) -> Iterator[Start]:
        """One after the other, and only as long as every group that is needed has one."""
        if not any(group.coming for group in self.groups.values()):
            return
        needed = [group for group in self.groups.values() if group.coming or group.wanted or group.num_present]
        total = sum(max(1, group.num_present) * group.size for group in needed)
        for group in needed:
            goal = min(group.wanted + group.coming, group.at_most)
            more = group.size if group.num_present else 0.0
            is_next = group.coming and group.num_present < goal and not group.num_starting
            is_bounded = group.num_warmed < group.at_most and total + more <= self.num_units + _EPS
            if is_next and is_bounded and self._fits(group):
                group.num_warmed += 1
                total += more
                yield self._start(group)

    def _grow(self, now: float) -> Iterator[Start | Stop]:
        """More holders for who wants them; whose work waits most for each that is there is first."""
        while short := [g for g in self.groups.values() if g.num_present < min(g.wanted, g.at_most)]:
            group = min(short, key=lambda group: (group.rank, -group.wanted / max(1, group.num_present)))
            if self._fits(group):
                yield self._start(group)
                continue
            lacking = group.size - self.free - self._leaving
            spare = self._spare(now, min(self.turn_s, SPARE_S)) if lacking > _EPS else []
            if not spare or sum(holder.size for holder in spare) < lacking - _EPS:
                return
            yield self._stop(spare[0], now)

    def _fits(self, group: Group) -> bool:
        return group.size <= self.free + _EPS and self.room(group)

    def _start(self, group: Group) -> Start:
        group.num_started += 1
        group.num_starting += 1
        group.num_present += 1
        holder = Holder(f"{group.name}-{group.num_started}", group.name, group.size)
        group.holders[holder.name] = holder
        self.held += group.size
        return Start(holder)

    def _stop(self, holder: Holder, now: float) -> Stop:
        group = self.groups[holder.group]
        was_starved = group.starved
        holder.state, holder.closed = "stopping", True
        group.num_stopping += 1
        group.num_present -= 1
        self._leaving += holder.size
        group.idle.pop(holder, None)
        self._draining.pop(holder, None)
        self._settle(group, was_starved, now)
        return Stop(holder)

    def _drain(self, holders: dict[Holder, None]) -> None:
        for holder in self._draining.keys() - holders.keys():
            holder.closed = False
        for holder in holders:
            holder.closed = True
        self._draining = holders

    def _rest(self, holder: Holder, now: float) -> None:
        holder.free_at = now
        group = self.groups[holder.group]
        group.idle.pop(holder, None)
        group.idle[holder] = None
        self._at(now + self.linger_s, now + min(self.turn_s, SPARE_S), now + self.turn_s, now + group.idle_s)
        self._changed = True

    def _settle(self, group: Group, was_starved: bool, now: float) -> None:
        if group.starved and not was_starved:
            group.since = now
            self._at(now + self.turn_s)
        self._changed = True

    def _at(self, *times: float) -> None:
        for time in times:
            if time < math.inf:
                heapq.heappush(self._timers, time)
