"""Files of deploy/ and ray_cluster.yaml, as far as they can be read without a cloud."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import ray
import yaml

from safecl.store import Store
from safecl.sweepfile import load
from safecl.watch import RUN
from tests.mini import mini

ROOT = Path(__file__).parents[1]


def test_the_cluster_file_is_what_rays_launcher_takes_and_nothing_is_installed_at_start() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(raw, schema)
    filled = prepare_config(raw)
    validate_config(filled)
    commands = [*filled["setup_commands"], *filled["head_setup_commands"], *filled["worker_setup_commands"]]
    assert commands == []  # Ray's own would install another Ray
    gpu = filled["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] >= 1 and 1 <= gpu["min_workers"] <= gpu["max_workers"] <= filled["max_workers"]
    assert "RAY_AUTH_MODE=token" in " ".join(filled["docker"]["run_options"])


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.partition(" ")[0].split("==") for line in lines if "==" in line and line[0] not in "# ")


def test_the_images_closure_is_pinned_and_has_all_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {
        name.lower().replace("_", "-").partition("[")[0]: number
        for name, number in pinned("requirements-gpu.txt").items()
    }
    for named in [*project["dependencies"], *project["optional-dependencies"]["gpu"]]:
        name = named.partition(";")[0].partition("[")[0]
        for sign in ("==", ">=", "<", ","):
            name = name.partition(sign)[0]
        assert name in found, named
    assert found["ray"] == pinned("requirements-cpu.txt")["ray"].partition(" ")[0]
    assert "boto3" in found and "s3fs" in found  # the head's autoscaler, and the store
    kube = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    assert kube["spec"]["rayClusterSpec"]["rayVersion"] == found["ray"]


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-gpu.txt"])
def test_a_file_that_is_installed_is_known_by_its_hash(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    bare = [line for line in lines if "==" in line and not line.endswith("\\")]
    assert [line for line in bare if not line.startswith("torch==")] == []  # its CPU build is on PyTorch's own index


def given(command: str) -> tuple[list[str], list[str]]:
    """(words, settings) of a `safecl run` in a file."""
    words = shlex.split(command)
    return words, [words[at + 1] for at, word in enumerate(words) if word == "--set"]


def test_the_commands_in_the_files_are_ones_that_safecl_takes() -> None:
    kube: Any = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    sky: Any = yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text())
    [of_sky] = [line for line in sky["run"].splitlines() if line.startswith("safecl run")]
    for command in (kube["spec"]["entrypoint"], of_sky):
        words, settings = given(command)
        assert words[:2] == ["safecl", "run"]
        sweep = load(ROOT / "sweeps" / "quickstart.yaml", [s.replace("$ROOT", "s3://b/x") for s in settings])
        assert sweep.execution.use_gpu and sweep.execution.address != "local"


@pytest.mark.parametrize("file", ["deploy/slurm.sh"])
def test_a_script_is_one_that_bash_reads(file: str) -> None:
    subprocess.run(["bash", "-n", ROOT / file], check=True)


def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, both this machine: its commands are stand-ins."""
    commands = tmp_path / "bin"
    commands.mkdir()
    # Two nodes share this machine's ports; given here, since on a busy machine a raylet does not wait long enough for its
    # agents to choose their own.
    (commands / "srun").write_text(
        """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
[ "$1 $2" = "bash -c" ] && set -- "$@" --min-worker-port=0 --max-worker-port=0 --metrics-export-port=$(port) \\
    --dashboard-agent-listen-port=$(port) --dashboard-agent-grpc-port=$(port) --runtime-env-agent-port=$(port)
exec "$@"
"""
    )
    (commands / "scontrol").write_text("#!/bin/bash\nprintf 'one\\ntwo\\n'\n")
    for command in commands.iterdir():
        command.chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "[one-two]", "SLURM_CPUS_PER_TASK": "2"}
    return {**os.environ, "PATH": path, "HOME": str(tmp_path), "TMPDIR": "/tmp", "RAY_TMPDIR": "/tmp", **given}


def test_a_slurm_script_without_a_sweep_says_how_it_is_called(tmp_path: Path) -> None:
    done = subprocess.run([ROOT / "deploy" / "slurm.sh"], env=slurm(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_a_slurm_job_begins_ray_anew_where_it_did_not_come_up_and_ends_as_its_driver_does(tmp_path: Path) -> None:
    env = slurm(tmp_path)
    stand_ins = {
        "ray": f'[ -e "{tmp_path}/$2" ] || {{ touch "{tmp_path}/$2"; exit 1; }}; echo "$$ $*" >> {tmp_path}/rays; exec sleep 300',
        "python": "while [ $(wc -l < rays) != 2 ]; do sleep 0.1; done; echo 2",
        "safecl": 'echo "$@"; exit 3',
        "sleep": 'exec /bin/sleep "${1/#5/0.1}"',
        "srun": (tmp_path / "bin" / "srun").read_text().partition("port()")[0].removeprefix("#!/bin/bash")
        + 'exec "$@"',
    }
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "rays").touch()
    script = str(ROOT / "deploy" / "slurm.sh")
    done = subprocess.run(
        [script, "s.yaml", "--limit", "3"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("run s.yaml --set execution.address=") and done.stdout.endswith("--limit 3\n")
    rays = (tmp_path / "rays").read_text().splitlines()
    assert len(rays) == 2 and not any(psutil.pid_exists(int(line.split()[0])) for line in rays)
    assert not list(tmp_path.glob(".safecl-token*"))


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_runs_a_sweep_and_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(mini(tiny_model, tmp_path / "root")))
    done = subprocess.run(
        [ROOT / "deploy" / "slurm.sh", str(tmp_path / "mini.yaml")],
        env=slurm(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft" in done.stdout
    [note] = Store(str(tmp_path / "root")).notes(RUN).values()
    assert note["how"] == "ended" and note["cluster"]["nodes"] == 2
    assert not list(tmp_path.glob(".safecl-token*"))
    mine = str(20000 + os.getpid() % 20000)
    left = [p.cmdline() for p in psutil.process_iter() if any(f":{mine}" in word for word in p.cmdline())]
    assert left == []
