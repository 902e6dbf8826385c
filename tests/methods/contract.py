"""What every method owes, as functions over a small world. `test_contract.py` runs them over every file of methods/."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl import methods
from safecl.config import Execution, Lora, Template, Training
from safecl.stages import finetune, memory
from safecl.tasks import Row
from safecl.training import batches

WORDS = ["the", "water", "inner", "or", "a", "other", "rain", "thing"]
NUM_MEMORY = 12


@dataclass(frozen=True)
class World:
    """A tiny model, an aligned adapter, user rows, and the inputs that methods ask for."""

    model: Path
    safe: Path
    user: Path
    memory: Path

    def inputs(self) -> dict[str, Path]:
        return {"model": self.model, "safe": self.safe, "rows": self.user, "memory": self.memory}


def make_rows(name: str, num: int, harmful: bool, folder: Path) -> Path:
    """Rows of very different lengths (2 to 9 words asked, 1 to 12 answered)."""
    chance = random.Random(name)

    def text(low: int, high: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(low, high)))

    folder.mkdir()
    batches.write_rows([Row(f"{name}/{i}", text(2, 9), text(1, 12), harmful) for i in range(num)], folder)
    return folder


def config(method: str, dropout: float = 0.1, dtype: str = "float32", **params: Any) -> dict[str, Any]:
    """A finetune config: 7 steps of 5 rows out of 23."""
    return {
        "method": method,
        "params": params,
        "training": Training(epochs=1.5, learning_rate=2e-3, batch_size=5, max_tokens=256).model_dump(),
        "lora": Lora(dropout=dropout).model_dump(),
        "template": Template().model_dump(),
        "bos": False,
        "dtype": dtype,
        "adapter": "continue",
        "seed": 3,
    }


def execution(**changes: Any) -> dict[str, Any]:
    return Execution(**{"engine": "torch", "micro_batch_size": 8, "checkpoint_every_s": 1e6, **changes}).model_dump()


def build_world(folder: Path, tiny_model: Path) -> World:
    """Align the tiny model and make its memory, by the stages' own code."""
    safety = make_rows("safety", 20, True, folder / "safety")
    user = make_rows("user", 23, False, folder / "user")
    finetune.train_rows(config("sft"), {"model": tiny_model, "rows": safety}, folder / "align", execution())
    safe = folder / "align" / "result"
    remembered = folder / "memory"
    remembered.mkdir()
    settings = {
        "num_rows": NUM_MEMORY, "seed": 3, "template": Template().model_dump(), "bos": False, "dtype": "float32",
        "max_tokens": 256,
    }  # fmt: skip
    memory.remember(settings, {"model": tiny_model, "safe": safe, "rows": safety}, remembered)
    return World(tiny_model, safe, user, remembered)


def trained() -> list[str]:
    """Methods that train (the others take another's adapter)."""
    return [name for name in methods.names() if methods.load(name).trains_as is None]


def train(world: World, scratch: Path, settings: dict[str, Any], **where: Any) -> dict[str, Any]:
    """Train in this process; final adapter tensors by name."""
    finetune.train_rows(settings, world.inputs(), scratch, execution(**where))
    return adapter(scratch)


def adapter(scratch: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(str(scratch / "result" / "adapter" / "adapter_model.safetensors")))


def curves(scratch: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (scratch / "result" / "curves.jsonl").read_text().splitlines()]


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    import torch

    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def gap(first: dict[str, Any], second: dict[str, Any], start: dict[str, Any]) -> float:
    """Distance of two results relative to how far training moved: |first - second| / |first - start|."""
    import torch

    assert set(first) == set(second) == set(start)
    apart = torch.stack([(first[n] - second[n]).double().square().sum() for n in first]).sum().sqrt()
    moved = torch.stack([(first[n] - start[n]).double().square().sum() for n in first]).sum().sqrt()
    return float(apart / moved)


# -- run in other processes --------------------------------------------------------------------------------------------


def train_several(
    rank: int, world_size: int, world: World, jobs: list[tuple[str, dict[str, Any], dict[str, Any]]]
) -> None:
    """Each job `(scratch, settings, execution changes)` on this rank."""
    for scratch, settings, where in jobs:
        finetune.train_rows(
            settings, world.inputs(), Path(scratch), execution(**where), rank=rank, world_size=world_size
        )


def train_and_die(
    rank: int,
    world_size: int,
    world: World,
    scratch: str,
    settings: dict[str, Any],
    where: dict[str, Any],
    at_step: int,
) -> None:
    """Checkpoint after every step, and kill the last rank after `at_step` of them."""

    def after_step(step: int) -> None:
        if step == at_step and rank == world_size - 1:
            os.kill(os.getpid(), 9)

    finetune.train_rows(
        settings,
        world.inputs(),
        Path(scratch),
        execution(checkpoint_every_s=1e-9, **where),
        rank=rank,
        world_size=world_size,
        after_step=after_step,
    )
