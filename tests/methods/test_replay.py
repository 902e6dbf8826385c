from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training.run import Run


def test_it_trains_on_the_very_rows_that_der_draws(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[list[int]]] = {}
    draw = Run.draw

    def watched(self: Run, name: str = "memory") -> object:
        batch = draw(self, name)
        drawn[method].append(batch.indices)
        return batch

    monkeypatch.setattr(Run, "draw", watched)
    for method in ("replay", "der"):
        drawn[method] = []
        contract.train(world, tmp_path / method, contract.config(method))
    assert drawn["replay"] == drawn["der"] and len(drawn["der"]) == 7
    assert len({tuple(rows) for rows in drawn["der"]}) > 1


def test_the_first_loss_is_the_sum_of_two_token_means(world: World, tmp_path: Path) -> None:
    """Cross-entropies from a Hugging Face model's own logits, averaged over the response tokens of each batch."""
    settings = contract.config("replay", dropout=0.0, weight=0.5)
    seen = contract.first_batches(world, settings)
    model = contract.theta_safe(world)

    def mean(rows: list[tuple[list[int], int]]) -> float:
        total, num = 0.0, 0
        for ids, num_prompt in rows:
            with torch.no_grad():
                chances = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            total -= sum(float(chances[t - 1, ids[t]]) for t in range(num_prompt, len(ids)))
            num += len(ids) - num_prompt
        return total / num

    contract.train(world, tmp_path, settings)
    line = contract.curves(tmp_path)[0]
    assert line["replay"] == pytest.approx(mean(seen["memory"]), rel=1e-5)
    assert line["loss"] == pytest.approx(mean(seen["user"]) + 0.5 * mean(seen["memory"]), rel=1e-5)
