"""Verbs that look at a run from elsewhere, or at a store: status, logs, trace, gc, du, cancel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl import cancel, cli, keep, lease, live, tail, trace
from safecl.base import ConfigError, PrerequisiteError
from safecl.grid import STEPS, Cell
from safecl.lease import Lease
from safecl.overview import status
from safecl.project import Project, load
from safecl.schedule import Study
from safecl.store import Stage, Store
from safecl.watch import RUN, TRACE
from tests.made_up import finish, put
from tests.mini import mini

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
SMALL = ["methods=[{name: sft}]", "poison.ratios=[0.1]", "models.0.dtype=float32"]
GONE = "0123456789-1-1"  # a process of another machine, without a lease


def project(root: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [*SMALL, f"execution.root={root}", *settings]), reads=True)


def span(number: int, asked: float, ready: float, start: float, end: float, **more: Any) -> dict[str, Any]:
    known = {"key": f"{number:064x}", "kind": "finetune", "needs": "trainer", "rank": 0, "inputs": []}
    where = {"host": "one", "node": "n1", "pid": 7, "device": "cuda:0"}
    return {**known, **where, "asked": asked, "ready": ready, "start": start, "end": end, **more}


def noted(store: Store, times: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A run that left these notes."""
    run = f"{more.get('owner', store.owner)}-{int(more.get('began', 100))}"
    told = {
        "sweep": "quickstart", "owner": store.owner, "host": "one", "pid": os.getpid(), "began": 100.0, "at": 160.0,
        "how": "ended", "trials": 3, "trials_done": 1, "eta_s": 30.0, "cells": [], "running": [], "queue": {},
        "done": {"finetune": 2}, "failed": [], "num_failed": 0, "device_s": 7200.0,
        "cluster": {"unit": "GPU", "devices": 4.0, "nodes": 2, "held": {"GPU": [3.0, 4.0], "memory": [2**30, 4 * 2**30]}},
        **more,
    }  # fmt: skip
    store.note(RUN + run, told)  # type: ignore[arg-type]
    store.note(f"{TRACE}{run}-00000", times)  # type: ignore[arg-type]
    return told


def test_status_adds_up_all_runs_and_says_where_a_failure_was(tmp_path: Path) -> None:
    mine = project(tmp_path, "execution.device_price=2.5")
    failed = {
        "key": "ab" * 32, "kind": "judge", "error": "E: no", "cause": "trial", "end": 1.0, "host": "far", "node": "n2",
        "pid": 9, "device": "cpu",
    }  # fmt: skip
    assert live.state(mine.store, "quickstart", mine.sweep.execution) is None
    noted(mine.store, [], began=50.0, how="stopped")
    noted(mine.store, [], failed=[failed], num_failed=1)
    noted(mine.store, [], began=900.0, sweep="quickstart-2")  # another sweep's, in the same store
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    assert found is not None and found["runs"] == 2 and found["how"] == "ended" and found["eta_s"] is None
    assert found["stages"] == {"finetune": {"done": 4}}
    assert found["money"] == {"unit": "GPU", "hours": 4.0, "price": 2.5, "cost": 10.0}
    said = "\n".join(live.lines(found))
    assert "on far (process 9, cpu): E: no (safecl logs abababababab --root " in said and "cause trial" in said
    assert "about 10.00 (4.00 GPU-hours held so far, 2.5 each)" in said
    assert "its cluster had 2 nodes: GPU 4, memory 4.0 GiB" in said  # nothing of it is held any more
    said = "\n".join(live.lines({**found, "how": "under way"}))
    assert "held of 2 nodes: GPU 3 of 4, memory 1.0 of 4.0 GiB" in said


def test_without_a_price_none_is_made_up(tmp_path: Path) -> None:
    mine = project(tmp_path)
    noted(mine.store, [])
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    assert found is not None and found["money"]["cost"] is None
    assert "2.00 GPU-hours held so far; no price is known (execution.device_price)" in "\n".join(live.lines(found))


def test_a_failure_that_was_made_good_is_not_told(tmp_path: Path) -> None:
    mine = project(tmp_path)
    made = mine.cells[0].job({}, 0, "final").evidence.metrics
    failed = {"key": made.key, "kind": made.kind, "error": "E: no", "cause": "infrastructure", "host": None}
    noted(mine.store, [], began=50.0, failed=[failed], num_failed=1)
    noted(mine.store, [])
    execution = mine.sweep.execution
    assert [f["key"] for f in (live.state(mine.store, "quickstart", execution) or {})["failed"]] == [made.key]
    put(mine.store, [made])
    assert (live.state(mine.store, "quickstart", execution) or {})["failed"] == []


def test_a_run_whose_driver_is_gone_is_lost_and_one_that_lives_is_under_way(tmp_path: Path) -> None:
    mine = project(tmp_path)
    label = mine.cells[0].label
    noted(mine.store, [], how="under way", cells=[label], at=time.time())
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    assert found is not None and found["how"] == "under way" and found["eta_s"] == 30.0
    assert [row["state"] for row in status(mine, found)][:2] == ["under way", "to do"]
    noted(mine.store, [], owner=GONE, began=200.0, how="under way", cells=[label])
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    assert found is not None and found["how"] == "lost" and found["cells"] == []
    assert "without a word" in live.lines(found)[0] and "continues" in live.lines(found)[0]


def test_a_trace_has_a_row_a_device_and_lanes_where_stages_overlap(tmp_path: Path) -> None:
    mine = project(tmp_path)
    engine = {"kind": "generate", "needs": "candidate-1"}
    times = [
        span(1, 0, 1, 2, 5),
        span(2, 0, 5, 5, 9, inputs=[f"{1:064x}"]),
        span(3, 1, 1, 3, 6, **engine),
        span(4, 1, 1, 4, 8, **engine),
        span(5, 1, 1, 6, 8, **engine, error="E: no"),
        {"key": "never", "kind": "x", "asked": 0.0, "end": 1.0},  # failed with what it waited for
    ]
    noted(mine.store, times)
    found = trace.spans(mine.store, "quickstart")
    made = trace.chrome(found, {f"{1:064x}": {"a row"}})
    json.dumps(made)
    slices = [event for event in made["traceEvents"] if event["ph"] == "X"]
    assert [(s["ts"], s["dur"]) for s in slices] == [(2e6, 3e6), (3e6, 3e6), (4e6, 4e6), (5e6, 4e6), (6e6, 2e6)]
    names = {e["tid"]: e["args"]["name"] for e in made["traceEvents"] if e["name"] == "thread_name"}
    assert [names[s["tid"]] for s in slices] == [
        "cuda:0, process 7", "engine candidate-1", "engine candidate-1 #2", "cuda:0, process 7", "engine candidate-1"
    ]  # fmt: skip
    first = slices[0]["args"]
    assert first["cells"] == ["a row"] and first["waited for inputs, s"] == 1 and first["waited for trainer, s"] == 1
    assert slices[-1]["args"]["error"] == "E: no"
    waiting = [e["args"]["stages"] for e in made["traceEvents"] if e["name"] == "waiting for candidate-1"]
    assert waiting == [3, 2, 1, 0]


def test_who_waited_for_what_is_told_in_shares(tmp_path: Path) -> None:
    first = span(1, 0, 0, 10, 40, run="r")
    second = span(2, 0, 40, 60, 80, run="r", kind="generate", needs="judge-1", inputs=[f"{1:064x}"])
    beside = span(3, 0, 0, 0, 5, run="r")
    lines = trace.summary([beside, first, second])
    # Waits: 40 s for inputs, 20 s for an engine, 10 s for a trainer.
    assert lines[2] == "waited for: inputs 57%, engine 29%, trainer 14%"
    # The end: 30 s of a finetune, 20 s of generation, 20 s for the engine, 10 s for the trainer.
    assert lines[3].startswith("the end waited for: finetune 38%, ")
    assert {"generate 25%", "engine (its turn) 25%", "trainer (its turn) 12%"} <= set(
        lines[3].split(": ")[1].split(", ")
    )
    assert sum(trace.chain([beside, first, second]).values()) == 80


def test_trace_says_which_rows_of_the_table_need_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = project(tmp_path)
    job = mine.cells[-1].job({}, mine.sweep.seeds[0], "final")
    noted(mine.store, [{**span(1, 0, 1, 2, 3), "key": job.graph.tuned.key}])
    settings = [part for setting in (*SMALL, f"execution.root={tmp_path}") for part in ("--set", setting)]
    out = tmp_path / "t.json"
    cli.app(["trace", str(QUICKSTART), *settings, "--out", str(out)], standalone_mode=False)
    [found] = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    assert found["args"]["cells"] == [mine.cells[-1].label]
    assert "worked on: finetune 100%" in capsys.readouterr().out
    cli.app(["trace", str(QUICKSTART), *settings, "--out", str(out), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["stages"] == 1


def removed(root: Path, *words: str) -> None:
    settings = [part for setting in (*SMALL, f"execution.root={root}") for part in ("--set", setting)]
    cli.app(["gc", str(QUICKSTART), *settings, *words], standalone_mode=False)


def test_gc_removes_what_no_given_sweep_needs_and_only_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = project(tmp_path)
    needed = {stage.key for stage in finish(mine)}
    other = Stage("data", {"of": "another sweep"})
    put(mine.store, [other])
    (mine.store.local / "damaged" / "data-0.1").mkdir(parents=True)
    (mine.store.local / "tmp" / f"{lease.machine()}-1-1.x").mkdir(parents=True)  # its process is gone
    (mine.store.local / "tmp" / f"{mine.store.owner}.y").mkdir()
    kept, spare = f"{next(iter(needed))}", "f" * 64
    for key in (kept, spare):  # checkpoints of a dead driver: of a stage that is needed, and of one that is not
        (mine.store.local / "scratch" / key / f"{lease.machine()}-1-1").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    removed(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and "--yes removes it" in capsys.readouterr().out
    removed(tmp_path, "--yes")
    assert not mine.store.has(other) and {held.key for held in keep.stages(mine.store)} == needed
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [kept]
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == [f"{mine.store.owner}.y"]
    assert not (tmp_path / "damaged").exists()


def test_gc_keeps_every_stage_while_a_sweep_is_run_in_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = project(tmp_path)
    other = Stage("data", {"of": "another sweep"})
    put(mine.store, [other])
    with Lease(mine.store, "elsewhere", ["sweep elsewhere"]):
        removed(tmp_path, "--yes")
    assert mine.store.has(other) and "stages stay: sweep 'elsewhere'" in capsys.readouterr().out
    removed(tmp_path, "--yes")
    assert not mine.store.has(other)


SEARCHED = "methods=[{name: der, config: {memory_size: 9}, search: {weight: {low: 0.1, high: 9.0, log: true}}}]"


def _with_its_defaults_told(mine: Project) -> tuple[Cell, Study]:
    """The searched cell and its study, which knows what the method's defaults gave."""
    [cell] = [cell for cell in mine.cells if cell.space is not None]
    study = mine.study(cell)
    assert study is not None
    number, _ = study.ask()
    study.tell(number, 0.5, {"asr": -0.1})
    return cell, study


def test_gc_keeps_what_trials_under_way_and_trials_to_come_rest_on(tmp_path: Path) -> None:
    mine = Project(load(QUICKSTART, [*SMALL, SEARCHED, f"execution.root={tmp_path}"]))
    cell, study = _with_its_defaults_told(mine)
    _, params = study.ask()
    under_way, first = cell.trial(params).graph.tuned, cell.job({}, mine.sweep.seeds[0], "final").graph
    reader = Project(load(QUICKSTART, [*SMALL, SEARCHED, f"execution.root={tmp_path}"]), reads=True)
    needed = keep.needed([reader])
    assert under_way.key in needed and first.tuned.inputs["memory"].key in needed


def test_gc_keeps_what_a_pruned_trials_steps_measured_for_as_long_as_the_sweep_prunes(tmp_path: Path) -> None:
    def opened(prune: str) -> Project:
        more = [SEARCHED, f"search.prune={prune}", f"execution.root={tmp_path}"]
        return Project(load(QUICKSTART, [*SMALL, *more]))

    cell, study = _with_its_defaults_told(opened("wilcoxon"))
    number, params = study.ask()
    study.prune(number, "worse", {"asr": 0.1}, None)
    of_steps = {stage.key for role in STEPS for stage in cell.trial(params, role).evidence.targets}
    assert len(of_steps - {stage.key for stage in cell.trial(params).evidence.targets}) >= len(STEPS)
    assert of_steps <= keep.needed([opened("wilcoxon")])
    assert not of_steps <= keep.needed([opened("none")])


def test_du_counts_stages_by_kind_and_what_none_of_the_sweeps_needs(tmp_path: Path) -> None:
    mine = project(tmp_path)
    finish(mine)
    put(mine.store, [Stage("data", {"of": "another sweep"})])
    rows = {row["what"]: row for row in keep.table(mine.store, keep.needed([mine]))}
    assert rows["data"]["unneeded_num"] == 1 and rows["finetune"]["unneeded_num"] == 0
    assert rows["data"]["bytes"] > rows["data"]["unneeded_bytes"] > 0
    assert [keep.readable(n) for n in (0, 1536, 3 * 2**30)] == ["0 B", "1.5 KiB", "3.0 GiB"]


def test_gc_wants_sweeps_of_one_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"execution\.root"):
        keep.one_store([project(tmp_path / "a"), project(tmp_path / "b")])


def test_logs_are_found_by_key_and_followed_until_the_stage_is_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = Stage("finetune", {})
    folder = tmp_path / "logs"
    folder.mkdir()
    log = folder / f"finetune-{made.key[:12]}.log"
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    (folder / f"finetune-{made.key[:12]}-rank1.log").write_text("of rank 1\n")
    (folder / "data-ffffffffffff.log").write_text("another's\n")
    assert list(tail.lines(store, made.key[:7], 2, follow=False)) == [
        f"==> finetune-{made.key[:12]}-rank1.log <==", "of rank 1", f"==> {log.name} <==", "line 7", "line 8"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="begins with '123'"):
        tail.names_of(store, "123")
    with Lease(store, "s", ["sweep s"]):
        lines = tail.lines(store, made.key, 1, follow=True)
        next(lines), next(lines), next(lines)
        assert next(lines) == "line 8"
        with log.open("a") as file:
            file.write("more\nand no end of line")
        assert next(lines) == "more"
        put(store, [made])
        assert next(lines) == "and no end of line"
        assert list(lines) == []


def test_cancel_stops_a_driver_by_a_note_in_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(PrerequisiteError, match="no run of sweep 's'"):
        cancel.cancel(store, "s", 1.0, lambda text: None)
    code = (
        "import sys, time\nfrom safecl import lease\nfrom safecl.store import Store\nlease.BEAT_S = 0.2\n"
        "with lease.Lease(Store(sys.argv[1]), 's', ['sweep s']):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert driver.stdout is not None and driver.stdout.readline() == b"held\n"
    said: list[str] = []
    assert cancel.cancel(store, "s", 30.0, said.append)
    assert driver.wait(30) == -signal.SIGTERM  # no handler there: its lease's note stays, its process is gone
    assert f"process {driver.pid}" in said[0] and store.notes(lease.CANCEL) == {}


def test_status_knows_of_a_search_whose_study_lies_elsewhere(tmp_path: Path) -> None:
    searched = "methods=[{name: der, config: {memory_size: 9}, search: {weight: {low: 0.1, high: 9.0, log: true}}}]"
    mine = project(tmp_path, searched)
    [cell] = [cell for cell in mine.cells if cell.space is not None]
    noted(mine.store, [], searched={cell.label: [4, 0]})
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    assert [(row["search"], row["state"]) for row in status(mine, found)][-1] == (f"4/{cell.num_trials}", "searching")
    noted(mine.store, [], began=300.0, searched={cell.label: [cell.num_trials, len(mine.sweep.seeds)]})
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    assert status(mine, found)[-1]["state"] == "done"


def test_what_runs_is_told_with_its_place_and_is_in_the_trace(tmp_path: Path) -> None:
    mine = project(tmp_path)
    known = {
        "kind": "finetune",
        "key": "cd" * 32,
        "label": "finetune sft, seed 0",
        "start": 130.0,
        "done": 3,
        "total": 9,
    }
    place = {
        "unit": "steps",
        "host": "far",
        "pid": 5,
        "device": "cuda:1",
        "needs": "trainer",
        "inputs": [],
        "asked": 110.0,
    }
    noted(mine.store, [], how="under way", running=[{**known, **place, "ready": 120.0}])
    found = live.state(mine.store, "quickstart", mine.sweep.execution)
    said = "\n".join(live.lines(found))
    assert "running for 0:30: finetune sft, seed 0, 3 of 9 steps, on far (process 5, cuda:1), cdcdcdcdcdcd" in said
    [span] = trace.spans(mine.store, "quickstart")
    assert trace.row_of(span) == "cuda:1, process 5" and (span["start"], span["end"]) == (130.0, 160.0)


@pytest.mark.slow
def test_a_run_that_is_cancelled_from_another_terminal_stops_and_says_so(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "mini.yaml"
    file.write_text(yaml.safe_dump(mini(tiny_model, tmp_path / "root")))
    command, env = [sys.executable, "-m", "safecl.cli"], {**os.environ, "TMPDIR": "/tmp"}
    driver = subprocess.Popen([*command, "run", str(file)], env=env, stderr=subprocess.PIPE, text=True)
    store = Store(str(tmp_path / "root"))
    ends = time.monotonic() + 240
    while not store.notes(RUN) and time.monotonic() < ends:
        time.sleep(0.5)
    done = subprocess.run([*command, "cancel", str(file)], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "stopped; the same" in done.stderr, done.stderr
    assert driver.wait(60) == 128 + signal.SIGTERM
    [note] = store.notes(RUN).values()
    assert note["how"] == "stopped"
    again = subprocess.run([*command, "cancel", str(file)], env=env, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2 and "no run of sweep 'mini'" in again.stderr
