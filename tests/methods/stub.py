"""A run with a handful of parameters, for closed forms: the real engine, no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from safecl.training.engine import TorchEngine


class Few(nn.Module):
    """Parameters by name."""

    def __init__(self, **values: list[float]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))


def run(**values: list[float]) -> Any:
    """What a method's hooks touch: parameters, gradients, logs."""
    engine = TorchEngine(Few(**values), weight_decay=0.0, max_grad_norm=1e9)
    logged: dict[str, float] = {}

    def log(name: str, value: Any) -> None:
        logged[name] = float(value)

    return SimpleNamespace(
        engine=engine, parameters=lambda: engine.named, log=log, log_whole=log, logged=logged, num_parts=1, world_size=1,
        theta=engine.flat_parameters, set_theta=engine.set_flat_parameters, gradient=engine.flat_grad,
        set_gradient=engine.set_flat_grad, add_gradient=lambda extra: engine.set_flat_grad(engine.flat_grad() + extra),
        sizes=lambda: engine.sizes, step=0, num_steps=10, kept={},
    )  # fmt: skip
