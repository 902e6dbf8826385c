"""The engines of a run, and the leases by which stages use them.

Engines are booted when stages wait for them, or ahead of these where units are free. They are shut down when something else
waits for their units (devices.py). A stage leases an engine for as long as it sends requests to it.

A group is the engines of one model in one role. Each engine is a Serve application of its own. Among the engines that take
new work, a stage gets one that has its weights already, else the one with the fewest stages.
"""

from __future__ import annotations

import asyncio
import os
from bisect import insort
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from safecl.capacity import GIB, Capacity, reserved, unit
from safecl.config import Execution
from safecl.devices import IDLE_S, Holder
from safecl.lender import Lender
from safecl.order import Turn
from safecl.store import Stage, Store

# An engine is leased for so many different weights at a time. It serves one after the other, so stages with more weights
# would only wait inside the engine, where their turn does not count, and delay its shutdown.
WEIGHTS_AT_ONCE = 4
MOST_THREADS = 8  # threads of an engine on this machine's CPUs; with more, threads wait for each other on small batches


@dataclass(eq=False)
class App:
    """An engine that is up. `stages`: number of leases by weights. `lines`: number of leases by `Wish.line`."""

    holder: Holder
    stages: Counter[str] = field(default_factory=Counter)
    lines: Counter[Hashable] = field(default_factory=Counter)

    def takes(self, wish: Wish, at_once: int) -> bool:
        """Return whether the engine may be leased to this stage now."""
        num_weights = len(self.stages.keys() | {wish.weights})
        return self.holder.open and num_weights <= WEIGHTS_AT_ONCE and self.lines[wish.line] < at_once


@dataclass(eq=False)
class Wish:
    """A stage that wants an engine, or has one.

    Attributes:
        key: of the stage.
        weights: key of the weights that it asks for.
        turn: its place in the order; the lowest is next.
        line: of stages with the same line, only `Fleet.at_once` lease one engine at the same time.
        given: resolved when it gets an engine.
        app: the engine that it has.
    """

    key: str
    weights: str
    turn: Turn
    line: Hashable
    given: asyncio.Future[App]
    app: App | None = None


@dataclass(eq=False)
class Group:
    """The engines of one model in one role.

    Attributes:
        wishes: stages that wait for an engine, the next one first.
        leased: stages that have one.
        expected: number of stages that will ask for an engine or do so now.
        hoped: whether an engine is to be booted ahead of the first stage.
    """

    name: str
    role: str
    model: Stage
    wishes: list[Wish] = field(default_factory=list)
    leased: list[Wish] = field(default_factory=list)
    apps: list[App] = field(default_factory=list)
    expected: int = 0
    hoped: bool = False


class Fleet:
    """Boots engines, leases them to stages and shuts them down. Lives in the Broker, on its event loop.

    Args:
        at_once: how many stages of one line may lease one engine at a time.
        begin, end: called when an engine's boot begins, with (what, name), and when it ends, with (name).
    """

    def __init__(
        self,
        store: Store,
        execution: Execution,
        lender: Lender,
        capacity: Capacity,
        at_once: int,
        begin: Callable[[str, str], None],
        end: Callable[[str], None],
    ) -> None:
        self.store, self.execution = store, execution
        self.lender, self.capacity, self.at_once = lender, capacity, at_once
        self.begin, self.end = begin, end
        self.groups: dict[str, Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_up(self) -> int:
        """Number of engines that are up."""
        return sum(len(group.apps) for group in self.groups.values())

    def group(self, role: str, model: Stage) -> Group:
        """Return the group of a model in a role. If judges have no replicas of their own, they use the candidates' engines."""
        if role == "judge" and self.execution.num_judge_replicas == 0:
            role = "candidate"
        name = f"{role}-{model.key[:8]}"
        if name not in self.groups:
            self.groups[name] = Group(name, role, model)
            chosen = self.execution
            self._bound(name, chosen.num_candidate_engines if role == "candidate" else chosen.num_judge_replicas)
        return self.groups[name]

    def expect(self, role: str, model: Stage, num: int) -> None:
        """Report that `num` more (or, below 0, fewer) stages will ask for an engine. Until they do, one that is up is kept."""
        group = self.group(role, model)
        group.expected += num
        self._tell(group)

    def hope(self, role: str, model: Stage) -> None:
        """Boot an engine ahead of the first stage, if units are free for it. The model must be in the store."""
        group = self.group(role, model)
        group.hoped = True
        self._tell(group)

    @asynccontextmanager
    async def lease(
        self, role: str, model: Stage, key: str, weights: str, turn: Turn, line: Hashable = None
    ) -> AsyncIterator[dict[str, tuple[str, ...]]]:
        """Lease an engine to the stage `key` for the block. Among waiting stages the one with the lowest turn is next.

        Gives the engine in the form that `serving.client.Engines` takes. Raises the error of the engine's boot if it failed.
        """
        group = self.group(role, model)
        wish = Wish(key, weights, turn, line, asyncio.get_running_loop().create_future())
        insort(group.wishes, wish, key=lambda other: other.turn)
        group.hoped = False
        self._tell(group)
        try:
            app = await wish.given
            yield {f"{role}-{model.key[:8]}": (self._name(app.holder),)}
        finally:
            if wish.app is not None:
                group.leased.remove(wish)
                wish.app.stages -= Counter([weights])
                wish.app.lines[line] -= 1
                self.lender.work(wish.app.holder, -1)
            elif wish in group.wishes:
                group.wishes.remove(wish)
            self._tell(group)

    def hurry(self, key: str, turn: Turn) -> None:
        """Change the turn of a stage that waits for an engine."""
        for group in self.groups.values():
            for wish in [wish for wish in group.wishes if wish.key == key]:
                group.wishes.remove(wish)
                wish.turn = turn
                insort(group.wishes, wish, key=lambda other: other.turn)
                self._tell(group)

    def start(self, holder: Holder) -> None:
        """Begin to boot an engine (devices.Start)."""
        self._run(self._boot(self.groups[holder.group], holder))

    def stop(self, holder: Holder) -> None:
        """Begin to shut an engine down (devices.Stop)."""
        group = self.groups[holder.group]
        group.apps = [app for app in group.apps if app.holder is not holder]
        self._run(self._take_down(holder))

    def give(self) -> None:
        """Lease engines that take new work to waiting stages, in the order of their turns."""
        for group in self.groups.values():
            for wish in list(group.wishes):
                able = [app for app in group.apps if app.takes(wish, self.at_once)]
                if able and not wish.given.done():
                    app = min(able, key=lambda app: (wish.weights not in app.stages, app.stages.total()))
                    app.stages[wish.weights] += 1
                    app.lines[wish.line] += 1
                    group.wishes.remove(wish)
                    group.leased.append(wish)
                    wish.app = app
                    self.lender.work(app.holder, 1)
                    wish.given.set_result(app)

    def _tell(self, group: Group) -> None:
        every = [*group.wishes, *group.leased]
        # An engine has one candidate's weights at a time, so more engines help only if several weights are asked for.
        wanted = len({wish.weights for wish in every}) if group.role == "candidate" else len(every)
        rank = min((wish.turn.level for wish in every), default=0)
        known = group.hoped or bool(every) or bool(group.apps)  # otherwise its model may not be in the store yet
        coming = int(group.hoped or (known and group.expected > len(every)))
        self.lender.ask(group.name, wanted, rank, coming)

    async def _boot(self, group: Group, holder: Holder) -> None:
        from safecl.serving.deploy import deploy, ready

        self.begin(f"engine {group.role}", holder.name)
        try:
            local = self.execution.address == "local"
            resources = {"CPU": 0.0 if local else 1.0, **reserved(self.execution, holder.size)}
            settings = self._settings(group, holder)
            await asyncio.to_thread(deploy, settings, group.model.ref, self.store, resources=resources, wait=False)
            await asyncio.to_thread(ready, self._name(holder))
        except Exception as error:
            await self._remove(holder)
            if not self.lender.never_came(holder):
                self._failed(group, error)
            self.lender.gone(holder)
            return
        finally:
            self.end(holder.name)
        group.apps.append(App(holder))
        self.lender.up(holder)

    def _name(self, holder: Holder) -> str:
        """The name of its Serve application. It contains the driver's name, so that a driver never shuts down an engine of
        another driver on the same cluster."""
        return f"{holder.name}-{self.store.short}"

    def _settings(self, group: Group, holder: Holder) -> Any:
        from safecl.serving.messages import Settings

        chosen, packed = self.execution, group.model.config.get("quantization")
        return Settings(
            name=self._name(holder),
            max_model_len=chosen.engine_max_tokens,
            memory_gib=chosen.engine_memory_gib,
            gpu_memory=chosen.engine_gpu_memory or 0.9 * min(1.0, chosen.engine_units),
            max_num_seqs=chosen.engine_max_seqs,
            batch_invariant=chosen.batch_invariant,
            num_threads=self._num_threads(),
            use_gpu=chosen.use_gpu,
            num_gpus=chosen.engine_units,
            dtype=str(group.model.config["dtype"]),
            quantization=None if packed is None else str(packed),
        )

    def _num_threads(self) -> int:
        """Threads of an engine on CPUs. On one machine's CPUs the threads of several engines share all cores: they sleep while
        others work, and compute on any free core."""
        if self.execution.batch_invariant:  # one thread: otherwise the machine would decide how a sum is split
            return 1
        if unit(self.execution) == GIB:
            return min(MOST_THREADS, os.cpu_count() or 1)
        return max(1, int(self.execution.engine_units))

    def _failed(self, group: Group, error: Exception) -> None:
        """Handle a failed boot. If another engine of the group is up, it serves the waiting stages. Otherwise they get the error,
        and the next stage that asks boots an engine again."""
        if group.apps:
            self._bound(group.name, len(group.apps))
        else:
            wishes, group.wishes = group.wishes, []
            for wish in wishes:
                if not wish.given.done():
                    wish.given.set_exception(error)
            group.hoped = False
        self._tell(group)

    def _bound(self, group: str, at_most: int) -> None:
        # On one machine no other job waits for this memory: an engine stays until the run itself needs the memory.
        idle_s = float("inf") if self.capacity.unit == GIB else IDLE_S
        self.lender.add(group, self, self.capacity.engine, at_most, idle_s)

    async def _take_down(self, holder: Holder) -> None:
        await self._remove(holder)
        self.lender.gone(holder)

    async def _remove(self, holder: Holder) -> None:
        from safecl.serving.deploy import shutdown

        with suppress(Exception):  # it may not be there, or Serve may be gone
            await asyncio.to_thread(shutdown, self._name(holder))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
