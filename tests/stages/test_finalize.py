"""What post-hoc methods write, and that the served, the exported and the dense forms are the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.serving import swap
from safecl.stages import finalize
from safecl.testing import world as contract
from safecl.training import shards, weights
from safecl.training.tokens import weights_folder


@pytest.fixture(scope="session", params=["continue", "stack"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """theta_safe and an SFT from it, in both adapter modes."""
    folder = tmp_path_factory.mktemp(request.param)
    safety = contract.make_rows("safety", 20, True, folder / "safety")
    user = contract.make_rows("user", 23, False, folder / "user")
    settings = contract.config("sft", adapter=request.param)
    where = contract.execution()
    contract.finetune.train_rows(settings, {"model": tiny_model, "rows": safety}, folder / "align", where)
    safe = folder / "align" / "result"
    contract.finetune.train_rows(settings, {"model": tiny_model, "rows": user, "safe": safe}, folder / "sft", where)
    return {"model": tiny_model, "safe": safe, "tuned": folder / "sft" / "result"}


def run(pair: dict[str, Path], out: Path, method: str, dtype: str = "float32", **params: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return finalize.finalize({"method": method, "params": params, "dtype": dtype}, pair, out)


def deltas(pair: dict[str, Path], name: str) -> dict[str, torch.Tensor]:
    return {k: v.delta() for k, v in weights.load(pair[name] / "adapter").items()}


def test_the_ends_of_a_line_are_served_as_theta_safe_and_the_tuned_model(pair: dict[str, Path], tmp_path: Path) -> None:
    for share, name in ((0.0, "safe"), (1.0, "tuned")):
        facts = run(pair, tmp_path / name, "interpolate", share=share)
        assert facts["rank"] == 8 + len(next(iter(weights.load(pair["tuned"] / "adapter").values())).down_RI)
        mine = dict(swap.merged(pair["model"], weights_folder(tmp_path / name)))
        theirs = dict(swap.merged(pair["model"], pair[name] / "adapter"))
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in mine)


def test_a_dense_result_is_served_as_the_base_plus_its_deltas(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    facts = run(pair, tmp_path, "magmax", scale=0.5)
    folder = weights_folder(tmp_path)
    assert folder.name == "delta" and not (tmp_path / "adapter").exists()
    assert len(set(json.loads((folder / "delta.json").read_text()).values())) > 1 and facts["dense_bytes"] > 200_000
    swap.check(pair["model"], pair["model"], folder)
    safe, tuned, base = deltas(pair, "safe"), deltas(pair, "tuned"), dict(swap.merged(pair["model"], None))
    served = dict(swap.merged(pair["model"], folder))
    for name in safe:
        larger = torch.where(tuned[name].abs() >= safe[name].abs(), tuned[name], safe[name])
        assert torch.allclose(served[f"{name}.weight"], base[f"{name}.weight"] + 0.5 * larger, atol=1e-6)
    assert torch.equal(served["model.norm.weight"], base["model.norm.weight"])


def test_a_delta_of_another_model_is_refused_before_anything_is_loaded(pair: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run(pair, tmp_path, "magmax")
    folder = weights_folder(tmp_path)
    shards = json.loads((folder / "delta.json").read_text())
    name = next(iter(shards))
    save_file({each: torch.zeros(2, 2) for each in shards}, str(folder / shards[name]))
    with pytest.raises(ValueError, match="shape"):
        swap.check(pair["model"], pair["model"], folder)


def test_the_tuned_adapter_of_a_stack_is_both_together(pair: dict[str, Path], tmp_path: Path) -> None:
    """What training computed (fresh adapter on the folded base) is what the saved adapter adds to the bare base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((pair["tuned"] / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(pair["model"], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(pair["tuned"] / "adapter")).merge_and_unload()
    named = dict(theirs.named_parameters())
    served = dict(swap.merged(pair["model"], pair["tuned"] / "adapter"))
    assert all(torch.allclose(named[k], served[k], atol=1e-6) for k in served if k in named)
    tuned, safe = (weights.load(pair[name] / "adapter") for name in ("tuned", "safe"))
    apart = sum(float((delta.delta() - safe[name].delta()).square().sum()) for name, delta in tuned.items()) ** 0.5
    assert apart > 0.01 and config["r"] in (8, 16)


@pytest.mark.parametrize("method", ["safelora", "magmax", "interpolate"])
def test_every_post_hoc_method_writes_what_can_be_served(method: str, pair: dict[str, Path], tmp_path: Path) -> None:
    run(pair, tmp_path, method, dtype="bfloat16")
    swap.check(pair["model"], pair["model"], weights_folder(tmp_path))
    served = dict(swap.merged(pair["model"], weights_folder(tmp_path)))
    base = dict(swap.merged(pair["model"], None))
    assert any(not torch.equal(served[name], base[name]) for name in base)
