from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safecl.config import Template
from safecl.stages import finetune, memory
from safecl.testing import world as contract
from safecl.testing.world import World


def _world(world: World, rule: str, out: Path) -> World:
    """The same world with the teacher's states at another rule's positions."""
    out.mkdir()
    settings = {
        "num_rows": None, "seed": 3, "template": Template().model_dump(), "bos": False, "dtype": "float32",
        "max_tokens": 256, "positions": rule, "adapter": "continue",
    }  # fmt: skip
    memory.remember(settings, {"model": world.model, "safe": world.safe, "rows": world.user}, out)
    return World(**{**vars(world), "teacher": out})


@pytest.mark.parametrize("rule", ["response", "all", "last"])
def test_the_distance_is_zero_at_theta_safe_and_literal_away_from_it(rule: str, world: World, tmp_path: Path) -> None:
    """Mean over positions and dimensions of |h - h_safe|^2, from hidden_states[-1] of two Hugging Face models."""
    here = _world(world, rule, tmp_path / "teacher")
    settings = contract.config("lwf", dropout=0.0, weight=2.0, positions=rule)
    made = finetune.make_run(settings, here.inputs("lwf"), contract.execution(micro_batch_size=2))
    run, method = made.run, made.method
    method.prepare(run)
    run.indices = [4, 0, 7, 2, 11]
    share = run.share(run.indices, 0)

    def distance() -> float:
        run.metrics = {}
        with torch.no_grad():
            for part, _ in run.each_part(share):
                method.loss(run, part)
        return run.metrics["lwf"]

    assert distance() < 1e-10
    safe, student = contract.theta_safe(world), contract.theta_safe(world)
    change = torch.randn(student.model.norm.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the final norm is in h, and no adapter is on it
        student.model.norm.weight.add_(0.1 * change)
        run.model.get_base_model().model.norm.weight.add_(0.1 * change)
        total, num = 0.0, 0
        for i in run.indices:
            row = run.rows[i]
            ids = torch.tensor([row.ids])
            first, last = {"response": (row.num_prompt - 1, -1), "all": (0, None), "last": (-2, -1)}[rule]
            h, h_safe = (m(ids, output_hidden_states=True).hidden_states[-1][0, first:last] for m in (student, safe))
            total, num = total + float(((h - h_safe) ** 2).mean(1).sum()), num + len(h)
    assert total > 0.01
    assert distance() == pytest.approx(total / num, rel=1e-4)


def test_a_heavier_weight_holds_the_states_nearer(world: World, tmp_path: Path) -> None:
    last = {}
    for weight in (0.01, 100.0):
        contract.train(world, tmp_path / str(weight), contract.config("lwf", dropout=0.0, weight=weight))
        last[weight] = contract.curves(tmp_path / str(weight))[-1]["lwf"]
    assert last[100.0] < 0.5 * last[0.01]


def test_states_of_other_tokens_are_refused(world: World, tmp_path: Path) -> None:
    short = {**contract.config("lwf"), "template": {**Template().model_dump(), "prompt": "<|im_start|>{prompt}"}}
    with pytest.raises(RuntimeError, match="other tokens"):
        contract.train(world, tmp_path, short)
