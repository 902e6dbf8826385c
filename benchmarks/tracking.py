"""Telling MLflow of a large sweep: python benchmarks/tracking.py

The made-up store of benchmarks/review.py, 500 search trials and 36 final trials of 3 seeds, 200 prompts a set: how long all of it
takes to stand in MLflow (SQLite), how much of that a driver waits for, what a rerun with nothing new costs, and how
long MLflow then takes to list all runs. `--quick`: 20 trials and 20 prompts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import _bench
from review import made, project

from safecl.base import sqlite_url
from safecl.config import Sweep
from safecl.project import Project
from safecl.schedule import Done
from safecl.tracking import EXPERIMENT, Logbook, Tracker
from tests import made_up


class Told:
    """A logbook, and the seconds for which its driver waited."""

    def __init__(self, project: Project) -> None:
        self.tracker = Tracker(None, project.store.local)
        self.logbook, self.waited, self.num = Logbook(self.tracker, project), 0.0, 0

    def done(self, done: Done) -> None:
        start = time.monotonic()
        self.logbook.done(done)
        self.waited, self.num = self.waited + time.monotonic() - start, self.num + 1


def run(project: Project) -> tuple[Told, float, float, float]:
    """What a driver does with a sweep whose trials are all in the store: wall and CPU seconds until all is sent, and the
    seconds of the sweep's own table and plots."""
    start, cpu = time.monotonic(), time.process_time()
    told = Told(project)
    schedule = project.schedule(on_done=told.done)
    while (job := schedule.next()) is not None:  # theta_safe on validation prompts, which the made-up store lacks
        tops = (job.evidence.metrics, job.aligned.evidence.metrics)
        made_up.put(project.store, {s.key: s for top in tops for s in top.walk() if not project.store.has(s)}.values())
        schedule.finish(job, "")
    end = time.monotonic()
    told.logbook.end(schedule.missing())
    end = time.monotonic() - end
    assert told.tracker.close(3600), told.tracker.problem
    return told, time.monotonic() - start, time.process_time() - cpu, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the made-up store is kept for the next time")
    arguments = parser.parse_args()
    trials, made_up.NUM_PROMPTS = (20, 20) if arguments.quick else (500, 200)
    with tempfile.TemporaryDirectory() as name:
        root = (arguments.folder or Path(name)).absolute() / "runs"
        done = root / "made"
        if not done.exists():
            made(root, trials)
            done.touch()
        for file in ("mlflow.db", "tracked.jsonl"):
            (root / file).unlink(missing_ok=True)
        shutil.rmtree(root / "artifacts", ignore_errors=True)
        numbers = measured(project(root, trials).sweep)
    print(numbers)
    if not arguments.quick:
        _bench.write("tracking", numbers)


def measured(sweep: Sweep) -> dict[str, dict[str, float]]:
    root = Path(sweep.execution.root)
    first, wall, cpu, end = run(Project(sweep))
    _, again, again_cpu, _ = run(Project(sweep))
    from safecl.tracking.server import client

    read = client(sqlite_url(root / "mlflow.db"))
    experiment = read.get_experiment_by_name(EXPERIMENT).experiment_id
    start = time.monotonic()
    runs = read.search_runs([experiment], max_results=1000)
    return {
        f"{first.num} trials, {made_up.NUM_PROMPTS} prompts a set": {
            "sent, s": wall,
            "sent, CPU s": cpu,
            "a trial, CPU ms": 1000 * cpu / first.num,
            "the driver waited, s": first.waited + end,
            "of it for table and plots, s": end,
            "rerun, s": again,
            "rerun, CPU s": again_cpu,
            "all runs listed, s": time.monotonic() - start,
            "runs": len(runs),
            "database, MB": (root / "mlflow.db").stat().st_size / 1e6,
            "artifacts, MB": sum(f.stat().st_size for f in (root / "artifacts").rglob("*") if f.is_file()) / 1e6,
        }
    }


if __name__ == "__main__":
    main()
