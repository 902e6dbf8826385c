from __future__ import annotations

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


def test_distance_is_the_norm_of_the_difference_of_deltas() -> None:
    low = weights.LoRA(torch.ones(1, 2), torch.ones(3, 1), 0.5)  # a 3 x 2 matrix of 0.5
    assert weights.distance({"m": low}, {"m": weights.Dense(torch.zeros(3, 2))}) == pytest.approx((6 * 0.25) ** 0.5)
    with pytest.raises(ValueError, match="different modules"):
        weights.distance({"m": low}, {})
