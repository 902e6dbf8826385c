"""When each stage was asked for, ready, begun and ended, and where. `safecl status` and `safecl trace` read this.

The Broker keeps it in memory; the driver writes it into the store (watch.py). For each stage:

    asked --> ready (its inputs are there) --> start (a trainer's or engine's turn) --> end

Times are seconds since the epoch, by the Broker's clock.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from safecl.faults import kind_of
from safecl.stages import engine_of, needs_trainer

if TYPE_CHECKING:
    from safecl.store import Place, Stage


class Times:
    """The times of the stages that one Broker was asked for. `id` identifies the Broker, because another may replace
    it."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.closed: list[dict[str, Any]] = []  # ended stages, in order of their end
        self._open: dict[str, dict[str, Any]] = {}

    def asked(self, stage: Stage, rank: int) -> None:
        """A caller waits for a stage that is not in the store. `rank`: see Broker.ensure."""
        self._open[stage.key] = {
            "key": stage.key, "kind": stage.kind, "needs": needs(stage), "rank": rank, "asked": time.time(),
            "inputs": [other.key for other in stage.inputs.values()],
        }  # fmt: skip

    def ready(self, key: str) -> None:
        """All inputs of the stage are there."""
        self._add(key, ready=time.time())

    def begins(self, key: str, kind: str = "", at: float | None = None) -> None:
        """The stage begins now, or began `at`. This also adds the start of an engine or a trainer (`kind`), which no stage asks
        for."""
        now = time.time() if at is None else at
        if kind.startswith(("engine", "trainer")):
            self._open[key] = {
                "key": key,
                "kind": kind,
                "needs": key,
                "rank": 0,
                "asked": now,
                "ready": now,
                "inputs": [],
            }
        self._add(key, start=now)

    def works(self, key: str, where: dict[str, Any]) -> None:
        """A process works on the stage. `where`: see `here`."""
        if where.get("rank", 0) == 0:  # the other ranks share the stage with the first
            self._add(key, **{name: value for name, value in where.items() if name != "rank"})

    def node(self, key: str) -> str:
        """The node that works on a running stage; "" if it is not known."""
        return str(self._open.get(key, {}).get("node", ""))

    def ends(self, key: str, error: BaseException | None = None) -> None:
        """The stage is in the store, or failed with `error`."""
        if (found := self._open.pop(key, None)) is None:
            return
        found["end"] = time.time()
        if error is not None:
            found |= {"error": f"{type(error).__name__}: {error}", "cause": kind_of(error)}
        self.closed.append(found)

    def under_way(self) -> list[dict[str, Any]]:
        """Stages that were asked for and have not ended."""
        return list(self._open.values())

    def told(self, key: str) -> dict[str, Any]:
        """What is known of a stage that has not ended: its times so far, and where it runs."""
        return dict(self._open.get(key, {}))

    def _add(self, key: str, **facts: Any) -> None:
        if key in self._open:
            self._open[key].update(facts)


def needs(stage: Stage) -> str:
    """What a stage with all its inputs waits for: `trainer`, the group of an engine, or `process`."""
    if (role := engine_of(stage)) is not None:
        return f"{role}-{stage.inputs['model'].key[:8]}"
    return "trainer" if needs_trainer(stage) else "process"


def here(place: Place) -> dict[str, Any]:
    """A description of this process by which a person can find it: host, Ray's node, process id, device, rank."""
    ray = sys.modules.get("ray")
    node = ray.get_runtime_context().get_node_id()[:8] if ray is not None and ray.is_initialized() else ""
    return {
        "host": socket.gethostname(), "node": node, "pid": os.getpid(), "device": place.device, "rank": place.rank,
    }  # fmt: skip


def state_of(found: dict[str, Any]) -> str:
    """State of a stage that has not ended: `waiting` for its inputs, `ready` (waiting for its turn) or `running`."""
    return "running" if "start" in found else "ready" if "ready" in found else "waiting"


def queue(under_way: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{kind of stage: {state: number of stages}}."""
    counts = Counter((str(found["kind"]), state_of(found)) for found in under_way)
    table: dict[str, dict[str, int]] = {}
    for (kind, state), num in sorted(counts.items()):
        table.setdefault(kind, {})[state] = num
    return table
