"""One driver a sweep: real processes hold leases, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from safecl import driver, lease
from safecl.base import PrerequisiteError
from safecl.lease import NOTE, Lease
from safecl.project import Project, load
from safecl.store import Store

HOLDER = """
import sys
from pathlib import Path
from safecl.base import PrerequisiteError
from safecl.lease import Lease
from safecl.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease(store, "quickstart", sys.argv[2:]):
        print("held", flush=True)
        sys.stdin.readline()
except PrerequisiteError:
    print("refused", flush=True)
"""
OTHER = "0123456789-17-1"  # a process of another machine


@contextmanager
def drivers(root: Path, num: int, *holds: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that try for a lease at the same moment."""
    command = [sys.executable, "-c", HOLDER, str(root), *holds]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(num)]
    try:
        for process in started:
            assert _line(process) == "ready"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_drivers_that_start_at_once_one_runs_and_when_it_is_killed_the_next_takes_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with drivers(tmp_path, 3, "sweep a", "study 1") as started:
        said = [_line(process) for process in started]
        assert sorted(said) == ["held", "refused", "refused"]
        holder = started[said.index("held")]
        for holds in (["sweep a"], ["sweep b", "study 1"]):  # a sweep of another name may search the same cells
            with pytest.raises(PrerequisiteError, match=rf"'quickstart' .* process {holder.pid} on .*, since 20"):
                Lease(store, "again", holds).__enter__()
        with Lease(store, "other", ["sweep b", "study 2"]):
            assert len(store.notes(NOTE)) == 2
        os.kill(holder.pid, signal.SIGKILL)
        began = time.monotonic()
        while store.is_alive(_owner(store)):  # also while it is a zombie of ours
            assert time.monotonic() < began + 5
        with Lease(store, "quickstart", ["sweep a"]):
            assert list(store.notes(NOTE)) == [NOTE + lease.me()]
    assert store.notes(NOTE) == {}


def test_what_a_dead_driver_left_is_told_on_until_it_is_cleared(tmp_path: Path) -> None:
    """Its engines on a cluster that goes on. The driver that took its lease over was killed before it ended them, and they
    held their units for ever."""
    store, owners = Store(str(tmp_path)), list[str]()
    for _ in range(2):  # the second finds the first dead, and is killed as well
        with drivers(tmp_path, 1, "sweep a") as (process,):
            assert _line(process) == "held"
            owners.append(_owner(store))
    cleared: list[str] = []
    with Lease(store, "quickstart", ["sweep a"]) as third:
        assert third.num_dead == 1 and sorted(third.dead) == sorted(owners)
        with third.settling(cleared.append):
            assert sorted(cleared) == sorted(owners)
            assert store.noted(third.name)["left"] == []
        with third.settling(cleared.append):
            assert len(cleared) == 2, "once"


def _owner(store: Store) -> str:
    [name] = store.notes(NOTE)
    return name.removeprefix(NOTE)


@pytest.mark.parametrize("url", [False, True])
def test_a_driver_of_another_machine_is_dead_when_its_beat_stands_still(
    url: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.04)
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path))
    store = Store(f"memory://lease-{time.time_ns()}/root" if url else str(tmp_path))
    there = {"sweep": "a", "holds": ["sweep a"], "host": "far", "pid": 17, "since": "today", "held": True, "beat": 0}
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            store.note(NOTE + OTHER, {**there, "beat": time.time()})

    store.note(NOTE + OTHER, there)
    far = threading.Thread(target=beat)
    far.start()
    with pytest.raises(PrerequisiteError, match="process 17 on far"):
        Lease(store, "a", ["sweep a"]).__enter__()
    assert store.is_alive(OTHER) and list(store.notes(NOTE)) == [NOTE + OTHER]
    stop.set()
    far.join()
    with Lease(store, "a", ["sweep a"]):
        assert not store.is_alive(OTHER)
        time.sleep(0.15)
        assert store.notes(NOTE)[NOTE + store.owner]["beat"] >= 2


def test_of_two_machines_that_wait_for_each_other_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    meet, written = threading.Barrier(2), threading.Barrier(2)

    class Together(Store):
        def notes(self, prefix: str) -> dict[str, Any]:
            with suppress(threading.BrokenBarrierError):
                written.wait(0.5)
                written.abort()
            return super().notes(prefix)

        def forget(self, name: str) -> None:
            with suppress(threading.BrokenBarrierError):
                if name != NOTE + self.owner:  # takes the other for dead: at the same moment as the other does
                    meet.wait(1)
            super().forget(name)

    both = [Lease(Together(str(tmp_path), owner), "a", ["sweep a"]) for owner in (OTHER, f"f{OTHER[1:]}")]
    said: list[str] = []

    def attempt(each: Lease) -> None:
        try:
            with each:
                said.append("held")
                time.sleep(1)
        except PrerequisiteError:
            said.append("refused")

    threads = [threading.Thread(target=attempt, args=(each,)) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["held", "refused"] and both[0].store.notes(NOTE) == {}


@pytest.mark.parametrize("how", ["removed", "another beside it"])
@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_a_run_that_was_taken_for_dead_ends_and_does_not_go_on_beside_the_other(
    how: str, ctrl_c: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    before = signal.signal(signal.SIGINT, ctrl_c)  # ignored: by what a script started in the background
    file = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
    project = Project(load(file, [f"execution.root={tmp_path}", "models.0.dtype=float32"]))
    project.store.owner = f"f{OTHER[1:]}"
    there = {"sweep": "quickstart", "holds": ["sweep quickstart"], "host": "far", "pid": 17, "since": "x", "held": True}
    try:
        with pytest.raises(PrerequisiteError, match="another one took over"), driver._alone(project):
            if how == "removed":
                project.store.forget(NOTE + project.store.owner)
            else:
                project.store.note(NOTE + OTHER, there)
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(project.store.notes(NOTE)) == ([] if how == "removed" else [NOTE + OTHER])


def test_a_dead_lease_that_shares_nothing_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    store = Store(str(tmp_path))
    store.note(NOTE + OTHER, {"holds": ["sweep b"], "held": True, "beat": 7})
    with Lease(store, "a", ["sweep a"]):
        assert store.is_alive(OTHER)
        deadline = time.monotonic() + 10
        while store.is_alive(OTHER) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(store.notes(NOTE)) == [NOTE + store.owner]


def test_a_name_is_of_one_process_only() -> None:
    pid, began = lease.me().split("-")[1:]
    assert lease.is_here(lease.me()) and not lease.is_here(f"{lease.machine()}-{pid}-{int(began) + 1}")
    assert lease.is_here(OTHER) is None and lease.is_here("checkpoint-1") is None
