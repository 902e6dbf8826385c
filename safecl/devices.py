"""Which trainers and engines hold the devices, and how they take turns on them. Pure: the caller tells it the time.

A *unit* is one of the scarce resource: a GPU; without GPUs a CPU; on one machine's CPUs a GiB of memory. A *group* is the
trainers, or the engines of one model in one role. A *holder* is one trainer or one engine. It holds its group's `size`
units from its start until it is gone. The rules, in this order:

- A group with work and no holder is *starved*. Of the starved groups the one with the lowest rank is next, and of equal
  ranks the one that has waited longest. No other holder is started before it. It takes free units. If these do not suffice,
  it takes the units of holders without work. If these do not suffice either, it takes those of holders whose turn is over:
  such a holder is *closed* (it gets no new work), finishes its work, and is stopped. A holder of a group with a lower rank
  never makes way for a group with a higher one.
- Else a group whose work is to come is *warmed* (a holder is started ahead), as long as one holder of every group that will
  be needed fits.
- Else groups *grow* towards the number of holders that they want. They take free units, and units of holders that have been
  without work for as long as the longest start takes. A group with three times as much work for each of its holders as
  another group also takes units of the other's holders whose turn is over, once their work is done: trainers, which have
  work until the end, thus leave room for engines whose queues have become long.
- A holder that has been without work for `idle_s`, and whose group has none to come, is stopped.
- While others make what this run waits for (`shares`), and no units can be had, a holder that has been without work for as long
  as the longest start takes is stopped, also if its group has work to come: the others may wait for its units.

So the units of the largest holder suffice for any number of groups. A holder is started and stopped at most once a turn, or
as often as its work comes and goes.

To use it, report what happens. After each event, and at `next_at` at the latest, call `step` and do what it says:

    devices = Devices(units); devices.add("trainers", size=2, at_most=8); devices.add("judge-1", size=1, at_most=2)
    devices.ask("trainers", wanted=3, now=now, rank=0, coming=1)   # at each change of what there is to do
    for act in devices.step(now):          # Start(holder) or Stop(holder)
        ...
    devices.up(holder, now)                # a Start is done: the holder may be given work
    devices.work(holder, +1, now)          # the holder was given work (only if holder.open); -1: it has done it
    devices.gone(holder, now)              # a Stop is done, or the holder died: its units are free
    devices.resize(units)                  # nodes came or went

The Broker uses it with the real clock, `plan --cluster` with a simulated one. All times are in seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

TURN_S = 600.0  # a turn; an engine of a large model takes a minute or two to boot, which is a tenth to a fifth of it
# A holder without work for so long may be stopped for a starved group. Work that comes earlier still finds the holder.
LINGER_S = 2.0
START_S = 30.0  # seconds that a group's start takes, until one was seen
IDLE_S = 300.0
# A group that has so many times more work for each holder than another group gets some of the other's units. Less would
# start and stop holders for queues that come and go.
MUCH = 3
_EPS = 1e-6  # tolerance when units are compared; they may be fractions


@dataclass(eq=False)
class Holder:
    """A trainer or an engine. `open`: whether it may be given work."""

    name: str
    group: str
    size: float
    state: str = "starting"  # up, stopping, gone
    closed: bool = False  # it gets no new work, so that it can make way for another group
    num_working: int = 0  # pieces of work that it has
    since: float = 0.0  # when it came up; before that, when its start began
    free_at: float = 0.0  # when it last had work
    began: float = 0.0  # when it was last given work
    ends: float = math.inf  # when that work will be done; infinity: not known

    @property
    def open(self) -> bool:
        """Whether it is up and not closed."""
        return self.state == "up" and not self.closed


@dataclass(eq=False)
class Group:
    """The holders of one kind, and how much work there is for them."""

    name: str
    size: float
    at_most: int
    idle_s: float
    wanted: int = 0  # how many holders its work, waiting or under way, could keep busy
    rank: int = 0  # the lowest rank of that work
    coming: int = 0  # how many holders more it will want for work to come
    since: float = 0.0  # when it became starved
    start_s: float = START_S  # seconds that its last start took
    holders: dict[str, Holder] = field(default_factory=dict)
    idle: dict[Holder, None] = field(default_factory=dict)  # up and without work, longest first
    num_present: int = 0  # holders that are starting or up, closed ones included
    num_starting: int = 0
    num_stopping: int = 0
    num_started: int = 0
    num_warmed: int = 0

    @property
    def starved(self) -> bool:
        """Whether it has work and no holder."""
        return self.wanted > 0 and self.num_present == 0


class Start(NamedTuple):
    """The caller must start this holder, and then call `up`, or `gone` if the start failed."""

    holder: Holder


class Stop(NamedTuple):
    """The caller must stop this holder, which has no work, and then call `gone`."""

    holder: Holder


class Devices:
    """Decides which trainers and engines are started and stopped (the rules are in this module's docstring).

    Args:
        num_units: how many units there are.
        turn_s: length of a turn, in seconds.
        linger_s: seconds without work after which a holder may be stopped for a starved group.
        room: whether the free units can be had for a holder of this group: others may hold some of them, and a holder may
            need all of its units on one node.
    """

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
        self._shares = False
        self._leaving = 0.0  # units of `held` whose holders are being stopped
        self._draining: dict[Holder, None] = {}
        self._chosen_for: tuple[float, list[Group]] | None = None  # units and groups for which `_yielding` chose them
        self._timers: list[float] = []
        self._changed = True

    @property
    def free(self) -> float:
        """Units that no holder holds."""
        return self.num_units - self.held

    @property
    def _spare_s(self) -> float:
        """A holder without work for so long may be stopped for a group that wants one more."""
        return min(self.turn_s, max((group.start_s for group in self.groups.values()), default=0.0))

    @property
    def next_at(self) -> float:
        """The next time at which `step` may have something to do without an event; infinity if there is none."""
        return self._timers[0] if self._timers else math.inf

    def add(self, group: str, size: float, at_most: int = 1, idle_s: float = IDLE_S) -> None:
        """Add a group, or give a known group another `at_most` and `idle_s` (its `size` stays).

        Args:
            size: units of one holder.
            at_most: largest number of holders.
            idle_s: seconds without work after which a holder is stopped.
        """
        known = self.groups.setdefault(group, Group(group, size, at_most, idle_s))
        known.at_most, known.idle_s = at_most, idle_s
        self._changed = True

    def ask(self, group: str, wanted: int, now: float, rank: int = 0, coming: int = 0) -> None:
        """Report the work of a group, whenever it changes.

        Args:
            wanted: how many holders the work, waiting or under way, could keep busy.
            rank: the lowest rank of that work.
            coming: how many holders more the group will want for work to come.
        """
        known = self.groups[group]
        before, now_wanted = (min(num, known.at_most) for num in (known.wanted, wanted))
        if (before, known.rank, known.coming) == (now_wanted, rank, coming):
            known.wanted = wanted  # beyond at_most only `_grow` reads it, to compare queues when a unit comes free
            return
        was_starved = known.starved
        known.wanted, known.rank, known.coming = wanted, rank, coming
        self._settle(known, was_starved, now)

    def up(self, holder: Holder, now: float) -> None:
        """Report that a holder has been started."""
        if holder.state == "starting":
            group = self.groups[holder.group]
            group.num_starting -= 1
            group.start_s = now - holder.since
            holder.state, holder.since = "up", now
            self._at(now + self.turn_s)
            self._rest(holder, now)

    def work(self, holder: Holder, num: int, now: float, ends: float = math.inf) -> None:
        """Report that a holder was given `num` pieces of work, or, with a negative `num`, has done them.

        `ends`: when the work will be done; infinity: not known.
        """
        holder.num_working += num
        if holder.num_working <= 0:
            holder.num_working, holder.ends = 0, math.inf
            if holder.state == "up":
                self._rest(holder, now)
        elif num > 0:
            self.groups[holder.group].idle.pop(holder, None)
            holder.began, holder.ends = now, ends

    def gone(self, holder: Holder, now: float) -> None:
        """Report that a holder has been stopped, has died, or could not be started. Its units are free."""
        group = self.groups[holder.group]
        was_starved = group.starved
        if group.holders.pop(holder.name, None) is None:
            return
        if holder.state == "starting":
            group.num_starting -= 1
            group.num_warmed = group.at_most  # the start failed: start the next one only for work that is there
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

    def resize(self, num_units: float, shares: bool = False) -> None:
        """Report the number of units, when nodes or `room` may have changed. Report holders on lost nodes by `gone`.

        `shares`: whether others that share the units make what this run waits for.
        """
        self._changed = True
        self.num_units, self._shares = num_units, shares

    def waiting(self) -> list[Group]:
        """Return the starved groups, the next one first, without those whose holder needs more units than there are."""
        starved = [g for g in self.groups.values() if g.starved and g.size <= self.num_units + _EPS]
        return sorted(starved, key=lambda group: (group.rank, group.since))

    def step(self, now: float) -> list[Start | Stop]:
        """Return what to do now. The caller must do all of it."""
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
            yield self._start(waiting[0], now)
        yield from self._warm(now)
        yield from self._grow(now)
        for holder in self._spare(now, None):
            yield self._stop(holder, now)
        for holder in self._spare(now, self._spare_s) if self._shares else ():
            group = self.groups[holder.group]
            if not self.room(group):
                group.num_warmed = group.at_most  # the next one only for work that is there
                yield self._stop(holder, now)

    def _make_way(self, group: Group, now: float) -> Iterator[Stop]:
        """Stop holders without work, and close holders whose turn is over, as many as this starved group needs to fit."""
        lacking = group.size - self.free - self._leaving
        if lacking <= _EPS:
            if self._leaving > _EPS or self.room(group):
                return  # it will fit
            lacking = 2 * _EPS  # enough units in all, but they cannot be had: free one holder more
        chosen = dict.fromkeys(self._spare(now, self.linger_s))
        if now - group.since >= self.turn_s - _EPS:
            idle = sorted(
                (each for other in self.groups.values() for each in other.idle), key=lambda each: each.free_at
            )
            chosen |= dict.fromkeys(holder for holder in idle if self._is_over(holder, group, now))
            # Holders that are closed already stay closed, unless a holder without work can be stopped instead.
            chosen |= dict.fromkeys(holder for holder in self._draining if self._is_over(holder, group, now))
            if sum(holder.size for holder in chosen) < lacking - _EPS:
                everyone = [holder for other in self.groups.values() for holder in other.holders.values()]
                over = [holder for holder in everyone if self._is_over(holder, group, now)]
                chosen |= dict.fromkeys(sorted(over, key=lambda h: (h.ends, h.began)))
        ways: dict[Holder, None] = {}
        for holder in chosen:
            if lacking > _EPS:
                ways[holder] = None
                lacking -= holder.size
        if lacking > _EPS:
            ways = {}  # too few: close none, since closed holders would stand idle until enough units can be freed
        self._drain({holder: None for holder in ways if holder.num_working})
        self._chosen_for = None
        for holder in ways:
            if not holder.num_working:
                yield self._stop(holder, now)

    def _spare(self, now: float, for_s: float | None) -> list[Holder]:
        """Holders that have been without work for `for_s` seconds and are not wanted, longest first. `for_s` None: for their
        group's `idle_s`, and only in groups without work to come."""
        found: list[Holder] = []
        for group in self.groups.values():
            left = group.num_present - group.wanted if group.idle and not (for_s is None and group.coming) else 0
            if left > 0:
                least_s = (group.idle_s if for_s is None else for_s) - _EPS
                for holder in islice(group.idle, left):
                    if now - holder.free_at < least_s:
                        break  # all others of this group have worked since
                    found.append(holder)
        return sorted(found, key=lambda holder: holder.free_at)

    def _is_over(self, holder: Holder, waiting: Group, now: float) -> bool:
        """Whether the holder's turn is over for this waiting group. A group with a lower rank never makes way."""
        group = self.groups[holder.group]
        ranks_first = group.wanted > 0 and group.rank < waiting.rank
        return holder.state == "up" and not ranks_first and now - holder.since >= self.turn_s - _EPS

    def _warm(self, now: float) -> Iterator[Start]:
        """Start holders ahead of their work, one at a time in each group, while one of every needed group still fits."""
        groups = [
            group for group in self.groups.values()
            if group.coming and not group.num_starting and group.num_warmed < group.at_most
            and group.num_present < min(group.wanted + group.coming, group.at_most)
        ]  # fmt: skip
        if not groups:
            return
        needed = [group for group in self.groups.values() if group.coming or group.wanted or group.num_present]
        total = sum(max(1, group.num_present) * group.size for group in needed)
        for group in groups:
            more = group.size if group.num_present else 0.0
            if total + more <= self.num_units + _EPS and self._fits(group):
                group.num_warmed += 1
                total += more
                yield self._start(group, now)

    def _grow(self, now: float) -> Iterator[Start | Stop]:
        """Start more holders for groups that want them. The lowest rank is first, then the group with the most work wanted for
        each holder that it has."""
        while short := [g for g in self.groups.values() if g.num_present < min(g.wanted, g.at_most)]:
            group = min(short, key=_by_need)
            if self._fits(group):
                yield self._start(group, now)
                continue
            lacking, spare = group.size - self.free - self._leaving, list[Holder]()
            if lacking > _EPS:
                spare = [holder for other in self.groups.values() for holder in other.idle if holder.closed]
                spare += self._spare(now, self._spare_s)
            if not spare or sum(holder.size for holder in spare) < lacking - _EPS:
                break
            yield self._stop(spare[0], now)
        self._drain(self._yielding(short, now))

    def _yielding(self, short: Sequence[Group], now: float) -> dict[Holder, None]:
        """Holders whose turn is over and that make way, once their work is done, for a group with much more work for each
        holder (`MUCH` times as much, also when they have made way)."""
        behind = {g: num for g in short if (num := min(g.wanted // MUCH, g.at_most) - g.num_present) > 0}
        lacking = sum(num * group.size for group, num in behind.items()) - max(0.0, self.free) - self._leaving
        if lacking <= _EPS:
            self._chosen_for = None
            return {}
        next_one = min(behind, key=_by_need)
        need = next_one.wanted / max(1, next_one.num_present)
        # By group that may give some: how many, so that it still has no more work for each of its holders.
        givers = {g: num for g in self.groups.values() if not (g.wanted and g.rank < next_one.rank)
                  and (num := int(g.num_present - MUCH * g.wanted / need)) > 0}  # fmt: skip
        if (lacking, list(givers)) == self._chosen_for:
            return self._draining
        self._chosen_for, found = (lacking, list(givers)), dict[Holder, None]()
        latest = now - self.turn_s + _EPS
        over = [h for g in givers for h in g.holders.values() if h.state == "up" and h.since <= latest]
        for holder in sorted(over, key=lambda h: (not h.closed, h.ends, h.began)):
            left = givers[self.groups[holder.group]]
            if lacking > _EPS and left:
                found[holder] = None
                lacking -= holder.size
                givers[self.groups[holder.group]] = left - 1
        if lacking > _EPS:
            self._chosen_for = None  # more turns will be over
        return found

    def _fits(self, group: Group) -> bool:
        return group.size <= self.free + _EPS and self.room(group)

    def _start(self, group: Group, now: float) -> Start:
        group.num_started += 1
        group.num_starting += 1
        group.num_present += 1
        holder = Holder(f"{group.name}-{group.num_started}", group.name, group.size, since=now)
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
        if holders is self._draining:
            return
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
        self._at(now + self.linger_s, now + self._spare_s, now + self.turn_s, now + group.idle_s)
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


def _by_need(group: Group) -> tuple[int, float]:
    return group.rank, -group.wanted / max(1, group.num_present)
