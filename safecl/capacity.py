"""What trainers and engines hold, in units of what is scarce: GPUs, a cluster's CPUs, or this machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from safecl.config import Execution

GIB_PER_TRIAL, GIB_PER_ENGINE, GIB_PER_WORKER = 0.4, 4.0, 2.5  # measured at 135M parameters, see the README
GIB = "GiB"


class Capacity(NamedTuple):
    """`unit`: by Ray's name, or GiB of memory here. `trainer`, `engine`: how many one of them holds; `num_trainers`: as many
    as there may be at once."""

    unit: str
    num_units: float
    trainer: float
    engine: float
    num_trainers: int

    def needed(self) -> float:
        """The least with which a run comes to its end: trainers and engines take turns."""
        return max(self.trainer, self.engine)


def unit(execution: Execution) -> str:
    """What is scarce."""
    if execution.address == "local" and not execution.use_gpu and execution.unit is None:
        return GIB
    return execution.unit or ("GPU" if execution.use_gpu else "CPU")


def reserved(execution: Execution, num: float) -> dict[str, float]:
    """So many units as a worker or an engine asks Ray for them. On this machine's CPUs engines ask for none."""
    scarce = unit(execution)
    return {} if scarce == GIB else {scarce: num}


def capacity(execution: Execution, have: Mapping[str, float], free_gib: float) -> Capacity:
    """`have`: Ray's resources, with what autoscaling may bring; `free_gib`: memory here."""
    scarce = unit(execution)
    if scarce == GIB:
        trainer, engine = execution.num_workers * GIB_PER_WORKER, GIB_PER_ENGINE
        num_trainers = min(int(have.get("CPU", 1)) // execution.num_workers, execution.num_trials_at_once)
        memory = free_gib - execution.num_trials_at_once * GIB_PER_TRIAL
        return Capacity(scarce, max(memory, trainer, engine), trainer, engine, max(1, num_trainers))
    size = execution.num_workers * execution.worker_units
    return Capacity(scarce, have.get(scarce, 0.0), size, execution.engine_units, execution.num_trials_at_once)


def free_gib() -> float:
    """Memory that programs may still take here."""
    import psutil

    return float(psutil.virtual_memory().available) / 2**30
