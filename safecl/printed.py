"""What stages and engines print: written on their node, and put beside the store at a URL, where
every machine sees it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from safecl.store import Store


class Log(NamedTuple):
    """A file of what a stage or an engine printed."""

    name: str
    written: float  # when, in seconds since the epoch
    size: int  # bytes


def put(store: Store, path: Path) -> None:
    """Keep a log of this node where other machines see it."""
    if store.remote is not None and path.is_file():
        store.remote.upload(path.parent, [path.name], "logs")


def listed(store: Store, holds: str = "") -> list[Log]:
    """Logs whose name holds this text (12 digits of a stage's key, a kind, `engine-`), the oldest first. At a URL also those
    of what is under way on other nodes, some seconds old."""
    found = {}
    if store.remote is not None:
        found = {Path(name).name: Log(Path(name).name, *info) for name, info in store.remote.list("logs").items()}
    for path in store.logs.glob("*.log"):
        here = Log(path.name, path.stat().st_mtime, path.stat().st_size)
        found[path.name] = max(found.get(path.name, here), here, key=lambda log: (log.size, log.written))
    return sorted((log for log in found.values() if holds in log.name), key=lambda log: log.written)


def read(store: Store, name: str, start: int = 0) -> bytes:
    """What a log holds from byte `start` on. FileNotFoundError if there is none."""
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
