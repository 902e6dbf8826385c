"""The rule by which trainers and engines share devices, over a virtual clock: for every ratio of them to units all work is
done, no unit is held twice, and nobody is started and stopped for nothing."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

import pytest

from safecl.devices import Devices, Holder, Start, Stop

TURN_S, LINGER_S, BOOT_S = 600.0, 2.0, 60.0
Piece = tuple[str, float]  # group, seconds


@dataclass(eq=False)
class Job:
    """Pieces of work, one after the other."""

    pieces: deque[Piece]
    rank: int = 0


@dataclass(eq=False)
class World:
    """Jobs on devices: a trainer does a piece at a time, an engine up to 4. `fails`: how often a holder dies, at any time."""

    num_units: float
    sizes: dict[str, float]
    at_most: dict[str, int]
    jobs: list[Job]
    fails: int = 0
    seed: int = 0
    coming: bool = True
    starts: list[tuple[float, str]] = field(default_factory=list)
    spans: list[tuple[float, float, float]] = field(default_factory=list)  # of holders: from, to, units
    lost: int = 0
    now: float = 0.0

    def run(self, until: float = 1e7) -> float:
        """Seconds until all work is done."""
        self.devices = devices = Devices(self.num_units, TURN_S, LINGER_S)
        rng = random.Random(self.seed)
        for group, size in self.sizes.items():
            devices.add(group, size, self.at_most[group])
        ready: dict[str, list[Job]] = defaultdict(list)
        working: dict[Holder, list[Job]] = {}
        began: dict[Holder, float] = {}
        events: list[tuple[float, int, str, Holder, Job | None]] = []
        count = itertools.count()

        def later(seconds: float, what: str, holder: Holder, job: Job | None = None) -> None:
            heapq.heappush(events, (self.now + seconds, next(count), what, holder, job))

        for job in self.jobs:
            ready[job.pieces[0][0]].append(job)
        while any(job.pieces for job in self.jobs):
            for group in self.sizes:
                doing = [job for holder, jobs in working.items() if holder.group == group for job in jobs]
                num = len(ready[group]) + len(doing)
                to_come = sum(any(name == group for name, _ in list(job.pieces)[1:]) for job in self.jobs)
                rank = min((job.rank for job in ready[group] + doing), default=0)
                wanted = num if group == "trainers" else -(-num // 4)
                devices.ask(group, wanted, self.now, rank, to_come if self.coming else 0)
            for act in devices.step(self.now):
                holder = act.holder
                if isinstance(act, Start):
                    began[holder] = self.now
                    self.starts.append((self.now, holder.group))
                    later(5.0 if holder.group == "trainers" else BOOT_S, "up", holder)
                else:
                    assert not working[holder], "stopped with work"
                    later(3.0, "gone", holder)
            assert devices.held == pytest.approx(sum(holder.size for holder in began))
            assert devices.held <= self.num_units + 1e-6, "a unit is held twice"
            for holder, jobs in working.items():
                room = 1 if holder.group == "trainers" else 4
                while holder.open and ready[holder.group] and len(jobs) < room:
                    job = min(ready[holder.group], key=lambda job: job.rank)
                    ready[holder.group].remove(job)
                    jobs.append(job)
                    devices.work(holder, 1, self.now)
                    later(job.pieces[0][1], "done", holder, job)
            if self.lost < self.fails and began and rng.random() < 0.05:
                self.lost += 1
                later(rng.random() * 100, "gone", rng.choice(list(began)))
            at = min([devices.next_at, *(event[0] for event in events[:1])])
            assert at < until, f"nothing more will happen; waiting: {devices.waiting()}"
            self.now = max(self.now, at)
            while events and events[0][0] <= self.now:
                _, _, what, holder, job = heapq.heappop(events)
                if holder not in began:
                    continue
                if what == "up":
                    working[holder] = []
                    devices.up(holder, self.now)
                elif what == "done" and job in working[holder]:
                    working[holder].remove(job)
                    job.pieces.popleft()
                    if job.pieces:
                        ready[job.pieces[0][0]].append(job)
                    devices.work(holder, -1, self.now)
                elif what == "gone":
                    for lost in working.pop(holder, []):
                        ready[holder.group].append(lost)
                    self.spans.append((began.pop(holder), self.now, holder.size))
                    devices.gone(holder, self.now)
        return self.now


def grid(num_models: int, num_jobs: int, train_s: float = 300.0, size: float = 1.0, seed: int = 0) -> list[Job]:
    """Each: align, finetune, its answers, a judge's verdicts, for one of the models."""
    rng = random.Random(seed)
    return [
        Job(deque([("trainers", train_s * rng.uniform(0.2, 2)), (f"candidate-{model}", rng.uniform(5, 60)),
                   (f"judge-{model}", rng.uniform(5, 60))] * 2), rank=rng.choice([0, 0, 1, 2]))
        for number in range(num_jobs) for model in [number % num_models]
    ]  # fmt: skip


def world(num_units: float, num_models: int, tensor_parallel: float = 1, num_workers: int = 1, **more: object) -> World:
    engines = [f"{role}-{model}" for model in range(num_models) for role in ("candidate", "judge")]
    sizes = {"trainers": float(num_workers)} | dict.fromkeys(engines, float(tensor_parallel))
    at_most = {"trainers": 8} | dict.fromkeys(engines, 2)
    num_jobs = more.pop("num_jobs", 12)
    assert isinstance(num_jobs, int)
    return World(num_units, sizes, at_most, grid(num_models, num_jobs), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_models", [1, 2, 3, 7])
@pytest.mark.parametrize("num_units", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("fails", [0, 6])
def test_all_work_is_done_for_every_ratio_of_engines_to_units(num_units: int, num_models: int, fails: int) -> None:
    world(num_units, num_models, fails=fails, seed=num_units, num_jobs=8).run()


@pytest.mark.parametrize(("num_units", "tensor_parallel", "num_workers"),
                         [(2, 2, 1), (2, 1, 2), (4, 4, 1), (4, 2, 3), (5, 4, 3), (8, 4, 8), (1, .5, 1), (1, .3, .7)])  # fmt: skip
def test_sizes_that_do_not_divide_the_units_make_progress_too(
    num_units: int, tensor_parallel: float, num_workers: int
) -> None:
    for fails in (0, 5):
        world(num_units, 3, tensor_parallel, num_workers, fails=fails).run()


def test_random_worlds_come_to_their_end() -> None:
    rng = random.Random(7)
    for seed in range(60):
        units = rng.randint(1, 9)
        groups = ["trainers", *(f"engine-{i}" for i in range(rng.randint(1, 6)))]
        jobs = []
        for _ in range(rng.randint(1, 15)):
            pieces = [(rng.choice(groups), rng.choice([0.5, 20.0, 700.0, 5000.0])) for _ in range(rng.randint(1, 6))]
            jobs.append(Job(deque(pieces), rng.randint(0, 2)))
        sizes = {group: float(rng.randint(1, units)) for group in groups}
        at_most = {group: rng.randint(1, 4) for group in groups}
        World(units, sizes, at_most, jobs, fails=rng.choice([0, 3]), seed=seed, coming=rng.random() < 0.5).run(1e9)


def test_nobody_is_started_and_stopped_for_nothing() -> None:
    """One unit, three models: each change of use ends a turn or follows work that was done, so there is a bound."""
    busy = world(1, 3, num_jobs=30)
    seconds = busy.run()
    work = sum(piece for job in grid(3, 30) for _, piece in job.pieces if piece)
    # A use ends with its turn, or with the last of its work: each of six engines has work left at most once a round of turns.
    rounds = 1 + seconds / TURN_S
    assert len(busy.starts) <= 7 * rounds
    boots = sum(BOOT_S if group != "trainers" else 5.0 for _, group in busy.starts) + 3.0 * len(busy.starts)
    assert seconds <= work + boots + (TURN_S + LINGER_S) * len(busy.starts)


def test_with_units_for_everybody_each_is_started_once_ahead_of_its_work() -> None:
    ample = world(8, 3, num_jobs=3)
    ample.at_most = dict.fromkeys(ample.sizes, 1)
    ample.run()
    assert sorted(group for _, group in ample.starts) == sorted(ample.sizes)
    assert all(at == 0 for at, _ in ample.starts)  # warm before the first finetune is done


def test_an_idle_engine_makes_way_for_training_and_a_busy_one_for_its_turn() -> None:
    devices = Devices(1, TURN_S, LINGER_S)
    devices.add("trainers", 1)
    devices.add("judge", 1)
    devices.ask("judge", 1, 0.0)
    [start] = devices.step(0.0)
    engine = start.holder
    devices.up(engine, 10.0)
    devices.work(engine, 1, 10.0)
    devices.ask("trainers", 1, 20.0)
    assert devices.step(20.0) == [] and engine.open
    assert devices.step(20.0 + TURN_S - 1) == [] and engine.open
    assert devices.step(20.0 + TURN_S) == [] and not engine.open  # its turn is over: it drains
    devices.work(engine, -1, 700.0)
    [stop] = devices.step(700.0)
    assert stop.holder is engine and devices.free == 0
    devices.gone(engine, 705.0)
    [start] = devices.step(705.0)
    assert start.holder.group == "trainers"
    trainer = start.holder
    devices.up(trainer, 710.0)
    devices.work(trainer, 1, 710.0)
    devices.ask("trainers", 0, 720.0)  # done, and there is no more
    devices.work(trainer, -1, 720.0)
    assert devices.step(720.0) == []  # what comes at once would be its own
    [stop] = devices.step(720.0 + LINGER_S)
    assert stop.holder is trainer


def test_a_lower_rank_goes_first_and_is_not_put_off_by_a_higher_one() -> None:
    devices = Devices(1, TURN_S, LINGER_S)
    for group in ("a", "b", "c"):
        devices.add(group, 1)
    devices.ask("a", 1, 0.0, rank=1)
    [start] = devices.step(0.0)
    devices.up(start.holder, 0.0)
    devices.work(start.holder, 1, 0.0)
    devices.ask("b", 1, 1.0, rank=2)
    assert devices.step(5 * TURN_S) == [] and start.holder.open  # of a higher rank
    devices.ask("c", 1, 5 * TURN_S, rank=0)
    assert [group.name for group in devices.waiting()] == ["c", "b"]
    devices.step(6 * TURN_S)
    assert not start.holder.open
    devices.ask("a", 1, 6 * TURN_S, rank=0)  # now somebody waits for its work as urgently
    devices.ask("c", 0, 6 * TURN_S)  # and who had asked does so no more
    devices.step(6 * TURN_S)
    assert start.holder.open


def test_more_holders_for_a_queue_while_units_are_free_and_fewer_after_it() -> None:
    devices = Devices(4, TURN_S, LINGER_S)
    devices.add("judge", 1, at_most=3, idle_s=100)
    devices.ask("judge", 9, 0.0)
    holders = [act.holder for act in devices.step(0.0)]
    assert len(holders) == 3
    for holder in holders:
        devices.up(holder, 1.0)
    devices.ask("judge", 1, 2.0)
    assert {act.holder for act in devices.step(101.0)} <= set(holders) and devices.groups["judge"].num_present == 1


def test_several_units_on_one_node_are_cleared_though_enough_are_free_in_all() -> None:
    """Two nodes of two units, one of each in use: an engine over two units waits for a whole node."""
    taken = [1.0, 1.0]
    devices = Devices(4, TURN_S, LINGER_S, room=lambda group: max(2 - node for node in taken) >= group.size)
    devices.add("trainers", 1, at_most=2)
    devices.add("large", 2)
    devices.ask("trainers", 2, 0.0)
    trainers = [act.holder for act in devices.step(0.0)]
    for trainer in trainers:
        devices.up(trainer, 0.0)
        devices.work(trainer, 1, 0.0)
    devices.ask("large", 1, 1.0)
    devices.step(1.0)
    devices.step(1.0 + TURN_S)
    assert [trainer.open for trainer in trainers].count(False) == 1
    closed = next(trainer for trainer in trainers if not trainer.open)
    devices.work(closed, -1, 700.0)
    [stop] = devices.step(700.0)
    taken[0] = 0.0
    devices.gone(stop.holder, 701.0)
    assert [act.holder.group for act in devices.step(701.0)] == ["large", "trainers"]


def test_two_drivers_that_each_hold_what_the_other_waits_for_do_not_wait_for_ever() -> None:
    """Each counts the cluster's two units as its own. One has an engine and wants a trainer, the other has it the other way."""
    drivers: list[Devices] = []
    for has, wants in (("engine", "trainers"), ("trainers", "engine")):
        devices = Devices(2.0, TURN_S, LINGER_S, room=lambda group: sum(each.held for each in drivers) < 2)
        for name in (has, wants):
            devices.add(name, 1.0)
        devices.ask(has, 1, now=0.0)
        (start,) = devices.step(0.0)
        devices.up(start.holder, 1.0)
        devices.ask(has, 0, now=1.0, coming=1)  # its next work comes from the other group
        devices.ask(wants, 1, now=1.0)
        drivers.append(devices)
    one, other = drivers
    assert one.step(1.5) == other.step(1.5) == []
    one.resize(2.0)  # looks again
    (stop,) = one.step(1.0 + LINGER_S)
    assert stop == Stop(stop.holder) and stop.holder.group == "engine"
    one.gone(stop.holder, 4.0)
    (start,) = one.step(4.0)
    assert start == Start(start.holder) and start.holder.group == "trainers"


def test_a_driver_that_waits_for_what_another_makes_gives_up_what_is_idle() -> None:
    """The other one has no unit, and makes the stage for which this one's engine waits."""
    is_free = False
    devices = Devices(1.0, TURN_S, LINGER_S, room=lambda group: is_free)
    devices.add("engine", 1.0)
    devices.ask("engine", 1, now=0.0)
    assert devices.step(0.0) == [], "others hold it"
    is_free = True
    devices.resize(1.0)
    (start,) = devices.step(0.0)
    devices.up(start.holder, BOOT_S)
    is_free = False
    devices.ask("engine", 0, now=BOOT_S, coming=1)
    devices.resize(1.0, shares=True)
    assert devices.step(BOOT_S * 1.9) == []
    devices.resize(1.0)
    assert devices.step(BOOT_S * 2) == [], "nobody waits for it"
    is_free = True
    devices.resize(1.0, shares=True)
    assert devices.step(BOOT_S * 2) == [], "others have room"
    is_free = False
    devices.resize(1.0, shares=True)
    assert devices.step(BOOT_S * 2) == [Stop(start.holder)]
    devices.gone(start.holder, BOOT_S * 2)
    is_free = True
    devices.resize(1.0, shares=True)
    assert devices.step(BOOT_S * 2) == [], "not ahead of its work: the others would not get the unit"
    devices.ask("engine", 1, now=BOOT_S * 3)
    assert [type(act) for act in devices.step(BOOT_S * 3)] == [Start]


def test_units_that_went_are_given_back_by_whoever_comes_to_rest_first() -> None:
    devices = Devices(2, TURN_S, LINGER_S)
    devices.add("trainers", 1, at_most=2)
    devices.add("huge", 2)
    devices.ask("trainers", 2, 0.0)
    first, second = (act.holder for act in devices.step(0.0))
    devices.ask("huge", 1, 1.0)
    devices.resize(1)
    assert devices.waiting() == []  # what can never fit holds nobody up
    devices.gone(first, 2.0)  # it was on the node that went
    assert devices.step(2.0) == []  # there is no room for another one
    devices.up(second, 3.0)
    devices.resize(2)
    assert [group.name for group in devices.waiting()] == ["huge"]


def test_a_holder_without_work_makes_room_after_as_long_as_the_longest_start_took() -> None:
    """Else engines that take minutes to start would be stopped and started for queues that come and go."""
    devices, start_s = Devices(3, TURN_S, LINGER_S), 100.0
    for group, wanted in (("a", 2), ("b", 1)):
        devices.add(group, 1, at_most=2)
        devices.ask(group, wanted, 0.0)
    started = [act.holder for act in devices.step(0.0)]
    assert [holder.group for holder in started] == ["a", "b", "a"]
    for holder in started:
        devices.up(holder, start_s)
        devices.work(holder, 1, start_s)
    devices.ask("a", 1, 150.0)
    devices.ask("b", 2, 150.0)
    devices.work(started[2], -1, 150.0)
    seen = {now: devices.step(now) for now in (150.0, 150.0 + start_s - 1, 150.0 + start_s)}
    assert [len(acts) for acts in seen.values()] == [0, 0, 1]
    assert seen[150.0 + start_s] == [Stop(started[2])]


def test_ten_thousand_jobs_on_a_thousand_units_start_no_holder_twice() -> None:
    """As `plan --cluster` asks it to."""
    rng = random.Random(0)
    devices = Devices(1000, TURN_S, LINGER_S)
    devices.add("trainers", 1, at_most=990)
    for model in range(3):
        devices.add(f"candidate-{model}", 1, at_most=20)
    events: list[tuple[float, int, str, Holder]] = []
    now, left, count = 0.0, 10_000, itertools.count()
    while left:
        devices.ask("trainers", left, now)
        for act in devices.step(now):
            if isinstance(act, Start):
                heapq.heappush(events, (now + 5, next(count), "up", act.holder))
        now, _, what, holder = heapq.heappop(events)
        if what == "up":
            devices.up(holder, now)
        else:
            left -= 1
            devices.work(holder, -1, now)
        if left:
            devices.work(holder, 1, now)
            heapq.heappush(events, (now + rng.uniform(100, 1000), next(count), "done", holder))
    assert devices.groups["trainers"].num_started == 990


def test_trainers_make_way_for_engines_with_three_times_their_work_and_only_after_their_turn() -> None:
    devices = Devices(4, TURN_S, LINGER_S)
    devices.add("trainers", 1, 4)
    devices.add("engines", 1, 10)

    def started(now: float) -> list[Holder]:
        acts = devices.step(now)
        assert all(isinstance(act, Start) for act in acts)
        return [act.holder for act in acts]

    devices.ask("engines", 1, 0.0)
    devices.ask("trainers", 4, 0.0)
    holders = started(0.0)
    [engine], trainers = ([h for h in holders if h.group == group] for group in ("engines", "trainers"))
    for number, holder in enumerate([engine, *trainers]):
        devices.up(holder, 0.0)
        devices.work(holder, 1, 0.0, ends=1000.0 + number)
    devices.ask("engines", 6, 1.0)  # three for each of two engines
    assert not devices.step(1.0) and all(holder.open for holder in trainers)
    devices.step(TURN_S)
    assert [holder.open for holder in trainers] == [False, True, True]  # the one that is done first
    devices.ask("engines", 5, TURN_S)  # fewer than that
    devices.step(TURN_S)
    assert all(holder.open for holder in trainers)
    devices.ask("engines", 100, TURN_S)
    devices.step(TURN_S)
    assert [holder.open for holder in trainers] == [False, False, True]  # one trainer is left
    devices.work(trainers[0], -1, 1001.0)
    [stop] = devices.step(1001.0)
    assert stop.holder is trainers[0]
    devices.gone(trainers[0], 1002.0)
    assert [holder.group for holder in started(1002.0)] == ["engines"]
