"""The driver watches its run: it shows progress to a person, and writes small notes into the store for `safecl status`
and `safecl trace`.

    notes/run-<run>.json            progress of the run, every NOTE_S seconds and once at its end
    notes/trace-<run>-<number>.json times of at most CHUNK stages each (times.py); only the last one still grows

A run is one driver's life, called `<its owner>-<when it began>`. No error or delay here may fail or delay the run.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from safecl.eta import Eta
from safecl.schedule import Schedule
from safecl.store import Store

RUN, TRACE = "run-", "trace-"
NOTE_S = 5.0  # seconds; this much of the times is lost if the driver is killed
CHUNK = 500


@contextmanager
def watched(schedule: Schedule, broker: Any, eta: Eta, store: Store) -> Iterator[None]:
    """While the block runs, show its progress and note it in the store."""
    from safecl.report.progress import Display

    stop = threading.Event()
    display = Display(sys.stderr)
    notes = Notes(schedule, eta, store)

    def watch() -> None:
        import ray

        while not stop.wait(1.0):
            with suppress(Exception):  # watching is optional: the run itself reports its errors
                notes.look(ray.get(broker.snapshot.remote(*notes.told), timeout=5))
                if notes.state:
                    display.show(notes.state)
                notes.write()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    how = "stopped"
    try:
        yield
        how = "ended"
    finally:
        stop.set()
        thread.join(timeout=6)
        display.close()
        with suppress(Exception):
            import ray

            notes.look(ray.get(broker.snapshot.remote(*notes.told), timeout=2))
        with suppress(Exception):
            notes.write(how)


class Notes:
    """What is known of a run from the Broker's snapshots, and the notes that are written of it."""

    def __init__(self, schedule: Schedule, eta: Eta, store: Store) -> None:
        self.schedule, self.eta, self.store = schedule, eta, store
        self.began = time.time()
        self.run = f"{store.owner}-{int(self.began * 1000)}"
        self.state: dict[str, Any] = {}
        self.finished: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.done: dict[str, int] = {}  # by kind of stage
        self.failed: dict[str, dict[str, Any]] = {}
        self.device_s = 0.0  # seconds for which the cluster's devices were present, summed over devices
        self._queue: dict[str, dict[str, int]] = {}
        self._broker: str | None = None  # the Broker that the counts below refer to
        self._num_finished = self._num_times = 0
        self._written = 0  # number of `times` that are in full notes
        self._unsaved = False
        self._at = self._looked = self.began
        self._cluster: dict[str, Any] = {}

    @property
    def told(self) -> tuple[int, int]:
        """Counts of what the Broker need not send again."""
        return self._num_finished, self._num_times

    def look(self, snapshot: dict[str, Any]) -> None:
        """Take in a snapshot of the Broker."""
        if self._broker not in (None, snapshot["broker"]):  # another Broker replaced it, and counts from 0
            self._broker, self._num_finished, self._num_times = snapshot["broker"], 0, 0
            return
        self._broker = snapshot["broker"]
        self._num_finished += len(snapshot["finished"])
        self._num_times += len(snapshot["times"])
        self.finished += snapshot["finished"]
        self._queue = snapshot["queue"]
        for found in snapshot["times"]:
            self.times.append(found)
            self._unsaved = True
            if "error" not in found:
                self.done[found["kind"]] = self.done.get(found["kind"], 0) + 1
                self.failed.pop(found["key"], None)
            elif "start" in found:  # stages that depend on a failed one fail with the same message, and never began
                self.failed[found["key"]] = found
        now = time.time()
        self.device_s += self._cluster.get("devices", 0.0) * (now - self._looked)
        self._looked = now
        self.state = self.eta.state(self.schedule, {**snapshot, "finished": self.finished}, now)

    def write(self, how: str = "") -> None:
        """Write the notes into the store, at most every NOTE_S seconds. `how`: how the run ended; then they are written
        at once."""
        now = time.time()
        if now - self._at < NOTE_S and not how:
            return
        self._at = now
        with suppress(Exception):
            if not how:  # at the end the cluster may be gone, and Ray would wait a minute for it
                self._cluster = cluster(self.eta.forecast.execution.use_gpu)
        while self._unsaved:
            chunk: Any = self.times[self._written : self._written + CHUNK]
            self.store.note(f"{TRACE}{self.run}-{self._written // CHUNK:05d}", chunk)
            if len(chunk) < CHUNK:
                self._unsaved = False
            else:
                self._written += CHUNK
                self._unsaved = self._written < len(self.times)
        self.store.note(RUN + self.run, self._told(now, how))

    def _told(self, now: float, how: str) -> dict[str, Any]:
        state = self.state
        shown = (
            "kind", "key", "label", "start", "done", "total", "unit", "ends", "asked", "ready", "needs", "inputs", "host",
            "node", "pid", "device",
        )  # fmt: skip
        running = [{name: stage.get(name) for name in shown} for stage in state.get("running", ())]
        facts = ("key", "kind", "error", "cause", "end", "host", "node", "pid", "device")
        failed = [{name: found.get(name) for name in facts} for found in self.failed.values()]
        return {
            "sweep": self.schedule.sweep.name, "owner": self.store.owner, "host": socket.gethostname(), "pid": os.getpid(),
            "began": self.began, "at": now, "how": how or "under way",
            "trials": state.get("trials", 0), "trials_done": state.get("trials_done", 0), "eta_s": state.get("eta_s"),
            "cells": sorted({job.cell.label for queue in self.schedule.queues for job in queue.under_way}),
            "searched": self._searched(),
            "running": [] if how else running, "queue": {} if how else self._queue, "done": self.done,
            "failed": failed[-100:], "num_failed": len(failed),
            "cluster": self._cluster, "device_s": round(self.device_s, 1),
        }  # fmt: skip

    def _searched(self) -> dict[str, list[int]]:
        """{cell: [finished trials of its search, finished final trials]}, for readers that cannot reach the study."""
        finals = Counter(
            done.job.cell.label for done in self.schedule.done if done.job.role == "final" and done.result is not None
        )
        return {
            queue.cell.label: [len(queue.study.complete()), finals[queue.cell.label]]
            for queue in self.schedule.queues
            if queue.study is not None
        }


def cluster(use_gpu: bool) -> dict[str, Any]:
    """What the Ray cluster has now, and how much of it is held: devices that are counted (GPUs or CPUs), and all
    resources."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    names = ("GPU", "CPU", "memory", "object_store_memory")
    kinds = {name: [round(have[name] - free.get(name, 0.0), 2), have[name]] for name in names if name in have}
    return {
        "unit": "GPU" if use_gpu else "CPU",
        "devices": have.get("GPU" if use_gpu else "CPU", 0.0),
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "held": kinds,
    }
