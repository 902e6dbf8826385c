"""Output of stages and engines. It is written on their node, and at a URL also copied beside the store, where every
machine can read it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from safecl.store import Store


class Log(NamedTuple):
    """A file with the output of a stage or an engine."""

    name: str
    written: float  # when, in seconds since the epoch
    size: int  # bytes


def put(store: Store, path: Path) -> None:
    """Copy a log of this node to where other machines can read it."""
    if store.remote is not None and path.is_file():
        store.remote.upload(path.parent, [path.name], "logs")


def listed(store: Store, holds: str = "") -> list[Log]:
    """Logs whose name contains this text (12 digits of a stage's key, a kind, `engine-`), the oldest first. At a URL
    this includes logs of stages that run on other nodes, as of some seconds ago."""
    found = {}
    if store.remote is not None:
        found = {Path(name).name: Log(Path(name).name, *info) for name, info in store.remote.list("logs").items()}
    for path in store.logs.glob("*.log"):
        here = Log(path.name, path.stat().st_mtime, path.stat().st_size)
        found[path.name] = max(found.get(path.name, here), here, key=lambda log: (log.size, log.written))
    return sorted((log for log in found.values() if holds in log.name), key=lambda log: log.written)


def read(store: Store, name: str, start: int = 0) -> bytes:
    """The content of a log from byte `start` on. Raises FileNotFoundError if there is no such log."""
    found: list[bytes] = []
    if (path := store.logs / name).is_file():
        with path.open("rb") as file:
            file.seek(start)
            found.append(file.read())
    if store.remote is not None:
        with suppress(FileNotFoundError):
            found.append(store.remote.read(f"logs/{name}")[start:])
    if not found:
        raise FileNotFoundError(f"no log {name!r} in the store at {store.root}")
    return max(found, key=len)
