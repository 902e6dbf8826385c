"""Causes of failures: their names, whose fault each is, and the journal of a run's faults.

Only a trial's own fault (`bug`) counts as a result. After a fault of the machine the run goes on (again from the checkpoint,
with fewer rows a forward pass, on another node, or in another process). The journal counts these faults, and the run prints
the counts at its end.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safecl.base import ConfigError, Damaged, Infrastructure, PrerequisiteError

Kind = Literal["trial", "infrastructure", "configuration"]


@dataclass(frozen=True)
class Cause:
    """A cause of failures.

    Attributes:
        name: its name in the journal.
        kind: whose fault it is.
        what: what happened and what the run did about it, in words; printed after a count at the end of a run.
    """

    name: str
    kind: Kind
    what: str


MEMORY = Cause("memory", "infrastructure", "out of memory: again, a finetune with half the rows a forward")
DISK = Cause(
    "disk", "infrastructure", "no space left on a disk, or a disk that cannot be read or written: again, later"
)
WORKER = Cause(
    "worker", "infrastructure", "a process at work was lost: its stage again, a finetune from its checkpoint"
)
NODE = Cause("node", "infrastructure", "a node was lost or taken back: its stages again elsewhere")
CONTROLLER = Cause("controller", "infrastructure", "the process that holds a group of workers was lost: another one")
ENGINE = Cause(
    "engine", "infrastructure", "an engine was lost: booted again, and asked again for what it had not answered"
)
BROKER = Cause("broker", "infrastructure", "the Broker was lost: another one goes on from the store")
CLUSTER = Cause("cluster", "infrastructure", "the local Ray cluster was lost: started again, and on from the store")
DRIVER = Cause("driver", "infrastructure", "a driver was lost before: this one goes on from the store")
SERVICE = Cause("service", "infrastructure", "a server or a connection failed: again, later")
DEVICE = Cause("device", "infrastructure", "a device or the link between devices failed: again, from the checkpoint")
MACHINE = Cause("machine", "infrastructure", "the machine failed in another way: again")
DAMAGED = Cause("damaged", "configuration", "a finished stage's files were not what was written: made again")
CONFIGURATION = Cause("configuration", "configuration", "the sweep file or the machine lacks something: said below")
BUG = Cause("bug", "trial", "a stage's own fault: it stops what needs it, and nothing else")
CAUSES = {
    cause.name: cause
    for cause in (
        MEMORY, DISK, WORKER, NODE, CONTROLLER, ENGINE, BROKER, CLUSTER, DRIVER, SERVICE, DEVICE, MACHINE, DAMAGED,
        CONFIGURATION, BUG,
    )
}  # fmt: skip

PATIENT = (DISK, SERVICE)  # causes that pass by themselves, or when a person mends them
PATIENCE_S = 900.0  # after one of these causes a stage is tried again and again for so many seconds
PAUSE_S = 5.0  # seconds between two tries
# Errors by the name of their class, so that nothing heavy is imported: of torch, of Ray (a worker, actor, node or object
# that was lost), of the engine and of databases. The first name that fits decides. RayTaskError is not looked up, because
# it only wraps the error that a task raised.
_NAMES = {
    "OutOfMemoryError": MEMORY, "MemoryError": MEMORY,
    "NodeDiedError": NODE,
    "EngineDeadError": ENGINE, "EngineGenerateError": ENGINE, "Unavailable": ENGINE, "GateBroken": ENGINE,
    "AcceleratorError": DEVICE, "DistError": DEVICE, "DistBackendError": DEVICE,
    "OperationalError": SERVICE, "StorageInternalError": SERVICE, "ConnectionError": SERVICE, "TimeoutError": SERVICE,
    "GetTimeoutError": SERVICE,
    "ConnectionResetError": SERVICE, "ConnectionRefusedError": SERVICE, "ConnectionAbortedError": SERVICE,
    "BrokenPipeError": SERVICE,
    "RayError": WORKER, "BrokenExecutor": WORKER,
}  # fmt: skip
# By text: errors that libraries raise as a plain RuntimeError, and messages of errors from another process. A device-side
# assertion on a GPU is the program's own fault (a bug).
_TEXT = {
    r"out of memory|can't allocate memory|cannot allocate memory": MEMORY,
    r"no space left|disk quota|input/output error|disk is full": DISK,
    r"CUDA error|NCCL|gloo|unhandled system error": DEVICE,
    r"connection (?:closed|reset|refused)|broken pipe": SERVICE,
    r"too many open files": MACHINE,
}  # fmt: skip
_FULL = {28, 122, 5}  # ENOSPC, EDQUOT, EIO


def cause_of(error: BaseException) -> Cause:
    """Return the cause of the error that a stage raised. Pass the error itself, not the error of Ray that wraps it."""
    if isinstance(error, Damaged):
        return DAMAGED
    if isinstance(error, ConfigError | PrerequisiteError):
        return CONFIGURATION
    names = [kind.__name__ for kind in type(error).__mro__]
    text = str(error)
    if "device-side assert" in text:
        return BUG
    if isinstance(error, OSError) and error.errno in _FULL:
        return DISK
    if "RayTaskError" not in names:
        for name, cause in _NAMES.items():
            if name in names:
                return _by_text(text, cause) if cause is SERVICE else cause
    if isinstance(error, Infrastructure):  # from another process, as "<type>: <text>" or in words of ours
        if _by_text(text, WORKER) is DISK:  # a full disk killed that process
            return DISK
        first = re.match(r"(\w+): ", text)
        named = {"ActorDiedError": CONTROLLER, **_NAMES}  # trainers report it for the process that holds their workers
        return named.get(first[1] if first else "") or _by_text(text, WORKER)
    if isinstance(error, OSError | EOFError | subprocess.SubprocessError):  # time-outs are OSErrors
        return _by_text(text, MACHINE)
    return _by_text(text, BUG) if type(error) is RuntimeError else BUG


def _by_text(text: str, otherwise: Cause) -> Cause:
    return next((cause for form, cause in _TEXT.items() if re.search(form, text, re.IGNORECASE)), otherwise)


def kind_of(error: BaseException) -> Kind:
    """Return whose fault it is: the trial's own, the machine's, or an error of configuration."""
    return cause_of(error).kind


def plain_error(error: BaseException) -> BaseException:
    """Return the error that a stage raised, without the errors of Ray that wrap it."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


class Journal:
    """The faults of a store's runs, a line each in `<logs>/faults.jsonl`.

    Processes on the driver's node append to the file, and the driver reads it. The file is kept after the run.
    """

    def __init__(self, logs: Path, begin: int | None = None) -> None:
        """`begin`: position in the file, in bytes, where this run's lines begin; None: at the file's present end."""
        self.path = logs / "faults.jsonl"
        self.begin = begin if begin is not None else self.path.stat().st_size if self.path.exists() else 0

    def add(self, cause: Cause, where: str = "", error: BaseException | str = "") -> None:
        """Append a fault. Errors of the disk are ignored, so that the journal cannot end a run that survived the fault.

        `where`: the stage, engine or node that it happened to.
        """
        told = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
        if len(told) > 1000:  # keep the end: a traceback's last lines say what happened
            told = f"{told[:300]} ... {told[-700:]}"
        line = {"at": round(time.time(), 1), "cause": cause.name, "where": where, "error": told}
        if self.path.parent == Path():  # no folder for logs: a Broker without a run
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def lines(self, of_this_run: bool = True) -> list[dict[str, Any]]:
        """Return the lines that any process added since this run began, or all lines of the file."""
        found = []
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self.begin if of_this_run else 0)
            for line in file:
                with suppress(ValueError):  # cut short by a kill or a full disk
                    found.append(json.loads(line))
        return found

    def told(self) -> list[str]:
        """Return a line of text for each cause that this run met, with its count."""
        counts = Counter(line["cause"] for line in self.lines())
        return [f"{counts[name]} x {cause.what}" for name, cause in CAUSES.items() if counts[name]]

    def counts(self) -> dict[str, int]:
        """Return how often each cause was met, in all runs that wrote to this journal."""
        counts = Counter(line["cause"] for line in self.lines(of_this_run=False))
        return {name: counts[name] for name in CAUSES if counts[name]}
