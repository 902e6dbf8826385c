from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.config import Template
from safecl.methods import regmean
from safecl.stages import finalize
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import weights
from safecl.training.run import Memory


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    contract.train(world, folder, contract.config("sft", dropout=0.0))
    return folder / "result"


def merged(world: World, tuned: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    config = {
        "method": "regmean", "params": params, "dtype": "float32", "template": Template().model_dump(), "bos": False,
        "max_tokens": 256,
    }  # fmt: skip
    inputs = {"model": world.model, "safe": world.safe, "tuned": tuned, "user": world.user, "memory": world.memory}
    return finalize.finalize(config, inputs, out)


def seen(model: Any, rows: list[list[int]], names: list[str]) -> dict[str, torch.Tensor]:
    """What each linear module of a plain Hugging Face model is given, [all tokens, I], by hooks of our own."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        keep = parts[name]
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, keep=keep: keep.append(given[0][0]))
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    return {name: torch.cat(found).double() for name, found in parts.items()}


def whole(world: World, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world.model)
    return PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().eval()


@pytest.mark.parametrize(("share", "off_diagonal"), [(0.5, 0.5), (0.8, 0.9)])
def test_it_is_the_least_squares_merge(
    share: float, off_diagonal: float, world: World, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W ((1-a) G_s + a G_u) = (1-a) S G_s + a T G_u with whole weights and the inputs that two plain models see."""
    monkeypatch.setattr(regmean, "GROUP_BYTES", 2**20)  # several groups
    facts = merged(world, tuned, tmp_path / "out", share=share, off_diagonal=off_diagonal, num_rows=20)
    assert (facts["memory_rows"], facts["user_rows"]) == (contract.NUM_MEMORY, 20)
    found = weights.load(tmp_path / "out" / "adapter")
    names = list(found)
    remembered = [row.ids for row in Memory.load(world.memory).rows]
    teacher = Memory.load(world.teacher)  # the user rows, tokenised
    first, second = whole(world, world.safe), whole(world, tuned)
    before = {name: weights.load(world.safe / "adapter")[name].delta() for name in names}
    x_safe, x_user = seen(first, remembered, names), seen(second, [row.ids for row in teacher.rows[:20]], names)
    far = 0.0
    for name in names:
        s, t = (dict(model.named_modules())[name].weight.double() for model in (first, second))
        g_s, g_u = (x.T @ x / len(x) for x in (x_safe[name], x_user[name]))
        for g in (g_s, g_u):
            kept = g.diagonal().clone()
            g *= off_diagonal
            g.diagonal().copy_(kept)
        k = (1 - share) * g_s + share * g_u
        ridge = 1e-6 * k.diagonal().mean() * torch.eye(len(k)).double()
        right = (1 - share) * s @ g_s + share * t @ g_u + s @ ridge
        w = torch.linalg.solve(k + ridge, right.T).T
        expected = w - (s - before[name].double())  # a delta from theta_0
        far = max(far, float((found[name].delta().double() - expected).norm() / (t - s).norm()))
    assert far < 1e-3


def test_a_direction_that_safety_rows_never_see_keeps_the_users_update_and_the_other_way_round() -> None:
    """Two inputs, each seen on rows of one kind: W is T on the user's, S on the safety's."""
    safe = {"m": weights.LoRA(torch.eye(2), torch.tensor([[1.0, 1.0]]), 1.0)}
    after = {"m": weights.LoRA(torch.eye(2), torch.tensor([[5.0, 7.0]]), 1.0)}

    class Seen:
        def rows(self, name: str) -> list[str]:
            return [name]

        def inner_products(self, which: str, rows: list[str], names: list[str]) -> dict[str, torch.Tensor]:
            return {"m": torch.diag(torch.tensor([1.0, 0.0] if which == "safe" else [0.0, 1.0]))}

    method = regmean.Regmean(regmean.Regmean.Config())
    method.read(Seen())  # type: ignore[arg-type]
    [(_, found)] = list(method.finalize(safe, after, {}))
    assert found.delta().tolist() == [pytest.approx([1.0, 7.0], abs=1e-4)]


def test_the_graph_gives_it_rows_and_the_model_and_no_other_post_hoc_method() -> None:
    from tests.test_around import final, grid

    found = grid(methods="[{name: regmean, config: {num_rows: 9}}, {name: safelora}]")
    stage = final(found["regmean"]).graph.final
    assert stage is not None and sorted(stage.inputs) == ["memory", "model", "safe", "tuned", "user"]
    assert stage.inputs["user"] is final(found["regmean"]).graph.user_rows and stage.config["max_tokens"] == 128
    plain = final(found["safelora"]).graph.final
    assert plain is not None and sorted(plain.inputs) == ["safe", "tuned"]
    assert sorted(plain.config) == ["dtype", "method", "params"]
    assert stage.inputs["memory"].config["num_rows"] == 9
