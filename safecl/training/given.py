"""What a post-hoc method may read before it makes final weights: rows as tokens, and inner products of modules'
inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safecl.training import batches, model, tokens
from safecl.training.run import Memory
from safecl.training.tokens import Encoded

FORWARD_TOKENS = 2048  # most tokens of rows in one forward, unless one row is longer


@dataclass(frozen=True)
class Given:
    """The inputs that a post-hoc method's `requires` asked for, by name. `model`, `safe` and `tuned` are inputs too.

    `config`: `template`, `bos`, `dtype`, `max_tokens`.
    """

    inputs: Mapping[str, Path]
    config: Mapping[str, Any]
    device: str = "cpu"

    @cached_property
    def _base(self) -> Any:
        """The base model, loaded once: for a large model loading takes longer than the forwards."""
        return model.load(tokens.base_folder(self.inputs["model"]), self.config["dtype"], self.device)

    def rows(self, name: str) -> list[Encoded]:
        """The rows of an input (a memory, or rows of a role) as tokens. Rows that are too long are left out."""
        folder = self.inputs[name]
        if (folder / "memory.safetensors").is_file():
            return Memory.load(folder).rows
        text = tokens.Tokenizer(tokens.base_folder(self.inputs["model"])), self.config["template"], self.config["bos"]
        return tokens.encode(batches.read_rows(folder), *text, self.config["max_tokens"])[0]

    def inner_products(self, which: str, rows: Sequence[Encoded], names: Sequence[str]) -> dict[str, Tensor]:
        """By module name the inner products X^T X [I, I], float32, of a module's inputs over all tokens of the rows,
        divided by the number of tokens. `which`: the model that reads the rows, `safe` or `tuned`. Memory: I^2
        numbers per module."""
        folder = self.inputs.get(which)
        looking = model.theta_safe(self._base, folder and folder / "adapter", "continue", fused=False)
        found: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Module) -> Any:
            def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                seen_PI = given[0].reshape(-1, given[0].shape[-1]).float()
                found[name] = found.get(name, 0) + seen_PI.T @ seen_PI

            return module.register_forward_pre_hook(look)

        hooks = [watch(name, looking.base.get_submodule(name)) for name in names]
        start = 0
        with torch.no_grad():
            while start < len(rows):
                end = start + 1
                while end < len(rows) and sum(len(row.ids) for row in rows[start : end + 1]) <= FORWARD_TOKENS:
                    end += 1
                some = rows[start:end]
                looking(batches.collate(some, range(len(some)), [0] * len(some), 1, some[0], self.device))
                start = end
        for hook in hooks:
            hook.remove()
        if folder is not None:
            looking.peft_model.unload()  # the base is used again, with another adapter
        num_tokens = sum(len(row.ids) for row in rows)
        return {name: gram_II / num_tokens for name, gram_II in found.items()}
