from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Lora
from safecl.training import batches, model, tokens
from safecl.training.lora import RowDropout
from safecl.training.model import HiddenStates
from safecl.training.tokens import Encoded

IDS = torch.tensor([[5, 9, 40, 41]])
LORA = Lora(dropout=0.0).model_dump()


def _moved(tiny_model: Path, folder: Path) -> Path:
    """A PEFT folder whose B is not zero."""
    peft_model = model.with_adapter(model.load(tiny_model, "float32"), LORA, seed=1)
    with torch.no_grad():
        for name, factor in model.factors(peft_model).items():
            if "lora_B" in name:
                factor.fill_(0.02)
    model.save_adapter(peft_model, folder)
    return folder


def _batch() -> batches.Batch:
    row = Encoded("row", IDS[0].tolist(), 1)
    return batches.collate([row], [0], [0], 3, row, "cpu")


def _hidden(peft_model: Any) -> torch.Tensor:
    with torch.no_grad():
        return HiddenStates(peft_model).eval()(_batch())


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal but for float32 rounding."""
    return bool((first - second).norm() < 1e-6 * second.norm())


def test_a_fresh_adapter_changes_nothing_and_comes_from_the_seed(tiny_model: Path) -> None:
    base = model.load(tiny_model, "float32")
    with torch.no_grad():
        plain = base.model(IDS).last_hidden_state
    before = torch.random.get_rng_state()
    adapters = [model.with_adapter(model.load(tiny_model, "float32"), LORA, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert _close(_hidden(adapters[0]), plain[0])
    first, again, other = ({k: v.detach() for k, v in model.factors(a).items()} for a in adapters)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_factors_are_float32_on_a_bfloat16_base_and_only_they_are_trained(tiny_model: Path) -> None:
    peft_model = model.with_adapter(model.load(tiny_model, "bfloat16"), LORA, seed=1)
    kinds = {("lora_" in name, p.dtype, p.requires_grad) for name, p in peft_model.named_parameters()}
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}


def test_a_saved_adapter_is_peft_and_loads_to_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = _moved(tiny_model, tmp_path / "adapter")
    ours = model.with_adapter(model.load(tiny_model, "float32"), LORA, seed=5, continue_from=folder)
    theirs = PeftModel.from_pretrained(model.load(tiny_model, "float32"), str(folder)).eval()
    with torch.no_grad():
        expected = theirs.get_base_model().model(IDS).last_hidden_state
        plain = model.load(tiny_model, "float32").model(IDS).last_hidden_state
    assert _close(_hidden(ours), expected[0]) and not torch.allclose(expected, plain)
    assert _close(_hidden(model.with_continued(model.load(tiny_model, "float32"), folder)), expected[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_theta_safe_is_the_same_folded_into_the_base_as_beside_it(dtype: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = _moved(tiny_model, tmp_path / "adapter")

    def states(kind: str, dtype: str) -> torch.Tensor:
        safe = model.theta_safe(model.load(tiny_model, dtype), folder, kind)
        assert not safe.training
        with torch.no_grad():
            return safe(_batch()).double()

    plain = _hidden(model.with_adapter(model.load(tiny_model, dtype), LORA, seed=1)).double()
    beside, folded, exact = states("continue", dtype), states("stack", dtype), states("continue", "float32")
    apart, moved, rounding = (beside - folded).norm(), (beside - plain).norm(), (beside - exact).norm()
    # Folding rounds the weights once: no more than what computing in this type costs anyway.
    assert apart < (1e-4 * moved if dtype == "float32" else 2 * rounding)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_embedding_or_head_is_refused(target: str, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=target):
        model.with_adapter(model.load(tiny_model, "float32"), {**LORA, "targets": ["q_proj", target]}, seed=1)


def test_an_adapter_of_the_last_layers_goes_on_as_one(tiny_model: Path, tmp_path: Path) -> None:
    lora = {**LORA, "last_layers": 1}
    peft_model = model.with_adapter(model.load(tiny_model, "float32"), lora, seed=1)
    assert all(".layers.1." in name for name in model.factors(peft_model))
    model.save_adapter(peft_model, tmp_path / "adapter")
    for again in (
        model.with_adapter(model.load(tiny_model, "float32"), lora, 2, tmp_path / "adapter"),
        model.with_continued(model.load(tiny_model, "float32"), tmp_path / "adapter"),
    ):
        theirs, ours = model.factors(again), model.factors(peft_model)
        assert set(theirs) == set(ours) and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_all_linear_means_the_inner_layers(tiny_model: Path) -> None:
    peft_model = model.with_adapter(model.load(tiny_model, "float32"), {**LORA, "targets": "all-linear"}, seed=1)
    modules = {name.split(".lora_")[0] for name in model.factors(peft_model)}
    assert len(modules) == 2 * 7  # two layers of q, k, v, o, gate, up, down


def test_an_adapter_of_another_shape_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = _moved(tiny_model, tmp_path / "adapter")
    for changes, words in (({"rank": 4}, "r is 8, expected 4"), ({"targets": ["q_proj"]}, "names differ")):
        with pytest.raises(ConfigError, match=words):
            model.with_adapter(model.load(tiny_model, "float32"), {**LORA, **changes}, 1, folder)


def test_a_pointer_leads_to_the_model_and_a_missing_one_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "where.json").write_text(json.dumps({"path": str(tiny_model)}))
    assert tokens.base_folder(tmp_path) == tiny_model and tokens.base_folder(tiny_model) == tiny_model
    with pytest.raises(PrerequisiteError, match="nowhere"):
        model.load(tmp_path / "nowhere", "float32")


def test_dropout_is_of_the_row_whatever_stands_beside_it() -> None:
    def drop(*rows: tuple[int, int], module: int = 3) -> torch.Tensor:
        layer = RowDropout(0.25, module, list(rows)).train()
        return layer(torch.ones(1, sum(length for _, length in rows), 64))[0]

    alone, beside = drop((9, 50)), drop((5, 80), (9, 50))
    assert torch.equal(alone, beside[80:])
    assert not torch.equal(beside[:50], beside[80:]) and not torch.equal(alone, drop((9, 50), module=4))
    many = drop((1, 4000))
    share = float((many == 0).float().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / many.numel()) ** 0.5  # four standard errors
    assert float(many.max()) == pytest.approx(1 / 0.75)
    layer = RowDropout(0.25, 0, [(1, 2)]).eval()
    assert torch.equal(layer(torch.ones(1, 2, 3)), torch.ones(1, 2, 3))
    with pytest.raises(RuntimeError, match="got 3 tokens"):
        layer.train()(torch.ones(1, 3, 3))
