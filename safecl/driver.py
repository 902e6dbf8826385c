"""Run a project: store, Broker, engines, search, progress and tracker wired together."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from safecl import dtypes, execute, hardware, preflight
from safecl.base import ConfigError, Damaged, PrerequisiteError, json_lines
from safecl.config import Sweep
from safecl.cost import missing, slots
from safecl.eta import Eta
from safecl.graph import REFERENCES
from safecl.judging.served import check_endpoints, key_variables
from safecl.panel import all_seats, num_engines
from safecl.project import Project
from safecl.schedule import Done, Schedule
from safecl.stages import engine_of
from safecl.stats import as_json
from safecl.store import Store
from safecl.watch import watched


def open_to_run(sweep: Sweep) -> Project:
    """The sweep as a project whose dtypes are what the devices that will train multiply natively. On a cluster that one
    joins they are asked. Raises ConfigError where its nodes disagree."""
    execution = sweep.execution
    if execution.address == "local" or not (dtypes.has_auto(sweep) or dtypes.has_bfloat16(sweep)):
        return Project(sweep)
    Project(sweep)  # says what is wrong with it before a cluster is joined
    import ray

    was_connected = ray.is_initialized()
    execute.start(execution, Store(execution.root).local / "logs")
    try:
        nodes = hardware.nodes(execution.use_gpu, measure=dtypes.has_bfloat16(sweep))
    finally:
        if not was_connected:
            ray.shutdown()
    return Project(sweep, nodes)


def _settle_dtype(project: Project, show: Callable[[str], None]) -> None:
    """Say what is to be known of the dtypes, and note in the store what `auto` meant."""
    project.warnings += dtypes.warnings(project.sweep, project.store, project.auto, project.nodes)
    if project.auto is not None:
        show(f"dtype: auto is {project.auto.dtype}: {project.auto.why}")
    for warning in project.warnings:
        show(warning)
    dtypes.remember(project.sweep, project.store, project.auto)


def run(project: Project, show: Callable[[str], None], max_hours: float | None = None) -> list[str]:
    """Run what is missing, for at most `max_hours`. Returns a line for each row that is not complete for a failure. The end
    of the hours, Ctrl-C and crashes leave everything resumable by the same command.

    Raises:
        PrerequisiteError: another live driver runs this sweep, or took it over from this one.
    """
    with _alone(project):
        return _run(project, show, max_hours)


@contextmanager
def _alone(project: Project) -> Iterator[None]:
    """One driver a sweep."""
    project.store.check_writable(needed_gib=2.0)
    lease = project.lease()

    def end(*_: object) -> None:
        if lease.lost:
            raise KeyboardInterrupt

    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # a script's job in the background: Ctrl-C is not meant for it
        signal.signal(signal.SIGINT, end)
    try:
        with lease:
            project.store.sweep_temporary()
            yield
    except KeyboardInterrupt:
        if lease.lost:
            raise PrerequisiteError(
                f"sweep {project.sweep.name!r}: this run gave no sign of life for so long that another one took over"
            ) from None
        raise


def _run(project: Project, show: Callable[[str], None], max_hours: float | None) -> list[str]:
    from safecl.tracking import Tracker

    problems: list[str] = []
    tracker = Tracker(project.sweep.execution.tracking_uri, project.store.local)
    schedule = project.schedule(on_done=lambda done: track(tracker, project, done))
    try:
        first = schedule.next()
        guard = [stage for stage in project.guard_stages() if not project.store.sound(stage)]
        if first is None and not guard:
            dtypes.remember(project.sweep, project.store, project.auto)
            if not (missing_rows := schedule.missing()):
                show("nothing left to do: everything that this sweep reports is finished")
            return missing_rows
        if first is not None:
            schedule.give_back(first)
        project.expected  # noqa: B018  (refuses what would leave too few rows, before anything is spent)
        preflight.check(project.sweep)
        check_endpoints(all_seats(project.sweep), show)
        _settle_dtype(project, show)
        names = {cell.job({}, 0, "final").graph.base.key: cell.recipe.model.name for cell in project.cells}
        eta = Eta(
            project.store,
            project.forecast(keep=True),
            project.num_devices(),
            project.guard_stages(),
            (names if len(names) > 1 else {}) | ({} if project.sweep.align.train else {"": "aligned"}),
        )
        with _at_most(max_hours, lambda: show(_left(eta, schedule))), _cluster(project, show) as (broker, ray):
            if project.sweep.execution.address != "local":
                unit = "GPU" if project.sweep.execution.use_gpu else "CPU"
                eta.slots = slots(project.sweep.execution, int(ray.cluster_resources().get(unit, 1)))
                if unset := ray.get(broker.unset.remote(key_variables(all_seats(project.sweep)))):
                    raise PrerequisiteError(
                        f"the Ray cluster that runs has no environment variable {' and '.join(unset)}, where endpoints' keys "
                        "are read: start it with them set"
                    )
            waiting = [broker.ensure.remote(guard, rank=2)] if guard else []
            _warm(broker, schedule, project)
            with watched(schedule, broker, eta, project.store):
                if first is not None:
                    from safecl import tune

                    at_once = project.sweep.execution.num_trials_at_once
                    tune.run(schedule, broker, project.store.local / "tune", at_once)
                try:
                    ray.get(waiting)
                except Exception as error:
                    problems.append(f"the guard on held-out pairs: {execute.plain_error(error)}")
    finally:
        with suppress(Exception):  # what cannot be said now, the next run finds
            schedule.close()
        if not tracker.close(timeout_s=30.0):
            show(f"tracking: {tracker.problem}; what was not sent is kept, and sent by the next run")
    return [*schedule.missing(), *problems]


@contextmanager
def _at_most(hours: float | None, when_over: Callable[[], None]) -> Iterator[None]:
    """Ends the block when so many hours are over, as Ctrl-C would, and then calls `when_over`. Main thread only."""
    if hours is None:
        yield
        return

    is_over = False

    def stop(*_: object) -> None:
        nonlocal is_over
        is_over = True
        raise KeyboardInterrupt  # Ray raises a new one whatever this is

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, hours * 3600)
    try:
        yield
    except KeyboardInterrupt:
        if not is_over:
            raise
        when_over()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _left(eta: Eta, schedule: Schedule) -> str:
    from safecl.report.progress import clock

    num, seconds = eta.left(schedule)
    return f"the hours are over: {num} trials are left, about {clock(seconds)}; the same command continues"


def train_guard(project: Project, show: Callable[[str], None]) -> dict[str, Any]:
    """Run just the guard's stages: train it, judge the held-out pairs. Returns its keys and how it agrees with the labels
    of those pairs. Raises ConfigError for a sweep without a guard."""
    evidence = project.guard_evidence(alone=True)
    if evidence is None:
        raise ConfigError("this sweep trains no guard: expected evaluate.judges.asr: guard and evaluate.judges.guard")
    with _alone(project):
        if not all([project.store.sound(stage) for stage in (evidence.metrics, *evidence.judged)]):
            preflight.check_memory(project.sweep.execution, num_engines(project.sweep))
            _settle_dtype(project, show)
            with _cluster(project, show) as (broker, ray):
                show(f"training the guard and judging held-out pairs; output is under {project.logs}")
                try:
                    ray.get(broker.ensure.remote([evidence.metrics, *evidence.judged]))
                except Exception as error:
                    raise execute.plain_error(error) from None
    [judged], found = evidence.judged, project.guard_quality(alone=True)
    assert found is not None, "judged above"
    return {"guard": judged.inputs["weights"].key, "verdicts": judged.key, "heldout": as_json(found)}


@contextmanager
def _cluster(project: Project, show: Callable[[str], None]) -> Iterator[tuple[Any, Any]]:
    show("starting Ray")
    engines = num_engines(project.sweep)
    execute.start(project.sweep.execution, project.logs, num_engines=engines)
    import ray

    try:
        yield execute.broker(project.store, project.sweep.execution, project.logs, engines), ray
    finally:
        execute.stop(project.sweep.execution)


def _warm(broker: Any, schedule: Schedule, project: Project) -> None:
    """Boot engines while the first adapters train: a boot takes as long as a short finetune."""
    needed = missing([stage for job in schedule.open_jobs() for stage in job.evidence.targets], project.store)
    wanted = {
        (role, stage.inputs["model"].key): stage.inputs["model"]
        for stage in needed
        if (role := engine_of(stage)) is not None
    }
    for (role, _), model in wanted.items():
        broker.warm.remote(role, model)


def track(tracker: Any, project: Project, done: Done) -> None:
    """Put a finished job into MLflow, from the store: curves exist also where every stage was cached. A job that the machine
    failed is asked again, so it is no trial yet."""
    if done.result is None and done.kind != "trial":
        return
    job, graph, store = done.job, done.job.graph, project.store
    stages = {"metrics": job.evidence.metrics.key}
    curves: list[dict[str, Any]] = []
    if job.cell.recipe.method not in REFERENCES:
        stages["finetune"] = graph.tuned.key
        with suppress(Damaged, KeyError):
            curves = json_lines(store.file(graph.tuned, "curves.jsonl"))
    if graph.final is not None:
        stages["served"] = graph.final.key
    split = "validation" if job.role == "search" else "test"
    tracker.trial(
        sweep=project.sweep.name,
        cell=job.cell.label,
        trial=f"{job.evidence.metrics.key[:16]}-{split}",
        params={**graph.recipe.params, "seed": job.seed, "split": split, "adapter": project.sweep.adapter},
        metrics=_measured([done.result or {}]),
        curves=curves,
        tags={"safecl.method": graph.recipe.method, **({"safecl.error": done.error} if done.error else {})},
        stages=stages,
        failed=done.result is None,
    )
    tops = [job.cell.job(job.params, seed, "final").evidence.metrics for seed in project.sweep.seeds]
    if job.role == "final" and all(map(store.has, tops)):
        found = _measured([store.record(top)["result"] for top in tops])
        tracker.cell(project.sweep.name, job.cell.label, {**job.cell.defaults, **job.params}, found)


def _measured(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each metric's mean over results of the metrics stage, of those in which it could be read."""
    values: dict[str, list[float]] = {}
    for result in results:
        for name, entry in result.items():
            values.setdefault(name, []).extend([] if entry["value"] is None else [entry["value"]])
    return {name: sum(of_metric) / len(of_metric) for name, of_metric in values.items() if of_metric}
