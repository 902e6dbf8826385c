"""Run a project: connects the store, the Broker, engines, search, progress display and tracker.

A run may end early: by Ctrl-C, by SIGTERM, at the end of its hours, or because the cluster is lost. In each case finetunes
under way write a checkpoint if they still can, the run's engines are shut down, and the same command continues the run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from safecl import claims, cluster, dtypes, execute, hardware, nodes, preflight, trainers, upkeep
from safecl.base import ConfigError, Infrastructure, PrerequisiteError
from safecl.config import Sweep
from safecl.cost import missing, slots
from safecl.eta import Eta
from safecl.faults import CLUSTER, DRIVER, PATIENCE_S, PAUSE_S, Journal, plain_error
from safecl.judging.served import check_endpoints, key_variables
from safecl.lease import NOTE, Lease, is_here, owners, short_of
from safecl.order import Claim
from safecl.panel import all_seats
from safecl.project import Project
from safecl.schedule import Schedule
from safecl.stages import engine_of
from safecl.stats import as_json
from safecl.store import Stage, Store
from safecl.watch import watched

# Environment variables of a run that has restarted itself: how often and when it did so, and where in the journal the first
# of these processes began.
BEGUN_ANEW = "SAFECL_BEGUN_ANEW"
JOURNAL_FROM = "SAFECL_JOURNAL_FROM"
TOGETHER_S = 1.0  # SIGTERM to a process group may reach this process so many seconds after the cluster's processes
SAVE_S = 15.0  # seconds for checkpoints when a run must end; after SIGTERM a scheduler often kills within 30 s


def open_to_run(sweep: Sweep) -> Project:
    """Return the sweep as a project, with `dtype: auto` resolved to what the devices that will train multiply natively.

    The nodes of a cluster that is joined are asked for it.

    Raises:
        ConfigError: the sweep is wrong, or the nodes disagree.
    """
    execution = sweep.execution
    if execution.address == "local" or not (dtypes.has_auto(sweep) or dtypes.has_bfloat16(sweep)):
        return Project(sweep)
    Project(sweep)  # reports errors of the sweep before a cluster is joined
    import ray

    was_connected = ray.is_initialized()
    try:
        cluster.start(execution, Store(execution.root).local / "logs")
        nodes = hardware.nodes(execution.use_gpu, measure=dtypes.has_bfloat16(sweep))
    finally:
        if not was_connected:
            ray.shutdown()
    return Project(sweep, nodes)


def _settle_dtype(project: Project, show: Callable[[str], None]) -> None:
    """Show what `auto` means and warnings on the dtypes, and note in the store what `auto` meant."""
    project.warnings += dtypes.warnings(project.sweep, project.store, project.auto, project.nodes)
    if project.auto is not None:
        show(f"dtype: auto is {project.auto.dtype}: {project.auto.why}")
    for warning in project.warnings:
        show(warning)
    dtypes.remember(project.sweep, project.store, project.auto)


class Lost(Infrastructure):
    """The local Ray cluster is gone."""


class Terminated(SystemExit):
    """The run was ended by SIGTERM, which a scheduler sends, or a machine that is taken away. The exit code is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def run(
    project: Project,
    show: Callable[[str], None],
    max_hours: float | None = None,
    again: Callable[[], None] | None = None,
) -> list[str]:
    """Run what is missing. Returns a line for each row that is not complete because of a failure.

    After the end of the hours, Ctrl-C or a crash, the same command continues.

    Args:
        show: called with each line of progress.
        max_hours: stop after so many hours, in the way Ctrl-C does. Only in the main thread.
        again: called in another thread when the local cluster is lost, to restart the process. It does not return if it
            restarts it.

    Raises:
        PrerequisiteError: another live driver runs this sweep, or took it over from this one.
        Terminated: SIGTERM came.
        Lost: the local cluster was lost, and `again` did not restart the process.
    """
    with _alone(project) as (journal, lease, told):
        return _run(project, show, max_hours, journal, lease, told, again)


@contextmanager
def _alone(project: Project) -> Iterator[tuple[Journal, Lease, threading.Event]]:
    """Let only one driver run a sweep. The event is set when SIGTERM comes."""
    _check_writable(project.store)
    began = os.environ.get(JOURNAL_FROM)
    lease, journal = project.lease(), Journal(project.logs, int(began) if began else None)
    told = threading.Event()

    def end(number: int, *_: object) -> None:
        if number == signal.SIGTERM:
            told.set()
        if number == signal.SIGTERM or lease.lost:
            raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)  # a background job of a script ignores SIGINT, and Ctrl-C is not meant for it
    before = signal.signal(signal.SIGTERM, end) if in_main else None
    try:
        with lease:
            for _ in range(lease.num_dead):
                journal.add(DRIVER)
            for owner in lease.dead:
                if is_here(owner) is False:  # a dead driver of this machine
                    cluster.end_local(owner)
            _tidy(project)
            try:
                yield journal, lease, told
            finally:
                _tidy(project)
    except (KeyboardInterrupt, SystemExit) as error:
        if lease.lost:
            raise PrerequisiteError(
                f"sweep {project.sweep.name!r}: this run gave no sign of life for so long that another one took over"
            ) from None
        if told.is_set() or getattr(error, "code", None) == signal.SIGTERM:  # exit code: SIGTERM during Ray's start
            raise Terminated from None
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _check_writable(store: Store) -> None:
    """Check that the store can be written. A run that restarted itself after it lost its cluster waits up to PATIENCE_S seconds
    while the disk is full, as its stages do."""
    deadline = time.monotonic() + (PATIENCE_S if BEGUN_ANEW in os.environ else 0.0)
    while True:
        try:
            return upkeep.check_writable(store, needed_gib=2.0)
        except PrerequisiteError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_S)


def _tidy(project: Project) -> None:
    """Remove the unfinished work that this driver and dead drivers left. Only while this driver runs no stage."""
    store = project.store
    upkeep.sweep_temporary(store)
    claims.forget_dead(store)
    others = {owner for owner in owners(store) if owner != store.owner and store.is_alive(owner)}
    trainers.tidy(project.logs, {short_of(owner) for owner in others})
    shutil.rmtree(store.local / "tune" / project.sweep.name, ignore_errors=True)
    with suppress(OSError):
        (store.local / "tune").rmdir()


def _run(
    project: Project,
    show: Callable[[str], None],
    max_hours: float | None,
    journal: Journal,
    lease: Lease,
    told: threading.Event,
    again: Callable[[], None] | None,
) -> list[str]:
    from safecl.tracking import Logbook, Tracker

    problems: list[str] = []
    tracker = Tracker(project.sweep.execution.tracking_uri, project.store.local)
    logbook = Logbook(tracker, project)
    schedule = project.schedule(on_done=logbook.done)
    is_over = False  # whether it ended by itself, and not by an interruption
    try:
        first = schedule.next()
        guard = [stage for stage in project.guard_stages() if not project.store.sound(stage)]
        if first is None and not guard:
            dtypes.remember(project.sweep, project.store, project.auto)
            is_over = True
            if not (missing_rows := schedule.missing()):
                show("nothing left to do: everything that this sweep reports is finished")
            return missing_rows
        if first is not None:
            schedule.give_back(first)
        project.expected  # noqa: B018  (refuses what would leave too few rows, before anything is spent)
        preflight.check(project.sweep)
        check_endpoints(all_seats(project.sweep), show)
        _settle_dtype(project, show)
        logbook.begin()
        names = {cell.job({}, 0, "final").graph.base.key: cell.recipe.model.name for cell in project.cells}
        eta = Eta(
            project.store,
            project.forecast(keep=True),
            project.num_devices(),
            project.guard_stages(),
            (names if len(names) > 1 else {}) | ({} if project.sweep.align.train else {"": "aligned"}),
        )
        guarded = _guarded(project, journal, lease, told, again)
        is_joined = project.sweep.execution.address != "local"
        with (
            _at_most(max_hours, lambda: show(_left(eta, schedule))),
            _cluster(project, show, eta.forecast.seconds, guarded) as (broker, ray),
            # On a cluster that goes on, engines outlive their driver.
            lease.settling(lambda owner: cluster.clear(short_of(owner))) if is_joined else nullcontext(),
        ):
            if is_joined:
                unit = "GPU" if project.sweep.execution.use_gpu else "CPU"
                eta.slots = slots(project.sweep.execution, int(ray.cluster_resources().get(unit, 1)))
                if unset := ray.get(broker.unset.remote(key_variables(all_seats(project.sweep)))):
                    raise PrerequisiteError(
                        f"the Ray cluster that runs has no environment variable {' and '.join(unset)}, where endpoints' keys "
                        "are read: start it with them set"
                    )
            waiting = [broker.ensure.remote(guard, Claim(rank=2))] if guard else []
            _warm(broker, schedule, project)
            with _saved(broker, ray), watched(schedule, broker, eta, project.store):
                if first is not None:
                    from safecl import tune

                    at_once = project.sweep.execution.num_trials_at_once
                    tune.run(schedule, broker, project.store.local / "tune", at_once)
                try:
                    ray.get(waiting)
                except Exception as error:
                    problems.append(f"the guard on held-out pairs: {plain_error(error)}")
        is_over = True
    finally:
        with suppress(Exception):  # what cannot be recorded now, the next run finds
            schedule.close()
        logbook.end([*schedule.missing(), *problems] if is_over else None)
        if not tracker.close(timeout_s=30.0):
            show(f"tracking: {tracker.problem}; what was not sent is kept, and sent by the next run")
        for line in (met := journal.told()):
            show(line)
        if met:
            with suppress(OSError):
                project.store.note(f"faults-{project.sweep.name}", dict(journal.counts()))
    return [*schedule.missing(), *problems]


@contextmanager
def _saved(broker: Any, ray: Any) -> Iterator[None]:
    """When the block is interrupted, let finetunes under way write a checkpoint before their workers end. A second Ctrl-C
    ends the wait for them."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(Exception):
            ray.get(broker.wind_down.remote(SAVE_S), timeout=SAVE_S + 5)
        raise


@contextmanager
def _guarded(
    project: Project, journal: Journal, lease: Lease, told: threading.Event, again: Callable[[], None] | None
) -> Iterator[None]:
    """Watch a local cluster, also while it starts, so that a lost raylet or head server is noticed within a second. Of a
    cluster that was joined, watch this machine's node.

    Without this, Ray's calls under way would wait for minutes and then end this process.
    """
    if project.sweep.execution.address != "local":
        with _told_of_its_node(lease) if again is not None else nullcontext():
            yield
        return
    stop, lost = threading.Event(), threading.Event()
    before = cluster.local_processes()  # dead processes of the command that this process was before it restarted itself

    def watch() -> None:
        parts: dict[int, Any] = {}
        while not stop.wait(0.5):
            if len(parts) < 2:
                parts |= {pid: part for pid, part in cluster.local_processes().items() if pid not in before}
            if all(cluster.is_alive(part) for part in parts.values()):
                continue
            is_ending = told.wait(TOGETHER_S)  # SIGTERM to the whole process group is meant for this run as well
            cluster.end_local(project.store.owner)
            if is_ending and again is not None:  # Ray's calls in the main thread would go on for a minute
                with suppress(Exception):
                    _tidy(project)
                with suppress(Exception):
                    lease.__exit__(None, None, None)
                print("stopped; run the same command to continue from what is finished", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            lost.set()
            journal.add(CLUSTER)
            if again is not None:
                os.environ[JOURNAL_FROM] = str(journal.begin)
                again()
            if callable(signal.getsignal(signal.SIGTERM)):  # the handler of `_alone`; SIGINT may be ignored
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            return

    thread = threading.Thread(target=watch, name="safecl-cluster", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise Lost("the local Ray cluster was lost; the same command continues from the store") from None
        raise
    finally:
        stop.set()
        thread.join(timeout=5)


@contextmanager
def _told_of_its_node(lease: Lease) -> Iterator[None]:
    """Say it when the node of a joined cluster dies on which this driver is, and give the lease back. Ray ends a process
    that has lost its raylet, at once and without a word."""
    stop = threading.Event()

    def watch() -> None:
        node = None
        while not stop.wait(0.05 if node else 0.5):
            node = node or cluster.raylet()
            if node is None or cluster.is_alive(node):
                continue
            print(
                "the Ray node of this machine is gone, and this run with it; the same command continues from what is finished, "
                "on any node that reaches the store",
                file=sys.stderr,
                flush=True,
            )
            with suppress(Exception):
                lease.__exit__(None, None, None)
            os._exit(1)

    thread = threading.Thread(target=watch, name="safecl-node", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


@contextmanager
def _at_most(hours: float | None, when_over: Callable[[], None]) -> Iterator[None]:
    """End the block after so many hours, as Ctrl-C would, and then call `when_over`. Only in the main thread."""
    if hours is None:
        yield
        return

    is_over = False

    def stop(*_: object) -> None:
        nonlocal is_over
        is_over = True
        raise KeyboardInterrupt  # Ray raises a new KeyboardInterrupt in its place, so a class of our own would be lost

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
    """Run only the guard's stages: train the guard and judge the held-out pairs.

    Returns `guard` and `verdicts` (keys of its stages) and `heldout` (how it agrees with the labels of those pairs).

    Raises:
        ConfigError: the sweep has no guard.
    """
    evidence = project.guard_evidence(alone=True)
    if evidence is None:
        raise ConfigError("this sweep trains no guard: expected evaluate.judges.asr: guard and evaluate.judges.guard")
    with _alone(project):
        if not all([project.store.sound(stage) for stage in (evidence.metrics, *evidence.judged)]):
            preflight.check_memory(project.sweep.execution)
            _settle_dtype(project, show)
            with _cluster(project, show) as (broker, ray), _saved(broker, ray):
                show(f"training the guard and judging held-out pairs; output is under {project.logs}")
                try:
                    ray.get(broker.ensure.remote([evidence.metrics, *evidence.judged]))
                except Exception as error:
                    raise plain_error(error) from None
    [judged], found = evidence.judged, project.guard_quality(alone=True)
    assert found is not None, "judged above"
    return {"guard": judged.inputs["weights"].key, "verdicts": judged.key, "heldout": as_json(found)}


@contextmanager
def _cluster(
    project: Project,
    show: Callable[[str], None],
    seconds: Callable[[Stage], float] | None = None,
    guard: AbstractContextManager[None] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Start or join the cluster and give (Broker, ray). `guard`: entered before the cluster starts, left before it ends."""
    show("starting Ray")
    lost = False
    try:
        with guard or nullcontext():
            cluster.start(project.sweep.execution, project.logs)
            import ray

            if project.sweep.execution.address != "local" and project.store.remote is None:
                nodes.check_folder(ray, project.store.local / "notes" / f"{NOTE}{project.store.owner}.json")
            yield execute.broker(project.store, project.sweep.execution, project.logs, seconds), ray
    except Lost:
        lost = True  # the cluster is gone, so there is nothing to stop
        raise
    finally:
        if not lost:
            cluster.stop(project.sweep.execution, project.store.short)


def _warm(broker: Any, schedule: Schedule, project: Project) -> None:
    """Boot engines while the first adapters train. A boot takes as long as a short finetune."""
    needed = missing([stage for job in schedule.open_jobs() for stage in job.evidence.targets], project.store)
    wanted = {
        (role, stage.inputs["model"].key): stage.inputs["model"]
        for stage in needed
        if (role := engine_of(stage)) is not None
    }
    for (role, _), model in wanted.items():
        broker.warm.remote(role, model)
