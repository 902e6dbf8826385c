"""Which stages this driver makes, of those that other drivers of the store may want as well: each is made once.

A driver's claims are one note in the store (`notes/claims-<owner>.json`): keys that it makes (`held`) and keys that it would
like to (`wanted`). It writes a key down first and reads the others' notes after that, so of two that want one key at once
one gives way (the first by name stays), on a folder and at a URL alike. Claims that come together share one writing. They
hold for as long as their driver lives: who waits for one takes over from a driver whose process is gone, or whose lease
(lease.py) was seen to stand still.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from safecl import lease

if TYPE_CHECKING:
    from safecl.store import Stage, Store

NOTE = "claims-"
LOOK_S = 0.5  # between two looks at what another driver makes
TELL_S = 0.05  # what nobody here waits for is written down together with what else comes by then
DIGITS = 24  # of a key, in a note

Rivals = dict[str, dict[str, list[str]]]  # other live drivers' notes, by owner


class Claims:
    """Of one driver; lives in its Broker, on the event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.held: set[str] = set()
        self.wanted: set[str] = set()
        self._running: asyncio.Task[Rivals] | None = None
        self._coming: asyncio.Task[Rivals] | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._beats: dict[str, tuple[int, float]] = {}  # of drivers on other machines: their beat, and since when

    async def take(self, stage: Stage) -> bool:
        """Return True when the stage is ours to make (`leave` it afterwards), False once another driver has made it."""
        key = stage.key[:DIGITS]
        while True:
            self.wanted.add(key)
            try:
                rivals = await self._round()
            finally:
                self.wanted.discard(key)
            at_work = any(key in note["held"] for note in rivals.values())
            others = [owner for owner, note in rivals.items() if key in note["wanted"]]
            if not at_work and not others:
                self.held.add(key)
                if await self._is_made(stage):  # while we asked
                    self.leave(stage)
                    return False
                self._tell()
                return True
            if not at_work and self.store.owner < min(others):
                self.wanted.add(key)  # until they have seen it, and given way
                await asyncio.sleep(LOOK_S / 10)
                continue
            self._tell()
            await asyncio.sleep(LOOK_S)
            if await self._is_made(stage):
                return False

    def leave(self, stage: Stage) -> None:
        """The stage is made, or failed: whoever waits for it may look."""
        self.held.discard(stage.key[:DIGITS])
        self._tell()

    async def _is_made(self, stage: Stage) -> bool:
        if self.store.remote is None:
            return self.store.has(stage)
        return await asyncio.to_thread(self.store.has, stage)

    def _tell(self) -> None:
        """Write what is new soon, without waiting for it."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell_now)

    def _tell_now(self) -> None:
        self._telling = None
        self._round()

    def _round(self) -> asyncio.Task[Rivals]:
        """A writing and reading that begins after this call."""
        if self._coming is None:
            self._coming = asyncio.create_task(self._write_and_read(self._running))
            self._coming.add_done_callback(_heard)
        return self._coming

    async def _write_and_read(self, before: asyncio.Task[Rivals] | None) -> Rivals:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._coming = self._coming, None
        return await asyncio.to_thread(self._exchange, sorted(self.held), sorted(self.wanted))

    def _exchange(self, held: list[str], wanted: list[str]) -> Rivals:
        mine = NOTE + self.store.owner
        if held or wanted:
            self.store.note(mine, {"held": [*held], "wanted": [*wanted]})
        else:
            self.store.forget(mine)
        if not wanted:
            return {}
        others = {name.removeprefix(NOTE): note for name, note in self.store.notes(NOTE).items() if name != mine}
        looked_for = set(wanted)
        return {
            owner: note
            for owner, note in others.items()
            if not looked_for.isdisjoint([*note["held"], *note["wanted"]]) and self._is_alive(owner)
        }

    def _is_alive(self, owner: str) -> bool:
        if (here := lease.is_here(owner)) is not None:
            return here
        if (told := self.store.noted(lease.NOTE + owner)) is None:
            return False
        beat, now = int(told["beat"]), time.monotonic()
        if self._beats.get(owner, (-1, 0.0))[0] != beat:
            self._beats[owner] = beat, now
        return now - self._beats[owner][1] < lease.BEAT_S * lease.DEAD_AFTER


def _heard(done: asyncio.Task[Rivals]) -> None:
    if not done.cancelled():
        done.exception()  # whoever waits raises it; of a `_tell` that failed the next one makes up for it


def forget_dead(store: Store) -> None:
    """Remove this process's claims, and those that dead drivers left. For a driver at its start and end."""
    for name in store.notes(NOTE):
        owner = name.removeprefix(NOTE)
        if owner == store.owner or not store.is_alive(owner):
            store.forget(name)
