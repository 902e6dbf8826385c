"""A LoRA-adapted linear layer as one autograd node, and dropout that depends only on the row.

    y = W x + b + s B A d(x),       d: dropout of the row,  s = alpha / r

PEFT computes this as a chain of six operations over all tokens, each with a copy for its backward. Here the forward
is three matrix products and the backward five. Only x, A d(x) and, with dropout, a mask are kept. A and B are
float32. Their products are computed in the base's dtype, as under autocast.

Shapes: P tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from safecl.training import fused

DRAWS = 2**16  # dropout probabilities are multiples of 1 / DRAWS


class Rows(list[tuple[int, int]]):
    """(dropout seed, length in tokens) of each row of the running forward, in order."""

    tokens: tuple[Tensor, Tensor] | None = None  # on the device, per token: its row's seed, its place in the row

    def set(self, rows: Iterable[tuple[int, int]], tokens: tuple[Tensor, Tensor] | None = None) -> None:
        """Set the rows, and `tokens` if they are known."""
        self[:] = rows
        self.tokens = tokens

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`tokens` on this device; computed if they are not set."""
        if self.tokens is None:
            lengths = torch.tensor([length for _, length in self])
            seeds_P = torch.tensor([seed for seed, _ in self]).repeat_interleave(lengths)
            places_P = torch.cat([torch.arange(length) for _, length in self])
            self.tokens = seeds_P.to(device), places_P.to(device)
        return self.tokens


class RowDropout(nn.Module):
    """LoRA dropout whose mask depends only on (row seed, module). So two ranks draw the same masks as one would, an
    extra forward changes no other mask, and a resumed run needs no random state."""

    def __init__(self, probability: float, module_index: int, rows: Rows) -> None:
        super().__init__()
        self.probability, self.module_index = probability, module_index
        self.rows = rows  # shared by all modules
        self.cut = round(probability * DRAWS)

    @property
    def active(self) -> bool:
        """Whether elements are dropped: in training, with a probability above 0."""
        return self.training and self.cut > 0

    @property
    def scale(self) -> float:
        """The factor for kept elements."""
        return DRAWS / (DRAWS - self.cut)

    def kept(self, x_PI: Tensor) -> Dropped:
        """The function that drops elements of x, and the tensors it needs; the backward uses both again."""
        if kernels := fused.kernels_for(x_PI):
            known = self.rows.on(x_PI.device)
            if len(known[0]) != len(x_PI):
                raise RuntimeError(f"dropout has seeds for {len(known[0])} tokens, got {len(x_PI)} tokens")
            return partial(kernels.drop, module=self.module_index, cut=self.cut), known
        return by_mask, (self.mask(x_PI),)

    def mask(self, x_PI: Tensor) -> Tensor:
        """1 where an element is kept, else 0, as int8: a CPU multiplies int8 three times as fast as booleans."""
        if sum(length for _, length in self.rows) != len(x_PI):
            raise RuntimeError(f"dropout has seeds for rows of {self.rows}, got {len(x_PI)} tokens")
        kept_PI = torch.empty(x_PI.shape, dtype=torch.int8, device=x_PI.device)
        generator = torch.Generator(device=x_PI.device)
        for (seed, _), kept in zip(self.rows, torch.split(kept_PI, [length for _, length in self.rows]), strict=True):
            generator.manual_seed((seed + self.module_index * 0x9E3779B97F4A7C15) % 2**63)
            # 16 random bits per element, four elements per 64-bit draw: 6 times faster than bernoulli_ on a CPU.
            draws = torch.empty(-(-kept.numel() // 4), dtype=torch.int64, device=x_PI.device)
            draws.random_(-(2**63), None, generator=generator)
            kept.copy_(draws.view(torch.int16)[: kept.numel()].view_as(kept).ge_(self.cut - DRAWS // 2))
        return kept_PI

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        x_PI = x.flatten(0, -2)
        drop, known = self.kept(x_PI)
        dropped_PI: Tensor = _Drop.apply(x_PI, drop, *known)  # type: ignore[no-untyped-call]
        return dropped_PI.view_as(x) * self.scale


def by_mask(x_PI: Tensor, mask_PI: Tensor, base_PI: Tensor | None = None) -> Tensor:
    """x where an element is kept, else 0. With `base_PI` the result is added to it in place, and x is overwritten."""
    return x_PI * mask_PI if base_PI is None else base_PI.add_(x_PI.mul_(mask_PI))


# The function that drops, called as `(x, *known, base=None)` like `by_mask`, and the tensors `known` that it needs.
Dropped = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, drop: Callable[..., Tensor], *known: Tensor) -> Tensor:
        ctx.save_for_backward(*known)
        ctx.drop = drop
        return drop(x_PI, *known)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return ctx.drop(outer[0], *known), None, *[None] * len(known)


def _scaled(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """scale * first @ second, with the scale applied inside the matrix product."""
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
        ctx.drop, known = drop.kept(x_PI) if drop is not None and drop.active else (None, ())
        factor = scale if ctx.drop is None else scale * drop.scale
        own_RI, own_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        inner_PR = _scaled(x_PI if ctx.drop is None else ctx.drop(x_PI, *known), own_RI.T, factor)
        y_PO.addmm_(inner_PR, own_OR.T)
        ctx.save_for_backward(x_PI, weight_OI, own_RI, own_OR, inner_PR, *known)
        ctx.factor = factor
        return y_PO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, weight_OI, own_RI, own_OR, inner_PR, *known = ctx.saved_tensors
        grad = outer[0]
        grad_PO = grad.reshape(-1, grad.shape[-1])
        inner_grad_PR = _scaled(grad_PO, own_OR, ctx.factor)
        grad_RI = (inner_grad_PR.T @ (x_PI if ctx.drop is None else ctx.drop(x_PI, *known))).float()
        grad_OR = (inner_PR.T @ grad_PO).T.float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_PI = grad_PO @ weight_OI
            if ctx.drop is None:
                grad_PI.addmm_(inner_grad_PR, own_RI)
            else:
                ctx.drop(inner_grad_PR @ own_RI, *known, grad_PI)
            grad_x = grad_PI.view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_RI, grad_OR, None, None


def _forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    y: Tensor = _LoraLinear.apply(
        x, base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight,
        layer.scaling["default"], layer.lora_dropout["default"],
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return y


def seed_dropout(peft_model: Any, rows: Rows) -> None:
    """Replace the dropout of every adapted layer by one that depends on `rows`. The caller sets `rows` before each
    forward."""
    index = 0
    for module in peft_model.modules():
        drop = getattr(module, "lora_dropout", None)
        if isinstance(drop, nn.ModuleDict) and "default" in drop:
            probability = drop["default"].p if isinstance(drop["default"], nn.Dropout) else 0.0
            drop["default"] = RowDropout(probability, index, rows)
            index += isinstance(drop["default"], RowDropout) and probability > 0


def fuse(peft_model: Any) -> None:
    """Let every plainly adapted linear layer compute as one node. Other layers (GPT-2's Conv1D) keep PEFT's forward."""
    from peft.tuners.lora import Linear

    for module in peft_model.modules():
        if isinstance(module, Linear) and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.forward = MethodType(_forward, module)
