"""Gated units and rotary positions as one autograd node each, on GPUs; and the check whether the GPU kernels work
here.

    y = act(gate(x)) * up(x),     act: SiLU, or GELU by tanh
    q cos + rotate_half(q) sin

transformers computes the first by two passes over the widest states of the model, the second by five passes over each
of queries and keys, and their backwards by twice as many. A module is replaced only if a test on random input shows
that it computes exactly this.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

ACTS = {"silu": nn.SiLU(), "gelu_tanh": nn.GELU(approximate="tanh")}
ROTARY = "apply_rotary_pos_emb"


@cache
def _kernels() -> Any:
    """The module kernels.py; None if Triton is missing or cannot compile."""
    try:
        from safecl.training import kernels

        ones = torch.ones(1, 4, device="cuda")
        kernels.norm(ones, ones[0], 1e-6)
    except Exception as error:  # no Triton, no C compiler, a GPU that Triton does not know: errors of any type
        message = (str(error).splitlines() or [""])[0][:200]
        warnings.warn(
            f"Triton compiles nothing here ({type(error).__name__}: {message}): training is slower", stacklevel=2
        )
        return None
    return kernels


def kernels_for(tensor: Tensor) -> Any:
    """The module with the GPU kernels for this tensor's device; None where they cannot be used."""
    if not tensor.is_cuda or tensor.device.index != torch.cuda.current_device():  # Triton runs on the current device
        return None
    return _kernels()


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        y: Tensor = kernels_for(gate).gated(gate, up, kind)
        return y

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = kernels_for(gate).gated_back(gate, up, outer[0], ctx.kind)
        return grad_gate, grad_up, None


def _gated_forward(module: Any, kind: str, x: Tensor) -> Tensor:
    inner = _Gated.apply(module.gate_proj(x), module.up_proj(x), kind)  # type: ignore[no-untyped-call]
    y: Tensor = module.down_proj(inner)
    return y


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_1HPD: Tensor, cos_1PD: Tensor, sin_1PD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_1PD, sin_1PD)
        y_1HPD: Tensor = kernels_for(x_1HPD).rotated(x_1HPD, cos_1PD, sin_1PD, False)
        return y_1HPD

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return kernels_for(outer[0]).rotated(outer[0], *ctx.saved_tensors, True), None, None


def _rotary(theirs: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
    """The model's own function `theirs`, or one kernel if the arguments are the plain case."""
    plain = len(q) == 1 and cos.ndim == 3 and cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) and not more
    if not plain or named or q.shape[3] % 2 or kernels_for(q) is None:
        return theirs(q, k, cos, sin, *more, **named)
    cos, sin = cos.contiguous(), sin.contiguous()
    return tuple(_Rotated.apply(x, cos, sin) for x in (q, k))  # type: ignore[no-untyped-call]


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Context in which the module has no dropout."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def _act(function: Any, device: torch.device) -> str | None:
    """The key of `ACTS` that `function` computes; None if it is none of them."""
    probe = torch.linspace(-4, 4, 99, device=device)
    try:
        found = function(probe)
    except (TypeError, ValueError, RuntimeError):
        return None
    return next((kind for kind, act in ACTS.items() if torch.allclose(found, act(probe), rtol=0, atol=1e-5)), None)


def _probe_gated(module: Any) -> None:
    weight = module.gate_proj.weight
    kind = _act(module.act_fn, weight.device)
    if kind is None:
        return
    generator = torch.Generator(weight.device).manual_seed(0)
    probe = torch.randn(1, 4, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    with _evaluated(module):
        try:
            expected = module(probe)
        except (TypeError, ValueError, RuntimeError):  # it needs more arguments than hidden states
            return
        found = _gated_forward(module, kind, probe)
    if torch.is_tensor(expected) and (found - expected).norm() <= 2e-2 * expected.norm():
        module.forward = partial(_gated_forward, module, kind)


def _probe_rotary(module: Any) -> None:
    """Replace a module's forward by the same one with `_rotary` as its `apply_rotary_pos_emb`, if the two agree."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names or "forward" in vars(module):
        return
    theirs = forward.__globals__.get(ROTARY)
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator, device=device)
        for shape in ((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 8), (1, 5, 8))
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    try:
        expected = theirs(q, k, cos, sin)  # type: ignore[misc]
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments
        return
    found = _rotary(theirs, q, k, cos, sin)
    if all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True)):
        own = {**forward.__globals__, ROTARY: partial(_rotary, theirs)}
        copy = FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)


def fuse(model: nn.Module) -> None:
    """Let gated units and attentions of a model on a GPU use the kernels, where the kernels compute the same."""
    weight = next(model.parameters(), None)
    if weight is None or kernels_for(weight) is None:
        return
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            _probe_gated(module)
        elif hasattr(module, "q_proj"):
            _probe_rotary(module)
