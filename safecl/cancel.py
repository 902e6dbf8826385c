"""End a sweep's run on any machine. A note in the store asks its driver to stop, as SIGTERM would. The driver looks for
this note with each beat of its lease (lease.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from safecl import lease
from safecl.base import PrerequisiteError
from safecl.store import Store

EVERY_S = 0.5


def cancel(store: Store, sweep: str, wait_s: float, show: Callable[[str], None]) -> bool:
    """Ask every live driver of a sweep to stop, and return whether all are gone within `wait_s` seconds.

    Raises:
        PrerequisiteError: no driver of this sweep runs.
    """
    found = {
        name: told
        for name, told in store.notes(lease.NOTE).items()
        if told["sweep"] == sweep and store.is_alive(name.removeprefix(lease.NOTE))
    }
    if not found:
        raise PrerequisiteError(
            f"no run of sweep {sweep!r} is at work in the store at {store.root!r}: nothing to stop (`safecl status` tells of "
            "runs that ended)"
        )
    for name, told in found.items():
        store.note(lease.CANCEL + name.removeprefix(lease.NOTE), {"at": time.time()})
        show(f"asked the run of process {told['pid']} on {told['host']} (since {told['since']}) to stop")
    ends = time.monotonic() + wait_s
    left: dict[str, Any] = found
    while left and time.monotonic() < ends:
        time.sleep(EVERY_S)
        left = {
            name: told
            for name, told in left.items()
            if store.noted(name) is not None and store.is_alive(name.removeprefix(lease.NOTE))
        }
    return not left
