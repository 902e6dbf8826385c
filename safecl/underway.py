"""Copies of a running stage's checkpoints and log in a store at a URL.

Another node can continue from them when this one is lost.

    <url>/scratch/<key>/<owner>/<number>/...     copy of the scratch folder when its newest checkpoint was new, and
    <url>/scratch/<key>/<owner>/newest.json      written after it: which number counts, its files and their hashes
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safecl import printed, records
from safecl.remote import names_below
from safecl.store import Stage, Store

LOOK_EVERY_S = 5.0  # seconds between looks for a new checkpoint and new output
CHECKPOINT = "checkpoint-*"  # a folder with this name is complete; the last one by name is the newest


def bring(store: Store, stage: Stage, scratch: Path, rank: int = 0, agree: Callable[[Any], Any] | None = None) -> None:
    """Make this node's scratch folder hold the newest checkpoint of a stage, wherever it was made, the same for all
    ranks. The function `agree` returns rank 0's value on every rank; None if there is only one rank."""
    if store.remote is None:
        return
    newest = None
    if rank == 0:
        newest = _newest(store, stage)
        here = _checkpoint(scratch)
        if here is not None and (newest is None or here > newest["checkpoint"]):
            newest = keep(store, stage, scratch) or newest
    newest = newest if agree is None else agree(newest)
    with store.cache.alone(f"scratch.{stage.key}"):  # ranks of one node share the folder
        wanted = None if newest is None else newest["checkpoint"]
        if _checkpoint(scratch) == wanted:
            return
        for left in scratch.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if newest is None:
            return
        made = store.new_folder()
        try:
            store.remote.download(newest["at"], list(newest["sha256"]), made)
            if records.sums(made, newest["sha256"])["sha256"] != newest["sha256"]:
                return  # the stage starts from the beginning
            for each in made.iterdir():
                each.rename(scratch / each.name)
        except FileNotFoundError:  # its owner has published the stage meanwhile
            return
        finally:
            shutil.rmtree(made, ignore_errors=True)


def keep(store: Store, stage: Stage, scratch: Path) -> dict[str, Any] | None:
    """Copy the scratch folder with its newest checkpoint beside the store. Returns the note that other machines now
    find. None if a newer checkpoint replaced it meanwhile, or there is no checkpoint."""
    checkpoint, remote = _checkpoint(scratch), store.remote
    if checkpoint is None or remote is None:
        return None
    names = [
        name for name in names_below(scratch)
        if not name.startswith("tmp-") and not name.endswith(".tmp") and name.partition("/")[0] in (checkpoint, name)
    ]  # fmt: skip
    mine = f"scratch/{stage.key}/{store.owner}"
    before = remote.noted(f"{mine}/newest.json")
    made = store.new_folder()  # a copy, because curves are still being written
    try:
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(scratch / name, made / name)
        newest: dict[str, Any] = {"at": f"{mine}/{uuid.uuid4().hex[:12]}", "checkpoint": checkpoint}
        newest["sha256"] = records.sums(made, names)["sha256"]
        remote.upload(made, names, newest["at"])
    except FileNotFoundError:  # a newer checkpoint has replaced it
        return None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    remote.note(f"{mine}/newest.json", newest)
    if before is not None:
        remote.remove(before["at"])
    return newest


@contextmanager
def kept(store: Store, log: Path | None, stage: Stage | None = None, scratch: Path | None = None) -> Iterator[None]:
    """While the block runs, copy the log and a stage's checkpoints (`scratch`) beside a store at a URL. The log is
    copied once more at the end."""
    if store.remote is None:
        yield
        return
    stop = threading.Event()
    before = None if scratch is None else _checkpoint(scratch)  # this one is already copied

    def watch() -> None:
        size, done, pause = 0, before, 0.0
        while not stop.wait(max(LOOK_EVERY_S, pause)):
            with suppress(Exception):  # copying is optional: an error in it must not stop the stage
                if log is not None and log.is_file() and log.stat().st_size != size:
                    size = log.stat().st_size
                    printed.put(store, log)
                if stage is not None and scratch is not None and _checkpoint(scratch) not in (None, done):
                    began, newest = time.monotonic(), keep(store, stage, scratch)
                    done = done if newest is None else newest["checkpoint"]
                    pause = 9 * (time.monotonic() - began)  # copying takes at most a tenth of the time

    thread = threading.Thread(target=watch, name="safecl-kept", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if log is not None:
            with suppress(Exception):
                printed.put(store, log)


def _checkpoint(scratch: Path) -> str | None:
    return max((path.name for path in scratch.glob(CHECKPOINT)), default=None)


def _newest(store: Store, stage: Stage) -> dict[str, Any] | None:
    """The newest checkpoint beside the store, made by this owner or one that is no longer alive."""
    assert store.remote is not None
    names = [name for name in store.remote.list(f"scratch/{stage.key}") if name.endswith("/newest.json")]
    owners = {name: name.split("/")[2] for name in names}
    ours = [name for name, owner in owners.items() if owner == store.owner or not store.is_alive(owner)]
    found = [json.loads(text) for text in store.remote.read_all(ours).values()]
    return max(found, key=lambda newest: str(newest["checkpoint"]), default=None)
