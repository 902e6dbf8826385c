"""Which processes work in a store: names that are unique for all time, and the lease of one driver on a sweep.

A lease is a note in the store (`notes/lease-<owner>.json`). Its driver increases the note's `beat` every BEAT_S
seconds. A driver that wants a lease first writes a candidate and then reads the others. So of two drivers that start
together one gives way, on a folder and at a URL alike. A driver of this machine is dead as soon as its process is gone.
A driver of another machine is dead when its beat was seen to stand still. A driver that only hung may continue beside
the one that replaced it. Both see this at their next beat, and the one whose name comes first stays.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from safecl.base import PrerequisiteError

if TYPE_CHECKING:
    from safecl.store import Store

BEAT_S = 5.0
DEAD_AFTER = 3  # beats that a driver on another machine may miss
# Beats of a running driver during which another one stood still; nothing waits for it, so there is time.
FORGOTTEN_AFTER = 60
NOTE = "lease-"
CANCEL = "cancel-"  # a note with this prefix and a driver's name asks that driver to stop (safecl cancel)
_NAME = re.compile(r"([0-9a-f]{10})-(\d+)-(\d+)")


@cache
def machine() -> str:
    """Ten hex digits that identify this boot of this machine, or of this container. Process ids are unique only within
    it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


def me() -> str:
    """This process's name: `<machine>-<pid>-<start time>`. No later process has the same name."""
    return f"{machine()}-{os.getpid()}-{_began(os.getpid())}"


def is_here(owner: str) -> bool | None:
    """Whether the process of this name runs on this machine. None if it belongs to another machine, or is no such
    name."""
    found = _NAME.fullmatch(owner)
    if found is None or found[1] != machine():
        return None
    return _began(int(found[2])) == int(found[3])


def owners(store: Store) -> list[str]:
    """Owners that have a lease in the store, dead ones included."""
    return [name.removeprefix(NOTE) for name in store.notes(NOTE)]


def short_of(owner: str) -> str:
    """Eight digits that identify this owner."""
    return hashlib.sha256(owner.encode()).hexdigest()[:8]


def is_name(text: str) -> bool:
    """Whether the text has the form of a name that `me` returns."""
    return _NAME.fullmatch(text) is not None


def _began(pid: int) -> int:
    """When a process began, in its system's own unit. 0 if there is no such process, or only a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(fields[18])  # ticks since the boot: setting a clock does not change them
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


class Pulse:
    """Whether other processes live, seen from this one. One on another machine lives while the beat of its lease changes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._beats: dict[str, tuple[int, float]] = {}  # last beat, and when it was first seen

    def still_s(self, owner: str) -> float:
        """Seconds without a sign of life since this was first asked. 0 if the process is seen to live, infinity if it is
        gone."""
        if (here := is_here(owner)) is not None:
            return 0.0 if here else math.inf
        if (told := self._store.noted(NOTE + owner)) is None:
            return math.inf
        beat, now = int(told["beat"]), time.monotonic()
        if self._beats.get(owner, (-1, 0.0))[0] != beat:
            self._beats[owner] = beat, now
        return now - self._beats[owner][1]


class Lease:
    """A context manager that holds the lease while the block runs. `holds`: names (a sweep, its studies) that no two
    live leases of a store share.

    Raises:
        PrerequisiteError: another live driver holds one of the names.
        KeyboardInterrupt: later, with `lost` set: this driver could not write for too long and was taken for dead.
    """

    def __init__(self, store: Store, sweep: str, holds: Collection[str]) -> None:
        self.store, self.holds = store, set(holds)
        self.name = NOTE + store.owner
        self.lost = False
        self.dead: list[str] = []  # owners that were found dead; those that held one of our names come first
        self.num_dead = 0  # number of dead owners that held one of our names
        self._clear: Callable[[str], None] | None = None
        self._told: dict[str, Any] = {
            "sweep": sweep, "holds": sorted(holds), "host": socket.gethostname(), "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"), "held": False, "beat": 0,
            "left": [],
        }  # fmt: skip
        self._seen: dict[str, tuple[Any, int]] = {}  # notes of others, and for how many of our beats each was unchanged
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="safecl-lease", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()  # a driver that waits beats too, so that another waiting driver does not take it for dead
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
        """Another lease that is held at the same time and whose name comes first."""
        others: dict[str, dict[str, Any]] = self.store.notes(NOTE)
        for name, other in others.items():
            shares = other["held"] and not self.holds.isdisjoint(other["holds"])
            if shares and name < self.name and is_here(name.removeprefix(NOTE)) is not False:
                return other
        return None

    def _give_way(self) -> None:
        """Return when no other live lease shares a name. Leases of dead drivers are removed."""
        for name, other in self.store.notes(NOTE).items():
            if name == self.name:
                continue
            shares = not self.holds.isdisjoint(other["holds"])
            if self._is_dead(name) if shares else is_here(name.removeprefix(NOTE)) is False:
                self._bury(name, other, shares)
            while shares and (now := self.store.noted(name)) is not None:
                # Of two candidates that saw each other, the first by name waits until the other has gone.
                if now["held"] or name < self.name:
                    raise PrerequisiteError(_refusal(now))
                time.sleep(0.2)
                if self._is_dead(name):
                    self._bury(name, now, shares)

    def _bury(self, name: str, told: Mapping[str, Any], shares: bool) -> None:
        """Remove the lease of a dead driver. What that driver left behind, and what it had taken over itself, is told in this
        lease until it is cleared: this driver may die before that."""
        left = [name.removeprefix(NOTE), *told.get("left", [])]
        self.num_dead += shares
        self.dead = [*left, *self.dead] if shares else [*self.dead, *left]
        self._told["left"] = [*self._told["left"], *left]
        self._write()
        self.store.forget(name)

    @contextmanager
    def settling(self, clear: Callable[[str], None]) -> Iterator[None]:
        """While the block runs, call `clear` with the name of each dead driver whose engines may still be up, on a cluster
        that goes on. `clear` may be called by another thread."""
        self._clear = clear
        try:
            self._settle()
            yield
        finally:
            self._clear = None

    def _settle(self) -> None:
        if self._clear is None or not (left := self._told["left"]):
            return
        for owner in left:
            self._clear(owner)
        self._told["left"] = self._told["left"][len(left) :]
        self._write()

    def _is_dead(self, name: str) -> bool:
        found = is_here(name.removeprefix(NOTE))
        if found is not None:
            return not found
        seen = self.store.noted(name)
        for _ in range(4 * DEAD_AFTER):
            time.sleep(BEAT_S / 4)  # clocks of two machines differ: only a changed beat shows life
            if seen is None or (now := self.store.noted(name)) is None:
                return True
            if now["beat"] != seen["beat"] or now["held"] != seen["held"]:
                return False
        return True

    def _forget_still(self) -> None:
        """Remove leases of other machines whose beat stood still for long. What their drivers left can then be taken
        over."""
        for name, other in self.store.notes(NOTE).items():
            before, num = self._seen.get(name, (None, 0))
            self._seen[name] = other, num + 1 if other == before else 0
            if self._seen[name][1] >= FORGOTTEN_AFTER and is_here(name.removeprefix(NOTE)) is None:
                self._bury(name, other, shares=False)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(Exception):  # the disk may be full for a while: the next beat shows it
                # Checked before and after writing: a write may hang for so long that another driver takes over.
                gone = self.store.noted(self.name) is None
                if not gone:
                    self._told["beat"] += 1
                    self._write()
                if gone or (self._told["held"] and self._rival() is not None):
                    self.lost = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._forget_still()
                self._settle()
                if self._told["held"] and self.store.noted(CANCEL + self.store.owner) is not None:
                    self.store.forget(CANCEL + self.store.owner)
                    os.kill(os.getpid(), signal.SIGTERM)


def _refusal(other: dict[str, Any]) -> str:
    return (
        f"sweep {other['sweep']!r} is being run in this store by process {other['pid']} on {other['host']}, since "
        f"{other['since']}: wait for it, or end it there; the same command then continues"
    )
