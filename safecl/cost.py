"""What a run would do: stages that must run, are finished or are shared, and how long past ones of the kind took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from safecl.plan import Job
from safecl.store import Stage, Store


class Count(NamedTuple):
    """Stages of one kind: how many must run, are finished, and how often one was needed again (shared)."""

    to_run: int
    cached: int
    shared: int
    hours: float | None  # of those to run, from past records of the kind; None: unknown


def missing(targets: Sequence[Stage], store: Store) -> list[Stage]:
    """The stages that must run, inputs first, so that every target is finished. A finished stage's inputs are not
    needed: they may have been pruned."""
    needed: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key in needed or store.has(stage):
            return
        for below in stage.inputs.values():
            visit(below)
        needed[stage.key] = stage

    for target in targets:
        visit(target)
    return list(needed.values())


def cost(jobs: Iterable[Job], folder: Path | None, store: Store, instruments: Sequence[Stage] = ()) -> dict[str, Count]:
    """Per kind of stage, what running these jobs would take, with the stages that measure the judges (`instruments`)."""
    uses: Counter[str] = Counter()
    stages: dict[str, Stage] = {}
    targets: list[Stage] = list(instruments)
    tops = list(instruments[-1:])
    for job in jobs:
        evidence = job.evidence(folder)
        targets += [*evidence.judged, evidence.metrics]
        tops.append(evidence.metrics)
    for stage in (stage for top in tops for stage in top.walk()):
        uses[stage.key] += 1
        stages[stage.key] = stage
    to_run = {stage.key for stage in missing(targets, store)}
    table: dict[str, Count] = {}
    for kind in dict.fromkeys(stage.kind for stage in stages.values()):
        keys = [key for key, stage in stages.items() if stage.kind == kind]
        run = [key for key in keys if key in to_run]
        past = [float(record["seconds"]) for record in store.records(kind)]
        hours = (sum(past) / len(past)) * len(run) / 3600 if past else (0.0 if not run else None)
        table[kind] = Count(len(run), len(keys) - len(run), sum(uses[key] - 1 for key in keys), hours)
    return table
