"""The Broker: runs every missing stage once, on Ray, and tells every caller that waits for it.

The Broker is one actor without CPUs, held by the driver. It maps the key of a stage to its running task. Trials only await
stages. So two trials that need one stage run it once, and a trial that stops does not stop a stage that another trial needs.
Two drivers of one store also run a stage once (claims.py). What is finished is read from the store alone. A Broker that dies
is replaced, and its callers ask the new one again. When the driver dies, the same command continues from what is finished
and from checkpoints.

Heavy stages run on trainers, one after the other (trainers.py). Light stages mostly wait for engines, and run as threads of
one process (work.py). So a stage or a trial that waits needs no process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safecl import faults, gauges, reclaim
from safecl.base import Damaged
from safecl.capacity import GIB, Capacity, capacity, find, free_gib, free_units, unit
from safecl.claims import Claims
from safecl.cluster import clear
from safecl.config import Execution
from safecl.devices import Devices, Group
from safecl.fleet import Fleet
from safecl.lender import Lender
from safecl.order import NUM_RANKS, UNNAMED, Claim, Line, Turn, chains
from safecl.stages import engine_of, load, names, needs_trainer, stays
from safecl.store import Stage, Store, below
from safecl.times import Times, queue
from safecl.trainers import GROUP as TRAINERS
from safecl.trainers import Trainers
from safecl.work import Begun, Hand, Ran, run_stage

DRAIN_S = 2.0  # seconds between two looks for draining nodes; a spot warning comes 30 s to 2 minutes before the end
WATCH_S = 5.0  # seconds between two looks at the cluster's size, and at what dead actors hold
# For so many seconds after a holder is gone, its units are taken as free. Ray's view of them may be as old.
FREED_S = 2 * WATCH_S
REPAIRS = 2  # how often a stage is begun again because one of its inputs was found damaged

T = TypeVar("T")


class Broker:
    """Runs stages. `broker()` makes it a Ray actor. All methods run on one event loop."""

    def __init__(
        self,
        store: Store,
        execution: Execution,
        logs: str,
        num_cpus: float,
        held: Capacity | None = None,
        seconds: Callable[[Stage], float] | None = None,
    ) -> None:
        """Make a Broker.

        Args:
            logs: folder of the run's logs.
            num_cpus: CPUs of the cluster. They bound how many light stages are at work.
            held: what trainers and engines may hold; None: computed for `num_cpus` CPUs and no bound on memory.
            seconds: predicts the seconds of a stage, by which ready stages are ordered; None: 1 for each.
        """
        self.store, self.execution, self.logs = store, execution, logs
        self.seconds = seconds or (lambda stage: 1.0)
        self.running: dict[str, asyncio.Task[None]] = {}
        self.turns: dict[str, Turn] = {}  # by key of a stage under way: the lowest turn of the callers that wait for it
        self.training: dict[str, float] = {}  # by key of such a stage that waits for a trainer: its seconds
        # By model: the same of stages that will ask an engine of candidates, as seconds of all its engines together.
        self.coming: dict[str, dict[str, float]] = {}
        self.failed: dict[str, BaseException] = {}
        self.live: dict[str, dict[str, Any]] = {}
        self.finished: list[dict[str, Any]] = []
        self.times = Times()
        self.gauges = gauges.of(execution.address)
        self.num_tokens = 0  # generated since the gauges were last shown
        # An engine serves the weights of waiting stages in turn. The more stages wait, the longer each waits for its answer.
        self.num_light = min(64, 2 * max(2, int(num_cpus)))
        self.light: dict[tuple[str, int], Line] = {}  # by kind and rank, so that no line delays another
        self.hand: Any = None
        self.num_asked = 0  # calls of `ensure`
        self.claims = Claims(store)
        self.journal = faults.Journal(Path(logs))
        self.ending: float | None = None  # since when finetunes must write a checkpoint, because the driver ends
        self.draining: dict[str, float] = {}  # by node that will be gone (first digits of its id): since when
        self.free: list[float] | None = None  # units that each node of a joined cluster had free at the last look
        self.told: set[str] = set()  # draining nodes that are in the journal
        self.watching: list[asyncio.Task[None]] = []  # tasks that look after the cluster
        if _replaces_another():
            self.journal.add(faults.BROKER)
            clear(store.short)
        held = held or capacity(execution, {"CPU": num_cpus}, math.inf)
        self.lender = Lender(Devices(held.num_units, execution.turn_s, room=self._room))
        self.trainers = Trainers(
            store, execution, logs, self.lender, held, self._trains, self._ahead, self._begin, self._end
        )  # fmt: skip
        self.fleet = Fleet(
            store, execution, self.lender, held, 2 * self.num_light, self._begin, self._end
        )  # fmt: skip
        self.holding: list[Any] = []  # leases that last as long as the Broker

    def unset(self, variables: Sequence[str]) -> list[str]:
        """Return which of these environment variables are not set where stages run."""
        return [name for name in variables if not os.environ.get(name)]

    async def ensure(self, stages: Sequence[Stage], claim: Claim = UNNAMED) -> None:
        """Run these stages, and return when all are in the store. Raises a stage's failure as soon as it is known.

        `claim` decides in which order callers get trainers and engines, and in which order their stages do (order.py).
        """
        self.num_asked += 1
        number = self.num_asked
        if not self.watching:
            joined = self.execution.address != "local"
            watches = [self._watch_reserved(), *([self._watch_nodes(), self._watch_size()] if joined else ())]
            self.watching = [asyncio.create_task(watch) for watch in watches]
            if joined:
                self.free = await asyncio.to_thread(free_units, unit(self.execution))
        turn = self._line_up(await self._asked(below, stages, self.store.has), claim, number)
        await self._all(stages, turn)

    def _line_up(self, todo: Sequence[Stage], claim: Claim, number: int) -> Turn:
        """Give each stage that must run its turn. A stage that other callers wait for already moves forward if this caller's
        turn is lower."""
        place = {stage.key: number for number, stage in enumerate(todo)}
        needs = [[place[s.key] for s in stage.inputs.values() if s.key in place] for stage in todo]
        seconds = [self.seconds(stage) for stage in todo]
        for stage, its, chain in zip(todo, seconds, chains(seconds, needs), strict=True):
            turn = Turn.of(claim, chain, number)
            if stage.key in self.failed:  # it does not run again; `_ensure` raises its error
                continue
            if stage.key not in self.turns:
                self.turns[stage.key] = turn
                if needs_trainer(stage):
                    self.training[stage.key] = its
                elif engine_of(stage) == "candidate":
                    self.coming.setdefault(stage.inputs["model"].key, {})[stage.key] = its
            elif turn < self.turns[stage.key]:
                self.turns[stage.key] = turn
                self.trainers.hurry(stage, turn)
                self.fleet.hurry(stage.key, turn)
        return Turn.of(claim, 0.0, number)

    async def _all(self, stages: Iterable[Stage], turn: Turn) -> None:
        await asyncio.gather(*(self._ensure(stage, turn) for stage in stages))

    async def _ensure(self, stage: Stage, turn: Turn) -> None:
        """Run a stage if it is missing. `turn`: of the stage that waits for it. It is used if the stage has no turn yet, because
        it was finished before and must be made again."""
        if stage.key in self.failed:
            raise self.failed[stage.key]
        if stage.key not in self.running and await self._asked(self.store.has, stage):
            self._leave(stage)
            return
        if stage.key in self.failed:
            raise self.failed[stage.key]
        if stage.key not in self.running:
            self.turns.setdefault(stage.key, turn)
            self.times.asked(stage, self.turns[stage.key].rank)
            self.running[stage.key] = asyncio.create_task(self._make(stage, needs_trainer(stage)))
        # shield: cancelling one waiter must not cancel the shared stage.
        await asyncio.shield(self.running[stage.key])

    async def _asked(self, look: Callable[..., T], *arguments: Any) -> T:
        """Ask the store. At a URL this may take a while, so it runs in a thread, and other work goes on."""
        return look(*arguments) if self.store.remote is None else await asyncio.to_thread(look, *arguments)

    async def _make(self, stage: Stage, heavy: bool) -> None:
        role = None if heavy else engine_of(stage)
        self.trainers.expect(int(heavy))
        if role is not None:
            self.fleet.expect(role, stage.inputs["model"], 1)
        try:
            for tries_left in range(REPAIRS, -1, -1):
                await self._all(stage.inputs.values(), self.turns[stage.key])
                if not await self.claims.take(stage):  # another driver has made it
                    return
                try:
                    seconds = await self._persist(stage, heavy)
                    break
                except Exception as error:
                    if not isinstance(faults.plain_error(error), Damaged) or not tries_left:
                        raise
                    # `sound` moves damaged inputs away, so that they are made again.
                    await asyncio.gather(*(asyncio.to_thread(self.store.sound, s) for s in stage.inputs.values()))
                finally:
                    self.claims.leave(stage)
            self.finished.append({"kind": stage.kind, "key": stage.key, "seconds": seconds})
            self.times.ends(stage.key)
            if self.gauges is not None and stage.kind == "generate":
                self.num_tokens += int((await asyncio.to_thread(self.store.record, stage))["result"]["tokens"])
        except BaseException as error:
            self.failed[stage.key] = error
            self.times.ends(stage.key, faults.plain_error(error))
            raise
        finally:
            self.trainers.expect(-int(heavy))
            if role is not None:
                self.fleet.expect(role, stage.inputs["model"], -1)
            self.live.pop(stage.key, None)
            self.running.pop(stage.key, None)
            self._leave(stage)

    def _leave(self, stage: Stage) -> None:
        """Forget the turn of a stage that no caller waits for any more."""
        self.turns.pop(stage.key, None)
        self.training.pop(stage.key, None)
        self._came(stage)

    def _came(self, stage: Stage) -> None:
        if "model" in stage.inputs:
            self.coming.get(stage.inputs["model"].key, {}).pop(stage.key, None)

    async def _persist(self, stage: Stage, heavy: bool) -> float:
        """Call `_run`, and again if the machine failed. This is for light stages: trainers repeat heavy ones themselves."""
        began = time.monotonic()
        for tries in itertools.count(1):
            try:
                return await self._run(stage, heavy)
            except Exception as error:
                found = faults.plain_error(error)
                cause = faults.cause_of(found)
                if not (heavy and cause.kind == "infrastructure"):
                    self.journal.add(cause, f"{stage.kind} {stage.key[:12]}", found)
                patient = cause in faults.PATIENT and time.monotonic() - began < faults.PATIENCE_S
                if heavy or cause.kind != "infrastructure" or (tries > self.execution.max_failures and not patient):
                    raise
                await asyncio.sleep(faults.PAUSE_S if patient else min(30.0, 2.0**tries))
        raise AssertionError("returned or raised above")

    async def _run(self, stage: Stage, heavy: bool) -> float:
        """Run a stage whose inputs are in the store. Returns the seconds that it took."""
        self.times.ready(stage.key)
        if heavy:
            await self.trainers.run(stage, self.turns[stage.key])
        elif load(stage.kind).runs == "thread":
            return await self._light(stage)
        else:  # in a process of its own
            self._starts(stage)
            await self._alone(stage)
        return time.time() - float(self.live[stage.key]["start"])

    async def _light(self, stage: Stage) -> float:
        turn, role = self.turns[stage.key], engine_of(stage)
        line = (stage.kind, turn.rank)
        # Twice as many stages are handed over as may be at work, so that the next one begins at once (work.py: Hand).
        if role is None:
            places = self.light.setdefault(line, Line(2 * self.num_light))
            await places.enter(turn)
            try:
                return await self._in_hand(stage, {}, turn.level)
            finally:
                places.leave()
        self._came(stage)
        weights = stage.inputs.get("weights", stage.inputs["model"]).key
        async with self.fleet.lease(role, stage.inputs["model"], stage.key, weights, turn, line) as groups:
            return await self._in_hand(stage, groups, self.turns[stage.key].level)

    async def _in_hand(self, stage: Stage, groups: dict[str, tuple[str, ...]], level: int) -> float:
        ran: Ran = await self._hand().run.remote(stage, groups, level)
        if ran.began:  # the stage may be done before `begun` was called for it
            self.times.begins(stage.key, at=ran.began)
            self.times.works(stage.key, ran.where)
        return ran.seconds

    def _ahead(self) -> tuple[float, float]:
        return sum(self.training.values()), max((sum(each.values()) for each in self.coming.values()), default=0.0)

    def _trains(self, stage: Stage) -> None:
        self.training.pop(stage.key, None)
        self._starts(stage)

    def _starts(self, stage: Stage) -> None:
        self._begin(stage.kind, stage.key, load(stage.kind).unit)

    def _begin(self, kind: str, key: str, unit: str = "", at: float | None = None) -> None:
        self.live[key] = _live(kind, key, unit, at)
        self.times.begins(key, kind, at)

    def _end(self, key: str) -> None:
        self.live.pop(key, None)
        self.times.ends(key)

    def _hand(self) -> Any:
        if self.hand is None:
            import ray

            num_kinds = sum(load(name).runs == "thread" for name in names())
            # max_task_retries: after a process that died, not after a stage that raised.
            options = {
                "max_concurrency": 2 * num_kinds * self.num_light * NUM_RANKS,
                "max_restarts": -1,
                "max_task_retries": 1,
            }
            actor = ray.remote(num_cpus=0, scheduling_strategy=_here(), **options)(Hand)
            self.hand = actor.remote(self.store, self.execution, _me(), self.num_light)
        return self.hand

    async def _alone(self, stage: Stage) -> None:
        import ray

        memory = 0 if self.execution.address == "local" else int(load(stage.kind).memory_gib(stage) * 2**30)
        options = {"memory": memory} if memory else {}
        where = _here() if stays(stage) else "DEFAULT"
        task = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=where, **options)(run_stage)
        await task.remote(stage, self.store, self.execution, _me())

    async def warm(self, role: str, model: Stage) -> None:
        """Boot an engine of a model ahead of the first stage that needs it, if there is room for it."""
        await self._ensure(model, Turn.of(UNNAMED, 0.0, 0))
        self.fleet.hope(role, model)

    async def hold(self, role: str, model: Stage) -> dict[str, tuple[str, ...]]:
        """Lease an engine for as long as this Broker lives. Returns `Engines.groups`."""
        await self._ensure(model, Turn.of(UNNAMED, 0.0, 0))
        self.holding.append(self.fleet.lease(role, model, "", model.key, Turn.of(UNNAMED, 0.0, 0)))
        groups: dict[str, tuple[str, ...]] = await self.holding[-1].__aenter__()
        return groups

    async def _watch_reserved(self) -> None:
        """Free what killed controllers had reserved. Ray may not know yet that one is dead when its trainer is given up, and
        several may die together."""
        while True:
            await asyncio.sleep(WATCH_S)
            with suppress(Exception):  # Ray's own head may be away for a while
                await asyncio.to_thread(reclaim.free)

    async def _watch_size(self) -> None:
        """Follow the cluster's size while nodes come and go."""
        scarce = unit(self.execution)
        while True:
            await asyncio.sleep(WATCH_S)
            with suppress(Exception):  # Ray's own head may be away for a while
                found = await asyncio.to_thread(find, self.execution, scarce)
                self.free = await asyncio.to_thread(free_units, scarce)
                self.lender.resize(found.may, found.have, shares=bool(self.claims.awaited))

    def _room(self, group: Group) -> bool:
        """Whether the cluster has the units of one holder more. Other drivers may hold them, and an engine needs its own on
        one node. Autoscaling may always bring some."""
        if self.free is None or self.lender.may_grow or self.lender.since_freed < FREED_S:
            return True
        if group.name != TRAINERS:
            return max(self.free, default=0.0) >= group.size
        return sum(int(free / self.execution.worker_units) for free in self.free) >= self.execution.num_workers

    async def take(self, trainer: str, rank: int, worker: str) -> tuple[Stage, int] | None:
        """`Trainers.take`, for a trainer's workers."""
        return await self.trainers.take(trainer, rank, worker)

    async def done(self, trainer: str, rank: int, key: str, error: Exception | None) -> None:
        """`Trainers.done`, for a trainer's workers."""
        await self.trainers.done(trainer, rank, key, error)

    async def begun(self, stages: Sequence[Begun], where: dict[str, Any]) -> None:
        """Called by the Hand once it begins light stages. A stage that was done before this call came is skipped."""
        for kind, key, at in stages:
            if key in self.running:
                self._begin(kind, key, load(kind).unit, at)
                self.times.works(key, where)

    async def progress(self, key: str, done: int, total: int, metrics: dict[str, float]) -> bool:
        """Called by stages under way. Returns whether the stage must write a checkpoint now.

        `metrics["checkpoint"]` says that it has written one. The time of its end (`ends`, seconds since the epoch) follows
        from its pace since the first call. It is None until 5 % of the work, and at least 2 units of it, were done since then.
        """
        if "checkpoint" in metrics:
            self.trainers.safe(key, done)
            if key in self.live:
                self.live[key]["saved"] = time.time()
        elif "halved" in metrics:
            self.journal.add(faults.MEMORY, key[:12], f"with {int(metrics['halved'])} rows a forward from now on")
        elif key in self.live:
            live, now = self.live[key], time.time()
            if "first" not in live or done < live["done"]:  # `done` fell: its worker died, and it began again
                live["first"] = (now, done)
            began, before = live["first"]
            told = done - before >= max(2, total / 20)
            ends = now + (now - began) * (total - done) / (done - before) if told else None
            live.update(done=done, total=total, metrics=metrics, ends=ends)
        asked = max(self.ending or 0.0, self.draining.get(self.times.node(key), 0.0))
        return float(self.live.get(key, {}).get("saved", 0.0)) < asked

    async def _watch_nodes(self) -> None:
        """Watch for nodes that are about to be taken away (a spot instance's warning, `ray drain-node`, the autoscaler)."""
        while True:
            with suppress(Exception):  # the head may be away for a while
                now, gone = time.time(), await asyncio.to_thread(reclaim.draining)
                self.draining = {node: self.draining.get(node, now) for node in gone}
                for node in gone - self.told:
                    self.journal.add(faults.NODE, node, "is being drained: what runs there writes a checkpoint")
                self.told |= gone
            await asyncio.sleep(DRAIN_S)

    async def wind_down(self, timeout_s: float = 20.0) -> int:
        """Let finetunes under way write a checkpoint, because the driver is about to end, and wait for them.

        Returns how many did not write one within `timeout_s` seconds.
        """
        self.ending = time.time()
        while True:
            unsaved = [
                live for live in self.live.values()
                if "first" in live and live.get("saved", 0.0) < self.ending and load(live["kind"]).all_ranks
            ]  # fmt: skip
            if not unsaved or time.time() > self.ending + timeout_s:
                return len(unsaved)
            await asyncio.sleep(0.1)

    async def pid(self) -> int:
        """Return the id of the process that this Broker runs in."""
        return os.getpid()

    async def works(self, key: str, where: dict[str, Any]) -> None:
        """Called by the process that works on a stage. `where`: its node and process (times.py: here)."""
        self.times.works(key, where)

    async def snapshot(self, since: int = 0, told: int = 0) -> dict[str, Any]:
        """Return what runs, waits for units, failed and was finished in this run.

        Args:
            since: leave out the first `since` finished stages.
            told: leave out the times of the first `told` stages that ended.
        """
        if self.gauges is not None:
            self.gauges.show(self.times, self.fleet.num_up, self.num_tokens)
            self.num_tokens = 0
        plain = {key: faults.plain_error(error) for key, error in self.failed.items()}
        lent, scarce = self.lender.told(), unit(self.execution)
        waiting = [
            {**_live(f"{name} waits for its turn on a {scarce}", name), "start": time.time() - group["waits_s"]}
            for name, group in lent["groups"].items() if group["waits_s"] is not None
        ]  # fmt: skip
        return {
            "broker": self.times.id,
            "running": [*({**self.times.told(key), **live} for key, live in self.live.items()), *waiting],
            "finished": self.finished[since:],
            "failed": {key: f"{type(error).__name__}: {error}" for key, error in plain.items()},
            "lent": lent,
            "queue": queue(self.times.under_way()),
            "times": self.times.closed[told:],
        }


def _live(kind: str, key: str, unit: str = "", at: float | None = None) -> dict[str, Any]:
    """The state of a stage that begins now, or began `at`."""
    return {
        "kind": kind, "key": key, "start": time.time() if at is None else at, "done": 0, "total": 0, "unit": unit,
        "metrics": {}, "ends": None,
    }  # fmt: skip


def broker(store: Store, execution: Execution, logs: Path, seconds: Callable[[Stage], float] | None = None) -> Any:
    """Start the Broker as an actor on the driver's node, and return its handle.

    It lives as long as the driver holds the handle. Ray replaces it if it dies. `seconds`: see Broker.
    """
    import ray

    # If the actor dies, Ray starts it again and repeats the calls under way.
    options = {"max_concurrency": 1000, "max_restarts": -1, "max_task_retries": -1}
    actor = ray.remote(num_cpus=0, scheduling_strategy=_here(), **options)(Broker)
    have, scarce = ray.cluster_resources(), unit(execution)
    if scarce != GIB:
        have[scarce] = find(execution, scarce).may
    held = capacity(execution, have, free_gib())
    return actor.remote(store, execution, str(logs), have.get("CPU", 1), held, seconds)


def _replaces_another() -> bool:
    """Whether this process is a Broker that Ray started because the previous one died."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return False
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _here() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _me() -> Any:
    import ray

    return ray.get_runtime_context().current_actor
