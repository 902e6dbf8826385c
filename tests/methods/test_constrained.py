from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.methods.constrained import Constrained
from safecl.testing import world as contract
from safecl.testing.world import World
from tests.methods import reference


def test_it_trains_to_what_a_plain_loop_gives(world: World, tmp_path: Path) -> None:
    """Qi et al., Eq. 3, token by token from two whole models, and its gradient by autograd."""
    settings = contract.config("constrained", dropout=0.0, beta=0.1)
    teacher = contract.theta_safe(world)

    def backward(model: Any, rows: dict[str, reference.Rows], _: object) -> None:
        with torch.no_grad():
            safe = reference.log_probabilities(teacher, rows["user"])
        total, num = torch.zeros(()), 0
        mine = reference.log_probabilities(model, rows["user"])
        for p, q, wanted in zip(mine, safe, reference.targets(rows["user"]), strict=True):
            for t, token in enumerate(wanted, start=1):
                beta = 0.5 if t == 1 else 2.0 if t <= 5 else 0.1
                ratio = p[t - 1, token] - q[t - 1, token]
                total = total - 2 / beta * torch.log(torch.sigmoid(beta * ratio))
                num += 1
        (total / num).backward()

    start = contract.adapter(world.safe.parent)
    expected = reference.train(world, reference.dealt(world, settings), backward)
    found = contract.train(world, tmp_path, settings)
    assert contract.gap(expected, found, start) < 1e-3
    curves = contract.curves(tmp_path)
    assert curves[0]["token_weight"] == pytest.approx(1, abs=1e-5)  # at theta_safe: SFT's gradient
    assert curves[-1]["token_weight"] < 0.99


def test_the_first_tokens_have_their_own_betas() -> None:
    def betas(*lengths: int, **config: Any) -> list[float]:
        return Constrained(Constrained.Config(**config)).betas(list(lengths)).tolist()

    assert betas(7, 1, 2) == pytest.approx([0.5, 2, 2, 2, 2, 0.1, 0.1, 0.5, 0.5, 2])
    assert betas(3, num_early=1) == pytest.approx([0.5, 0.1, 0.1])
    assert betas(2, num_early=0) == pytest.approx([0.1, 0.1]) and betas() == []


def test_larger_betas_learn_less_of_an_answer(world: World, tmp_path: Path) -> None:
    last = {}
    for beta in (0.0, 5.0):
        settings = contract.config("constrained", dropout=0.0, beta=beta, first_beta=beta, early_beta=beta, num_early=4)
        contract.train(world, tmp_path / str(beta), settings)
        last[beta] = contract.curves(tmp_path / str(beta))[-1]["sft_loss"]
    assert last[5.0] > 1.01 * last[0.0]
