from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.methods.refresh import Refresh
from safecl.testing import world as contract
from safecl.testing.world import World


def test_with_gamma_zero_it_is_replay_bit_for_bit(world: World, tmp_path: Path) -> None:
    for variant in ("paper", "released"):
        found = contract.train(world, tmp_path / variant, contract.config("refresh", gamma=0.0, variant=variant))
        assert contract.same_bits(found, contract.train(world, tmp_path / f"r{variant}", contract.config("replay")))


def _change(**params: Any) -> tuple[torch.Tensor, float]:
    """Of a tensor of two elements, beside another of one, whose norm and RMS are its own."""
    theta, grad = torch.tensor([3.0, 4.0, 100.0]), torch.tensor([0.6, -0.8, 50.0])
    method = Refresh(Refresh.Config(**params))
    method.fisher = torch.tensor([1.0, 0.0, 0.0])
    step, capped = method.change(theta, grad, [2, 1], torch.Generator().manual_seed(0))
    return step[:2], float(capped)


def test_the_papers_step_by_hand() -> None:
    """gamma F^-1 g with F^-1 = 1 / (F + damping), without noise: .1 * (.6 / 1.25, -.8 / .25)."""
    step, capped = _change(gamma=0.1, damping=0.25, max_noise=0.0)
    assert step.tolist() == pytest.approx([0.048, -0.32]) and capped == 1


def test_the_papers_noise_has_variance_two_gamma_over_f_up_to_its_cap() -> None:
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))[:2]
    step, capped = _change(gamma=1e-8, damping=0.5, max_noise=1e-3)
    size = torch.tensor([(2e-8 / 1.5) ** 0.5, (2e-8 / 0.5) ** 0.5])  # 1.2e-4 and 2e-4, below 1e-3 * RMS 3.5
    assert torch.allclose(step - 1e-8 * torch.tensor([0.6 / 1.5, -0.8 / 0.5]), size * drawn, rtol=1e-4) and capped == 0
    step, capped = _change(gamma=1e-2, damping=0.5, max_noise=1e-3)
    cap = 1e-3 * 12.5**0.5
    assert torch.allclose(step - 1e-2 * torch.tensor([0.6 / 1.5, -0.8 / 0.5]), cap * drawn, rtol=1e-4)
    assert capped == pytest.approx(1.0)  # the other tensor's too: its cap is .1, its noise .2


def test_the_released_step_by_hand() -> None:
    """gamma (1 + .001 F)^-1 (|theta| g / |g| + .001 noise) with |theta| = 5, |g| = 1."""
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))[:2]
    step, _ = _change(gamma=1e-5, variant="released")
    expected = 1e-5 / torch.tensor([1.001, 1.0]) * (torch.tensor([3.0, -4.0]) + 1e-3 * drawn)
    assert torch.allclose(step, expected, rtol=1e-5)


def test_unlearning_raises_the_user_loss(world: World, tmp_path: Path) -> None:
    """A large first step up the user's gradient: the loss that the step then sees is above replay's."""
    contract.train(world, tmp_path / "up", contract.config("refresh", dropout=0.0, gamma=0.1, max_noise=0.0))
    contract.train(world, tmp_path / "flat", contract.config("refresh", dropout=0.0, gamma=0.0))
    up, flat = (contract.curves(tmp_path / name)[0] for name in ("up", "flat"))
    assert up["loss"] > flat["loss"] * 1.004
