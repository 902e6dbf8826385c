"""Chains of small operations as one GPU kernel each, in Triton. Each kernel computes in float32 what its chain
computes, and rounds once. Only fused.py imports this file, because there is no Triton without a GPU. fused.py also
says where the kernels are used.

Shapes: P tokens, D numbers of a row, H heads, N rows of scores, T scores of a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 16384  # longest row, in numbers, that one program can hold


def _one_row(size: int) -> dict[str, Any]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 8192 else 16}


# -- RMS normalisation -------------------------------------------------------------------------------------------------


@triton.jit
def _norm(x, weight, y, inverse, eps, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(x + row * size + place, mask=inside, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(inverse + row, factor)
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + place, value * factor * w, mask=inside)


@triton.jit
def _norm_back(x, weight, inverse, grad, grad_x, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < size
    factor = tl.load(inverse + row)
    unit = tl.load(x + row * size + place, mask=inside, other=0.0).to(tl.float32) * factor
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * size + place, mask=inside, other=0.0).to(tl.float32) * w
    along = tl.sum(g * unit, 0) / size
    tl.store(grad_x + row * size + place, (g - unit * along) * factor, mask=inside)


def norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS normalisation: (y, 1 / root mean square of each row)."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        _norm[(inverse.numel(),)](x, weight_D, y, inverse, eps, size, **_one_row(size))
    return y, inverse


def norm_back(x: Tensor, weight_D: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `norm` with respect to x, from the gradient of y; `inverse` as `norm` returned it."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, size = torch.empty_like(x), x.shape[-1]
    if x.numel():
        _norm_back[(inverse.numel(),)](x, weight_D, inverse, grad, grad_x, size, **_one_row(size))
    return grad_x


# -- gated units -------------------------------------------------------------------------------------------------------

ELEMENTS = 1024  # elements per program of an element-wise kernel


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _gate(gate, up, y, num, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    act = tl.sigmoid(g)
    if KIND == "gelu_tanh":
        act = 0.5 + 0.5 * _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
    tl.store(y + place, act * g * u, mask=inside)


@triton.jit
def _gate_back(gate, up, grad, grad_gate, grad_up, num, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    outer = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        s = tl.sigmoid(g)
        act = g * s
        slope = s * (1 + g * (1 - s))
    else:
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        act = 0.5 * g * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * g * g)
    tl.store(grad_gate + place, outer * u * slope, mask=inside)
    tl.store(grad_up + place, outer * act, mask=inside)


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up; `kind` of act: `silu` or `gelu_tanh`."""
    y = torch.empty_like(gate)
    if y.numel():
        _gate[(triton.cdiv(y.numel(), ELEMENTS),)](gate, up, y, y.numel(), KIND=kind, BLOCK=ELEMENTS)
    return y


def gated_back(gate: Tensor, up: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(gradient of gate, gradient of up) of `gated`, from the gradient of its result."""
    grad_gate, grad_up, num = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if num:
        grid = (triton.cdiv(num, ELEMENTS),)
        _gate_back[grid](gate, up, grad.contiguous(), grad_gate, grad_up, num, KIND=kind, BLOCK=ELEMENTS)
    return grad_gate, grad_up


# -- rotary positions --------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x, y, cos, sin, x_head, x_token, y_head, y_token, heads, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, HALF)[None, :]
    at, there = place + token * 2 * half, place < half
    inside = (head < heads) & there
    first = tl.load(x + token * x_token + head * x_head + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + token * x_token + head * x_head + place + half, mask=inside, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos + at, mask=there, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + at + half, mask=there, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + at, mask=there, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + at + half, mask=there, other=0.0).to(tl.float32)
    if BACK:
        low = first * cos_1 + second * sin_2
        high = second * cos_2 - first * sin_1
    else:
        low = first * cos_1 - second * sin_1
        high = second * cos_2 + first * sin_2
    tl.store(y + token * y_token + head * y_head + place, low, mask=inside)
    tl.store(y + token * y_token + head * y_head + place + half, high, mask=inside)


def rotated(x_1HPD: Tensor, cos_1PD: Tensor, sin_1PD: Tensor, back: bool) -> Tensor:
    """Heads [1, H, P, D] rotated by their token's position, or rotated back with `back` (the transpose). The result
    holds each token's heads side by side in memory."""
    _, heads, num, size = x_1HPD.shape
    if x_1HPD.stride(3) != 1:
        x_1HPD = x_1HPD.contiguous()
    y_1HPD = torch.empty((1, num, heads, size), dtype=x_1HPD.dtype, device=x_1HPD.device).transpose(1, 2)
    if y_1HPD.numel():
        _rotate[(num,)](
            x_1HPD, y_1HPD, cos_1PD, sin_1PD, x_1HPD.stride(1), x_1HPD.stride(2), y_1HPD.stride(1), y_1HPD.stride(2),
            heads, size // 2, BACK=back, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return y_1HPD


# -- attention weights under a soft cap --------------------------------------------------------------------------------


@triton.jit
def _capped(scores, out, tokens, window, scale, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    query = row % tokens
    place = tl.arange(0, BLOCK)
    seen = (place <= query) & (place > query - window)
    s = tl.load(scores + row * tokens + place, mask=seen, other=0.0).to(tl.float32)
    z = tl.where(seen, cap * _tanh(s * (scale / cap)), float("-inf"))
    e = tl.exp(z - tl.max(z, 0))
    tl.store(out + row * tokens + place, e / tl.sum(e, 0), mask=place < tokens)


@triton.jit
def _capped_back(scores, grad, tokens, window, scale, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    query = row % tokens
    place = tl.arange(0, BLOCK)
    seen = (place <= query) & (place > query - window)
    s = tl.load(scores + row * tokens + place, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(grad + row * tokens + place, mask=seen, other=0.0).to(tl.float32)
    t = _tanh(s * (scale / cap))
    z = tl.where(seen, cap * t, float("-inf"))
    e = tl.exp(z - tl.max(z, 0))
    w = e / tl.sum(e, 0)
    along = tl.sum(w * g, 0)
    tl.store(scores + row * tokens + place, w, mask=place < tokens)
    tl.store(grad + row * tokens + place, w * (g - along) * (1 - t * t) * scale, mask=place < tokens)


def capped_weights(scores: Tensor, scale: float, window: int | None, cap: float) -> Tensor:
    """softmax(cap tanh(s scale / cap)) of scores s [..., T], over the tokens that each query may see. Every T
    consecutive rows of scores are the T queries of one head, in order."""
    out, num = torch.empty_like(scores), scores.shape[-1]
    _capped[(scores.numel() // num,)](scores, out, num, window or num, scale, cap, **_one_row(num))
    return out


def capped_weights_back(scores: Tensor, grad: Tensor, scale: float, window: int | None, cap: float) -> None:
    """Overwrite `scores` with the weights, and `grad` (the weights' gradient) with the scores' gradient."""
    num = scores.shape[-1]
    _capped_back[(scores.numel() // num,)](scores, grad, num, window or num, scale, cap, **_one_row(num))


# -- cross-entropy -----------------------------------------------------------------------------------------------------


@triton.jit
def _cross_entropy(logits, targets, losses, vocab, cap, CAPPED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    target = tl.load(targets + row)
    picked = tl.load(logits + target).to(tl.float32)
    if CAPPED:
        picked = cap * _tanh(picked / cap)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        z = tl.load(logits + place, mask=place < vocab, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(place < vocab, cap * _tanh(z / cap), float("-inf"))
        higher = tl.maximum(highest, z)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - safe) + tl.exp(z - safe)
        highest = higher
    top = tl.max(highest, 0)
    summed = tl.sum(total * tl.exp(highest - top), 0)
    tl.store(losses + row, tl.log(summed) + top - picked)
    if GRAD:
        for start in range(0, vocab, BLOCK):
            place = start + tl.arange(0, BLOCK)
            z = tl.load(logits + place, mask=place < vocab, other=float("-inf")).to(tl.float32)
            if CAPPED:
                t = _tanh(z / cap)
                z = cap * t
            g = tl.exp(z - top) / summed - tl.where(place == target, 1.0, 0.0)
            if CAPPED:
                g = g * (1 - t * t)
            tl.store(logits + place, g, mask=place < vocab)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, cap: float | None, grad: bool) -> Tensor:
    """-log p(target) of each row, [N], from logits before their soft cap. With `grad`, `logits_NV` is overwritten
    with its gradient."""
    losses_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    if len(logits_NV):
        _cross_entropy[(len(logits_NV),)](
            logits_NV, targets_N, losses_N, logits_NV.shape[1], cap or 1.0, CAPPED=cap is not None, GRAD=grad, BLOCK=4096,
            num_warps=8,
        )  # fmt: skip
    return losses_N


# -- dropout -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["module"])
def _drop(x, base, seeds, places, y, size, module, cut, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    # Four draws of 32 bits at once, for four elements that follow one another.
    four = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    number = (tl.load(places + row) * ((size + 3) // 4) + four).to(tl.uint32)
    other = number * 0
    a, b, c, d = tl.philox(tl.load(seeds + row).to(tl.uint64), number, other + module, other, other)
    drawn = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,))
    kept = (drawn & 0xFFFF) >= cut
    value = tl.where(kept, tl.load(x + row * size + place, mask=inside, other=0.0), 0.0)
    if ADD:
        value += tl.load(base + row * size + place, mask=inside, other=0.0)
    tl.store(y + row * size + place, value, mask=inside)


def drop(
    x_PD: Tensor, seeds_P: Tensor, places_P: Tensor, base_PD: Tensor | None = None, *, module: int, cut: int
) -> Tensor:
    """x where an element is kept, else 0. With `base_PD` the result is added to it in place.

    An element is dropped with probability cut / 2**16. This depends only on its row's seed, its token's place in the
    row, its place in the token's numbers, and the module's number.
    """
    num, size = x_PD.shape
    x_PD = x_PD.contiguous()
    y_PD = torch.empty_like(x_PD) if base_PD is None else base_PD
    if x_PD.numel():
        _drop[(num, triton.cdiv(size, ELEMENTS))](
            x_PD, y_PD, seeds_P, places_P, y_PD, size, module, cut, ADD=base_PD is not None, BLOCK=ELEMENTS
        )  # fmt: skip
    return y_PD
