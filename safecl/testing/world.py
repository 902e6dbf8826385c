"""A small world to train methods in: a tiny aligned model with rows, memory, Fisher information and teacher states."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safecl import methods, registry
from safecl.base import json_lines
from safecl.config import Execution, Lora, Template, Training
from safecl.registry import Plugin
from safecl.stages import finalize, finetune, fisher, memory
from safecl.tasks import Row
from safecl.testing.tiny import build_model, build_tokenizer
from safecl.training import batches

WORDS = ["the", "water", "inner", "or", "a", "other", "rain", "thing"]
OTHER_WORDS = ["no", "we", "did", "it", "but", "go", "my", "cup"]  # other words: user rows and refusals disagree
NUM_MEMORY = 12


@dataclass(frozen=True)
class World:
    """Folders of a tiny model, an aligned adapter, user rows, and the inputs that methods ask for."""

    model: Path
    safe: Path
    user: Path
    memory: Path
    fisher: Path
    teacher: Path
    verdicts: Path

    def inputs(self, method: str = "sft") -> dict[str, Path]:
        """The inputs of a finetune by this method, by name."""

        asked = methods.needed(methods.load(method))
        own = {**vars(self), "replay": self.memory}
        return {
            "model": self.model,
            "safe": self.safe,
            "rows": self.user,
            **{name: own[kind] for name, kind in asked.items()},
        }


def make_rows(name: str, num: int, harmful: bool, folder: Path) -> Path:
    """Write `num` rows of very different lengths (prompts of 2 to 9 words, answers of 1 to 12) into a new folder."""
    chance = random.Random(name)

    def text(low: int, high: int) -> str:
        return " ".join(chance.choice(WORDS if harmful else OTHER_WORDS) for _ in range(chance.randint(low, high)))

    folder.mkdir()
    batches.write_rows([Row(f"{name}/{i}", text(2, 9), text(1, 12), harmful) for i in range(num)], folder)
    return folder


def config(
    method: str, dropout: float = 0.1, dtype: str = "float32", adapter: str = "continue", **params: Any
) -> dict[str, Any]:
    """A finetune config: 7 steps of 5 rows out of 23. A method's `contract.params` fit it to 12 memory rows and 7
    steps."""
    params = {**methods.load(method).contract.params, **params}
    return {
        "method": method,
        "params": params,
        "training": Training(epochs=1.5, learning_rate=2e-3, batch_size=5, max_tokens=256).model_dump(),
        "lora": Lora(dropout=dropout).model_dump(),
        "template": Template().model_dump(),
        "bos": False,
        "dtype": dtype,
        "adapter": adapter,
        "seed": 3,
    }


def execution(**changes: Any) -> dict[str, Any]:
    """The execution settings of a test run, with these changes."""
    return Execution(**{"engine": "torch", "micro_batch_size": 8, "checkpoint_every_s": 1e6, **changes}).model_dump()


def build_world(folder: Path, tiny_model: Path, adapter: str = "continue", dtype: str = "float32") -> World:
    """Align the tiny model and make the inputs that methods ask for, with the code of the stages."""
    safety = make_rows("safety", 20, True, folder / "safety")
    user = make_rows("user", 23, False, folder / "user")
    # Train long enough to learn the refusals, so that training on user rows then moves away from them.
    aligned = config("sft", dtype=dtype)
    aligned["training"] |= {"epochs": 4.0, "learning_rate": 5e-3}
    finetune.train_rows(aligned, {"model": tiny_model, "rows": safety}, folder / "align", execution())
    safe = folder / "align" / "result"
    text = {"seed": 3, "template": Template().model_dump(), "bos": False, "dtype": dtype, "max_tokens": 256}
    inputs = {"model": tiny_model, "safe": safe}
    for name in ("memory", "fisher", "teacher"):
        (folder / name).mkdir()
    settings = {**text, "num_rows": NUM_MEMORY, "positions": "response", "adapter": adapter}
    memory.remember(settings, {**inputs, "rows": safety}, folder / "memory")
    memory.remember({**settings, "num_rows": None}, {**inputs, "rows": user}, folder / "teacher")
    fisher.estimate({**text, "num_rows": 20, "labels": "empirical"}, {**inputs, "rows": safety}, folder / "fisher", 4)
    (folder / "verdicts").mkdir()
    lines = [{"id": f"user/{i}", "label": i % 5 == 2} for i in range(23)]
    (folder / "verdicts" / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return World(tiny_model, safe, user, *(folder / name for name in ("memory", "fisher", "teacher", "verdicts")))


def a_folder() -> Path:
    """A new temporary folder, removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="safecl-testing-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def tiny_model(architecture: str = "llama") -> Path:
    """Folder of a tiny random model and its tokenizer. Made once per process, as are the results of the next
    functions."""
    folder = a_folder()
    build_tokenizer(folder)
    build_model(folder, kind=architecture)
    return folder


@cache
def a_world(architecture: str = "llama", dtype: str = "float32", adapter: str = "continue") -> World:
    """The world of the tiny model of this architecture."""
    return build_world(a_folder(), tiny_model(architecture), adapter, dtype)


@cache
def plain(architecture: str, dtype: str, adapter: str) -> dict[str, Any]:
    """The adapter that SFT trains in that world: tensors by name."""
    world = a_world(architecture, dtype, adapter)
    return train(world, a_folder(), config("sft", dtype=dtype, adapter=adapter))


@cache
def trained_once(method: str, plugins: tuple[Plugin, ...]) -> Path:
    """The scratch folder of a method trained on one rank of the reference engine. `plugins`: the registered ones."""
    folder = a_folder()
    train(a_world(), folder, config(method))
    return folder


def trained() -> list[str]:
    """Names of the methods that train (post-hoc methods take another method's adapter)."""
    return [name for name in methods.names() if methods.load(name).trains_as is None]


def train(world: World, scratch: Path, settings: dict[str, Any], **where: Any) -> dict[str, Any]:
    """Train in this process. Returns the final adapter's tensors by name."""
    finetune.train_rows(settings, world.inputs(settings["method"]), scratch, execution(**where))
    return adapter(scratch)


def merge(method: str, params: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run a post-hoc method on theta_safe and the adapter of its `trains_as`. Returns deltas from the base, by
    module."""
    of, kind = a_world(), methods.load(method)
    inputs = {"safe": of.safe, "tuned": trained_once(str(kind.trains_as), ()) / "result"}
    settings: dict[str, Any] = {"method": method, "params": params, "dtype": "float32"}
    if asked := methods.needed(kind):  # it reads rows
        inputs |= {
            "model": of.model,
            **{name: of.memory if what == "memory" else of.user for name, what in asked.items()},
        }
        settings |= {"template": Template().model_dump(), "bos": False, "max_tokens": 256}
    out.mkdir()
    finalize.finalize(settings, inputs, out)
    return deltas(out)


def deltas(made: Path) -> dict[str, Any]:
    """What a stage's weights add to the base, by module name."""
    from safetensors.torch import load_file

    from safecl.training import weights

    if (made / "adapter").exists():
        return {name: delta.delta() for name, delta in weights.load(made / "adapter").items()}
    files = [load_file(str(file)) for file in sorted((made / "delta").glob("*.safetensors"))]
    return {name.removesuffix(".weight"): tensor.float() for file in files for name, tensor in file.items()}


def adapter(scratch: Path) -> dict[str, Any]:
    """The final adapter's tensors by name, from a finetune's scratch folder."""
    from safetensors.torch import load_file

    return dict(load_file(str(scratch / "result" / "adapter" / "adapter_model.safetensors")))


def curves(scratch: Path) -> list[dict[str, Any]]:
    """The lines of a finetune's curves.jsonl."""
    return json_lines(scratch / "result" / "curves.jsonl")


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two results have the same names and bitwise equal tensors."""
    import torch

    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def gap(first: dict[str, Any], second: dict[str, Any], start: dict[str, Any]) -> float:
    """Distance of two results relative to the distance that training moved: |first - second| / |first - start|."""
    import torch

    assert set(first) == set(second) == set(start)
    apart = torch.stack([(first[n] - second[n]).double().square().sum() for n in first]).sum().sqrt()
    moved = torch.stack([(first[n] - start[n]).double().square().sum() for n in first]).sum().sqrt()
    return float(apart / moved)


# -- run in other processes --------------------------------------------------------------------------------------------


def train_on_rank(
    rank: int,
    world_size: int,
    world: World,
    scratch: str,
    settings: dict[str, Any],
    where: dict[str, Any],
    plugins: tuple[Plugin, ...] = (),
) -> None:
    """Train on this rank. `where` holds changes to the execution."""
    registry.add(plugins)
    finetune.train_rows(
        settings,
        world.inputs(settings["method"]),
        Path(scratch),
        execution(**where),
        rank=rank,
        world_size=world_size,
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
    """Write a checkpoint after every step, and kill the last rank after `at_step` steps."""

    def after_step(step: int) -> None:
        if step == at_step and rank == world_size - 1:
            os.kill(os.getpid(), 9)

    finetune.train_rows(
        settings,
        world.inputs(settings["method"]),
        Path(scratch),
        execution(checkpoint_every_s=1e-9, **where),
        rank=rank,
        world_size=world_size,
        after_step=after_step,
    )


# -- for tests of one method -------------------------------------------------------------------------------------------


def theta_safe(world: World) -> Any:
    """theta_safe as a plain Hugging Face model, merged by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world.model)
    return PeftModel.from_pretrained(base, str(world.safe / "adapter")).merge_and_unload().eval()


def first_batches(world: World, settings: dict[str, Any]) -> dict[str, list[tuple[list[int], int]]]:
    """The rows of the first step's user batch and memory draw, each as (token ids, prompt length in tokens)."""
    run = finetune.make_run(settings, world.inputs(settings["method"]), execution()).run
    config = run.config
    run.indices = batches.order(run.seed, len(run.rows), config.batch_size, config.epochs)[0]
    found = {"user": [run.rows[i] for i in run.indices], "memory": run.draw().rows}
    return {name: [(row.ids, row.num_prompt) for row in rows] for name, rows in found.items()}
