"""A node's local copies of things from a store at a URL: locks that let several processes share them, and removal of
the least recently used ones when the space is full.

<folder>/locks/<name>    The file's content is the size of the thing in bytes (empty: the thing is not here). Its time of
                         modification is when the thing was last used. A process that fetches or removes the thing
                         holds the lock alone (exclusive flock). Processes that use it hold the lock together (shared
                         flock). The system frees the lock of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FRESH_S = 60.0  # a thing used so recently stays, even without a lock: a process may be reading it at this moment


class Cache:
    """Things in a folder, each under a name.

    Args:
        folder: where they lie.
        limit_gib: how many GiB they may take together. None: half of (their size + the disk's free space).
    """

    def __init__(self, folder: Path, limit_gib: float | None = None) -> None:
        self.folder, self.limit_gib = folder, limit_gib

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until no other process holds this name, and hold it alone for the block."""
        opened = self._open(name)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
            yield
        finally:
            os.close(opened)

    def hold(self, name: str) -> int:
        """Hold this name together with other users, so that the thing is not removed. Returns what `let_go` takes."""
        opened = self._open(name)
        fcntl.flock(opened, fcntl.LOCK_SH)
        os.utime(opened)
        return opened

    @staticmethod
    def let_go(held: int) -> None:
        """Give up a name that `hold` returned."""
        os.close(held)

    def used(self, name: str) -> None:
        """Record that the thing is used now."""
        self._lock(name).parent.mkdir(parents=True, exist_ok=True)
        self._lock(name).touch()

    def put(self, name: str, num_bytes: int) -> None:
        """Record that the thing is here, with its size. Only for the process that holds the name alone."""
        self._lock(name).write_text(str(num_bytes))

    def make_room(self, num_bytes: int, remove: Callable[[str], None]) -> None:
        """Remove the least recently used things until `num_bytes` more fit within the limit.

        Things that are held, or were used within the last FRESH_S seconds, stay. So there may be too little room afterwards.
        `remove(name)` deletes one thing.
        """
        things = []
        for entry in os.scandir(self.folder / "locks") if (self.folder / "locks").is_dir() else ():
            told = Path(entry.path).read_text()
            things += [(entry.stat().st_mtime, entry.name, int(told))] if told else []
        total, limit = sum(size for *_, size in things), self._limit(sum(size for *_, size in things))
        for used, name, size in sorted(things):
            if total + num_bytes <= limit or time.time() - used < FRESH_S:
                return
            opened = self._open(name)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(name)
                self._lock(name).write_text("")
                total -= size
            except BlockingIOError:
                continue
            finally:
                os.close(opened)

    def _limit(self, total: int) -> float:
        if self.limit_gib is not None:
            return self.limit_gib * 2**30
        return (total + shutil.disk_usage(self.folder).free) / 2

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / name

    def _open(self, name: str) -> int:
        self._lock(name).parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._lock(name), os.O_RDWR | os.O_CREAT, 0o644)
