"""Claims on stages: several drivers of one store may need the same stage, and only one of them makes it.

A driver's claims are one note in the store (`notes/claims-<owner>.json`). It lists the keys of stages that the driver makes
(`held`) and of those that it wants to make (`wanted`). A driver first writes a key into its note, and then reads the notes
of the other drivers. So when two drivers want one key at the same time, at least one sees the other; the driver whose name
sorts first keeps the key. This works for a store in a folder and for one at a URL. Claims that come together share one
write. A claim holds as long as its driver lives. A waiting driver takes the stage over when the other driver's process is
gone, or when the beat of its lease (lease.py) no longer changes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from safecl import lease

if TYPE_CHECKING:
    from safecl.store import Stage, Store

NOTE = "claims-"
LOOK_S = 0.5  # seconds between two looks at what another driver makes
TELL_S = 0.05  # after this time a change that no stage waits for is written, with all changes that came meanwhile
DIGITS = 24  # a note holds so many digits of a key

Rivals = dict[str, dict[str, list[str]]]  # other live drivers' notes, by owner


class Claims:
    """The claims of one driver. Lives in the driver's Broker, on its event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.held: set[str] = set()
        self.wanted: set[str] = set()
        self.awaited: set[str] = set()  # what other drivers make and this one waits for
        self._running: asyncio.Task[Rivals] | None = None
        self._coming: asyncio.Task[Rivals] | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._pulse = lease.Pulse(store)

    async def take(self, stage: Stage) -> bool:
        """Wait for the stage. Returns True when this driver is to make it (then call `leave`), False once it has been made."""
        key = stage.key[:DIGITS]
        try:
            return await self._take(stage, key)
        finally:
            self.awaited.discard(key)

    async def _take(self, stage: Stage, key: str) -> bool:
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
                self.wanted.add(key)  # until the other drivers have seen it and given way
                await asyncio.sleep(LOOK_S / 10)
                continue
            self._tell()
            self.awaited.add(key)
            await asyncio.sleep(LOOK_S)
            if await self._is_made(stage):
                return False

    def leave(self, stage: Stage) -> None:
        """Give up the claim on a stage that is made or has failed. Drivers that wait for the stage then look again."""
        self.held.discard(stage.key[:DIGITS])
        self._tell()

    async def _is_made(self, stage: Stage) -> bool:
        if self.store.remote is None:
            return self.store.has(stage)
        return await asyncio.to_thread(self.store.has, stage)

    def _tell(self) -> None:
        """Write the changed claims within TELL_S, without waiting for the write."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell_now)

    def _tell_now(self) -> None:
        self._telling = None
        self._round()

    def _round(self) -> asyncio.Task[Rivals]:
        """A task that writes this driver's note and reads the others', and that begins after this call."""
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
            if not looked_for.isdisjoint([*note["held"], *note["wanted"]])
            and self._pulse.still_s(owner) < lease.BEAT_S * lease.DEAD_AFTER
        }


def _heard(done: asyncio.Task[Rivals]) -> None:
    if not done.cancelled():
        done.exception()  # `take` raises it where it waits; a failed `_tell` is made good by the next write


def forget_dead(store: Store) -> None:
    """Remove this process's claims and those of dead drivers. A driver calls this at its start and at its end."""
    for name in store.notes(NOTE):
        owner = name.removeprefix(NOTE)
        if owner == store.owner or not store.is_alive(owner):
            store.forget(name)
