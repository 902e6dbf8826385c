"""What travels with a job, and what is refused before it is sent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl import submit
from safecl.base import ConfigError, PrerequisiteError
from tests.cluster import _free_ports
from tests.mini import mini


def packed(tmp_path: Path, raw: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "job"
    folder.mkdir()
    submit.pack({"execution": {"root": "s3://b/x"}, **raw}, tmp_path / "mine" / "sweep.yaml", folder)
    return folder, yaml.safe_load((folder / "sweep.yaml").read_text())


def test_what_lies_beside_a_sweep_file_travels_and_absolute_places_stay(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    for name in ("rows.jsonl", "val.jsonl", "plugin.py", "numbers.yaml", "model/config.json"):
        (mine / name).write_text(name)
    data = [{"name": "a", "file": {"train": "rows.jsonl", "test": "val.jsonl"}}, {"name": "b", "file": "/data/b.jsonl"}]
    folder, raw = packed(
        tmp_path,
        {
            "plugins": ["plugin.py"], "published": {"file": "numbers.yaml"}, "data": data,
            "models": [{"source": "model"}, {"source": "meta/llama"}, {"source": "/models/one"}],
        },
    )  # fmt: skip
    read = [raw["plugins"][0], raw["published"]["file"], *raw["data"][0]["file"].values()]
    assert [(folder / place).read_text() for place in read] == ["plugin.py", "numbers.yaml", "rows.jsonl", "val.jsonl"]
    assert (folder / raw["models"][0]["source"] / "config.json").is_file()
    assert raw["data"][1]["file"] == "/data/b.jsonl"
    assert [model["source"] for model in raw["models"][1:]] == ["meta/llama", "/models/one"]


def test_a_store_in_the_jobs_own_folder_is_refused(tmp_path: Path) -> None:
    for execution in ({}, {"root": "runs"}):
        with pytest.raises(ConfigError, match=r"execution\.root.*goes with the job"):
            submit.pack({"execution": execution}, tmp_path / "sweep.yaml", tmp_path)


def test_large_folders_do_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LARGEST", 3)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "weights").write_text("four")
    with pytest.raises(ConfigError, match="at most 3 B travel"):
        packed(tmp_path, {"models": [{"source": "model"}]})


def test_where_no_dashboard_answers_is_said_with_the_remedy() -> None:
    for address in ("http://127.0.0.1:9", "127.0.0.1:9"):
        with pytest.raises(PrerequisiteError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9 .*--address"):
            submit.client(address)


@contextmanager
def head(folder: Path) -> Iterator[tuple[dict[str, str], str]]:
    """A Ray head with its dashboard that takes only who knows a token: the environment with it, and the dashboard."""
    (folder / "token").write_text("0123456789abcdef" * 2)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
           "TMPDIR": "/tmp", "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    sockets = tempfile.mkdtemp(prefix="r", dir="/tmp")
    names = ("port", "dashboard-port", "metrics-export-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "runtime-env-agent-port", "ray-client-server-port")  # fmt: skip
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=3",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={sockets}",
    ]
    with (folder / "head.log").open("w") as log:
        ray = subprocess.Popen(
            [*command, *(f"--{name}={port}" for name, port in ports.items())],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(240):
            time.sleep(0.5)
            if "Ray runtime started" in (folder / "head.log").read_text():
                break
            assert ray.poll() is None, (folder / "head.log").read_text()
        yield env, f"http://127.0.0.1:{ports['dashboard-port']}"
    finally:
        ray.send_signal(signal.SIGTERM)
        try:
            ray.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(ray.pid, signal.SIGKILL)
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.mark.slow
def test_a_sweep_runs_as_a_job_of_a_cluster_that_wants_a_token(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "mini.yaml"
    file.write_text(yaml.safe_dump(mini(Path("model"), tmp_path / "root")))

    def said(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "safecl.cli", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=420, cwd=tmp_path)

    with head(tmp_path) as (env, address):
        (tmp_path / "wrong").write_text("f" * 32)
        refused = said(
            {**env, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, "submit", str(file), "--address", address
        )
        assert refused.returncode == 2 and "is not the cluster's" in refused.stderr, refused.stderr
        done = said(env, "submit", str(file), "--address", address)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "trials " in done.stdout and "sft" in done.stdout and "SUCCEEDED" in done.stderr
    status = json.loads(said(env, "status", str(file), "--json").stdout)
    assert {row["state"] for row in status["cells"]} == {"done"} and status["run"]["how"] == "ended"
