"""What a node keeps of a store at a URL: how several processes share it, and what makes room when it is full.

<folder>/locks/<name>    its content is the size of the thing of that name (empty: it is not here), its time of
                         writing when it was used last. Whoever fetches or removes the thing holds the lock alone,
                         whoever uses it holds it with others; a process that dies lets go.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FRESH_S = 60.0  # what was used so lately stays, though nobody holds it: it may be read at this moment


class Cache:
    """Things under names. `limit_gib`: how much may lie here; None: half of what the disk could give it."""

    def __init__(self, folder: Path, limit_gib: float | None = None) -> None:
        self.folder, self.limit_gib = folder, limit_gib

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until nobody else holds this name, and hold it alone."""
        opened = self._open(name)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
            yield
        finally:
            os.close(opened)

    def hold(self, name: str) -> int:
        """Hold this name with others, so that the thing stays, until `let_go`."""
        opened = self._open(name)
        fcntl.flock(opened, fcntl.LOCK_SH)
        os.utime(opened)
        return opened

    @staticmethod
    def let_go(held: int) -> None:
        os.close(held)

    def used(self, name: str) -> None:
        """Say that the thing is used now."""
        self._lock(name).parent.mkdir(parents=True, exist_ok=True)
        self._lock(name).touch()

    def put(self, name: str, num_bytes: int) -> None:
        """Say that the thing is here, by who holds it alone."""
        self._lock(name).write_text(str(num_bytes))

    def make_room(self, num_bytes: int, remove: Callable[[str], None]) -> None:
        """Remove what was used longest ago, until so much more may lie here; nothing that is held or was used just now."""
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
