"""What a run would do: stages that must run, are finished or are shared, and how long past ones of the kind took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from safecl.grid import Job
from safecl.store import Stage, Store, below


class Count(NamedTuple):
    """Stages of one kind: how many must run, are finished, and how often one was needed again (shared)."""

    to_run: int
    cached: int
    shared: int
    hours: float | None  # of those to run, from past records of the kind; None: unknown


def missing(targets: Sequence[Stage], store: Store) -> list[Stage]:
    """The stages that must run, inputs first, so that every target is finished. A finished stage's inputs are not
    needed: they may have been pruned."""
    return below(targets, store.has)


def cost(jobs: Iterable[Job], store: Store, instruments: Sequence[Stage] = ()) -> dict[str, Count]:
    """Per kind of stage, what running these jobs would take, with the stages that measure the judges (`instruments`)."""
    uses: Counter[str] = Counter()
    stages: dict[str, Stage] = {}
    targets: list[Stage] = list(instruments)
    tops = list(instruments[-1:])
    for job in jobs:
        targets += job.evidence.targets
        tops.append(job.evidence.metrics)
    for top in tops:
        needed = top.walk()
        stages.update((stage.key, stage) for stage in needed)
        uses.update(stage.key for stage in needed)
    to_run = {stage.key for stage in missing(targets, store)}
    table: dict[str, Count] = {}
    by_kind: dict[str, list[str]] = {}
    for key, stage in stages.items():
        by_kind.setdefault(stage.kind, []).append(key)
    for kind, keys in by_kind.items():
        num_run = sum(key in to_run for key in keys)
        past = [float(record["seconds"]) for record in store.records(kind)]
        hours = (sum(past) / len(past)) * num_run / 3600 if past else (0.0 if not num_run else None)
        table[kind] = Count(num_run, len(keys) - num_run, sum(uses[key] - 1 for key in keys), hours)
    return table
