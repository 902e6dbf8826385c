from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safecl.config import Lora
from safecl.training import model, weights


def test_the_deltas_of_a_saved_adapter_are_what_peft_merges_into_the_base(tiny_model: Path, tmp_path: Path) -> None:
    lora = Lora(dropout=0.0, targets=("q_proj", "down_proj")).model_dump()
    peft_model = model.with_adapter(model.load(tiny_model, "float32"), lora, seed=1)
    with torch.no_grad():
        for name, factor in model.factors(peft_model).items():
            if "lora_B" in name:
                factor.fill_(0.02)
    model.save_adapter(peft_model, tmp_path)
    found = weights.load(tmp_path)
    assert len(found) == 2 * 2  # two modules in two layers
    plain = dict(model.load(tiny_model, "float32").named_parameters())
    merged = dict(peft_model.merge_and_unload().named_parameters())
    for name, delta in found.items():
        change = merged[f"{name}.weight"] - plain[f"{name}.weight"]
        assert change.abs().max() > 0 and torch.allclose(delta.delta(), change, atol=1e-6)


def test_an_adapter_that_means_more_than_its_factors_is_refused_as_an_engine_refuses_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    peft_model = model.with_adapter(model.load(tiny_model, "float32"), Lora(targets=("q_proj",)).model_dump(), seed=1)
    model.save_adapter(peft_model, tmp_path)
    file = tmp_path / "adapter_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, "use_rslora": True}))
    [scale] = {delta.scale for delta in weights.load(tmp_path).values()}
    assert scale == plain["lora_alpha"] / plain["r"] ** 0.5
    for more in ({"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 1}}):
        file.write_text(json.dumps({**plain, **more}))
        with pytest.raises(ValueError, match=f"expected plain LoRA.*{next(iter(more))}"):
            weights.load(tmp_path)
