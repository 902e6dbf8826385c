"""What a store holds, and which of it the given sweeps do not need: `safecl du` and `safecl gc`.

A sweep needs every stage on which its rows and its search's trials are based, finished or not. No stage that a sweep
could use again is removed. Besides stages there are leftovers of dead processes: half-written folders, checkpoints of
stages that are not needed, damaged stages, Ray Tune's folders.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import lease
from safecl.base import ConfigError
from safecl.grid import steps
from safecl.live import runs
from safecl.store import Stage, Store, below
from safecl.study import is_partial

if TYPE_CHECKING:
    from safecl.project import Project


class Held(NamedTuple):
    """A stage in a store (`kind`, `key`, size in bytes), or a leftover: then `kind` describes it and `key` is its local
    path."""

    kind: str
    key: str
    bytes: int


def stages(store: Store) -> list[Held]:
    """All stages of a store, including half-removed ones."""
    if store.remote is not None:
        sizes: dict[tuple[str, str], int] = defaultdict(int)
        for path, (_, size) in {**store.remote.list("records"), **store.remote.list("files")}.items():
            kind, key = path.removesuffix(".json").split("/")[1:3]
            sizes[kind, key] += size
        return [Held(*name, size) for name, size in sorted(sizes.items())]
    return [
        Held(folder.parent.name, folder.name, size_of(folder)) for folder in sorted((store.local / "store").glob("*/*"))
    ]


def leftovers(store: Store, needed: frozenset[str] | set[str]) -> list[Held]:
    """What dead processes have left on this machine and no sweep needs."""
    found = []
    for folder in sorted((store.local / "tmp").glob("*")):
        if not store.is_alive(folder.name.partition(".")[0]):
            found.append(Held("half-written", str(folder), size_of(folder)))
    for folder in sorted((store.local / "scratch").glob("*/*")):
        if folder.parent.name not in needed and not store.is_alive(folder.name):
            found.append(Held("checkpoints", str(folder), size_of(folder)))
    found += [Held("damaged", str(folder), size_of(folder)) for folder in sorted((store.local / "damaged").glob("*"))]
    if not live(store):
        found += [
            Held("Ray Tune's own", str(folder), size_of(folder)) for folder in sorted((store.local / "tune").glob("*"))
        ]
    return found


def live(store: Store) -> list[dict[str, Any]]:
    """Leases of running drivers in a store."""
    return [told for name, told in store.notes(lease.NOTE).items() if store.is_alive(name.removeprefix(lease.NOTE))]


def needed(projects: Iterable[Project]) -> set[str]:
    """Keys of all stages that these sweeps are based on, now or later. Of a searched trial, also of one that was pruned, those
    of each step: with another bound they decide again."""
    tops: list[Stage] = []
    for project in projects:
        tops += project.guard_stages()
        for cell, _, finals, _ in project.finals():
            past = project.past(cell)
            tried = [trial.params for trial in past.complete()] if past else []
            tried += getattr(past, "others", [])
            if cell.space is not None:
                finals = [
                    *finals,
                    *(cell.job(params, seed, "final") for params in ({}, *tried) for seed in project.sweep.seeds),
                ]
                finals += [cell.trial(params, role) for params in ({}, *tried) for role in steps(project.sweep)]
                finals += [job.aligned for job in finals]
            for job in finals:
                tops += job.evidence.targets
    return {stage.key for stage in below(tops)}


def unseen(projects: Iterable[Project]) -> list[str]:
    """Names of sweeps with a search under way whose study lies on the machine that runs it. Which trials it has is not known
    here beyond what the store's results tell (Project.past), so no stage of the store may be removed from here."""
    return [
        project.sweep.name
        for project in projects
        if project.store.remote is not None and project.sweep.execution.study_uri is None
        and any(cell.space is not None and is_partial(project.past(cell)) for cell in project.cells)
        and runs(project.store, project.sweep.name)
    ]  # fmt: skip


def one_store(projects: Sequence[Project]) -> Store:
    """The store of all these sweeps. Raises ConfigError if they have different stores."""
    first = projects[0]
    for project in projects[1:]:
        if project.sweep.execution.root != first.sweep.execution.root:
            raise ConfigError(
                f"execution.root: {project.sweep.name!r} has {project.sweep.execution.root!r}, {first.sweep.name!r} has "
                f"{first.sweep.execution.root!r}; expected sweeps of one store"
            )
    return first.store


def remove(store: Store, held: Held) -> None:
    """Remove a stage or a leftover. A stage disappears at once, never in part."""
    if os.path.isabs(held.key):
        shutil.rmtree(held.key, ignore_errors=True)
        with suppress(OSError):
            Path(held.key).parent.rmdir()  # the folder of a key's checkpoints, once all are removed
        return
    if store.remote is not None:
        # First, because without its record a stage does not exist.
        store.remote.remove(f"records/{held.kind}/{held.key}.json")
        for name in (f"files/{held.kind}/{held.key}", f"scratch/{held.key}"):
            store.remote.remove(name)
        for name in store.remote.list("logs"):
            if name.startswith(f"logs/{held.kind}-{held.key[:12]}"):
                store.remote.remove(name)
    folder = store.local / "store" / held.kind / held.key
    gone = store.local / "tmp" / f"{store.owner}.{uuid.uuid4().hex}"
    gone.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
    for log in (store.local / "logs").glob(f"{held.kind}-{held.key[:12]}*.log"):
        log.unlink(missing_ok=True)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder. Files that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def readable(num_bytes: int) -> str:
    """A size as text: `1536` -> `1.5 KiB`."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def table(store: Store, needed_keys: set[str] | None) -> list[dict[str, Any]]:
    """A row for each kind of stage, then for each other folder: number and bytes (at a URL, of what lies there, not in this
    machine's cache). With `needed_keys` also the number and bytes of stages that are not needed."""
    rows: dict[str, dict[str, Any]] = {}
    for held in stages(store):
        row = rows.setdefault(held.kind, {"what": held.kind, "num": 0, "bytes": 0})
        row["num"] += 1
        row["bytes"] += held.bytes
        if needed_keys is not None:
            row.setdefault("unneeded_num", 0)
            row.setdefault("unneeded_bytes", 0)
            if held.key not in needed_keys:
                row["unneeded_num"] += 1
                row["unneeded_bytes"] += held.bytes
    found = sorted(rows.values(), key=lambda row: -int(row["bytes"]))
    if store.remote is not None:
        for name in ("logs", "scratch", "uploads", "damaged", "notes"):
            if there := store.remote.list(name):
                found.append({"what": f"{name}/", "num": len(there), "bytes": sum(size for _, size in there.values())})
        return found
    for name in ("logs", "scratch", "damaged", "tmp", "tune", "report", "notes"):
        folder = store.local / name
        if folder.is_dir() and (size := size_of(folder)):
            found.append({"what": f"{name}/", "num": sum(1 for _ in folder.iterdir()), "bytes": size})
    for name in ("study.db", "mlflow.db"):
        if (store.local / name).is_file():
            found.append({"what": name, "num": 1, "bytes": (store.local / name).stat().st_size})
    return found
