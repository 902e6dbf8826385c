"""A run without a cluster: the Broker and the search are stand-ins, the rest is real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from safecl import cluster, driver, hardware, tune
from safecl.base import PrerequisiteError
from safecl.hardware import Speed
from safecl.project import Project, load
from safecl.report import progress
from tests.made_up import put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Its cluster is closed by `_cluster` as the real one is; trials run by putting their stages into the store."""
    import ray  # noqa: F401  (else the hours may be over in the middle of it)

    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: {"bfloat16": Speed(9, 9), "float32": Speed(9, 9)})
    monkeypatch.setattr(driver.preflight, "check_memory", lambda *_: None)
    found = Project(
        load(QUICKSTART, ["methods=[{name: sft}]", "models.0.dtype=bfloat16", f"execution.root={tmp_path}"])
    )

    @contextmanager
    def no_cluster(*_: Any) -> Iterator[Any]:
        broker = SimpleNamespace(
            ensure=SimpleNamespace(remote=_put(found)), warm=SimpleNamespace(remote=lambda *_: None)
        )
        yield broker, SimpleNamespace(get=lambda waiting: None)

    @contextmanager
    def no_display(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(driver, "_cluster", no_cluster)
    monkeypatch.setattr(driver, "watched", no_display)
    monkeypatch.setattr(
        "safecl.tracking.Tracker", lambda *_: SimpleNamespace(put=_nothing, knows=_nothing, close=lambda **_: True)
    )
    return found


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _put(project: Project) -> Any:
    def ensure(stages: list[Any], rank: int = 0) -> None:
        made = {s.key: s for stage in stages for s in stage.walk() if not project.store.has(s)}
        put(project.store, made.values())

    return ensure


def jobs_in_turn(monkeypatch: pytest.MonkeyPatch, pause_s: float, then_hang_after: int | None = None) -> None:
    def run(schedule: Any, broker: Any, storage_path: Path, num_at_once: int) -> None:
        while (job := schedule.next()) is not None:
            broker.ensure.remote(job.evidence.targets)
            schedule.finish(job, "")
            if len(schedule.done) == then_hang_after:
                try:
                    time.sleep(60)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt from None  # Ray raises one of its own where a signal interrupts it
            time.sleep(pause_s)

    monkeypatch.setattr(tune, "run", run)


def test_when_the_hours_are_over_a_run_stops_says_what_is_left_and_goes_on_from_there(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_in_turn(monkeypatch, 0.0, then_hang_after=2)
    said: list[str] = []
    began = time.monotonic()
    failed = driver.run(project, said.append, max_hours=5.0 / 3600)
    assert time.monotonic() - began < 60 and failed == []
    [line] = [text for text in said if "hours are over" in text]
    assert "2 trials are left, about" in line and "the same command continues" in line
    assert [row["state"] for row in _status(project)].count("done") == 2
    jobs_in_turn(monkeypatch, 0.0)
    assert driver.run(project, said.append, max_hours=1.0) == []
    assert {row["state"] for row in _status(project)} == {"done"}
    assert len([text for text in said if "hours are over" in text]) == 1


def _status(project: Project) -> list[dict[str, str]]:
    from safecl.overview import status

    return status(project)


def test_ctrl_c_within_the_hours_is_ctrl_c(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver.run(project, lambda text: None, max_hours=1.0)


def test_a_run_waits_for_a_full_disk_where_it_begins_anew_and_says_so_at_once_where_it_does_not(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[float] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free.pop(0) * 2**30)

    monkeypatch.setattr("safecl.store.shutil.disk_usage", disk_usage)
    monkeypatch.setattr(driver, "PAUSE_S", 0.01)
    jobs_in_turn(monkeypatch, 0.0)
    free[:] = [0.5, 9.0]
    with pytest.raises(PrerequisiteError, match=r"has 0\.5 GiB free"):
        driver.run(project, lambda text: None)
    free[:] = [0.5, 0.5, 9.0]
    monkeypatch.setenv(driver.BEGUN_ANEW, "1 0")
    assert driver.run(project, lambda text: None) == [] and not free


def test_what_a_driver_that_was_killed_left_of_its_cluster_is_ended_and_nobody_elses() -> None:
    def started(**owner: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], env={**os.environ, **owner}, start_new_session=True)

    agent = subprocess.Popen(["ray::DashboardAgent", "60"], executable=shutil.which("sleep"))  # no child of a raylet
    theirs = [*(started(**{cluster.OWNER: "gone"}) for _ in range(2)), agent]
    others = [started(), started(**{cluster.OWNER: "another"})]
    try:
        cluster.end_local("gone")
        assert not any(psutil.pid_exists(process.pid) for process in theirs)
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in [*theirs, *others]:
            process.kill()
            process.wait()


def test_a_run_within_its_hours_leaves_no_timer_behind(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGALRM)
    jobs_in_turn(monkeypatch, 0.0)
    driver.run(project, lambda text: None, max_hours=1.0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) is before


def test_a_dead_tracker_is_said_and_costs_nothing_else(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = SimpleNamespace(
        put=_nothing, knows=_nothing, close=lambda **_: False, problem="http://nowhere did not answer"
    )
    jobs_in_turn(monkeypatch, 0.0)
    monkeypatch.setattr("safecl.tracking.Tracker", lambda *_: tracker)
    said: list[str] = []
    assert driver.run(project, said.append) == []
    assert [line for line in said if "tracking: http://nowhere" in line and "sent by the next run" in line]


def test_a_run_keeps_the_speed_it_measured(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs_in_turn(monkeypatch, 0.0)
    driver.run(project, lambda text: None)
    assert len(project.store.noted("speed")) == 1


def test_the_progress_line_has_a_time_from_the_first_tick_and_names_what_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = progress.Display(sys.stderr, every_s=0.0)
    running = [{"label": "finetune der, mini p=0.1, seed 0", "done": 3, "total": 12, "unit": "steps", "start": 0.0}]
    state = {
        "running": running,
        "num_finished": 4,
        "failed": {},
        "trials_done": 1,
        "trials": 8,
        "eta_s": 75.0,
        "now": 9.0,
    }
    display.show(state)
    line = capsys.readouterr().err
    assert "ETA about 1:15" in line and "finetune der, mini p=0.1, seed 0 25%" in line and "unknown" not in line


@pytest.mark.parametrize(("arguments", "said"), [(["run", "--nope"], "--nope"), (["run", "no.yaml"], "no sweep file")])
def test_what_a_person_can_mend_is_said_without_a_traceback(arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "safecl.cli", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_help_loads_no_config_schema_and_a_rerun_no_mlflow() -> None:
    code = (
        "import sys\nfrom safecl import cli\ntry:\n cli.app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'pydantic', 'torch', 'ray', 'mlflow', 'optuna', 'scipy', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_trial_that_cannot_build_its_stages_tells_why_in_place_of_beginning_anew_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray
    import ray.tune

    class Cell:
        def job(self, *_: Any) -> None:
            raise FileNotFoundError(2, "No such file or directory", "model/config.json")

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "get", lambda given: given)
    monkeypatch.setattr(ray.tune, "report", told.append)
    config = {"cell": 0, "params": "{}", "seed": 0, "role": "final", "claim": [0, 0, 0.0]}
    tune.trial(config, broker=None, cells=[[Cell()]])
    [found] = told
    assert found["error"].startswith("FileNotFoundError: ") and "model/config.json" in found["error"]


def test_a_driver_whose_node_of_a_joined_cluster_dies_says_so_and_gives_its_lease_back() -> None:
    code = textwrap.dedent("""
        import subprocess, time
        from types import SimpleNamespace
        import psutil
        from safecl import cluster, driver
        node = subprocess.Popen(["sleep", "60"])
        cluster.raylet = lambda: psutil.Process(node.pid)
        lease = SimpleNamespace(__exit__=lambda *_: print("given back", flush=True))
        with driver._told_of_its_node(lease):
            time.sleep(1)
            node.kill()
            time.sleep(50)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "given back\n", done.stderr
    assert (
        done.stderr.startswith("the Ray node of this machine is gone") and "the same command continues" in done.stderr
    )
