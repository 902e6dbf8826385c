"""Shapes of graphs; what graphs compute needs a GPU (test_gpu.py)."""

from __future__ import annotations

from safecl.training.graphs import rounded


def test_numbers_are_rounded_up_by_less_than_a_step_of_their_octave() -> None:
    for steps in (2, 8):
        for number in range(16, 5000):
            assert number <= rounded(number, steps) < number * (1 + 1 / steps) + 1
        assert len({rounded(number, steps) for number in range(513, 1025)}) == steps
    assert rounded(2560, 8) == 2560
