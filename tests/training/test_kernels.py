"""Each kernel against the operations it replaces, forward and backward. Skipped where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def draw() -> Any:
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device="cuda")


@pytest.fixture
def kernels() -> Any:
    pytest.importorskip("triton")
    from safecl.training import kernels

    return kernels


def _same(found: torch.Tensor, exact: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert (found.double() - exact.double()).norm() < tolerance * exact.double().norm()


@pytest.mark.parametrize("width", [37, 2304, 4096])
def test_norm(width: int, draw: Any, kernels: Any) -> None:
    x, weight, outer = draw(5, width).requires_grad_(), draw(width), draw(5, width)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    y.backward(outer)
    found, inverse = kernels.norm(x.detach(), weight, 1e-6)
    _same(found, y.detach())
    _same(kernels.norm_back(x.detach(), weight, inverse, outer), x.grad)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kind: str, draw: Any, kernels: Any) -> None:
    gate, up, outer = draw(7, 300).requires_grad_(), draw(7, 300).requires_grad_(), draw(7, 300)
    y = (functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")) * up
    y.backward(outer)
    _same(kernels.gated(gate.detach(), up.detach(), kind), y.detach())
    for found, exact in zip(kernels.gated_back(gate.detach(), up.detach(), outer, kind), (gate, up), strict=True):
        _same(found, exact.grad)


@pytest.mark.parametrize("size", [20, 128])
def test_rotated(size: int, draw: Any, kernels: Any) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = draw(1, 11, 3, size).transpose(1, 2).requires_grad_()
    cos, sin, outer = draw(1, 11, size), draw(1, 11, size), draw(1, 3, 11, size)
    y, _ = apply_rotary_pos_emb(x, x, cos, sin)
    y.backward(outer)
    _same(kernels.rotated(x.detach(), cos, sin, False), y.detach())
    _same(kernels.rotated(outer, cos, sin, True), x.grad)


@pytest.mark.parametrize("window", [None, 4])
def test_capped_weights(window: int | None, draw: Any, kernels: Any) -> None:
    scores, outer = (draw(6, 13, 13) * 30).requires_grad_(), draw(6, 13, 13)
    seen = torch.ones(13, 13, dtype=torch.bool, device="cuda").tril()
    seen = seen if window is None else seen.triu(1 - window)
    weights = (torch.tanh(scores * 0.7 / 5) * 5).masked_fill(~seen, float("-inf")).softmax(-1)
    weights.backward(outer)
    _same(kernels.capped_weights(scores.detach(), 0.7, window, 5.0), weights.detach())
    found, slope = scores.detach().clone(), outer.clone()
    kernels.capped_weights_back(found, slope, 0.7, window, 5.0)
    _same(found, weights.detach())
    _same(slope, scores.grad, 1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_cross_entropy(cap: float | None, draw: Any, kernels: Any) -> None:
    raw = (draw(6, 5000) * 3).requires_grad_()
    targets = torch.arange(6, device="cuda") * 7
    logits = raw if cap is None else cap * torch.tanh(raw / cap)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    losses.sum().backward()
    _same(kernels.cross_entropy(raw.detach(), targets, cap, False), losses.detach())
    found = raw.detach().clone()
    _same(kernels.cross_entropy(found, targets, cap, True), losses.detach())
    _same(found, raw.grad)


def test_what_is_dropped_is_of_the_row_the_place_and_the_module(draw: Any, kernels: Any) -> None:
    x, places = torch.ones(400, 1500, device="cuda"), torch.arange(400, device="cuda")
    seeds = torch.full((400,), 2**62 + 7, device="cuda")
    found = kernels.drop(x, seeds, places, module=3, cut=6554)
    deviation = (0.1 * 0.9 / x.numel()) ** 0.5
    assert abs(1 - float(found.mean()) - 6554 / 2**16) < 4 * deviation
    assert torch.equal(kernels.drop(x[5:], seeds[5:], places[5:], module=3, cut=6554), found[5:])
    assert torch.equal(kernels.drop(x, seeds, places, x.clone(), module=3, cut=6554), found + 1)
    for other in (
        kernels.drop(x, seeds, places, module=4, cut=6554),
        kernels.drop(x, seeds + 1, places, module=3, cut=6554),
    ):
        assert abs(float(((other == 0) & (found == 0)).float().mean()) - 0.01) < 1e-3  # independent
