"""What kind a failure is. Only a trial's own is a result; others are tried again by the same command, and never counted."""

from __future__ import annotations

import re
import subprocess
from typing import Literal

from safecl.base import ConfigError, Infrastructure, PrerequisiteError

Kind = Literal["trial", "infrastructure", "configuration"]

_MACHINE = (Infrastructure, MemoryError, OSError, EOFError, subprocess.SubprocessError)  # time-outs are OSErrors
# By name, so that nothing heavy is imported: torch's, Ray's (a worker, actor, node or object that was lost), the engine's,
# and those of databases. A RayTaskError only wraps what a task raised.
_NAMES = {
    "OutOfMemoryError", "AcceleratorError", "DistError", "DistBackendError", "RayError", "EngineDeadError",
    "EngineGenerateError", "Unavailable", "GateBroken", "OperationalError", "StorageInternalError", "BrokenExecutor",
}  # fmt: skip
# What libraries raise as a plain RuntimeError. An assertion on a GPU is the program's own.
_TEXT = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|no space left|CUDA error|NCCL|gloo|connection (?:closed|reset"
    r"|refused)|broken pipe|unhandled system error|input/output error|too many open files",
    re.IGNORECASE,
)


def kind_of(error: BaseException) -> Kind:
    """The kind of what a stage raised, as it was raised (not in Ray's wrapping)."""
    if isinstance(error, ConfigError | PrerequisiteError):
        return "configuration"
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if "device-side assert" in text:
        return "trial"
    if isinstance(error, _MACHINE) or (names & _NAMES and "RayTaskError" not in names):
        return "infrastructure"
    return "infrastructure" if type(error) is RuntimeError and _TEXT.search(text) else "trial"
