"""What the finetune stage records. Its run on a cluster: tests/test_trainers.py; its loop: tests/training, tests/methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safecl.stages import finetune
from safecl.testing import world as contract


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

    def made(weight: Any) -> Any:
        """A model with `weight(module name, base weight)` for adapted modules."""
        other = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()
        for name in tuned:
            other.get_submodule(name).weight.data = weight(name, base[f"{name}.weight"])
        return other

    def answers(weight: Any) -> torch.Tensor:
        """Log-probabilities [N, V] at response tokens."""
        other = made(weight)
        with torch.no_grad():
            rows = run.rows[: finetune.GAP_ROWS]
            logits = [other(torch.tensor([row.ids])).logits[0, row.num_prompt - 1 : -1] for row in rows]
        return torch.cat(logits).log_softmax(-1)

    def folded(name: str, weight: torch.Tensor) -> torch.Tensor:
        return (weight + safe[name]).to(kind).float() if adapter == "stack" else weight + safe[name]

    def as_trained(name: str, weight: torch.Tensor) -> torch.Tensor:
        return folded(name, weight) + tuned[name] - safe[name]

    trained = answers(as_trained)
    probe = json.loads((tmp_path / "result" / "probe.json").read_text())
    assert sum(len(row["ids"]) for row in probe) == finetune.PROBE_TOKENS  # the last one is cut
    assert all(row["ids"] == whole.ids[: len(row["ids"])] for row, whole in zip(probe, run.rows, strict=False))
    for row in probe:
        with torch.no_grad():
            logprobs_TV = made(as_trained)(torch.tensor([row["ids"]])).logits[0, :-1].log_softmax(-1)
        assert row["logprobs"] == pytest.approx(
            logprobs_TV.gather(1, torch.tensor(row["ids"])[1:, None])[:, 0].tolist(), abs=1e-3
        )

    def divergence(other: torch.Tensor) -> float:
        return float((trained.exp() * (trained - other)).sum(-1).mean())

    merged = divergence(answers(lambda name, weight: (weight + tuned[name]).to(kind).float()))
    assert facts["kl_moved"] == pytest.approx(divergence(answers(folded)), rel=1e-3) and facts["kl_moved"] > 1e-3
    assert facts["kl_merged"] == pytest.approx(merged, rel=0.02, abs=1e-7)
    assert merged < 1e-7 if dtype == "float32" else merged > 5e-6
