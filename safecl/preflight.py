"""What a run needs of this machine: memory, and isolation for programs that a model writes."""

from __future__ import annotations

import os
from typing import Any

from safecl import panel, sandbox
from safecl.base import PrerequisiteError
from safecl.capacity import GIB_PER_ENGINE, GIB_PER_TRIAL, GIB_PER_WORKER, free_gib
from safecl.config import Execution, Sweep
from safecl.cost import slots
from safecl.models import tokenizer_folder, tokenizer_stage
from safecl.tasks._written import find

GIB_PER_WAITING = 0.2  # memory of a trial's process, measured


def check(sweep: Sweep) -> None:
    """Raises PrerequisiteError if this machine lacks what the sweep needs."""
    check_memory(sweep.execution)
    check_isolation(sweep)
    if lacking := lacking_judges(sweep):
        raise PrerequisiteError("\n".join(lacking))


def lacking_judges(sweep: Sweep) -> list[str]:
    """Judges' models on the hub that are not available, one line each. Checked early, before hours are spent on answers
    to judge."""
    found: dict[str, str] = {}
    for seat in panel.all_seats(sweep):
        if seat.model is None:
            continue
        tokenizer = tokenizer_stage(seat.model)
        source: Any = tokenizer.config["source"]
        if "hub" not in source:  # check.py has checked its files
            continue
        try:
            tokenizer_folder(tokenizer)
        except PrerequisiteError as error:
            found[seat.model.name] = f"evaluate.judges, {seat.judge}, model {seat.model.name!r}: {error}"
    return list(found.values())


def check_memory(execution: Execution) -> None:
    """Raises PrerequisiteError if what a run holds on this machine does not fit into its free memory: on its CPUs also a
    trainer or an engine, else only the processes of trials, which mostly wait."""
    if execution.address != "local" or execution.use_gpu:
        free, need = free_gib(), execution.num_trials_at_once * GIB_PER_WAITING
        if free < need:
            raise PrerequisiteError(
                f"memory: {free:.1f} GiB are free on this machine, and {execution.num_trials_at_once} trials at once need about "
                f"{need:.1f} on it, wherever they train: lower execution.num_trials_at_once, or start the run on a larger machine"
            )
        return
    free, need = free_gib(), least_gib(execution)
    if free < need:
        held = f"an engine, or the {execution.num_workers} training workers of a finetune, in turn"
        raise PrerequisiteError(
            f"memory: {free:.1f} GiB are free, the sweep needs about {need:.1f} ({held}): close other programs, or lower "
            "execution.num_trials_at_once"
        )


def least_gib(execution: Execution) -> float:
    """Least memory in GiB with which a run on this machine's CPUs can finish. With less than `needed_gib`, engines and
    trainers take turns, and each turn starts them again."""
    held = max(GIB_PER_ENGINE, execution.num_workers * GIB_PER_WORKER)
    return held + execution.num_trials_at_once * GIB_PER_TRIAL


def needed_gib(execution: Execution) -> float:
    """Memory in GiB of a run of one model on this machine's CPUs, with all processes that it may hold at once."""
    workers = _num_workers(execution)
    engines = execution.num_candidate_engines + execution.num_judge_replicas
    return engines * GIB_PER_ENGINE + workers * GIB_PER_WORKER + execution.num_trials_at_once * GIB_PER_TRIAL


def _num_workers(execution: Execution) -> int:
    return slots(execution, os.cpu_count() or 1) * execution.num_workers


def check_isolation(sweep: Sweep) -> None:
    """Raises PrerequisiteError if a task's programs would run without isolation, and the sweep does not allow that."""
    if sweep.evaluate.unsafe_code or not any(find(task.task, sweep.data).RUNS_CODE for task in sweep.tasks):
        return
    lacking = sandbox.missing()
    if lacking is not None:
        raise PrerequisiteError(
            f"this sweep runs programs that a model wrote, and this machine cannot isolate them: {lacking}. Or consent "
            "to run them without isolation: --set evaluate.unsafe_code=true"
        )
