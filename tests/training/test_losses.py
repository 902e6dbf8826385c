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


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_few_logits_are_there_at_once(soft_cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = losses.Head.logits

    def seen(head: losses.Head, hidden_ND: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden_ND) * head.num_vocab)
        return logits(head, hidden_ND)

    monkeypatch.setattr(losses.Head, "logits", seen)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 200)
    hidden, head = torch.ones(10, 3), losses.Head(torch.ones(50, 3), soft_cap=soft_cap)
    losses.cross_entropy_sum(hidden, head, torch.zeros(10, dtype=torch.long))
    assert max(sizes) <= 200 and sum(sizes) == 10 * 50
    if soft_cap is not None:
        sizes.clear()
        losses.LogitDistance(head)(hidden, hidden)
        assert max(sizes) <= 200 and sum(sizes) == 2 * 10 * 50


@pytest.mark.parametrize("soft_cap", [None, 300.0])
def test_logits_that_are_far_apart_or_all_low_neither_overflow_nor_vanish(
    soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4)
    places = torch.tensor([-200.0, 150.0, -90.0, 199.0, 120.0])
    for shift in (0.0, -400.0):
        hidden = torch.tensor([[1.0, shift]], requires_grad=True)
        weight_VD = torch.stack([places, torch.ones(5)], 1)
        loss = losses.cross_entropy_sum(hidden, losses.Head(weight_VD, soft_cap=soft_cap), torch.tensor([1]))
        loss.backward()
        exact = hidden.detach().double().requires_grad_()
        z = exact @ weight_VD.double().T
        z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
        torch.nn.functional.cross_entropy(z, torch.tensor([1])).backward()
        expected = torch.nn.functional.cross_entropy(z, torch.tensor([1]))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_an_almost_certain_tokens_gradient_is_not_rounding_alone_in_bfloat16(soft_cap: float | None) -> None:
    """Its two terms are nearly equal. What is left is as exact as if the logits' gradient were made in float32."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = (torch.randn(2000, 64, generator=generator) * 0.3).bfloat16()
    targets = torch.randint(2000, (64,), generator=generator)
    hidden = (weight_VD[targets].float() * 2.2).bfloat16().requires_grad_()
    losses.cross_entropy_sum(hidden, losses.Head(weight_VD, soft_cap=soft_cap), targets).backward()
    exact = hidden.detach().double().requires_grad_()
    z = exact @ weight_VD.double().T
    z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
    torch.nn.functional.cross_entropy(z, targets, reduction="sum").backward()
    off = (hidden.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert off.median() < 0.03  # 0.07 without a cap, 0.05 with one, where the target's entry was in both terms


def test_neither_few_tokens_nor_many_go_through_the_vocabulary_in_slivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few took 1.7 times as long, for the small operations of each part; many 1.14 times, for each part went over the
    gradients of all of them."""
    shapes: list[tuple[int, int]] = []
    logits = losses.Head.logits

    def seen(head: losses.Head, hidden_ND: torch.Tensor) -> torch.Tensor:
        shapes.append((len(hidden_ND), head.num_vocab))
        return logits(head, hidden_ND)

    monkeypatch.setattr(losses.Head, "logits", seen)
    head = losses.Head(torch.ones(20_000, 576))
    losses.cross_entropy_sum(torch.ones(4, 576), head, torch.zeros(4, dtype=torch.long))
    assert shapes == [(4, 20_000)]
    shapes.clear()
    num = 2 * losses.TOKENS_IN_CACHE + 1
    losses.cross_entropy_sum(torch.ones(num, 576), head, torch.zeros(num, dtype=torch.long))
    assert max(tokens for tokens, _ in shapes) == losses.TOKENS_IN_CACHE
    assert sum(tokens * entries for tokens, entries in shapes) == num * 20_000


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
