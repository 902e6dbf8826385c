from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.methods.safegrad import Safegrad
from safecl.testing import world as contract
from safecl.testing.world import World
from tests.methods import reference, stub


def combined(g: list[float], align: list[float], rho: float) -> tuple[list[float], dict[str, float]]:
    """The gradient that SafeGrad leaves, over two parameters, and what it logs."""
    run = stub.run(a=[0.0], b=[0.0])
    method = Safegrad(Safegrad.Config(rho=rho))
    method.reference = torch.tensor(align)
    run.set_gradient(torch.tensor(g))
    method.after_backward(run, None)  # type: ignore[arg-type]
    return [float(p.grad) for p in run.parameters().values()], run.logged


def test_a_conflict_is_taken_off_and_the_alignments_gradient_added() -> None:
    """g . g_align = -1, |g_align|^2 = 2: g + g_align / 2 + rho g_align."""
    grad, logged = combined([1.0, 0.0], [-1.0, 1.0], 0.0)
    assert grad == pytest.approx([0.5, 0.5]) and logged["conflict"] == 1
    assert combined([1.0, 0.0], [-1.0, 1.0], 3.0)[0] == pytest.approx([-2.5, 3.5])


def test_without_a_conflict_nothing_is_taken_off() -> None:
    grad, logged = combined([0.3, 0.0], [1.0, 1.0], 2.0)
    assert grad == pytest.approx([2.3, 2.0]) and logged["conflict"] == 0


def test_an_alignment_gradient_of_rounding_alone_projects_nothing() -> None:
    grad, logged = combined([1.0, 0.0], [-1e-5, 0.0], 0.0)
    assert grad == pytest.approx([1.0, 0.0]) and logged["conflict"] == 0 and logged["cosine"] == pytest.approx(-1)


def test_it_trains_to_what_a_plain_loop_gives(world: World, tmp_path: Path) -> None:
    """Two backward passes by autograd on whole models, the surgery written out on one vector."""
    settings = contract.config("safegrad", dropout=0.0, rho=0.5)
    teacher = contract.theta_safe(world)
    conflicts: list[float] = []

    def backward(model: Any, rows: dict[str, reference.Rows], trained: list[torch.nn.Parameter]) -> None:
        with torch.no_grad():
            safe = reference.log_probabilities(teacher, rows["memory"])
        mine = reference.log_probabilities(model, rows["memory"])
        apart = [(q.exp() * (q - p)).sum(-1) for p, q in zip(mine, safe, strict=True)]

        def flat(loss: torch.Tensor) -> torch.Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

        align = flat(torch.cat(apart).mean())
        user = flat(reference.cross_entropy(model, rows["user"]))
        conflicts.append(float(user @ align < 0 and align @ align > 1e-9))
        if conflicts[-1]:
            user = user - (user @ align) / (align @ align) * align
        parts = torch.split(user + 0.5 * align, [p.numel() for p in trained])
        for p, part in zip(trained, parts, strict=True):
            p.grad = part.view_as(p)

    start = contract.adapter(world.safe.parent)
    expected = reference.train(world, reference.dealt(world, settings), backward)
    found = contract.train(world, tmp_path, settings)
    assert [line["conflict"] for line in contract.curves(tmp_path)] == conflicts and sum(conflicts) > 0
    assert contract.gap(expected, found, start) < 1e-3
