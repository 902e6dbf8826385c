"""What a run needs of this machine: memory, and isolation for programs that a model writes."""

from __future__ import annotations

import os

from safecl import sandbox, tasks
from safecl.base import PrerequisiteError
from safecl.config import Execution, Sweep
from safecl.cost import slots

GIB_PER_TRIAL, GIB_PER_ENGINE, GIB_PER_WORKER = 0.4, 4.0, 2.5  # measured at 135M parameters, see the README


def check(sweep: Sweep) -> None:
    """Raises PrerequisiteError where this machine lacks what the sweep needs."""
    check_memory(sweep.execution)
    check_isolation(sweep)


def check_memory(execution: Execution) -> None:
    """Raises PrerequisiteError where a run on this machine's CPUs would not fit into its free memory."""
    if execution.address != "local" or execution.use_gpu:
        return
    free, need = free_gib(), needed_gib(execution)
    if free < need:
        raise PrerequisiteError(
            f"memory: {free:.1f} GiB are free, the sweep needs about {need:.1f} ({_num_engines(execution)} engines, "
            f"{_num_workers(execution)} training workers): close other programs, or lower execution.num_trials_at_once"
        )


def needed_gib(execution: Execution) -> float:
    """Memory that a run takes on this machine's CPUs."""
    workers, engines = _num_workers(execution), _num_engines(execution)
    return engines * GIB_PER_ENGINE + workers * GIB_PER_WORKER + execution.num_trials_at_once * GIB_PER_TRIAL


def free_gib() -> float:
    """Memory that programs may still take here."""
    import psutil

    return float(psutil.virtual_memory().available) / 2**30


def _num_engines(execution: Execution) -> int:
    return execution.num_candidate_engines + execution.num_judge_replicas


def _num_workers(execution: Execution) -> int:
    return slots(execution, os.cpu_count() or 1) * execution.num_workers


def check_isolation(sweep: Sweep) -> None:
    """Raises PrerequisiteError where a task's programs would run without isolation, and nobody consented to that."""
    if sweep.evaluate.unsafe_code or not any(tasks.load(task.task).RUNS_CODE for task in sweep.tasks):
        return
    lacking = sandbox.missing()
    if lacking is not None:
        raise PrerequisiteError(
            f"this sweep runs programs that a model wrote, and this machine cannot isolate them: {lacking}. Or consent "
            "to run them without isolation: --set evaluate.unsafe_code=true"
        )
