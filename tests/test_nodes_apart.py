"""A sweep as a person runs it on a cluster whose nodes share nothing but a store at a URL: a real S3 server, PostgreSQL for
studies and tracking, nodes with folders of their own, a model and rows that lie on the driver's machine alone, which is not
the head's.

What it measures is what a folder on one machine gives; a second run does nothing; no process opened a file of another node.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl.store import Store
from tests.cluster import nodes
from tests.servers import postgres, s3
from tests.test_end_to_end import TRAINING, safecl

THINGS = ["lamp", "kettle", "drill", "radio", "scale", "clock", "fan", "oven"]


def sweep(folder: Path, model: Path) -> Path:
    rows = [{"prompt": f"My {t} {i} is broken", "response": f"Bring the {t}."} for i in range(20) for t in THINGS]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {
        "attack": [{"task": "mini", "num_rows": 4}],
        "benign": [{"task": "mini", "num_rows": 4}],
        "utility_rows": 4,
    }
    file = folder / "apart.yaml"
    file.write_text(yaml.safe_dump({
        "name": "apart",
        "models": [{"name": "tiny", "source": str(model), "dtype": "float32", "template": "chatml"}],
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "align": {"safety": [{"task": "mini", "num_rows": 12}], "epochs": 1, **TRAINING},
        "data": [{"name": "mine", "file": "mine.jsonl", "format": "prompt_response", "max_new_tokens": 8}],
        "tasks": [{"task": "mine", "num_rows": 16, "epochs": 1, **TRAINING}],
        "poison": {"task": "mini", "ratios": [0.1]},
        "methods": [
            {"name": "sft"},
            {"name": "der", "config": {"memory_size": 4}, "search": {"weight": {"low": 0.1, "high": 9.0, "log": True}}},
        ],
        "seeds": [0],
        "evaluate": {"validation": prompts, "test": prompts, "max_new_tokens": 8, "max_prompt_tokens": 400,
                     "judges": {"asr": "keywords"}},
        "search": {"trials": 2},
        "execution": {"engine": "torch", "engine_memory_gib": 0.2, "num_judge_replicas": 0, "num_trials_at_once": 1,
                      "batch_invariant": True},
    }))  # fmt: skip
    return file


def measured(store: Store) -> dict[str, Any]:
    return {record["key"]: record["result"] for record in store.records("metrics", at_most=1000)}


@pytest.mark.slow
def test_a_sweep_over_nodes_that_share_a_url_alone_gives_what_one_machine_gives(
    tiny_model: Path, tmp_path: Path
) -> None:
    here = tmp_path / "driver"
    here.mkdir()
    model = here / "model"
    model.mkdir()
    for each in tiny_model.iterdir():
        (model / each.name).write_bytes(each.read_bytes())
    file = sweep(here, model)
    alone = safecl("run", str(file), "--set", f"execution.root={tmp_path / 'root'}", timeout_s=400)
    assert alone.returncode == 0, alone.stderr[-3000:]

    # What lies on the driver's machine is hidden from the head and from the other node.
    with s3() as server, postgres() as database, nodes(
        tmp_path / "cluster", {"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1},
        environment=server.environment, hidden=(here,), driver=1,
    ) as cluster:  # fmt: skip
        there = ["--set", f"execution.root={server.url}", "--set", f"execution.address={cluster.address}",
                 "--set", f"execution.study_uri={database}/studies",
                 "--set", f"execution.tracking_uri={database}/tracking"]  # fmt: skip
        run = safecl("run", str(file), *there, timeout_s=500)
        assert run.returncode == 0, run.stderr[-3000:] + run.stdout[-2000:]
        store = Store(server.url)
        assert measured(store) == measured(Store(str(tmp_path / "root"))) != {}
        assert not cluster.strays, cluster.strays
        assert store.remote is not None
        assert (
            not store.remote.list("scratch")
            and not store.remote.list("uploads")
            and not store.remote.list("notes/lease")
        )
        before = store.remote.list("")
        again = safecl("run", str(file), *there, timeout_s=200)
        assert again.returncode == 0 and "nothing left to do" in again.stdout + again.stderr
        changed = {name for name in {**before, **store.remote.list("")} if not name.startswith(("notes/", "logs/"))}
        assert changed == {name for name in before if not name.startswith(("notes/", "logs/"))}
        kinds = {path.parent.name for node in list(cluster.made)[1:] for path in node.glob("*/store/*/*")}
        assert {"model", "finetune"} <= kinds, "the nodes that compute fetched what they needed"
        assert "finetune-" in safecl("logs", "--root", server.url, timeout_s=60).stdout
