"""One stage's work, in the process that does it: run, log, report, publish."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from safecl import printed, registry, underway
from safecl.base import Infrastructure, Json
from safecl.config import Execution
from safecl.nodes import check_here
from safecl.store import Context, Place, Stage, Store
from safecl.times import here

EVENTS = frozenset({"checkpoint", "halved"})  # metrics that report a single event
# Seconds; light stages that begin within it are reported in one call: a person sees two updates per second.
TOGETHER_S = 0.2


def run_stage(
    stage: Stage,
    store: Store,
    execution: Execution,
    broker: Any,
    *,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    rank: int = 0,
    place: Place | None = None,
    own_process: bool = True,
    slot: AbstractContextManager[None] | None = None,
) -> float:
    """Run one stage here and publish it. Returns the seconds that its work took. A failed stage leaves nothing in the
    store; its output is in the store's logs.

    Args:
        groups, rank: see Engines.
        place: this process's place among those that work on the stage together; the first one publishes.
        own_process: nothing else runs in this process meanwhile, so all its output belongs to the stage. If False, only
            a traceback is logged.
        slot: a context that is held while the stage works.
    """
    place = place or Place()
    if place.world_size == 1 and store.has(stage):  # several ranks must all do the same
        return 0.0
    name = f"{stage.kind}-{stage.key[:12]}" + (f"-rank{place.rank}" if place.rank else "")
    log = store.logs / f"{name}.log"
    out = store.new_folder()
    with ExitStack() as held:
        if own_process:
            held.enter_context(output_to(log))
        progress = Progress(broker, stage.key)
        if own_process:
            progress.begins(place)
        try:
            check_here()
            if own_process:
                print(
                    f"began {datetime.now(UTC).isoformat(timespec='milliseconds')} in process {os.getpid()}", flush=True
                )
            seconds, result = _run(
                stage, store, execution, progress, out, log, groups or {}, rank, place, own_process, slot
            )
            if place.rank == 0:
                store.publish(stage, out, result, seconds)
            return seconds
        except BaseException:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                traceback.print_exc(file=file)
            with suppress(Exception):  # the stage's own error is raised, not this one
                printed.put(store, log)
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _run(
    stage: Stage,
    store: Store,
    execution: Execution,
    progress: Progress,
    out: Path,
    log: Path,
    groups: Mapping[str, tuple[str, ...]],
    rank: int,
    place: Place,
    own_process: bool,
    slot: AbstractContextManager[None] | None,
) -> tuple[float, dict[str, Json]]:
    """Returns the seconds that the stage's work took, and its result."""
    from safecl.serving.client import Engines

    with ExitStack() as held:
        try:
            paths = held.enter_context(store.using(stage.inputs.values()))
        except KeyError as error:  # removed after it was made
            raise Infrastructure(error.args[0]) from None
        scratch = out  # light stages keep no checkpoints
        if own_process:
            scratch = store.scratch(stage)
            underway.bring(store, stage, scratch, place.rank, _agree if place.world_size > 1 else None)
            keeps = place.rank == 0
            held.enter_context(underway.kept(store, log, stage, scratch) if keeps else underway.kept(store, log))
        context = Context(
            stage=stage,
            inputs=dict(zip(stage.inputs, paths, strict=True)),
            out=out,
            scratch=scratch,
            execution=execution,
            report=progress,
            engines=Engines(groups, rank=rank),
            place=place,
            whole=store.remote is not None,
        )
        registry.prepare(stage.version, stage.hints)
        run = importlib.import_module(f"safecl.stages.{stage.kind}").run
        with slot or nullcontext():
            start = time.monotonic()
            result = run(context)
            return time.monotonic() - start, result


def _agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    import torch

    given = [value]
    torch.distributed.broadcast_object_list(given)
    return given[0]


class Progress:
    """Reports a stage's progress to the Broker, from any process, at most twice a second. Never raises. A call returns
    True if a checkpoint is wanted now, because this process may soon be lost."""

    def __init__(self, broker: Any, key: str) -> None:
        self.broker, self.key, self.last = broker, key, 0.0
        self.answer: Any = None  # of the last call

    def begins(self, place: Place) -> None:
        """Report which process works on the stage."""
        with suppress(Exception):
            self.broker.works.remote(self.key, here(place))

    def __call__(self, done: int, total: int, metrics: dict[str, float]) -> bool:
        now = time.monotonic()
        if now - self.last < 0.5 and done < total and EVENTS.isdisjoint(metrics):
            return False
        self.last = now
        try:
            wanted = self._answered()
            self.answer = self.broker.progress.remote(self.key, done, total, metrics)
        except Exception as error:  # progress is optional: an error in it must not stop the work
            print(f"progress of {self.key[:12]} was not reported: {error}", file=sys.stderr)
            return False
        return wanted

    def _answered(self) -> bool:
        import ray

        if self.answer is None or not ray.wait([self.answer], timeout=0)[0]:
            return False
        try:
            return bool(ray.get(self.answer))
        except Exception:  # the Broker has died meanwhile
            return False


class Ran(NamedTuple):
    """A light stage's seconds of work; when it began, in seconds since the epoch (0: it was already in the store); and
    where it ran."""

    seconds: float
    began: float
    where: dict[str, Any]


class Hand:
    """Runs light stages, each in a thread, because most of them only wait for an engine. The Broker makes it a Ray
    actor."""

    def __init__(self, store: Store, execution: Execution, broker: Any, at_once: int) -> None:
        self.given = (store, execution, broker)
        self.freed = time.monotonic()
        self.broker, self.at_once = broker, at_once
        self.slots: dict[tuple[str, int], threading.Semaphore] = {}
        self.where = here(Place())
        self.begun: SimpleQueue[Begun] = SimpleQueue()
        threading.Thread(target=self._tell, daemon=True).start()

    def run(self, stage: Stage, groups: dict[str, tuple[str, ...]], level: int) -> Ran:
        """`run_stage` in this process. At most `at_once` stages of one kind and level (order.Turn) work at the same
        time. Meanwhile others are prepared or published; otherwise each slot would be idle for that time."""
        began = 0.0

        @contextmanager
        def slot() -> Iterator[None]:
            nonlocal began
            with self.slots.setdefault((stage.kind, level), threading.Semaphore(self.at_once)):
                began = time.time()
                self.begun.put(Begun(stage.kind, stage.key, began))
                yield

        try:
            seconds = run_stage(stage, *self.given, groups=groups, rank=level, own_process=False, slot=slot())
            return Ran(seconds, began, self.where)
        except BaseException:
            with suppress(Exception):  # a failure is shown with the time and place where it began
                import ray

                begun = Begun(stage.kind, stage.key, began or time.time())
                ray.get(self.broker.begun.remote([begun], self.where), timeout=10)
            raise
        finally:
            if time.monotonic() - self.freed > 1.0:
                self.freed = time.monotonic()
                free_heap()

    def _tell(self) -> None:
        """Tell the Broker which stages have begun. Those within TOGETHER_S are sent in one call."""
        while True:
            begun = [self.begun.get()]
            time.sleep(TOGETHER_S)
            while not self.begun.empty():
                begun.append(self.begun.get())
            self.broker.begun.remote(begun, self.where)


class Begun(NamedTuple):
    """A light stage that has begun, and when, in seconds since the epoch."""

    kind: str
    key: str
    at: float


def free_heap() -> None:
    """Return freed memory to the system. glibc keeps it, in a heap for each thread (800 MiB of tokenizers were
    seen)."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Redirect this process's output, including that of native code, to a file while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.close(opened)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, old in zip((1, 2), saved, strict=True):
            os.dup2(old, target)
            os.close(old)
