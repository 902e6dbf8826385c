from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import losses
from tests.methods import reference


def _mean(mine: list[torch.Tensor], safe: list[torch.Tensor], direction: str, temperature: float) -> torch.Tensor:
    """T^2 KL, a mean over tokens, from full log-probabilities."""
    total, num = torch.zeros(()), 0
    for p, q in zip(mine, safe, strict=True):
        p, q = ((x / temperature).log_softmax(-1) for x in (p, q))
        forward = (q.exp() * (q - p)).sum()
        total = total + temperature**2 * (forward if direction == "forward" else (p.exp() * (p - q)).sum())
        num += len(p)
    return total / num


@pytest.mark.parametrize(
    ("on", "direction", "temperature"), [("both", "forward", 1.0), ("user", "reverse", 1.0), ("memory", "reverse", 2.0)]
)
def test_it_trains_to_what_a_plain_loop_gives(
    on: str, direction: str, temperature: float, world: World, tmp_path: Path
) -> None:
    """Two whole models, full logits, autograd, AdamW: the final adapters agree to rounding."""
    settings = contract.config(
        "kl", dropout=0.0, weight=3.0, on=on, direction=direction, temperature=temperature, memory_batch_size=4
    )
    teacher = contract.theta_safe(world)

    def backward(model: Any, rows: dict[str, reference.Rows], _: object) -> None:
        loss = reference.cross_entropy(model, rows["user"])
        for name in ("user", "memory"):
            if on in (name, "both"):
                with torch.no_grad():
                    safe = reference.log_probabilities(teacher, rows[name])
                loss = loss + 3.0 * _mean(reference.log_probabilities(model, rows[name]), safe, direction, temperature)
        loss.backward()

    start = contract.adapter(world.safe.parent)
    expected = reference.train(world, reference.dealt(world, settings), backward)
    found = contract.train(world, tmp_path, settings)
    assert contract.gap(expected, found, start) < 1e-3
    curves = contract.curves(tmp_path)
    held = [name for name in ("kl_user", "kl_memory") if name in curves[0]]
    assert held == [f"kl_{name}" for name in ("user", "memory") if on in (name, "both")]
    assert all(curves[0][name] < 1e-7 < curves[-1][name] for name in held)


def test_a_heavier_weight_holds_the_distribution_nearer(world: World, tmp_path: Path) -> None:
    last = {}
    for weight in (0.01, 100.0):
        contract.train(world, tmp_path / str(weight), contract.config("kl", dropout=0.0, weight=weight))
        line = contract.curves(tmp_path / str(weight))[-1]
        last[weight] = line["kl_user"] + line["kl_memory"]
    assert last[100.0] < 0.5 * last[0.01]


@pytest.mark.parametrize("extra", [{}, {"bias_V": torch.linspace(-1, 1, 37)}, {"soft_cap": 2.0}])
@pytest.mark.parametrize("forward_kl", [True, False])
def test_the_chunked_divergence_and_its_gradient_are_torchs_own(
    extra: dict[str, Any], forward_kl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 37 * 3)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(37, 6, generator=generator)
    mine, states = torch.randn(11, 6, generator=generator), torch.randn(11, 6, generator=generator)

    def chances(hidden_ND: torch.Tensor) -> torch.Tensor:
        z = hidden_ND @ weight_VD.T + extra.get("bias_V", 0)
        return ((2.0 * torch.tanh(z / 2.0) if "soft_cap" in extra else z) / 1.5).log_softmax(1)

    first, second = mine.clone().requires_grad_(), mine.clone().requires_grad_()
    head = losses.Head(weight_VD, **extra)
    ours = losses.divergence_sum(first, states, head, forward_kl=forward_kl, temperature=1.5)
    pair = (chances(second), chances(states))
    given, asked = pair if forward_kl else pair[::-1]  # torch's kl_div(p, q) is KL(q || p)
    literal = 1.5**2 * torch.nn.functional.kl_div(given, asked, reduction="sum", log_target=True)
    (0.3 * ours).backward()
    (0.3 * literal).backward()
    assert ours.item() == pytest.approx(literal.item(), rel=1e-4)
    assert torch.allclose(first.grad, second.grad, rtol=1e-3, atol=1e-5)
