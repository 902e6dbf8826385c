from __future__ import annotations

import torch

from safecl.methods.magmax import Magmax
from safecl.training.weights import LoRA


def test_the_larger_magnitude_wins_with_its_sign_and_a_tie_goes_to_the_tuned() -> None:
    """S = [1 -2 3 -4], T = [-1 3 -2 0]: |T| >= |S| at the tie -1 and at 3; S elsewhere. Times lambda = .5."""
    one = torch.ones(1, 1)
    safe = {"m": LoRA(torch.tensor([[1.0, -2.0, 3.0, -4.0]]), one, 1.0)}
    tuned = {"m": LoRA(torch.tensor([[-1.0, 3.0, -2.0, 0.0]]), one, 1.0)}
    log: dict[str, object] = {}
    found = dict(Magmax(Magmax.Config(scale=0.5)).finalize(safe, tuned, log))
    assert found["m"].delta().tolist() == [[-0.5, 1.5, 1.5, -2.0]]
    assert log["share_of_tuned"] == 0.5
