"""RMS normalisation as one autograd node, for models whose own code takes a dozen.

    y = w' * x / sqrt(mean(x^2) + eps),     w' = w, or 1 + w (Gemma)

For one norm autograd keeps about six tensors of all tokens and passes over them about twenty times. That is a tenth
of a training step on a CPU. Here only x, w' and the inverse root mean square are kept. A module is replaced only if
one of the two forms gives the module's own result.

Shapes: P tokens, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safecl.training import fused


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if kernels := fused.kernels_for(x_PD):
            y_PD: Tensor
            y_PD, inverse_P = kernels.norm(x_PD, weight_D, eps)
            ctx.save_for_backward(x_PD, weight_D, inverse_P)
            return y_PD
        norm_P1 = torch.linalg.vector_norm(x_PD, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_P1 = norm_P1.square_().div_(x_PD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_PD, weight_D, inverse_P1)
        if x_PD.is_cuda:
            wide = torch.promote_types(x_PD.dtype, weight_D.dtype)
            y_PD = torch.nn.functional.rms_norm(x_PD.to(wide), weight_D.shape, weight_D.to(wide), eps)
        elif weight_D.dtype == x_PD.dtype:
            y_PD = (x_PD * inverse_P1).to(x_PD.dtype).mul_(weight_D)
        else:
            y_PD = (x_PD * inverse_P1).mul_(weight_D)
        return y_PD.to(x_PD.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        x_PD, weight_D, inverse_P1 = ctx.saved_tensors
        if kernels := fused.kernels_for(x_PD):
            return kernels.norm_back(x_PD, weight_D, inverse_P1, outer[0]), None, None
        unit_PD = x_PD * inverse_P1
        grad_PD = outer[0] * weight_D
        along_P1 = torch.linalg.vecdot(grad_PD.float(), unit_PD)[..., None].div_(x_PD.shape[-1])
        return torch.addcmul(grad_PD, unit_PD, along_P1, value=-1).mul_(inverse_P1).to(x_PD.dtype), None, None


def _forward(weight_D: Tensor, eps: float, hidden_states: Tensor) -> Tensor:
    y: Tensor = _RmsNorm.apply(hidden_states, weight_D, eps)  # type: ignore[no-untyped-call]
    return y


def fuse(model: nn.Module) -> None:
    """Replace the forward of every RMS norm with frozen weights for which one of the two forms gives its result."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
            continue
        if not isinstance(weight, Tensor) or weight.requires_grad:
            continue
        probe = torch.linspace(-2, 3, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
        with torch.no_grad():
            expected = module(probe)
            for form in (weight, 1 + weight.float()):
                found = _RmsNorm.apply(probe, form.detach(), eps)  # type: ignore[no-untyped-call]
                close = 1e-5 if weight.dtype == torch.float32 else 2**-7
                if torch.allclose(found, expected, rtol=close, atol=close):
                    module.forward = partial(_forward, form.detach(), eps)
                    break
