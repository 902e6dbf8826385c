"""A sweep from file to table: loads and checks it, wires store, Broker, search and tracker together, shows progress."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Sweep
from safecl.objective import select
from safecl.plan import REFERENCES, Cell, Graph, Job, cells, check, missing
from safecl.schedule import Done, Schedule, Study
from safecl.store import Stage, Store

GIB_PER_TRIAL, GIB_PER_ENGINE, GIB_PER_WORKER = 1.0, 4.0, 2.5  # measured at 135M parameters, see the README


def load(path: Path, settings: list[str], limit: int | None = None) -> Sweep:
    """Read a sweep file, apply `--set path=value` and `--limit`, and validate: all errors at once (ConfigError)."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no sweep file {str(path)!r}.{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with `name`, `models`, ..., got {type(raw).__name__}")
    for setting in settings:
        _set(raw, setting)
    if limit is not None:
        _limit(raw, limit)
    try:
        return Sweep(**raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _set(raw: Any, setting: str) -> None:
    import yaml

    path, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting!r}: expected path=value, for example execution.num_workers=2")
    *parents, last = path.split(".")
    at = raw
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"--set {setting!r}: {part!r} holds {at!r}, which has no keys")
    value = yaml.safe_load(text)
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value


def _limit(raw: Any, limit: int) -> None:
    """At most `limit` rows of every set, for a quick look. Other rows are another recipe: nothing is confused."""
    if isinstance(raw, list):
        for item in raw:
            _limit(item, limit)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if key in ("num_rows", "utility_rows"):
                raw[key] = limit if value is None else min(value, limit)
            else:
                _limit(value, limit)
        if "task" in raw and "ratios" not in raw:
            raw.setdefault("num_rows", limit)


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields(item["loc"][:-1])
        near = get_close_matches(str(item["loc"][-1]), known, 1)
        return f"{where}: unknown key.{f' Did you mean {near[0]!r}?' if near else ''} Known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where}: is required and not given"
    return f"{where}: {item['msg'].removeprefix('Value error, ')} (got {item.get('input')!r})"


def _fields(location: tuple[Any, ...]) -> list[str]:
    """Names of the config at a place in the sweep file."""
    from typing import get_args

    from safecl.base import Strict

    def find(annotation: Any) -> type[Strict] | None:
        if isinstance(annotation, type) and issubclass(annotation, Strict):
            return annotation
        return next((found for part in get_args(annotation) if (found := find(part))), None)

    at: type[Strict] = Sweep
    for part in location:
        if isinstance(part, str) and part in at.model_fields:
            at = find(at.model_fields[part].annotation) or at
    return sorted(at.model_fields)


class Project:
    """A checked sweep with its store and paths. Opening it spends nothing."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.folder = Path(sweep.execution.data_dir).absolute() if sweep.execution.data_dir else None
        if self.folder is not None and not self.folder.is_dir():
            raise PrerequisiteError(
                f"execution.data_dir {str(self.folder)!r} is no folder: name one with --set execution.data_dir=FOLDER"
            )
        check(sweep, self.folder)
        self.store = Store(sweep.execution.root)
        self.logs = self.store.local / "logs"
        self.study_url = sweep.execution.study_uri or f"sqlite:///{self.store.local / 'study.db'}"
        self._storage: Any = None

    def study(self, cell: Cell, create: bool) -> Study | None:
        """A cell's study; with `create=False` None where no search was ever started."""
        if cell.space is None:
            return None
        from safecl import search

        if self._storage is None:
            is_new = self.study_url.startswith("sqlite:///") and not Path(self.study_url[10:]).exists()
            if is_new and not create:
                return None
            self._storage = search.open_storage(self.study_url)
        return search.study_of(cell, self.sweep, self._storage)

    def schedule(self, on_done: Callable[[Done], None] | None = None) -> Schedule:
        return Schedule(self.sweep, self.store, self.folder, lambda cell: self.study(cell, create=True), on_done)

    def guard_stages(self) -> tuple[Stage, ...]:
        """The stages that measure the trained guard on labelled pairs; none where a published guard judges."""
        graph = Graph(cells(self.sweep)[0].recipe, self.folder)
        evidence = graph.guard_agreement()
        return () if evidence is None else (*evidence.judged, evidence.metrics)

    def finals(self) -> list[tuple[Cell, dict[str, Any], list[Job], str]]:
        """Per cell: the parameters its final trials use, those trials, and a note. A cell whose search is unfinished
        has no final trials yet."""
        found: list[tuple[Cell, dict[str, Any], list[Job], str]] = []
        for cell in cells(self.sweep):
            params: dict[str, Any] = {}
            note = ""
            if cell.space is not None:
                study = self.study(cell, create=False)
                trials = study.complete() if study else []
                if study is None or study.remaining or not trials:
                    found.append((cell, {}, [], f"search: {len(trials)} of {self.sweep.search.trials} trials"))
                    continue
                chosen = select(trials)
                params = chosen.params
                note = f"chosen of {len(trials)} trials on validation prompts"
                note += "" if chosen.feasible else "; none met the bounds, this violates them least"
            found.append((cell, params, [Job(cell, params, seed, "final") for seed in self.sweep.seeds], note))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, from the store alone: every metric with its interval over the seeds that are finished."""
        from safecl.stats import intervals

        table: list[dict[str, Any]] = []
        for cell, params, jobs, note in self.finals():
            recipe = cell.recipe
            per_seed: list[list[dict[str, Any]]] = []
            seeds: list[int] = []
            seconds = 0.0
            libraries: set[str] = set()
            for job in jobs:
                evidence = job.evidence(self.folder)
                if not self.store.has(evidence.metrics):
                    continue
                path = self.store.path(evidence.metrics) / "outcomes.jsonl"
                per_seed.append([json.loads(line) for line in path.read_text().splitlines()])
                seeds.append(job.seed)
                seconds += self._own_seconds(job, evidence.metrics)
                libraries.add(json.dumps(self.store.record(evidence.metrics)["libraries"], sort_keys=True))
            metrics: dict[str, Any] = {}
            for name in dict.fromkeys(outcome["metric"] for seed in per_seed for outcome in seed):
                outcomes = [[o for o in seed if o["metric"] == name] for seed in per_seed]
                read = [[o for o in seed if o["value"] is not None] for seed in outcomes]
                interval = intervals(read)
                if interval is not None:
                    metrics[name] = {
                        "value": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                        "num": sum(map(len, read)),
                        "unparsed": sum(map(len, outcomes)) - sum(map(len, read)),
                    }
            from safecl.schedule import defaults

            is_reference = recipe.method in REFERENCES
            table.append(
                {
                    "model": recipe.model.name,
                    "task": recipe.task.task,
                    "poison": None if is_reference else recipe.poison_ratio,
                    "method": recipe.method,
                    "params": {**defaults(cell), **params},
                    "seeds": seeds,
                    "metrics": metrics,
                    "seconds": seconds,
                    "note": note if seeds else note or "not run yet",
                    "libraries": sorted(libraries),
                }
            )
        return table

    def _own_seconds(self, job: Job, metrics: Stage) -> float:
        """Wall time of the stages that this row alone needed: those of the aligned row are everyone's."""
        shared: set[str] = set()
        if job.cell.recipe.method not in REFERENCES:
            from safecl.schedule import aligned_job

            shared = {stage.key for stage in aligned_job(job).evidence(self.folder).metrics.walk()}
        own = [stage for stage in metrics.walk() if stage.key not in shared and self.store.has(stage)]
        return sum(float(self.store.record(stage)["seconds"]) for stage in own)

    def facts(self) -> dict[str, Any]:
        """What a caption must say beside the rows."""
        sweep = self.sweep
        agreement: dict[str, Any] | None = None
        stages = self.guard_stages()
        if stages and self.store.has(stages[-1]):
            agreement = self.store.record(stages[-1])["result"]["guard_agreement"]
        return {
            "name": sweep.name,
            "about": sweep.about,
            "seeds": list(sweep.seeds),
            "adapter": sweep.adapter,
            "template": sweep.models[0].template.prompt,
            "judge": sweep.evaluate.judges.asr,
            "over_refusal_judge": sweep.evaluate.judges.over_refusal,
            "guard_agreement": agreement,
            "search_trials": sweep.search.trials,
        }


def run(project: Project, show: Callable[[str], None]) -> list[Done]:
    """Run what is missing. Returns failed jobs. Ctrl-C and crashes leave everything resumable by the same command."""
    from safecl.tracking import Tracker

    project.store.check_writable(needed_gib=2.0)
    project.store.sweep_temporary()
    tracker = Tracker(project.sweep.execution.tracking_uri, project.store.local)
    schedule = project.schedule(on_done=lambda done: track(tracker, project, done))
    try:
        first = schedule.next()
        guard = [stage for stage in project.guard_stages() if not project.store.has(stage)]
        if first is None and not guard:
            return [done for done in schedule.done if done.error]
        if first is not None:
            schedule.give_back(first)
        _check_memory(project.sweep)
        with _cluster(project, show) as (broker, ray):
            waiting = [broker.ensure.remote(guard)] if guard else []
            _warm(broker, schedule, project)
            with _progress(project, schedule, broker):
                if first is not None:
                    from safecl import search

                    at_once = project.sweep.execution.num_trials_at_once
                    search.run(schedule, broker, project.store.local / "tune", at_once)
                ray.get(waiting)
    finally:
        tracker.close(timeout_s=30.0)
    return [done for done in schedule.done if done.error]


@contextmanager
def _cluster(project: Project, show: Callable[[str], None]) -> Iterator[tuple[Any, Any]]:
    from safecl import execute

    show("starting Ray")
    execute.start(project.sweep.execution, project.logs)
    import ray

    try:
        yield execute.broker(project.store, project.sweep.execution, project.logs), ray
    finally:
        execute.stop(project.sweep.execution)


def _warm(broker: Any, schedule: Schedule, project: Project) -> None:
    """Boot engines while the first adapters train: a boot takes as long as a short finetune."""
    targets = [stage for job in schedule.open_jobs() for stage in job.evidence(project.folder).metrics.walk()]
    needed = missing([stage for stage in targets if stage.kind in ("generate", "judge")], project.store)
    from safecl.execute import ENGINE_ROLE

    wanted = {
        (ENGINE_ROLE[stage.kind], stage.inputs["model"].key): stage.inputs["model"]
        for stage in needed
        if stage.kind in ENGINE_ROLE and "model" in stage.inputs
    }
    for (role, _), model in wanted.items():
        broker.warm.remote(role, model)


def _check_memory(sweep: Sweep) -> None:
    if sweep.execution.address != "local" or sweep.execution.use_gpu:
        return
    import psutil

    execution = sweep.execution
    engines = execution.num_candidate_engines + execution.num_judge_replicas
    workers = min(os.cpu_count() or 1, execution.num_trials_at_once) * execution.num_workers
    need = engines * GIB_PER_ENGINE + workers * GIB_PER_WORKER + execution.num_trials_at_once * GIB_PER_TRIAL
    free = psutil.virtual_memory().available / 2**30
    if free < need:
        raise PrerequisiteError(
            f"memory: {free:.1f} GiB are free, the sweep needs about {need:.1f} ({engines} engines, {workers} training "
            "workers): close other programs, or lower execution.num_trials_at_once"
        )


@contextmanager
def _progress(project: Project, schedule: Schedule, broker: Any) -> Iterator[None]:
    from safecl.report.progress import Display

    stop = threading.Event()
    display = Display(sys.stderr)
    eta = _Eta(project)

    def watch() -> None:
        import ray

        while not stop.wait(1.0):
            try:
                snapshot = ray.get(broker.snapshot.remote(), timeout=5)
            except Exception:  # the display is a courtesy; the run says what is wrong
                continue
            display.show(_state(schedule, snapshot, eta))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=6)
        display.close()


class _Eta:
    """Seconds left, from what stages of the same kind took before (in earlier runs, and so far in this one)."""

    TRIAL = ("finetune", "generate", "generate", "generate", "judge", "metrics")  # what a suggested trial will need

    def __init__(self, project: Project) -> None:
        self.project = project
        self.seconds: dict[str, list[float]] = {}
        for kind in (*set(self.TRIAL), "model", "data", "memory"):
            self.seconds[kind] = [float(record["seconds"]) for record in project.store.records(kind)]

    def __call__(self, schedule: Schedule, snapshot: dict[str, Any]) -> tuple[float | None, bool]:
        """(seconds, whether some kind of stage has no past record and is left out)."""
        seconds = {kind: list(past) for kind, past in self.seconds.items()}
        for stage in snapshot["finished"]:
            seconds.setdefault(stage["kind"], []).append(stage["seconds"])
        means = {kind: sum(past) / len(past) for kind, past in seconds.items() if past}
        targets = [stage for job in schedule.open_jobs() for stage in _stages(self.project, job)]
        kinds = [stage.kind for stage in missing(targets, self.project.store)]
        kinds += list(self.TRIAL) * schedule.num_unasked()
        if not kinds or not any(kind in means for kind in kinds):
            return None, True
        work = sum(means.get(kind, 0.0) for kind in kinds)
        at_once = min(os.cpu_count() or 1, self.project.sweep.execution.num_trials_at_once)
        return work / at_once, any(kind not in means for kind in kinds)


def _stages(project: Project, job: Job) -> list[Stage]:
    evidence = job.evidence(project.folder)
    return [*evidence.judged, evidence.metrics]


def _state(schedule: Schedule, snapshot: dict[str, Any], eta: _Eta) -> dict[str, Any]:
    eta_s, eta_is_partial = eta(schedule, snapshot)
    return {
        "running": snapshot["running"],
        "num_finished": len(snapshot["finished"]),
        "failed": snapshot["failed"],
        "trials_done": len(schedule.done),
        "trials": len(schedule.done) + len(schedule.open_jobs()) + schedule.num_unasked(),
        "eta_s": eta_s,
        "eta_is_partial": eta_is_partial,
        "now": time.time(),
    }


def track(tracker: Any, project: Project, done: Done) -> None:
    """Put a finished job into MLflow, from the store: curves exist also where every stage was cached."""
    if done.result is None:
        return
    graph = done.job.graph(project.folder)
    curves: list[dict[str, Any]] = []
    if done.job.cell.recipe.method not in REFERENCES and project.store.has(graph.tuned):
        text = (project.store.path(graph.tuned) / "curves.jsonl").read_text()
        curves = [json.loads(line) for line in text.splitlines()]
    metrics = {name: entry["value"] for name, entry in done.result.items() if entry["value"] is not None}
    split = "validation" if done.job.role == "search" else "test"
    tracker.trial(
        sweep=project.sweep.name,
        cell=done.job.cell.label,
        trial=f"{done.evidence.metrics.key[:16]}-{split}",
        params={**graph.recipe.params, "seed": done.job.seed, "split": split, "adapter": project.sweep.adapter},
        metrics=metrics,
        curves=curves,
        tags={"safecl.metrics_key": done.evidence.metrics.key, "safecl.method": graph.recipe.method},
    )


def plan(project: Project) -> dict[str, Any]:
    """Cells, trials, stages by kind and hours, as plain data. Hours are "unknown" without past records."""
    from safecl.plan import cost

    sweep = project.sweep
    found: list[dict[str, Any]] = []
    jobs: list[Job] = []
    open_trials = 0
    for (cell, _, finals, _), seeds in zip(project.finals(), [len(sweep.seeds)] * 10**6, strict=False):
        found.append(
            {
                "cell": cell.label,
                "searched": ", ".join(cell.space or ()) or "-",
                "trials": seeds + (sweep.search.trials if cell.space is not None else 0),
            }
        )
        study = project.study(cell, create=False)
        tried = study.complete() if study else []
        jobs += [Job(cell, trial.params, sweep.seeds[0], "search") for trial in tried] + finals
        if not finals:
            open_trials += sweep.search.trials - len(tried) + seeds
            if not tried:  # trial 0 is the defaults, so its stages are known
                jobs.append(Job(cell, {}, sweep.seeds[0], "search"))
                open_trials -= 1
    counts = cost(jobs, project.folder, project.store)
    hours = [count.hours for count in counts.values()]
    known = None if open_trials or None in hours else sum(h for h in hours if h is not None)
    return {
        "cells": found,
        "stages": {
            kind: {
                "to run": count.to_run,
                "cached": count.cached,
                "shared": count.shared,
                "hours": "unknown" if count.hours is None else f"{count.hours:.2f}",
            }
            for kind, count in counts.items()
        },
        "open_trials": open_trials,
        "hours": "unknown" if known is None else f"{known:.2f}",
    }


def status(project: Project) -> list[dict[str, str]]:
    """How far each cell is, from the store and the studies alone."""
    found = []
    for cell, _, jobs, note in project.finals():
        done = sum(project.store.has(job.evidence(project.folder).metrics) for job in jobs)
        num_seeds = len(project.sweep.seeds)
        if cell.space is None:
            search = "-"
        else:
            study = project.study(cell, create=False)
            search = f"{len(study.complete()) if study else 0}/{project.sweep.search.trials}"
        state = "done" if jobs and done == num_seeds else "searching" if note.startswith("search:") else "to do"
        found.append({"cell": cell.label, "search": search, "final": f"{done}/{num_seeds}", "state": state})
    return found


def write_report(project: Project, out: Path | None) -> Path:
    """Write the page with plots; returns its path."""
    from safecl.report import page

    folder = out or project.store.local / "report" / project.sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    return page.write(project.rows(), project.facts(), folder)


def listing(what: str) -> list[dict[str, str]]:
    """Methods, tasks or judges as rows for `safecl ls`."""
    from safecl import judges, methods, tasks

    if what == "methods":
        return [
            {"method": name, "equation": kind.equation, "hyperparameters": ", ".join(kind.Config.model_fields) or "-"}
            for name, kind in ((name, methods.load(name)) for name in methods.names())
        ]
    if what == "tasks":
        return [{"task": name, "splits": ", ".join(tasks.load(name).SPLITS)} for name in tasks.names()]
    if what == "judges":
        return [
            {"judge": name, "question": kind.question, "served": "yes" if kind.served else "no"}
            for name, kind in ((name, judges.load(name)) for name in judges.names())
        ]
    raise ConfigError(f"nothing to list called {what!r}: expected methods, tasks or judges")
