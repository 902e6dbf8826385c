"""What a driver does with a store before and after its run: it checks that the store can be written, and removes what ended
processes left half-written."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from safecl.base import PrerequisiteError
from safecl.identity import Ref
from safecl.remote import Remote
from safecl.store import Store, record_name


def check_writable(store: Store, needed_gib: float) -> None:
    """Raises PrerequisiteError if the root cannot be written, or its disk (at a URL: the cache's) has less than
    `needed_gib` GiB free."""
    what, remedy = "execution.root", "name another folder with --set execution.root=FOLDER"
    if store.remote is not None:
        store.remote.check(uuid.uuid4().hex)
        what, remedy = "the cache", "name another folder in the environment variable SAFECL_CACHE"
    try:
        store.local.mkdir(parents=True, exist_ok=True)
        probe = store.local / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PrerequisiteError(
            f"{what} {str(store.local)!r} cannot be written ({error.strerror}): {remedy.replace('another', 'a writable')}"
        ) from None
    free_gib = shutil.disk_usage(store.local).free / 2**30
    if free_gib < needed_gib:
        raise PrerequisiteError(
            f"{what} {str(store.local)!r} has {free_gib:.1f} GiB free, expected at least {needed_gib:.1f}: free some or "
            f"{remedy}"
        )


def sweep_temporary(store: Store) -> None:
    """Remove half-written folders and unfinished uploads of processes that have ended, and those of this owner from
    before. This owner must have no stage in progress."""
    for folder in (store.local / "tmp").glob("*"):
        owner = folder.name.partition(".")[0]
        if owner == store.owner or not store.is_alive(owner):
            shutil.rmtree(folder, ignore_errors=True)
    if store.remote is not None:
        for name in store.remote.list("uploads"):
            _sweep_upload(store, Path(name).stem, store.remote)


def _sweep_upload(store: Store, upload: str, remote: Remote) -> None:
    owner = upload.partition(".")[0]
    if (owner != store.owner and store.is_alive(owner)) or (left := remote.noted(f"uploads/{upload}.json")) is None:
        return
    record = remote.noted(record_name(Ref(left["kind"], left["key"])))
    if record is None or record["upload"] != upload:
        remote.remove(f"files/{left['kind']}/{left['key']}/{upload}")
    remote.remove(f"uploads/{upload}.json")
