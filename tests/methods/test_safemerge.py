from __future__ import annotations

import pytest
import torch

from safecl.methods.safemerge import Safemerge
from safecl.training.weights import LoRA


def _low(seed: int, scale: float = 0.5) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    return LoRA(torch.randn(3, 7, generator=generator), torch.randn(9, 3, generator=generator), scale)


SAFE = {name: _low(i) for i, name in enumerate("abcd")}
TUNED = {
    name: LoRA(s.down_RI + 0.1 * _low(i + 20).down_RI, s.up_OR + 0.3 * _low(i + 20).up_OR, s.scale)
    for i, (name, s) in enumerate(SAFE.items())
}


def _cosine(name: str) -> float:
    """cos(C U, U) with every matrix written out."""
    v = SAFE[name].delta().double()
    u = TUNED[name].delta().double() - v
    cu = v @ v.T @ u / v.norm()
    return float((u * cu).sum() / (u.norm() * cu.norm()))


def test_modules_below_the_threshold_are_merged_and_others_left_alone() -> None:
    cosines = {name: _cosine(name) for name in SAFE}
    order = sorted(cosines, key=lambda name: cosines[name])
    threshold = (cosines[order[1]] + cosines[order[2]]) / 2
    log: dict[str, object] = {}
    found = dict(Safemerge(Safemerge.Config(threshold=threshold, share=0.8)).finalize(SAFE, TUNED, log))  # type: ignore[arg-type]
    for name in SAFE:
        s, t = SAFE[name].delta(), TUNED[name].delta()
        expected = 0.2 * s + 0.8 * t if name in order[:2] else t
        assert torch.allclose(found[name].delta(), expected, atol=1e-5), name
    assert log["merged"] == 2 and log["modules"] == 4
    assert log["cosines"] == pytest.approx(sorted(cosines.values()), abs=2e-5)


def test_the_neutral_setting_is_the_tuned_adapter_and_a_zero_alignment_is_left_alone() -> None:
    found = dict(Safemerge(Safemerge.neutral()).finalize(SAFE, TUNED, {}))
    assert all(found[name] is TUNED[name] for name in SAFE)
    nothing = {"a": LoRA(SAFE["a"].down_RI, torch.zeros(9, 3), 0.5)}
    found = dict(Safemerge(Safemerge.Config(threshold=1.0, share=0.0)).finalize(nothing, {"a": TUNED["a"]}, {}))
    assert found["a"] is TUNED["a"]
