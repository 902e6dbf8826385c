from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Training
from safecl.testing import world as contract
from safecl.testing.world import World


def settings(epochs: float, **params: Any) -> dict[str, Any]:
    found = contract.config("lisa", dropout=0.0, **params)
    return {**found, "training": Training(**{**found["training"], "epochs": epochs}).model_dump()}


def test_the_schedule_in_optimizer_steps(world: World, tmp_path: Path) -> None:
    """18 steps in 3 cycles of 6, a third of each for alignment; the pull is zero where a state begins and grows in it."""
    contract.train(world, tmp_path, settings(90 / 23, cycles=3, alignment_share=1 / 3), micro_batch_size=2)
    lines = contract.curves(tmp_path)
    assert [line["user_step"] for line in lines] == [0, 0, 1, 1, 1, 1] * 3
    for place, line in enumerate(lines):
        assert (line["proximal"] == 0) == (place % 6 in (0, 2))


def test_the_other_states_last_iterate_is_what_it_is_tied_to(world: World, tmp_path: Path) -> None:
    far = contract.train(world, tmp_path / "far", settings(90 / 23, cycles=3, rho=0.0))
    near = contract.train(world, tmp_path / "near", settings(90 / 23, cycles=3, rho=1e4))
    start = contract.adapter(world.safe.parent)
    moved = {
        name: sum(float((w[k] - start[k]).square().sum()) for k in w) for name, w in (("far", far), ("near", near))
    }
    assert moved["near"] < 0.25 * moved["far"]


def test_the_first_steps_may_go_without_the_pull(world: World, tmp_path: Path) -> None:
    contract.train(world, tmp_path, settings(90 / 23, cycles=3, alignment_share=1 / 3, free_share=0.5))
    assert ["proximal" in line for line in contract.curves(tmp_path)] == [False] * 9 + [True] * 9


def test_too_few_steps_for_three_cycles_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="7 optimizer steps are too few for 10 cycles"):
        contract.train(world, tmp_path, settings(1.5, cycles=10))


def test_a_period_that_does_not_divide_the_run_still_leaves_room_for_all_cycles(world: World, tmp_path: Path) -> None:
    """8 steps in 3 cycles: turns of 2, one of each state however large the share asked for."""
    contract.train(world, tmp_path, settings(40 / 23, cycles=3, alignment_share=0.9))
    assert [line["user_step"] for line in contract.curves(tmp_path)] == [0, 1] * 4
