"""Fine-tuned weights as what they add to the base, module by module. Merges and projections are written on these.

    delta of a module = scale * B @ A (LoRA)   or   a dense matrix

Shapes: O outputs, I inputs, R rank. All float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """A low-rank delta: scale * up_OR @ down_RI (PEFT's lora_B and lora_A; scale = alpha / rank)."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    def delta(self) -> Tensor:
        """[O, I]."""
        return self.scale * (self.up_OR.float() @ self.down_RI.float())


@dataclass(frozen=True)
class Dense:
    """A full delta [O, I]."""

    delta_OI: Tensor

    def delta(self) -> Tensor:
        return self.delta_OI.float()


Weights: TypeAlias = Mapping[str, LoRA | Dense]  # by module name in the base model


def load(folder: Path) -> dict[str, LoRA | Dense]:
    """The deltas of a PEFT folder, by module name."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("use_rslora") or config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{folder}: expected plain LoRA of one rank and alpha, got {config}")
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    modules = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {
        name.removeprefix(PREFIX): LoRA(
            tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float(), scale
        )
        for name in modules
    }


def distance(first: Weights, second: Weights) -> float:
    """L2 norm of the difference of two sets of deltas over the same modules."""
    if set(first) != set(second):
        raise ValueError(f"different modules: {sorted(set(first) ^ set(second))[:3]}")
    squares = [(first[name].delta() - second[name].delta()).square().sum() for name in first]
    return float(torch.stack(squares).sum().sqrt())
