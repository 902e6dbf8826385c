from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.methods.agem import Agem
from safecl.testing import world as contract
from safecl.testing.world import World
from tests.methods import stub


def projected(g: list[float], ref: list[float]) -> tuple[Any, dict[str, float]]:
    """The gradient that A-GEM leaves, over two parameters, and what it logs."""
    run = stub.run(a=[0.0], b=[0.0])
    method = Agem(Agem.Config())
    method.reference = torch.tensor(ref)
    run.set_gradient(torch.tensor(g))
    method.after_backward(run, None)  # type: ignore[arg-type]
    grad = [float(p.grad) for p in run.parameters().values()]
    run.engine.step(0.1)
    method.after_step(run)
    return grad, run.logged


def test_a_conflicting_gradient_loses_its_part_along_the_memory_gradient() -> None:
    grad, logged = projected([1.0, 0.0], [-1.0, 1.0])  # g.g_s = -1, g_s.g_s = 2: g + g_s / 2
    assert grad == pytest.approx([0.5, 0.5])
    assert logged["violation"] == 1 and logged["cosine"] == pytest.approx(-(0.5**0.5))
    assert grad[0] * -1 + grad[1] * 1 == pytest.approx(0.0, abs=1e-7)  # what is left is not against g_s


def test_a_gradient_that_does_not_conflict_is_not_touched() -> None:
    for ref in ([1.0, 1.0], [0.0, 5.0]):
        grad, logged = projected([0.3, 0.0], ref)
        assert grad == [pytest.approx(0.3), 0.0] and logged["violation"] == 0


def test_the_sign_of_the_real_step_is_logged() -> None:
    """AdamW's first step is -lr * sign(g): along g = (1, 1) it lowers a loss whose gradient is (3, -1), but g = (1, 0)
    projected off (-1, 1) gives a step along (-1, -1), which is orthogonal to it: counted as not lowering."""
    assert projected([1.0, 1.0], [3.0, -1.0])[1]["step_along_ref"] == 1
    assert projected([1.0, 0.0], [-1.0, 1.0])[1]["step_along_ref"] == -1


def test_a_run_logs_all_three_every_step(world: World, tmp_path: Path) -> None:
    contract.train(world, tmp_path, contract.config("agem"))
    for line in contract.curves(tmp_path):
        assert line["violation"] in (0, 1) and abs(line["cosine"]) <= 1 and line["step_along_ref"] in (-1, 1)
        assert (line["cosine"] < 0) == (line["violation"] == 1)
    assert any(line["violation"] for line in contract.curves(tmp_path)), "nothing conflicts: test is void"
