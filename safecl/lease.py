"""Who is at work in a store: names of processes that outlive them, and the lease that one driver holds on a sweep.

A lease is a note in the store (`notes/lease-<owner>.json`) whose `beat` its driver counts up every BEAT_S seconds. Whoever
wants one writes a candidate first and reads the others after that, so of two that start together one gives way, on a
folder and at a URL alike. A driver whose process is gone from this machine is dead at once; one of another machine when
its beat was seen to stand still. One that only hung, and goes on beside who took its place, is seen by both at their next
beat: the first by name stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from safecl.base import PrerequisiteError

if TYPE_CHECKING:
    from safecl.store import Store

BEAT_S = 5.0
DEAD_AFTER = 3  # beats that another machine's driver may miss
FORGOTTEN_AFTER = 60  # beats that stood still while a driver beside it ran: nobody waits for it, so there is time
NOTE = "lease-"
CANCEL = "cancel-"  # a note of this name and a driver's asks that driver to stop (safecl cancel)
_NAME = re.compile(r"([0-9a-f]{10})-(\d+)-(\d+)")


@cache
def machine() -> str:
    """Ten hex digits: this boot of this machine, or of this container, where process ids mean something."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


def me() -> str:
    """This process's name: `<machine>-<pid>-<when it began>`, which no later process has."""
    return f"{machine()}-{os.getpid()}-{_began(os.getpid())}"


def is_here(owner: str) -> bool | None:
    """Whether the process of this name runs on this machine; None if it is another machine's (or no such name)."""
    found = _NAME.fullmatch(owner)
    if found is None or found[1] != machine():
        return None
    return _began(int(found[2])) == int(found[3])


def owners(store: Store) -> list[str]:
    """Who has a lease in the store, dead ones included."""
    return [name.removeprefix(NOTE) for name in store.notes(NOTE)]


def short_of(owner: str) -> str:
    """Eight digits that tell this owner from others."""
    return hashlib.sha256(owner.encode()).hexdigest()[:8]


def is_name(text: str) -> bool:
    """Whether `me` gives such names."""
    return _NAME.fullmatch(text) is not None


def _began(pid: int) -> int:
    """When a process began, in its system's own count; 0 where there is none, or only what its parent has not collected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(fields[18])  # ticks since the boot: no clock that is set moves it
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return 0
    except ProcessLookupError:
        return 0
    import psutil

    try:
        process = psutil.Process(pid)
        return 0 if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time() * 1000)
    except psutil.Error:
        return 0


class Lease:
    """Held while the block runs. `holds`: names (a sweep, its studies) that no two live leases of a store share.

    Raises:
        PrerequisiteError: another live driver holds one of them; or, later and by way of Ctrl-C (KeyboardInterrupt, with
            `lost` set), this one was taken for dead, since it could not write for too long.
    """

    def __init__(self, store: Store, sweep: str, holds: Collection[str]) -> None:
        self.store, self.holds = store, set(holds)
        self.name = NOTE + store.owner
        self.lost = False
        self.dead: list[str] = []  # owners that were found dead; first those that held a name of ours
        self.num_dead = 0  # these
        self._told: dict[str, Any] = {
            "sweep": sweep, "holds": sorted(holds), "host": socket.gethostname(), "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"), "held": False, "beat": 0,
        }  # fmt: skip
        self._seen: dict[str, tuple[Any, int]] = {}  # others' notes, and for how many of our beats they were the same
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="safecl-lease", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()  # who only waits beats too: another that waits must not take it for dead
        try:
            self._give_way()
            self._told["held"] = True
            self._write()
            if (rival := self._rival()) is not None:
                raise PrerequisiteError(_refusal(rival))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._stop.set()
        self._thread.join()
        self.store.forget(self.name)
        self.store.forget(CANCEL + self.store.owner)

    def _write(self) -> None:
        with self._lock:
            self.store.note(self.name, self._told)

    def _rival(self) -> dict[str, Any] | None:
        """A lease that is held though this one is, and comes first."""
        others: dict[str, dict[str, Any]] = self.store.notes(NOTE)
        for name, other in others.items():
            shares = other["held"] and not self.holds.isdisjoint(other["holds"])
            if shares and name < self.name and is_here(name.removeprefix(NOTE)) is not False:
                return other
        return None

    def _give_way(self) -> None:
        """Return when no other live lease shares a name; leases of the dead are removed on the way."""
        for name, other in self.store.notes(NOTE).items():
            if name == self.name:
                continue
            shares = not self.holds.isdisjoint(other["holds"])
            if self._is_dead(name) if shares else is_here(name.removeprefix(NOTE)) is False:
                self.num_dead += shares
                self.dead.insert(0 if shares else len(self.dead), name.removeprefix(NOTE))
                self.store.forget(name)
            while shares and (now := self.store.noted(name)) is not None:
                # Of two candidates that saw each other, the first by name waits for the other to go.
                if now["held"] or name < self.name:
                    raise PrerequisiteError(_refusal(now))
                time.sleep(0.2)
                if self._is_dead(name):
                    self.num_dead += 1
                    self.dead.insert(0, name.removeprefix(NOTE))
                    self.store.forget(name)

    def _is_dead(self, name: str) -> bool:
        found = is_here(name.removeprefix(NOTE))
        if found is not None:
            return not found
        seen = self.store.noted(name)
        for _ in range(4 * DEAD_AFTER):
            time.sleep(BEAT_S / 4)  # clocks of two machines differ: only a beat that is seen to change says something
            if seen is None or (now := self.store.noted(name)) is None:
                return True
            if now["beat"] != seen["beat"] or now["held"] != seen["held"]:
                return False
        return True

    def _forget_still(self) -> None:
        """Remove leases of other machines whose beat stood still for long: what their drivers left can be taken over then."""
        for name, other in self.store.notes(NOTE).items():
            before, num = self._seen.get(name, (None, 0))
            self._seen[name] = other, num + 1 if other == before else 0
            if self._seen[name][1] >= FORGOTTEN_AFTER and is_here(name.removeprefix(NOTE)) is None:
                self.dead.append(name.removeprefix(NOTE))
                self.store.forget(name)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(Exception):  # a disk that is full for a while: the next beat tells
                # Looked for before and after writing, which may hang for as long as another needs to take over.
                gone = self.store.noted(self.name) is None
                if not gone:
                    self._told["beat"] += 1
                    self._write()
                if gone or (self._told["held"] and self._rival() is not None):
                    self.lost = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._forget_still()
                if self._told["held"] and self.store.noted(CANCEL + self.store.owner) is not None:
                    self.store.forget(CANCEL + self.store.owner)
                    os.kill(os.getpid(), signal.SIGTERM)


def _refusal(other: dict[str, Any]) -> str:
    return (
        f"sweep {other['sweep']!r} is being run in this store by process {other['pid']} on {other['host']}, since "
        f"{other['since']}: wait for it, or end it there; the same command then continues"
    )
