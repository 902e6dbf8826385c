"""A LoRA-adapted linear layer as one node of the graph, and dropout that depends on the row alone.

    y = W x + b + s B A d(x),       d: dropout of the row,  s = alpha / r

PEFT computes this as a chain of six operations over all tokens, each with a copy for its backward. Here the forward is
three matrix products and the backward five, and what is kept is x, A d(x) and, with dropout, a mask. A and B are float32;
their products are taken in the base's dtype, as under autocast.

Shapes: P tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

DRAWS = 2**16  # dropout probabilities are multiples of 1 / DRAWS


class RowDropout(nn.Module):
    """LoRA dropout whose mask depends on (row seed, module) alone: two ranks draw what one would, a forward more or
    less changes nobody else's mask, and a resumed run needs no random state."""

    def __init__(self, probability: float, module_index: int, rows: list[tuple[int, int]]) -> None:
        super().__init__()
        self.probability, self.module_index = probability, module_index
        self.rows = rows  # shared by all modules: (seed, length) of each row of the running forward, end to end
        self.cut = round(probability * DRAWS)

    @property
    def active(self) -> bool:
        return self.training and self.cut > 0

    @property
    def scale(self) -> float:
        """What a kept element is multiplied by."""
        return DRAWS / (DRAWS - self.cut)

    def mask(self, x_PI: Tensor) -> Tensor:
        """1 where an element is kept, else 0: in int8, which a CPU multiplies by three times as fast as by booleans."""
        if sum(length for _, length in self.rows) != len(x_PI):
            raise RuntimeError(f"dropout has seeds for rows of {self.rows}, got {len(x_PI)} tokens")
        kept_PI = torch.empty(x_PI.shape, dtype=torch.int8, device=x_PI.device)
        generator = torch.Generator(device=x_PI.device)
        for (seed, _), kept in zip(self.rows, torch.split(kept_PI, [length for _, length in self.rows]), strict=True):
            generator.manual_seed((seed + self.module_index * 0x9E3779B97F4A7C15) % 2**63)
            # 16 random bits an element, four to a 64-bit draw: 6 times faster than bernoulli_ on a CPU.
            draws = torch.empty(-(-kept.numel() // 4), dtype=torch.int64, device=x_PI.device)
            draws.random_(-(2**63), None, generator=generator)
            kept.copy_(draws.view(torch.int16)[: kept.numel()].view_as(kept).ge_(self.cut - DRAWS // 2))
        return kept_PI

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        return x * self.mask(x.flatten(0, -2)).view_as(x) * self.scale


def _scaled(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """scale * first @ second, by the matrix product itself."""
    return torch.addmm(first.new_empty(1), first, second, beta=0, alpha=scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        drop: Any,
    ) -> Tensor:
        x_PI = x.reshape(-1, x.shape[-1])
        y_PO = torch.nn.functional.linear(x_PI, weight_OI, bias_O)
        mask_PI = drop.mask(x_PI) if drop is not None and drop.active else None
        factor = scale if mask_PI is None else scale * drop.scale
        own_RI, own_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        inner_PR = _scaled(x_PI if mask_PI is None else x_PI * mask_PI, own_RI.T, factor)
        y_PO.addmm_(inner_PR, own_OR.T)
        ctx.save_for_backward(x_PI, weight_OI, own_RI, own_OR, inner_PR, mask_PI)
        ctx.factor = factor
        return y_PO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, weight_OI, own_RI, own_OR, inner_PR, mask_PI = ctx.saved_tensors
        grad = outer[0]
        grad_PO = grad.reshape(-1, grad.shape[-1])
        inner_grad_PR = _scaled(grad_PO, own_OR, ctx.factor)
        grad_RI = (inner_grad_PR.T @ (x_PI if mask_PI is None else x_PI * mask_PI)).float()
        grad_OR = (inner_PR.T @ grad_PO).T.float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_PI = grad_PO @ weight_OI
            if mask_PI is None:
                grad_PI.addmm_(inner_grad_PR, own_RI)
            else:
                grad_PI.add_((inner_grad_PR @ own_RI).mul_(mask_PI))
            grad_x = grad_PI.view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_RI, grad_OR, None, None


def _forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    y: Tensor = _LoraLinear.apply(
        x, base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight,
        layer.scaling["default"], layer.lora_dropout["default"],
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return y


def seed_dropout(peft_model: Any, rows: list[tuple[int, int]]) -> None:
    """Make the dropout of every adapted layer depend on `rows` (seed, length), which the caller fills per forward."""
    index = 0
    for module in peft_model.modules():
        drop = getattr(module, "lora_dropout", None)
        if isinstance(drop, nn.ModuleDict) and "default" in drop:
            probability = drop["default"].p if isinstance(drop["default"], nn.Dropout) else 0.0
            drop["default"] = RowDropout(probability, index, rows)
            index += isinstance(drop["default"], RowDropout) and probability > 0


def fuse(peft_model: Any) -> None:
    """Let every plainly adapted linear layer compute as one node. Others (GPT-2's Conv1D) stay PEFT's."""
    from peft.tuners.lora import Linear

    for module in peft_model.modules():
        if isinstance(module, Linear) and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.forward = MethodType(_forward, module)
