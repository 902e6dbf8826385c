"""Engines and trainers of several models on a cluster with one unit, which is a resource of Ray's that a node was given: once
engines of three models alone, with a stand-in for vLLM inside real Serve applications; once a whole sweep of two, where all is
real and the models are tiny and random: each turn of an engine is a boot of vLLM, most of a minute on a busy machine."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl.capacity import capacity
from safecl.config import Execution
from safecl.devices import Devices
from safecl.fleet import Fleet
from safecl.lease import NOTE
from safecl.lender import Lender
from safecl.order import UNNAMED, Turn
from safecl.serving.driverless import end_without
from safecl.store import Stage, Store
from tests.cluster import nodes
from tests.test_lease import OTHER


class StandIn:
    """In vLLM's place: which model it serves."""

    def __init__(self, base: Any, settings: Any, store: Any) -> None:
        self.key = base.key

    async def status(self) -> str:
        return str(self.key)


@pytest.mark.slow
def test_engines_of_three_models_in_two_roles_take_turns_on_one_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray import serve

    from safecl.serving import deploy

    monkeypatch.setattr(deploy, "Engine", StandIn)
    models = [Stage("model", {"source": name, "dtype": "float32"}) for name in ("a", "b", "c")]
    with nodes(tmp_path / "cluster", {"num_cpus": 2}, {"num_cpus": 2, "resources": {"slot": 1}}) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        chosen = Execution(address=cluster.address, unit="slot", root=str(tmp_path / "root"))
        held = capacity(chosen, ray.cluster_resources(), 0.0)
        lender = Lender(Devices(held.num_units, turn_s=2.0, linger_s=0.1))
        fleet = Fleet(Store(chosen.root), chosen, lender, held, 8, lambda *_: None, lambda key: None)

        async def ask(role: str, model: Stage, number: int) -> str:
            async with fleet.lease(role, model, f"{number}", "w", Turn.of(UNNAMED, 0.0, number)) as groups:
                [(app,)] = groups.values()
                assert ray.available_resources().get("slot", 0.0) == 0
                found: str = await serve.get_app_handle(app).status.remote()
                return found

        async def scene() -> list[str]:
            asked = [ask(role, model, n) for n in range(2) for model in models for role in ("candidate", "judge")]
            return await asyncio.wait_for(asyncio.gather(*asked), 240)

        found = asyncio.run(scene())
        assert found == [model.key for _ in range(2) for model in models for _ in range(2)]
        booted = {name: group.num_started for name, group in lender.devices.groups.items()}
        assert len(booted) == 6 and set(booted.values()) == {1}
        deploy.shutdown_all(fleet.store.short)


class Driverless(StandIn):
    """It ends without its driver, like an engine."""

    def __init__(self, base: Any, settings: Any, store: Any) -> None:
        super().__init__(base, settings, store)
        end_without(store, settings.name, look_s=0.2, gone_s=1.0)


def test_an_engine_ends_by_itself_once_its_driver_is_gone(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would keep it, with its GPUs, for as long as the cluster lives."""
    from ray import serve

    from safecl.serving import deploy
    from safecl.serving.messages import Settings

    monkeypatch.setattr(deploy, "Engine", Driverless)
    driver, lives = OTHER, Store(str(cluster / "driverless"))
    store = Store(lives.root, owner=driver)
    store.note(NOTE + driver, {"beat": 1})
    for name, of in (("gone", store), ("lives", lives)):
        model = Stage("model", {"source": name})
        deploy.deploy(Settings(name=name, max_model_len=8), model.ref, of, resources={"CPU": 0}, wait=False)
    assert serve.status().applications.keys() >= {"gone", "lives"}
    until = time.monotonic() + 60
    while "gone" in (found := serve.status().applications) or found["lives"].status != "RUNNING":
        assert time.monotonic() < until
        time.sleep(0.1)
    deploy.shutdown("lives")


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
        "align": {"train": False},
        "tasks": [{"task": "mini", "num_rows": 8, **training}],
        "poison": {"task": "mini", "ratios": [0.1]},
        "methods": [{"name": "sft"}],
        "seeds": [0],
        "evaluate": {
            "validation": prompts, "test": prompts, "max_new_tokens": 8, "max_prompt_tokens": 400,
            "judges": {"asr": "guard", "over_refusal": "keywords", "guard": {**guard, "epochs": 24}},
        },
        "execution": {"root": str(root), "engine_max_tokens": 2048, "engine_memory_gib": 0.2, "address": address,
                      "unit": "slot", "turn_s": 20},
    }  # fmt: skip


@pytest.mark.slow
def test_one_unit_brings_a_sweep_of_two_models_in_two_roles_to_its_end(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from tests.test_end_to_end import safecl

    file, root = tmp_path / "turns.yaml", tmp_path / "root"
    models = {name: tiny_models[name] for name in ("llama", "gemma2")}
    with nodes(tmp_path / "cluster", {"num_cpus": 2}, {"num_cpus": 2, "resources": {"slot": 1}}) as cluster:
        file.write_text(yaml.safe_dump(sweep(models, root, cluster.address)))
        done = safecl("run", str(file), "--json", "--accept-judge", timeout_s=570)
        logs = sorted((root / "logs").glob("*.log"))
        assert done.returncode == 0, (done.stderr[-3000:], [(log.name, log.read_text()[-800:]) for log in logs])
    rows = json.loads(done.stdout)["rows"]
    assert {row["model"] for row in rows} == set(models)
    booted = {log.name.removeprefix("engine-").rsplit("-", 2)[0] for log in logs if log.name.startswith("engine-")}
    assert len(booted) == 4  # candidate and judge of each model, each on the one unit
