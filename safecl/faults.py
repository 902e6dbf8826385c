"""Why things fail: the causes by name, whose fault each is, and the journal of a run's faults.

Only a trial's own fault (`bug`) is a result. What the machine did is met while the run goes on (again from the checkpoint,
with fewer rows a forward, on another node, by another process), counted in the journal, and told at the end.
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
    """`what` happened and how it was met, in words for a person who reads it once a run, after a count."""

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

PATIENT = (DISK, SERVICE)  # pass by themselves, or when somebody sees to them
PATIENCE_S = 900.0  # for so long a stage is begun again and again after one of these
PAUSE_S = 5.0  # between two tries
# By name, so that nothing heavy is imported: torch's, Ray's (a worker, actor, node or object that was lost), the engine's,
# and those of databases. A RayTaskError only wraps what a task raised. The first that fits counts.
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
# What libraries raise as a plain RuntimeError, and what a message keeps of an error that is told in another process. An
# assertion on a GPU is the program's own.
_TEXT = {
    r"out of memory|can't allocate memory|cannot allocate memory": MEMORY,
    r"no space left|disk quota|input/output error|disk is full": DISK,
    r"CUDA error|NCCL|gloo|unhandled system error": DEVICE,
    r"connection (?:closed|reset|refused)|broken pipe": SERVICE,
    r"too many open files": MACHINE,
}  # fmt: skip
_FULL = {28, 122, 5}  # ENOSPC, EDQUOT, EIO


def cause_of(error: BaseException) -> Cause:
    """The cause of what a stage raised, as it was raised (not in Ray's wrapping)."""
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
    if isinstance(error, Infrastructure):  # told by another process as "<type>: <text>", or in words of ours
        if _by_text(text, WORKER) is DISK:  # of which that process died
            return DISK
        first = re.match(r"(\w+): ", text)
        named = {"ActorDiedError": CONTROLLER, **_NAMES}  # trainers tell it of the process that holds their workers
        return named.get(first[1] if first else "") or _by_text(text, WORKER)
    if isinstance(error, OSError | EOFError | subprocess.SubprocessError):  # time-outs are OSErrors
        return _by_text(text, MACHINE)
    return _by_text(text, BUG) if type(error) is RuntimeError else BUG


def _by_text(text: str, otherwise: Cause) -> Cause:
    return next((cause for form, cause in _TEXT.items() if re.search(form, text, re.IGNORECASE)), otherwise)


def kind_of(error: BaseException) -> Kind:
    """Whose fault it is: the trial's own, the machine's, or that of who set it up."""
    return cause_of(error).kind


class Journal:
    """What went wrong under way, a line each in `<logs>/faults.jsonl`: processes of the driver's node append to it, the
    driver reads it. It stays, for whoever asks later."""

    def __init__(self, logs: Path, begin: int | None = None) -> None:
        """`begin`: where in the file this run's lines begin; None: at its end."""
        self.path = logs / "faults.jsonl"
        self.begin = begin if begin is not None else self.path.stat().st_size if self.path.exists() else 0

    def add(self, cause: Cause, where: str = "", error: BaseException | str = "") -> None:
        """Never raises: the journal must not cost the run what the fault has spared. `where`: a stage, an engine."""
        told = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
        if len(told) > 1000:  # a traceback says at its end what happened
            told = f"{told[:300]} ... {told[-700:]}"
        line = {"at": round(time.time(), 1), "cause": cause.name, "where": where, "error": told}
        if self.path.parent == Path():  # no folder for logs: a Broker without a run
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def lines(self, of_this_run: bool = True) -> list[dict[str, Any]]:
        """What was added since this run began, by any process; or all that there is."""
        found = []
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self.begin if of_this_run else 0)
            for line in file:
                with suppress(ValueError):  # cut short by a kill or a full disk
                    found.append(json.loads(line))
        return found

    def told(self) -> list[str]:
        """A line for each cause that this run met, with its count."""
        counts = Counter(line["cause"] for line in self.lines())
        return [f"{counts[name]} x {cause.what}" for name, cause in CAUSES.items() if counts[name]]

    def counts(self) -> dict[str, int]:
        """How often each cause was met, in every run of this store."""
        counts = Counter(line["cause"] for line in self.lines(of_this_run=False))
        return {name: counts[name] for name in CAUSES if counts[name]}
