"""The contract, over every file of methods/. Every run has dropout 0.1 and micro-batches that cut batches unevenly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from safecl import methods
from safecl.training.tokens import base_folder
from tests.methods import contract
from tests.methods.contract import World
from tests.training import ranks

NEUTRAL = [name for name in contract.trained() if methods.load(name).neutral() is not None]
# Float32 sums in another order, relative to how far training moved; measured 5e-7, another seed gives about 1.
ROUNDING = 1e-5
BF16_ROUNDING = 0.05  # measured .006 to .015
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero0": {"engine": "deepspeed", "zero": 0},
    "zero1": {"engine": "deepspeed", "zero": 1},
    "zero2": {"engine": "deepspeed", "zero": 2},
    "zero3": {"engine": "deepspeed", "zero": 3},
}


@pytest.fixture(scope="session")
def start(world: World) -> dict[str, Any]:
    """The adapter that every run starts from."""
    return contract.adapter(world.safe.parent)


@pytest.fixture(scope="session")
def one(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every method trained once on one rank of the reference engine: its scratch folder."""
    folder = tmp_path_factory.mktemp("one")
    for name in contract.trained():
        contract.train(world, folder / name, contract.config(name))
    return {name: folder / name for name in contract.trained()}


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_is_sft_bit_for_bit(name: str, world: World, one: dict[str, Path], tmp_path: Path) -> None:
    neutral = methods.load(name).neutral()
    assert neutral is not None
    found = contract.train(world, tmp_path, contract.config(name, **neutral.model_dump()))
    assert contract.same_bits(found, contract.adapter(one["sft"]))


@pytest.mark.parametrize("name", contract.trained())
def test_a_seed_decides_the_weights(name: str, world: World, one: dict[str, Path], tmp_path: Path) -> None:
    settings = contract.config(name)
    assert contract.same_bits(contract.train(world, tmp_path / "again", settings), contract.adapter(one[name]))
    other = contract.train(world, tmp_path / "other", {**settings, "seed": 4})
    assert not contract.same_bits(other, contract.adapter(one[name]))


@pytest.mark.parametrize("name", contract.trained())
def test_an_interrupted_run_resumes_bit_for_bit(name: str, world: World, one: dict[str, Path], tmp_path: Path) -> None:
    from safecl.stages import finetune

    class Interrupted(Exception):
        pass

    def stop_at_four(step: int) -> None:
        if step == 4:
            raise Interrupted

    settings, where = contract.config(name), contract.execution(checkpoint_every_s=1e-9)
    with pytest.raises(Interrupted):
        finetune.train_rows(settings, world.inputs(settings["method"]), tmp_path, where, after_step=stop_at_four)
    seen: list[int] = []
    finetune.train_rows(settings, world.inputs(settings["method"]), tmp_path, where, after_step=seen.append)
    assert seen == list(range(5, 1 + len(contract.curves(one[name]))))
    assert contract.same_bits(contract.adapter(tmp_path), contract.adapter(one[name]))
    assert contract.curves(tmp_path) == contract.curves(one[name])


@pytest.mark.parametrize("name", contract.trained())
@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_ranks_engines_and_micro_batches_change_only_rounding(
    engine: str, num: int, name: str, world: World, one: dict[str, Path], start: dict[str, Any], tmp_path: Path
) -> None:
    """On real ranks, with micro-batches of 2."""
    where = {**ENGINES[engine], "micro_batch_size": 2}
    ranks.run(contract.train_on_rank, num, world, str(tmp_path), contract.config(name), where)
    assert contract.gap(contract.adapter(one[name]), contract.adapter(tmp_path), start) < ROUNDING
    for mine, theirs in zip(contract.curves(one[name]), contract.curves(tmp_path), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_ranks_and_engines_agree_in_bfloat16_too(
    engine: str, world: World, start: dict[str, Any], tmp_path: Path
) -> None:
    """As far as bfloat16 goes: the factors are float32, activations are not, and other shapes round otherwise."""
    settings = {name: contract.config(name, dtype="bfloat16") for name in ("der", "ewc", "agem", "refresh")}
    where = {**ENGINES[engine], "micro_batch_size": 2}
    for name, own in settings.items():
        alone = contract.train(world, tmp_path / name, own)
        ranks.run(contract.train_on_rank, 2, world, str(tmp_path / engine / name), own, where)
        assert contract.gap(alone, contract.adapter(tmp_path / engine / name), start) < BF16_ROUNDING


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "interpolate": [
        {"kind": "slerp"},
        {"kind": "ties"},
        {"kind": "dare"},
        {"kind": "task_arithmetic", "safe_share": 1.0},
    ],
    "safelora": [{"mode": "number"}, {"projector": "exact"}],
    "ewc": [{"fisher_norm": "none"}],
    "refresh": [{"variant": "paper"}],
    "kl": [{"on": "user"}, {"on": "memory"}],
}


@pytest.mark.parametrize("name", methods.names())
def test_the_default_search_space_is_one_that_a_search_can_use(name: str) -> None:
    """Of hyperparameters that exist, around the defaults, whose ends are allowed; a method without a number has none."""
    from safecl.check import _space_errors
    from safecl.config import Method

    for given in [{}, *VARIANTS.get(name, [])]:
        kind = methods.load(name)
        config = kind.Config(**given)
        assert bool(kind.search_space(config)) == any(isinstance(v, int | float) for v in config.model_dump().values())
        assert _space_errors(kind, Method(name=name, config=given, search={}), config) == []
    assert kind.equation and kind.cost and len(kind.equation) < 100


@pytest.mark.parametrize("name", contract.trained())
def test_only_the_trained_adapter_moves_and_the_base_stays(name: str, world: World, one: dict[str, Path]) -> None:
    import json

    tuned, safe = contract.adapter(one[name]), contract.adapter(world.safe.parent)
    assert set(tuned) == set(safe)
    assert all(bool((tuned[key] != safe[key]).any()) for key in tuned)
    assert not any("embed" in key or "lm_head" in key for key in tuned)
    assert base_folder(world.model) == world.model
    config = json.loads((one[name] / "result" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"


# -- other architectures, types and adapters ---------------------------------------------------------------------------

NEEDS_ONE_ADAPTER = ("ewc", "refresh")  # refused with `stack`, see test_ewc.py
CORNERS = [("mistral", "float32", "continue"), ("gemma2", "float32", "stack"), ("gemma2", "bfloat16", "continue"),
           ("llama", "bfloat16", "stack")]  # fmt: skip


Corner = tuple[str, str, str]


@pytest.fixture(scope="session")
def corners(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> Callable[[Corner], tuple[World, dict[str, Any]]]:
    """By architecture, dtype and adapter mode: a world, and SFT's result there. Each is made once, when first asked for (a
    fixture with parameters would be made anew for every method)."""

    @cache
    def make(corner: Corner) -> tuple[World, dict[str, Any]]:
        kind, dtype, adapter = corner
        folder = tmp_path_factory.mktemp("corner")
        world = contract.build_world(folder, tiny_models[kind], adapter, dtype)
        return world, contract.train(world, folder / "sft", contract.config("sft", dtype=dtype, adapter=adapter))

    return make


@pytest.mark.parametrize(
    ("corner", "name"),
    [(c, name) for c in CORNERS for name in contract.trained() if c[2] == "continue" or name not in NEEDS_ONE_ADAPTER],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_method_trains_elsewhere_too(
    name: str, corner: Corner, corners: Callable[[Corner], tuple[World, dict[str, Any]]], tmp_path: Path
) -> None:
    """Neutral is SFT bit for bit, what it holds starts at zero, and the adapter has the shape of its mode."""
    world, plain = corners(corner)
    mode = {"dtype": corner[1], "adapter": corner[2]}
    found = contract.train(world, tmp_path / "own", contract.config(name, dropout=0.0, **mode))
    assert not contract.same_bits(found, plain)  # dropout at least
    if (neutral := methods.load(name).neutral()) is not None:
        again = contract.train(world, tmp_path / "neutral", contract.config(name, **mode, **neutral.model_dump()))
        assert contract.same_bits(again, plain)
    first, *_, last = contract.curves(tmp_path / "own")
    for held in {"der", "lwf", "ewc", "kl_user", "kl_memory"} & set(first):
        assert first[held] < (1e-8 if mode["dtype"] == "float32" else 0.05) and last[held] > first[held]
    start = contract.adapter(world.safe.parent)
    rank = {len(t) for n, t in found.items() if "lora_A" in n}
    assert rank == ({16} if mode["adapter"] == "stack" else {8}) and set(found) == set(start)
