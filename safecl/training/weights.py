"""Fine-tuned weights as deltas from the base, module by module. Merges and projections work on these.

    delta of a module = scale * B @ A (LoRA)   or   a dense matrix

On disk: `adapter/` (a PEFT folder) if every module is low-rank, else `delta/` (safetensors shards of dense deltas
with the names of the base's tensors). Shapes: O outputs, I inputs, R rank. Computed in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, overload

import torch
from torch import Tensor

from safecl import peft_files
from safecl.base import ConfigError
from safecl.training.shards import Shards


@dataclass(frozen=True)
class LoRA:
    """A low-rank delta: scale * up_OR @ down_RI. These are PEFT's lora_B and lora_A; scale = alpha / rank."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The whole delta, [O, I], float32."""
        return self.scale * (self.up_OR.float() @ self.down_RI.float())


@dataclass(frozen=True)
class Dense:
    """A full delta [O, I]."""

    delta_OI: Tensor

    def delta(self) -> Tensor:
        """The whole delta, [O, I], float32."""
        return self.delta_OI.float()


Weights: TypeAlias = Mapping[str, LoRA | Dense]  # by module name in the base model


class Made(Weights):
    """Deltas that are made when asked for: dense deltas of all modules would not fit in memory at once."""

    def __init__(self, names: Iterable[str], make: Callable[[str], LoRA | Dense]) -> None:
        self.names, self.make = tuple(names), make

    def __getitem__(self, name: str) -> LoRA | Dense:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def none(like: Mapping[str, LoRA]) -> dict[str, LoRA]:
    """Zero deltas for the modules of `like`: factors of rank 0."""
    return {name: LoRA(delta.down_RI[:0], delta.up_OR[:, :0], 1.0) for name, delta in like.items()}


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str]) -> Made:
    """The dense deltas from the weights `before` to the weights `after`, by module name.

    Raises:
        ConfigError: the models have different shapes.
    """
    names = list(names)
    for name in names:
        first, second = before.get(name), after[name]
        if first is None or first.shape != second.shape:
            has = "has none" if first is None else f"has {list(first.shape)}"
            raise ConfigError(
                f"aligned_from: {name!r} of the model is {list(second.shape)}, its base {has}: is it its base?"
            )
    return Made(names, lambda name: Dense(after[name].float() - before[name].float()))


def load(folder: Path) -> dict[str, LoRA]:
    """The deltas of a PEFT folder, by module name.

    Raises:
        ValueError: the adapter is not a plain LoRA with one rank and alpha.
    """
    from safetensors.torch import load_file

    scale = peft_files.scale(folder)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    return {
        module: LoRA(tensors[down].float(), tensors[up].float(), scale)
        for module, (down, up) in peft_files.factors(folder, tensors).items()
    }


@overload
def combine(parts: Sequence[tuple[LoRA, float]]) -> LoRA: ...
@overload
def combine(parts: Sequence[tuple[LoRA | Dense, float]]) -> LoRA | Dense: ...
def combine(parts: Sequence[tuple[LoRA, float]] | Sequence[tuple[LoRA | Dense, float]]) -> LoRA | Dense:
    """Exact sum of weight * delta, as one delta. It is dense if one of the deltas is.

    Low-rank factors are laid side by side, so the rank is the sum of the ranks. They are never averaged, because
    averaging A and B would add unwanted cross terms.
    """
    low = [(delta, weight) for delta, weight in parts if isinstance(delta, LoRA)]
    if len(low) < len(parts):
        return Dense(torch.stack([weight * delta.delta() for delta, weight in parts]).sum(0))
    return LoRA(
        torch.cat([delta.down_RI.float() for delta, _ in low]),
        torch.cat([weight * delta.scale * delta.up_OR.float() for delta, weight in low], 1),
        1.0,
    )


def save(items: Iterable[tuple[str, LoRA | Dense]], out: Path, like: Path, dtype: str) -> dict[str, int]:
    """Write `out/adapter` if every module is low-rank, else `out/delta`; replaces what is there. Returns {"rank": of
    the adapter} or {"dense_bytes": of the deltas}.

    `like` is a PEFT folder over the same modules. Dense deltas are stored in the base's `dtype` (they are added to it
    in float32), with one shard in memory at a time.
    """
    low: dict[str, LoRA] = {}
    dense = Shards(out / "delta.tmp", "delta")
    for name, delta in items:
        if isinstance(delta, LoRA) and not dense.num_bytes:
            low[name] = delta
            continue
        for each, value in [*low.items(), (name, delta)]:
            dense.add(f"{each}.weight", value.delta().to(getattr(torch, dtype)))
        low = {}
    dense.close()
    for old in ("adapter", "delta"):
        shutil.rmtree(out / old, ignore_errors=True)
    if dense.files:
        (dense.folder / "delta.json").write_text(json.dumps(dense.files, indent=1))
        dense.folder.rename(out / "delta")
        return {"dense_bytes": dense.num_bytes}
    return {"rank": _save_lora(low, out / "adapter", like)}


def _save_lora(weights: Mapping[str, LoRA], folder: Path, like: Path) -> int:
    """Write a PEFT folder of one rank and return the rank. Factors of a smaller rank are filled up with zeros."""
    from safetensors.torch import save_file

    rank = max(len(delta.down_RI) for delta in weights.values())
    tensors: dict[str, Tensor] = {}
    for name, delta in weights.items():
        missing = rank - len(delta.down_RI)
        down_RI = torch.nn.functional.pad(delta.down_RI.float(), (0, 0, 0, missing))
        up_OR = torch.nn.functional.pad(delta.scale * delta.up_OR.float(), (0, missing))
        tensors[f"{peft_files.PREFIX}{name}.lora_A.weight"] = down_RI.contiguous()
        tensors[f"{peft_files.PREFIX}{name}.lora_B.weight"] = up_OR.contiguous()
    config = json.loads((like / "adapter_config.json").read_text())
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "r": rank, "lora_alpha": rank, "use_rslora": False}, indent=2, sort_keys=True)
    )
    return rank
