"""A sweep's runs as a trace for chrome://tracing and ui.perfetto.dev, with summaries of what each stage waited for.

The times are those that drivers noted in the store (times.py, watch.py), of all runs of a sweep. There is one row per
device, engine or process. Stages that overlap on one of them (an engine answers many stages at once) are in several
rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from safecl.live import runs
from safecl.store import Store
from safecl.watch import TRACE

Span = dict[str, Any]  # times of one stage: see times.Times


def spans(store: Store, sweep: str) -> list[Span]:
    """Times of every stage that ended, and of stages that still ran when the last run wrote its last note. Sorted by
    start."""
    found: list[Span] = []
    for told in runs(store, sweep):
        for _, times in sorted(store.notes(f"{TRACE}{told['run']}-").items()):
            found += [{**span, "run": told["run"]} for span in times if "start" in span]
        for stage in told["running"]:
            known = {name: value for name, value in stage.items() if value is not None}
            where = {"asked": stage["start"], "ready": stage["start"], "needs": "process", "inputs": []}
            found.append({**where, **known, "end": told["at"], "run": told["run"], "open": True})
    return sorted(found, key=lambda span: float(span["start"]))


def chrome(found: Iterable[Span], cells: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Trace events of these spans. `cells`: labels of the table's rows that need a stage, by the stage's key."""
    events: list[dict[str, Any]] = []
    pids: dict[str, int] = {}
    rows: dict[tuple[int, str], list[float]] = {}  # for each row, the time at which each of its lanes is free again
    tids: dict[tuple[int, str, int], int] = {}
    for span in found:
        node = f"{span.get('host') or 'engines'} {span.get('node') or ''}".strip()
        if node not in pids:
            pids[node] = len(pids) + 1
            events.append(_name("process_name", pids[node], 0, node))
        pid, row = pids[node], row_of(span)
        lanes = rows.setdefault((pid, row), [])
        lane = next((i for i, free in enumerate(lanes) if free <= span["start"]), len(lanes))
        lanes[lane : lane + 1] = [span["end"]]
        if (pid, row, lane) not in tids:
            tids[pid, row, lane] = len(tids) + 1
            events.append(_name("thread_name", pid, tids[pid, row, lane], row if lane == 0 else f"{row} #{lane + 1}"))
        events.append(
            {
                "ph": "X", "name": span["kind"], "cat": span["needs"], "pid": pid, "tid": tids[pid, row, lane],
                "ts": _micros(span["start"]), "dur": _micros(span["end"] - span["start"]),
                "args": {
                    "key": span["key"], "cells": sorted(cells.get(span["key"], ())),
                    "waited for inputs, s": round(span["ready"] - span["asked"], 3),
                    f"waited for {span['needs']}, s": round(span["start"] - span["ready"], 3),
                    **({"error": span["error"]} if "error" in span else {}),
                    **({"under way": True} if span.get("open") else {}),
                },
            }
        )  # fmt: skip
    events += _queues(found)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def row_of(span: Span) -> str:
    """Name of the device, engine or process that ran the stage."""
    if span["kind"].startswith("engine"):
        return f"engine {span['key']}"
    if span["kind"] == "trainer":
        return f"start of {span['key']}"
    if span["needs"] == "trainer":
        return f"{span.get('device', 'cpu')}, process {span.get('pid', '?')}"
    return span["needs"] if span["needs"] == "process" else f"engine {span['needs']}"


def _queues(found: Iterable[Span]) -> list[dict[str, Any]]:
    """A counter for each resource that stages wait for: the number of waiting stages."""
    steps: dict[str, Counter[float]] = defaultdict(Counter)
    for span in found:
        if span["start"] > span["ready"]:
            steps[span["needs"]][span["ready"]] += 1
            steps[span["needs"]][span["start"]] -= 1
    events = []
    for needs, changes in sorted(steps.items()):
        num = 0
        for at, change in sorted(changes.items()):
            num += change
            events.append(
                {"ph": "C", "name": f"waiting for {needs}", "pid": 0, "ts": _micros(at), "args": {"stages": num}}
            )
    return events


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _micros(seconds: float) -> int:
    return round(1e6 * seconds)


def summary(found: list[Span]) -> list[str]:
    """Lines that say what stages waited for, and what the end of the last run waited for."""
    if not found:
        return ["nothing was run"]
    total = max(span["end"] for span in found) - min(span["start"] for span in found)
    busy: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for span in found:
        busy[span["kind"]] += span["end"] - span["start"]
        waits["inputs"] += span["ready"] - span["asked"]
        waits[_thing(span)] += span["start"] - span["ready"]
    lines = [
        f"{len(found)} stages, {total:.0f} s from the first to the last",
        f"worked on: {_shares(busy)}",
        f"waited for: {_shares(waits)}",
    ]
    last = [span for span in found if span["run"] == found[-1]["run"]]
    lines.append(f"the end waited for: {_shares(chain(last))}")
    return lines


def chain(found: list[Span]) -> Counter[str]:
    """Seconds of one run by kind of stage, and by what was waited for. They are those of the chain from its last stage
    back, each time through the input that was ready last."""
    by_key = {span["key"]: span for span in found}
    at = max(found, key=lambda span: float(span["end"]))
    parts: Counter[str] = Counter()
    seen: set[str] = set()
    while at["key"] not in seen:
        seen.add(at["key"])
        parts[at["kind"]] += at["end"] - at["start"]
        parts[f"{_thing(at)} (its turn)"] += at["start"] - at["ready"]
        inputs = [by_key[key] for key in at["inputs"] if key in by_key and by_key[key]["end"] <= at["ready"]]
        inputs = [span for span in inputs if span["end"] > at["asked"]]
        before = inputs or [span for span in found if span["end"] <= at["asked"] and span["key"] not in seen]
        if not before:
            break
        nearest = max(before, key=lambda span: float(span["end"]))
        parts["hand-over" if inputs else "being asked for"] += (at["ready"] if inputs else at["asked"]) - nearest["end"]
        if not inputs:
            parts["inputs from the store"] += at["ready"] - at["asked"]
        at = nearest
    return parts


def _thing(span: Span) -> str:
    """The resource that a stage waits for, as a word for people."""
    return span["needs"] if span["needs"] in ("trainer", "process") else "engine"


def _shares(parts: Counter[str]) -> str:
    total = sum(parts.values())
    told = [
        f"{name} {seconds / total:.0%}" for name, seconds in parts.most_common() if total and seconds >= 0.005 * total
    ]
    return ", ".join(told) or "nothing"


def cells_of(project: Any, keys: set[str]) -> dict[str, set[str]]:
    """Labels of a project's rows that need these stages, by key, for its final trials and the search's trials so
    far."""
    found: dict[str, set[str]] = defaultdict(set)
    for cell, _, jobs, _ in project.finals():
        study = project.past(cell)
        tried = [cell.trial(trial.params) for trial in (study.complete() if study else [])]
        for job in (*jobs, *tried):
            for stage in job.evidence.metrics.walk():
                if stage.key in keys:
                    found[stage.key].add(cell.label)
    return found
