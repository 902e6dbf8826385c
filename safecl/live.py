"""The state of a run, read from the notes that its driver leaves in the store (watch.py). Works from any terminal,
during the run and afterwards.

Only reads, and joins no cluster. A sweep may have had several runs, one after the other. Costs are of all runs; running
stages are of the last run.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from safecl.report.progress import clock
from safecl.store import Stage, Store
from safecl.watch import NOTE_S, RUN

if TYPE_CHECKING:
    from safecl.config import Execution

SHOWN = 20  # running stages that are shown
SILENT_S = 12 * NOTE_S  # seconds; a run whose notes are older may be lost


def runs(store: Store, sweep: str) -> list[dict[str, Any]]:
    """All runs of a sweep that left a note, the newest last; `run` is the run's name."""
    found = [
        {**told, "run": name.removeprefix(RUN)} for name, told in store.notes(RUN).items() if told.get("sweep") == sweep
    ]
    return sorted(found, key=lambda told: float(told["began"]))


def state(store: Store, sweep: str, execution: Execution) -> dict[str, Any] | None:
    """The last run, and the costs of all runs. None if no run left a note. `how`: `under way`, `ended`, `stopped`, or
    `lost` (its driver died without a note)."""
    every = runs(store, sweep)
    if not every:
        return None
    last, now = every[-1], time.time()
    how = last["how"]
    if how == "under way" and not store.is_alive(last["owner"]):
        how = "lost"
    done: Counter[str] = Counter()
    for told in every:
        done.update(told["done"])
    kinds = sorted({*done, *last["queue"]})
    failed = [found for told in every[:-1] for found in told["failed"]]
    again = {found["key"] for found in last["failed"]}
    return {
        "run": last["run"], "how": how, "host": last["host"], "pid": last["pid"], "runs": len(every),
        "began": last["began"], "at": last["at"], "age_s": round(max(0.0, now - last["at"]), 1),
        "trials": last["trials"], "trials_done": last["trials_done"], "eta_s": last["eta_s"] if how == "under way" else None,
        "cells": last["cells"] if how == "under way" else [],
        "stages": {kind: {**last["queue"].get(kind, {}), "done": done[kind]} for kind in kinds},
        "running": last["running"] if how == "under way" else [],
        "searched": last.get("searched", {}), "root": store.root, "cluster": last["cluster"], "money": money(every, execution),
        "failed": [found for found in failed if found["key"] not in again and not _is_made(store, found)] + last["failed"],
        "num_failed": last["num_failed"],
    }  # fmt: skip


def _is_made(store: Store, failed: dict[str, Any]) -> bool:
    """Whether a stage that failed in an earlier run is in the store now."""
    return store.has(Stage.of({"config": {}, "version": "", **failed}, {}))


def money(every: list[dict[str, Any]], execution: Execution) -> dict[str, Any]:
    """Device-hours for which the cluster was held, over all runs, and their price if the sweep file gives one."""
    hours = sum(told["device_s"] for told in every) / 3600
    price = execution.device_price
    unit = next((told["cluster"]["unit"] for told in reversed(every) if told["cluster"]), "device")
    return {
        "unit": unit, "hours": round(hours, 4), "price": price, "cost": None if price is None else round(hours * price, 4)
    }  # fmt: skip


def lines(found: dict[str, Any] | None) -> list[str]:
    """Lines for a person, printed below the tables."""
    if found is None:
        return ["no run of this sweep has left a note in this store"]
    host, since = f"process {found['pid']} on {found['host']}", clock(found["at"] - found["began"])
    age = f"{clock(found['age_s'])} ago"
    silent = f"; its last word was {age}: it may be lost" if found["age_s"] > SILENT_S else f", {age}"
    told = [
        {
            "under way": f"run: under way for {since} ({host}{silent})",
            "ended": f"run: ended after {since} ({host}), {age}",
            "stopped": f"run: stopped after {since} ({host}), {age}; the same command continues",
            "lost": f"run: its driver is gone without a word ({host}), the last one {age}; the same command continues",
        }[found["how"]]
    ]
    ahead = "" if found["eta_s"] is None else f", about {clock(found['eta_s'])} left"
    told.append(f"trials of this run: {found['trials_done']} of {found['trials']}{ahead}")
    if held := found["cluster"].get("held"):
        gib, is_over = {"memory", "object_store_memory"}, found["how"] != "under way"
        each = []
        for name, (used, have) in held.items():
            of = "" if is_over else f"{used / 2**30:.1f} of " if name in gib else f"{used:g} of "
            each.append(f"{name.replace('_', ' ')} {of}" + (f"{have / 2**30:.1f} GiB" if name in gib else f"{have:g}"))
        nodes = f"{(num := found['cluster']['nodes'])} {'node' if num == 1 else 'nodes'}"
        told.append(f"{f'its cluster had {nodes}' if is_over else f'held of {nodes}'}: {', '.join(each)}")
    for stage in found["running"][:SHOWN]:
        done = f", {stage['done']} of {stage['total']} {stage['unit']}".rstrip() if stage["total"] else ""
        where = f", on {stage['host']} (process {stage['pid']}, {stage['device']})" if stage.get("host") else ""
        told.append(
            f"running for {clock(found['at'] - stage['start'])}: {stage['label']}{done}{where}, {stage['key'][:12]}"
        )
    if (more := len(found["running"]) - SHOWN) > 0:
        told.append(f"and {more} more")
    told.append(_money_line(found["money"]))
    for failed in found["failed"]:
        where = (
            "" if failed.get("host") is None else f", on {failed['host']} (process {failed['pid']}, {failed['device']})"
        )
        told.append(
            f"failed: {failed['kind']} {failed['key'][:12]}, cause {failed['cause']}{where}: {failed['error']} "
            f"(safecl logs {failed['key'][:12]}{'' if found['root'] == 'runs' else ' --root ' + found['root']})"
        )
    if more := found["num_failed"] - len(found["failed"]):
        told += [f"failed: {more} more"] if more > 0 else []
    return told


def _money_line(money: dict[str, Any]) -> str:
    spent = f"{money['hours']:.2f} {money['unit']}-hours held so far"
    if money["cost"] is None:
        return f"money: {spent}; no price is known (execution.device_price)"
    return f"money: about {money['cost']:.2f} ({spent}, {money['price']:g} each)"
