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


def _change(**params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascent and noise of a tensor of two elements, beside another of one, whose norm and RMS are its own."""
    theta, grad = torch.tensor([3.0, 4.0, 100.0]), torch.tensor([0.6, -0.8, 50.0])
    method = Refresh(Refresh.Config(**params))
    method.fisher = torch.tensor([1.0, 0.0, 0.0])
    ascent, noise = method.change(theta, grad, [2, 1], torch.Generator().manual_seed(0))
    return ascent[:2], noise[:2]


DRAWN = torch.randn(3, generator=torch.Generator().manual_seed(0))[:2]


def test_the_papers_step_by_hand() -> None:
    """gamma F^-1 g with F^-1 = 1 / (F + damping), without noise: .1 * (.6 / 1.25, -.8 / .25)."""
    ascent, noise = _change(variant="paper", gamma=0.1, damping=0.25, max_noise=0.0)
    assert ascent.tolist() == pytest.approx([0.048, -0.32]) and not noise.any()


def test_the_papers_noise_has_variance_two_gamma_over_f_up_to_its_cap() -> None:
    ascent, noise = _change(variant="paper", gamma=1e-8, damping=0.5, max_noise=1e-3)
    assert ascent.tolist() == pytest.approx([1e-8 * 0.6 / 1.5, -1e-8 * 0.8 / 0.5])
    # sd 1.2e-4 and 2e-4, below 1e-3 * RMS 3.5
    assert torch.allclose(noise, torch.tensor([(2e-8 / 1.5) ** 0.5, (2e-8 / 0.5) ** 0.5]) * DRAWN)
    _, noise = _change(variant="paper", gamma=1e-2, damping=0.5, max_noise=1e-3)
    assert torch.allclose(noise, 1e-3 * 12.5**0.5 * DRAWN)


def test_the_released_step_by_hand() -> None:
    """gamma (1 + .001 F)^-1 (|theta| g / |g| + .001 noise) with |theta| = 5, |g| = 1."""
    ascent, noise = _change(gamma=1e-5)
    assert ascent.tolist() == pytest.approx([3e-5 / 1.001, -4e-5])
    assert torch.allclose(noise, 1e-8 / torch.tensor([1.001, 1.0]) * DRAWN)


def test_by_default_weights_move_up_the_gradient_and_hardly_at_random(world: World, tmp_path: Path) -> None:
    """The paper's step at gamma 1e-8, once the default, was noise: 1e-8 of theta's norm against 1e-3."""
    settings = contract.config("refresh")
    default = {**settings, "params": {name: settings["params"][name] for name in settings["params"] if name != "gamma"}}
    moved = {}
    for name, config in (("default", default), ("before", contract.config("refresh", variant="paper", gamma=1e-8))):
        contract.train(world, tmp_path / name, config)
        lines = contract.curves(tmp_path / name)
        moved[name] = [max(line[key] for line in lines) for key in ("unlearned", "unlearn_noise")]
    assert moved["default"][0] == pytest.approx(1e-5, rel=0.01) and moved["default"][1] < 1e-6
    assert moved["before"][0] < 1e-7 and moved["before"][1] > 5e-4


def test_unlearning_raises_the_user_loss(world: World, tmp_path: Path) -> None:
    """A large first step up the user's gradient: the loss that the step then sees is above replay's."""
    contract.train(world, tmp_path / "up", contract.config("refresh", dropout=0.0, gamma=0.1))
    contract.train(world, tmp_path / "flat", contract.config("refresh", dropout=0.0, gamma=0.0))
    up, flat = (contract.curves(tmp_path / name)[0] for name in ("up", "flat"))
    assert up["loss"] > flat["loss"] * 1.004
