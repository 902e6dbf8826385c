from __future__ import annotations

from typing import Any

import pytest
import torch

from safecl.training import batches, losses
from safecl.training.tokens import Encoded


@pytest.mark.parametrize("extra", [{}, {"bias_V": torch.linspace(-1, 1, 37)}, {"soft_cap": 2.0}])
def test_chunked_cross_entropy_is_the_naive_one(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 37 * 3)  # 3 tokens a chunk, 11 tokens: the last chunk is short
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(37, 6, generator=generator)
    hidden, targets = torch.randn(11, 6, generator=generator), torch.arange(11) * 3
    ours, naive = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = losses.cross_entropy_sum(ours, losses.Head(weight_VD, **extra), targets)
    logits = naive @ weight_VD.T + extra.get("bias_V", 0)
    if "soft_cap" in extra:
        logits = extra["soft_cap"] * torch.tanh(logits / extra["soft_cap"])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(ours.grad, naive.grad, rtol=1e-4, atol=1e-6)


def test_no_logits_outlive_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    logits = losses.Head.logits
    monkeypatch.setattr(losses.Head, "logits", lambda self, h: shapes.append(len(h)) or logits(self, h))
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 50 * 4)
    losses.cross_entropy_sum(torch.ones(10, 3), losses.Head(torch.ones(50, 3)), torch.zeros(10, dtype=torch.long))
    assert shapes == [4, 4, 2]


def test_a_state_predicts_the_next_position() -> None:
    """The last prompt token's state counts, the end token's own does not."""
    mask, targets = losses.targets(torch.tensor([-100, -100, 5, 6, -100, 7]))
    assert mask.tolist() == [False, True, True, False, True, False]
    assert targets.tolist() == [5, 6, 7]


@pytest.mark.parametrize("rule", ["response", "last", "all"])
def test_a_rule_names_as_many_positions_of_a_row_as_it_says(rule: str) -> None:
    rows = [Encoded("long", [3, 4, 5, 6], 2), Encoded("short", [3, 7], 1)]
    mask = losses.positions(batches.collate(rows, [0, 1], [0, 0], 3, rows[0], "cpu"), rule)
    expected = {"response": [0, 1, 1, 0, 1, 0], "last": [0, 0, 1, 0, 1, 0], "all": [1] * 6}[rule]
    assert mask.tolist() == [bool(each) for each in expected]
    sizes = [losses.num_positions(row.num_prompt, len(row.ids), rule) for row in rows]
    assert [int(part.sum()) for part in mask.split([4, 2])] == sizes
    assert not losses.positions(batches.collate([], [], [], 3, rows[0], "cpu"), rule).any()


def test_no_tokens_give_zero_with_a_gradient() -> None:
    hidden = torch.ones(2, 3, requires_grad=True)
    loss = losses.cross_entropy_sum(hidden[:0], losses.Head(torch.ones(5, 3)), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()
