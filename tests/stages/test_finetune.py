"""The finetune stage on a real Ray cluster: about 60 s."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Execution
from safecl.stages import finetune
from safecl.store import Context, Stage
from tests.methods import contract


@dataclass
class KillOnce:
    """A progress callback that kills the worker it runs in, once, at step 4."""

    marker: Path

    def __call__(self, done: int, total: int, metrics: dict[str, float]) -> None:
        with (self.marker.parent / "progress").open("a") as file:
            file.write(f"{done}/{total}\n")
        if done >= 4 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), 9)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    yield
    ray.shutdown()


def _context(world: contract.World, folder: Path, settings: dict[str, Any], report: Any, **where: Any) -> Context:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    execution = Execution(**{"checkpoint_every_s": 0.2, "max_failures": 1, **where})
    return Context(Stage("finetune", settings), world.inputs(settings["method"]), out, scratch, execution, report)


def test_a_killed_worker_is_replaced_and_the_result_is_the_uninterrupted_one(
    world: contract.World, tmp_path: Path, ray_cluster: None
) -> None:
    settings = contract.config("der")
    settings["training"] = {**settings["training"], "epochs": 20.0}  # long enough for progress at more than one step
    context = _context(world, tmp_path / "ray", settings, KillOnce(tmp_path / "killed"), engine="torch")
    facts = finetune.run(context)
    assert (tmp_path / "killed").exists()
    contract.train(world, tmp_path / "plain", settings)
    from safetensors.torch import load_file

    found = load_file(str(context.out / "adapter" / "adapter_model.safetensors"))
    assert contract.same_bits(found, contract.adapter(tmp_path / "plain"))
    assert (context.out / "curves.jsonl").read_text() == (tmp_path / "plain" / "result" / "curves.jsonl").read_text()
    assert facts["steps"] == 92 and facts["rows"] == 23
    assert (tmp_path / "progress").read_text().splitlines()[-1] == "92/92"


def test_two_workers_under_zero_train_and_a_refusal_is_no_worker_failure(
    world: contract.World, tmp_path: Path, ray_cluster: None
) -> None:
    settings = contract.config("sft")
    context = _context(world, tmp_path / "two", settings, None, num_workers=2, zero=2)
    finetune.run(context)
    from safetensors.torch import load_file

    one = contract.train(world, tmp_path / "one", settings)
    found = load_file(str(context.out / "adapter" / "adapter_model.safetensors"))
    assert contract.gap(one, dict(found), contract.adapter(world.safe.parent)) < 1e-5
    refused = {**settings, "lora": {**settings["lora"], "rank": 4}}
    with pytest.raises(ConfigError, match="r is 8, expected 4"):
        finetune.run(_context(world, tmp_path / "refused", refused, None, engine="torch"))


@pytest.mark.parametrize(
    ("dtype", "adapter"), [("float32", "continue"), ("bfloat16", "continue"), ("bfloat16", "stack")]
)
def test_the_record_says_what_rounding_the_merge_costs(
    world: contract.World, tmp_path: Path, dtype: str, adapter: str
) -> None:
    """Against float32 Hugging Face models row by row, their weights made by hand."""
    import dataclasses
    import json

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=kind)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(world.model).save_pretrained(tmp_path / "model")
    world = dataclasses.replace(world, model=tmp_path / "model")
    settings = contract.config("sft", dtype=dtype, adapter=adapter)
    contract.train(world, tmp_path, settings)
    facts = json.loads((tmp_path / "result" / "result.json").read_text())
    run = finetune.make_run(settings, world.inputs(), contract.execution()).run

    def deltas(folder: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        scale = {8: 0.5, 16: 1.0}[len(next(t for n, t in tensors.items() if "lora_A" in n))]
        return {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
            * tensors[name.replace("lora_A", "lora_B")]
            @ down
            for name, down in tensors.items()
            if "lora_A" in name
        }

    base = {name: p.detach().float() for name, p in model.named_parameters()}
    safe, tuned = deltas(world.safe / "adapter"), deltas(tmp_path / "result" / "adapter")

    def answers(weight: Any) -> torch.Tensor:
        """Log-probabilities [N, V] at response tokens, with `weight(module name, base weight)` for adapted modules."""
        other = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()
        for name in tuned:
            other.get_submodule(name).weight.data = weight(name, base[f"{name}.weight"])
        with torch.no_grad():
            rows = run.rows[: finetune.GAP_ROWS]
            logits = [other(torch.tensor([row.ids])).logits[0, row.num_prompt - 1 : -1] for row in rows]
        return torch.cat(logits).log_softmax(-1)

    def folded(name: str, weight: torch.Tensor) -> torch.Tensor:
        return (weight + safe[name]).to(kind).float() if adapter == "stack" else weight + safe[name]

    trained = answers(lambda name, weight: folded(name, weight) + tuned[name] - safe[name])

    def divergence(other: torch.Tensor) -> float:
        return float((trained.exp() * (trained - other)).sum(-1).mean())

    merged = divergence(answers(lambda name, weight: (weight + tuned[name]).to(kind).float()))
    assert facts["kl_moved"] == pytest.approx(divergence(answers(folded)), rel=1e-3) and facts["kl_moved"] > 1e-3
    assert facts["kl_merged"] == pytest.approx(merged, rel=0.02, abs=1e-7)
    assert merged < 1e-7 if dtype == "float32" else merged > 5e-6


@pytest.mark.slow  # longer than Ray Train's own patience of 60 s
def test_a_finetune_waits_for_as_long_as_others_hold_the_cpus(
    world: contract.World, ray_cluster: None, tmp_path: Path
) -> None:
    import time

    import ray

    def hold() -> None:
        time.sleep(75)

    held = ray.remote(num_cpus=2)(hold).remote()
    started = time.monotonic()
    facts = finetune.run(_context(world, tmp_path, contract.config("sft"), None, num_workers=1))
    assert facts["steps"] == 7 and time.monotonic() - started > 60
    ray.get(held)
