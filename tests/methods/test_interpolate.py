from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from safecl.methods.interpolate import Interpolate, drop, slerp, ties
from safecl.training.weights import LoRA


def _low(seed: int) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    return LoRA(torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator), 0.5)


SAFE, TUNED = {"m": _low(0)}, {"m": _low(1)}
S, T = SAFE["m"].delta(), TUNED["m"].delta()


def merge(**config: Any) -> Any:
    return dict(Interpolate(Interpolate.Config(**config)).finalize(SAFE, TUNED, {}))["m"]


def test_linear_and_task_arithmetic_stay_low_rank_and_exact() -> None:
    linear = merge(kind="linear", share=0.3)
    assert isinstance(linear, LoRA) and len(linear.down_RI) == 4
    assert torch.allclose(linear.delta(), 0.7 * S + 0.3 * T, atol=1e-6)
    task = merge(kind="task_arithmetic", share=0.4, safe_share=0.9)
    assert isinstance(task, LoRA)
    assert torch.allclose(task.delta(), 0.9 * S + 0.4 * (T - S), atol=1e-6)
    averaged = 0.5 * (0.5 * (SAFE["m"].up_OR + TUNED["m"].up_OR)) @ (0.5 * (SAFE["m"].down_RI + TUNED["m"].down_RI))
    assert not torch.allclose(averaged, merge(kind="linear", share=0.5).delta(), atol=0.1)


@pytest.mark.parametrize("kind", ["linear", "slerp", "ties"])
def test_the_ends_are_theta_safe_and_the_tuned_model(kind: str) -> None:
    assert torch.allclose(merge(kind=kind, share=0.0, density=1.0).delta(), S, atol=1e-5)
    assert torch.allclose(merge(kind=kind, share=1.0, density=1.0).delta(), T, atol=1e-5)


def test_slerp_goes_along_the_arc() -> None:
    """A quarter turn from (1, 0) to (0, 1): a third of the way is at 30 degrees, at length 1."""
    found = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert found.tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    parallel = slerp(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), 0.25)
    assert parallel.tolist() == pytest.approx([1.25, 2.5])
    assert slerp(torch.zeros(2), torch.tensor([2.0, 4.0]), 0.25).tolist() == pytest.approx([0.5, 1.0])


def test_ties_trims_elects_signs_and_averages_what_agrees() -> None:
    """By hand, as mergekit's generalised task arithmetic does it (sum consensus, normalised), density .75 of 4 entries.

    first  [4, -3, 1, .5] -> [4, -3, 1, 0];  second [2, 5, -8, 9] -> [0, 5, -8, 9];  weights .25 and .75
    weighted sums 1, -.75 + 3.75, .25 - 6, 6.75 -> signs + + - +; agreeing: first, second, second, second (0 has no sign)
    """
    found = ties([torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([2.0, 5.0, -8.0, 9.0])], [0.25, 0.75], 0.75)
    assert found.tolist() == pytest.approx([4.0, 5.0, -8.0, 9.0])
    both = ties([torch.tensor([4.0, 1.0]), torch.tensor([2.0, 1.0])], [0.25, 0.75], 1.0)
    assert both.tolist() == pytest.approx([0.25 * 4 + 0.75 * 2, 1.0])  # where both agree: their weighted mean


def test_dare_drops_at_random_from_the_seed_and_keeps_the_mean() -> None:
    ones = torch.ones(400, 400)
    first, again, other = (drop(ones, 0.25, name) for name in ("x", "x", "y"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert abs(float(first.mean()) - 1) < 4 * (3 / first.numel()) ** 0.5  # four standard errors: variance (1-p)/p = 3
    masks = [merge(kind="dare", share=0.5, density=0.5, seed=s).delta() for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
