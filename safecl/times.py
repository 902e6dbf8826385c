"""When each stage was asked for, could begin, began and ended, and where: what `safecl status` and `safecl trace` read.

The Broker keeps it in memory; the driver writes it into the store (watch.py). Of a stage:

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
    """The stages that one Broker was asked for. `id` tells it from a Broker that takes its place."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.closed: list[dict[str, Any]] = []  # ended, in that order
        self._open: dict[str, dict[str, Any]] = {}

    def asked(self, stage: Stage, rank: int) -> None:
        """Somebody waits for a stage that is not in the store. `rank`: see Broker.ensure."""
        self._open[stage.key] = {
            "key": stage.key, "kind": stage.kind, "needs": needs(stage), "rank": rank, "asked": time.time(),
            "inputs": [other.key for other in stage.inputs.values()],
        }  # fmt: skip

    def ready(self, key: str) -> None:
        """All its inputs are there."""
        self._add(key, ready=time.time())

    def begins(self, key: str, kind: str = "", at: float | None = None) -> None:
        """Its turn has come, or came `at`. An engine's boot (`kind`), which nobody asks for by a stage, is opened by this."""
        now = time.time() if at is None else at
        if kind.startswith("engine"):
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
        """A process says that it works on it. `where`: see `here`."""
        if where.get("rank", 0) == 0:  # other ranks share the stage with the first
            self._add(key, **{name: value for name, value in where.items() if name != "rank"})

    def node(self, key: str) -> str:
        """The node that a stage under way is worked on; empty where it is not known."""
        return str(self._open.get(key, {}).get("node", ""))

    def ends(self, key: str, error: BaseException | None = None) -> None:
        """It is in the store, or failed."""
        if (found := self._open.pop(key, None)) is None:
            return
        found["end"] = time.time()
        if error is not None:
            found |= {"error": f"{type(error).__name__}: {error}", "cause": kind_of(error)}
        self.closed.append(found)

    def under_way(self) -> list[dict[str, Any]]:
        """What was asked for and has not ended."""
        return list(self._open.values())

    def told(self, key: str) -> dict[str, Any]:
        """What is known of a stage under way: its times so far, and where it is worked on."""
        return dict(self._open.get(key, {}))

    def _add(self, key: str, **facts: Any) -> None:
        if key in self._open:
            self._open[key].update(facts)


def needs(stage: Stage) -> str:
    """What a stage waits for once its inputs are there: `trainer`, the group of an engine, or `process`."""
    if (role := engine_of(stage)) is not None:
        return f"{role}-{stage.inputs['model'].key[:8]}"
    return "trainer" if needs_trainer(stage) else "process"


def here(place: Place) -> dict[str, Any]:
    """This process, as a person finds it again: host, Ray's node, process, device, rank."""
    ray = sys.modules.get("ray")
    node = ray.get_runtime_context().get_node_id()[:8] if ray is not None and ray.is_initialized() else ""
    return {
        "host": socket.gethostname(), "node": node, "pid": os.getpid(), "device": place.device, "rank": place.rank,
    }  # fmt: skip


def state_of(found: dict[str, Any]) -> str:
    """Of a stage under way: `waiting` for its inputs, `ready` (waiting for its turn) or `running`."""
    return "running" if "start" in found else "ready" if "ready" in found else "waiting"


def queue(under_way: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{kind of stage: {state: how many}}."""
    counts = Counter((str(found["kind"]), state_of(found)) for found in under_way)
    table: dict[str, dict[str, int]] = {}
    for (kind, state), num in sorted(counts.items()):
        table.setdefault(kind, {})[state] = num
    return table
