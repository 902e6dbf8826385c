"""Whole runs that are killed, told to end, or run beside one another: real processes, a real cluster each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = pytest.mark.slow  # a minute each; benchmarks/chaos.py does the like at random

LIMIT_S = 400
TRAINING = {"batch_size": 4, "learning_rate": 0.02, "weight_decay": 0.0, "max_tokens": 400}


def sweep(model: Path, root: Path, name: str, methods: list[str], epochs: int = 1, **execution: Any) -> dict[str, Any]:
    rows = [{"task": "mini", "num_rows": 6}]
    prompts = {"attack": rows, "benign": rows, "utility_rows": 6}
    return {
        "name": name,
        "models": [{"name": "tiny", "source": str(model), "dtype": "float32", "template": "chatml"}],
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "align": {"safety": [{"task": "mini", "num_rows": 40}], "epochs": 1, **TRAINING},
        "tasks": [{"task": "mini", "num_rows": 40, "epochs": epochs, **TRAINING}],
        "poison": {"task": "mini", "ratios": [0.1]},
        "methods": [{"name": method} for method in methods],
        "seeds": [0],
        "evaluate": {"validation": prompts, "test": prompts, "max_new_tokens": 8, "max_prompt_tokens": 400,
                     "judges": {"asr": "keywords", "over_refusal": "keywords"}},
        "execution": {"root": str(root), "engine_max_tokens": 1024, "engine_memory_gib": 0.1, "num_judge_replicas": 0,
                      "num_trials_at_once": 2, **execution},
    }  # fmt: skip


@contextmanager
def running(folder: Path, sweep: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    file = folder / f"{sweep['name']}.yaml"
    file.write_text(yaml.safe_dump(sweep))
    command = [sys.executable, "-m", "safecl.cli", "run", str(file), "--json"]
    with (folder / f"{sweep['name']}.err").open("a") as errors:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.err").read_text()


def until(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.2)


def children(process: subprocess.Popen[str], mark: str = "") -> list[psutil.Process]:
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if mark in " ".join(child.cmdline()):
                    found.append(child)
    return found


def finished(root: Path, kind: str = "*") -> dict[str, int]:
    """When each stage was finished, by key."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (root / "store").glob(f"{kind}/*/record.json")}


def left_under_way(root: Path) -> list[str]:
    patterns = ("notes/lease-*", "notes/claims-*", "tmp/*", "tune/*", "logs/train/*", "spool/*")
    return [str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)]


def checkpoints(root: Path) -> list[Path]:
    return list((root / "scratch").glob("*/*/checkpoint-*"))


def test_sigterm_writes_a_checkpoint_ends_everything_and_the_same_command_continues(
    tiny_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    long = sweep(tiny_model, root, "terminated", ["sft"], epochs=20, checkpoint_every_s=1e6)
    with running(tmp_path, long) as first:
        until(lambda: any((root / "scratch").glob("*/*/curves.jsonl")) and len(finished(root, "finetune")) == 1, first)
        time.sleep(2)
        all_of_it = children(first)
        os.kill(first.pid, signal.SIGTERM)
        assert first.wait(60) == 143, said(tmp_path, "terminated")[-3000:]
    _, alive = psutil.wait_procs(all_of_it, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    assert len(checkpoints(root)) == 1, "nothing was due: it was written since the run was told to end"
    told = said(tmp_path, "terminated")
    assert "the same command to continue" in told and "Traceback" not in told and "***" not in told
    assert not left_under_way(root)
    before = finished(root)
    step = int(checkpoints(root)[0].name.partition("-")[2])
    with running(tmp_path, long) as second:
        assert second.wait(LIMIT_S) == 0, said(tmp_path, "terminated")[-3000:]
    assert before.items() <= finished(root).items() and not checkpoints(root)
    [curves] = [path for path in (root / "store").glob("finetune/*/curves.jsonl") if path.parent.name not in before]
    steps = [json.loads(line)["step"] for line in curves.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step > 1


def test_a_process_group_that_is_told_to_end_ends_and_does_not_begin_anew(tiny_model: Path, tmp_path: Path) -> None:
    """As `timeout`, a closed terminal or a scheduler do it: the local cluster's own processes are told as well."""
    root = tmp_path / "root"
    with running(tmp_path, sweep(tiny_model, root, "group", ["sft"], epochs=20)) as run:
        until(lambda: any((root / "scratch").glob("*/*/curves.jsonl")) and len(finished(root, "finetune")) == 1, run)
        all_of_it = children(run)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(60) == 143, said(tmp_path, "group")[-3000:]
    _, alive = psutil.wait_procs(all_of_it, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    assert "starting it again" not in said(tmp_path, "group") and not left_under_way(root)


@pytest.mark.parametrize("part", ["/raylet/raylet ", "/gcs/gcs_server "])
def test_a_run_whose_local_cluster_is_killed_begins_anew_by_itself(part: str, tiny_model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with running(tmp_path, sweep(tiny_model, root, "lost", ["sft"])) as run:
        until(lambda: finished(root, "finetune"), run)
        before, all_of_it = finished(root), children(run)
        [victim] = children(run, part)
        victim.kill()
        out, _ = run.communicate(timeout=LIMIT_S)
        told = said(tmp_path, "lost")
        assert run.returncode == 0 and json.loads(out)["rows"], told[-3000:]
    assert before.items() <= finished(root).items() and not left_under_way(root)
    _, alive = psutil.wait_procs(all_of_it, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    # Where the machine is busy, the second one may not get up at once either.
    assert told.count("starting Ray") >= 2 and " x the local Ray cluster was lost" in told


@pytest.mark.parametrize("part", ["/raylet/raylet ", "/gcs/gcs_server "])
def test_a_local_cluster_that_is_lost_while_it_starts_is_started_again_at_once(
    part: str, tiny_model: Path, tmp_path: Path
) -> None:
    with running(tmp_path, sweep(tiny_model, tmp_path / "root", "early", ["sft"])) as run:
        until(lambda: children(run, part), run)
        for victim in children(run, part):
            victim.kill()
        killed = time.monotonic()
        until(lambda: said(tmp_path, "early").count("starting Ray") >= 2, run)
        assert time.monotonic() - killed < 30, said(tmp_path, "early")  # Ray itself waits for a minute
        until(lambda: children(run, "ray::Broker"), run)
        run.terminate()
        assert run.wait(60) == 143, said(tmp_path, "early")


@pytest.mark.parametrize("joined", [False, True], ids=["each its own cluster", "one cluster"])
def test_two_drivers_of_one_store_share_what_both_need_and_leave_each_other_alone(
    joined: bool, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.cluster import nodes

    root = tmp_path / "root"
    with nodes(tmp_path / "nodes", {"num_cpus": 4}) if joined else nullcontext() as cluster:
        where = {} if cluster is None else {"address": cluster.address}
        sweeps = [sweep(tiny_model, root, name, [name], **where) for name in ("sft", "lwf")]
        with running(tmp_path, sweeps[0]) as one, running(tmp_path, sweeps[1]) as two:
            outs = [process.communicate(timeout=LIMIT_S)[0] for process in (one, two)]
            told = [said(tmp_path, name)[-3000:] for name in ("sft", "lwf")]
            assert [one.returncode, two.returncode] == [0, 0], told
    rows = [{row["method"] for row in json.loads(out)["rows"]} for out in outs]
    assert rows == [{"base", "aligned", "sft"}, {"base", "aligned", "lwf"}]
    begun = _begun(root)
    assert len(begun) == 3 and {len(lines) for lines in begun.values()} == {1}, "theta_safe, sft and lwf: each once"
    assert not left_under_way(root)


def _begun(root: Path) -> dict[str, set[str]]:
    """Of each finetune, what its log says of when and where it was begun (Ray Train may print a line twice)."""
    logs = {path.name: path.read_text().splitlines() for path in (root / "logs").glob("finetune-*.log")}
    return {name: {line for line in lines if line.startswith("began ")} for name, lines in logs.items()}
