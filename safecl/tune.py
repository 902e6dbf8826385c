"""Runs a schedule's jobs with Ray Tune: each trial waits for one job's evidence. The only file that imports
ray.tune."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safecl.faults import kind_of, plain_error
from safecl.grid import Cell, Job
from safecl.order import Claim
from safecl.schedule import Schedule
from safecl.store import canonical


def trial(config: dict[str, Any], *, broker: Any, cells: Any) -> None:
    """One Tune trial: wait until the Broker has all evidence of a job. It needs no CPU and reports once."""
    import ray
    from ray import tune

    [reference] = cells
    cell: Cell = ray.get(reference)[config["cell"]]
    error, kind = "", "infrastructure"
    try:
        job = cell.job(json.loads(config["params"]), config["seed"], config["role"])
        wanted = [job.evidence]
        if job.is_bounded:
            wanted.append(job.aligned.evidence)
        targets = [stage for evidence in wanted for stage in evidence.targets]
        ray.get(broker.ensure.remote(targets, Claim(*config["claim"])))
    except Exception as raised:  # reported to the schedule, which closes the trial and continues with the others
        found = plain_error(raised)
        error, kind = f"{type(found).__name__}: {found}", kind_of(found)
    tune.report({"error": error, "kind": kind})


def run(schedule: Schedule, broker: Any, storage_path: Path, num_at_once: int) -> None:
    """Run every job of the schedule with one Tuner. Returns when all are finished."""
    import ray
    from ray import tune
    from ray.tune.search import Searcher

    # A trial whose process died is started again; Tune need not print that.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    waiting: dict[str, Job] = {}  # Tune's trial id -> job

    class JobSearcher(Searcher):  # type: ignore[misc]
        """Gives the schedule's jobs to Tune. It keeps no state for Tune: all state is in the store and the study."""

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            job = schedule.next()
            if job is None:
                return Searcher.FINISHED if schedule.is_done else None
            waiting[trial_id] = job
            told = {"params": canonical(job.params), "seed": job.seed, "role": job.role}
            return {"cell": position[job.cell], **told, "claim": list(schedule.claim(job))}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if (job := waiting.pop(trial_id, None)) is not None:
                if error or not result or "error" not in result:
                    schedule.finish(job, "the trial's process died", "infrastructure")
                else:
                    schedule.finish(job, result["error"], result["kind"])

        def __reduce__(self) -> Any:
            return Searcher, ()  # Tune writes its state at any time; it must not contain the driver's threads and files

        def save(self, checkpoint_path: str) -> None:
            """Does nothing, because Tune's own folder is never read back."""

        def restore(self, checkpoint_path: str) -> None:
            """Does nothing, because Tune's own folder is never read back."""

    cells = [queue.cell for queue in schedule.queues]
    position = {cell: index for index, cell in enumerate(cells)}
    trainable = tune.with_parameters(trial, broker=broker, cells=[ray.put(cells)])
    local = ray.cluster_resources().get("trial_slot")
    slot: Any = {"cpu": 0, "trial_slot": 1}
    if not local:
        # On the driver's node: a trial builds its stages from the sweep's own files, and another node need not have them.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        slot = tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[here])
    tuner = tune.Tuner(
        tune.with_resources(trainable, slot),
        tune_config=tune.TuneConfig(
            search_alg=JobSearcher(), num_samples=-1, max_concurrent_trials=num_at_once, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=schedule.sweep.name,
            storage_path=str(storage_path),
            verbose=0,
            log_to_file=False,
            failure_config=tune.FailureConfig(max_failures=-1),  # for processes that die; `trial` itself never raises
        ),
    )
    tuner.fit()
