"""A whole sweep of three models on a cluster with one unit: trainers and engines of every model and role take turns on it.

The models are tiny and random, and the unit is a resource of Ray's that a node was given; trainers, engines (vLLM on CPUs)
and everything between them are the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import nodes
from tests.test_end_to_end import safecl

pytestmark = pytest.mark.slow


def sweep(models: dict[str, Path], root: Path, address: str) -> dict[str, Any]:
    training = {"batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.0, "max_tokens": 1500, "epochs": 1}
    rows = [{"task": "mini", "num_rows": 4}]
    prompts = {"attack": rows, "benign": rows, "utility_rows": 4}
    guard = {"rows": [{"task": "mini", "num_rows": 16}], "heldout": [{"task": "mini", "num_rows": 6}], **training}
    return {
        "name": "turns",
        "models": [
            {"name": name, "source": str(path), "dtype": "float32", "template": "chatml"} for name, path in models.items()
        ],
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "align": {"safety": [{"task": "mini", "num_rows": 8}], **training},
        "tasks": [{"task": "mini", "num_rows": 8, **training}],
        "poison": {"task": "mini", "ratios": [0.1]},
        "methods": [{"name": "sft"}],
        "seeds": [0],
        "evaluate": {
            "validation": prompts, "test": prompts, "max_new_tokens": 8, "max_prompt_tokens": 400,
            "judges": {"asr": "guard", "over_refusal": "keywords", "guard": {**guard, "epochs": 12}},
        },
        "execution": {"root": str(root), "engine_max_tokens": 2048, "engine_memory_gib": 0.2, "address": address,
                      "unit": "slot", "turn_s": 20},
    }  # fmt: skip


def test_one_unit_brings_a_sweep_of_three_models_in_two_roles_to_its_end(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "turns.yaml", tmp_path / "root"
    with nodes(tmp_path / "cluster", {"num_cpus": 2}, {"num_cpus": 2, "resources": {"slot": 1}}) as cluster:
        file.write_text(yaml.safe_dump(sweep(tiny_models, root, cluster.address)))
        done = safecl("run", str(file), "--json", "--accept-judge", timeout_s=570)
        logs = sorted((root / "logs").glob("*.log"))
        assert done.returncode == 0, (done.stderr[-3000:], [(log.name, log.read_text()[-800:]) for log in logs])
    rows = json.loads(done.stdout)["rows"]
    assert {row["model"] for row in rows} == set(tiny_models)
    booted = {log.name.removeprefix("engine-").rsplit("-", 2)[0] for log in logs if log.name.startswith("engine-")}
    assert len(booted) == 6  # candidate and judge of each model, each on the one unit
