from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Template
from safecl.stages import memory
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import batches, losses, model
from safecl.training.run import Memory


def _memory(world: World, out: Path, safety: Path, **changes: Any) -> Path:
    out.mkdir()
    settings = {
        "num_rows": 5, "seed": 3, "template": Template().model_dump(), "bos": False, "dtype": "float32",
        "max_tokens": 256, "positions": "response", "adapter": "continue", **changes,
    }  # fmt: skip
    memory.remember(settings, {"model": world.model, "safe": world.safe, "rows": safety}, out)
    return out


def test_the_gram_form_is_the_mean_squared_distance_of_the_models_own_logits(world: World) -> None:
    """|f(x) - z|^2 / V per token, from full logits of two separate models, against the memory and the Gram matrix."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    remembered = Memory.load(world.memory)
    safe = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), str(world.safe / "adapter"))
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), str(world.safe / "adapter"))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    distance = losses.LogitDistance(losses.head_of(student.get_base_model()))
    literal = gram = 0.0
    with torch.no_grad():
        for row, states_ND in zip(remembered.rows, remembered.states, strict=True):
            ids = torch.tensor([row.ids])
            # Logits at t predict token t + 1: answer tokens num_prompt .. end are predicted at num_prompt-1 .. end-1.
            predicts = slice(row.num_prompt - 1, len(row.ids) - 1)
            z, f = (m(ids).logits[0, predicts].double() for m in (safe, student))
            literal += float(((f - z) ** 2).sum() / z.shape[-1])
            hidden = student.get_base_model().model(ids).last_hidden_state[0, predicts]
            gram += float(distance(hidden, states_ND)[0])
    assert literal > 1.0
    assert gram == pytest.approx(literal, rel=1e-4)


def test_the_distance_is_zero_at_theta_safe_and_the_step_logs_it(world: World, tmp_path: Path) -> None:
    contract.train(world, tmp_path / "run", contract.config("der", dropout=0.0))
    der = [line["der"] for line in contract.curves(tmp_path / "run")]
    assert der[0] < 1e-8 < der[-1]


def test_a_heavier_weight_holds_the_logits_nearer(world: World, tmp_path: Path) -> None:
    last = {}
    for weight in (0.01, 100.0):
        contract.train(world, tmp_path / str(weight), contract.config("der", dropout=0.0, weight=weight))
        last[weight] = contract.curves(tmp_path / str(weight))[-1]["der"]
    assert last[100.0] < 0.5 * last[0.01]


def test_the_gradient_is_that_of_the_literal_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(50, 8, generator=generator)
    student, states = torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    losses.LogitDistance(losses.Head(weight_VD))(first, states)[0].backward()
    ((second @ weight_VD.T - states @ weight_VD.T) ** 2).mean(1).sum().backward()
    assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"bias_V": torch.linspace(-1, 1, 37)}, {"soft_cap": 2.0}])
@pytest.mark.parametrize("centred", [False, True])
def test_both_distances_and_their_gradients_are_those_of_the_literal_logits(
    extra: dict[str, Any], centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 37 * 3)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(37, 6, generator=generator)
    student, states = torch.randn(11, 6, generator=generator), torch.randn(11, 6, generator=generator)

    def logits(hidden_ND: torch.Tensor) -> torch.Tensor:
        z = hidden_ND @ weight_VD.T + extra.get("bias_V", 0)
        return 2.0 * torch.tanh(z / 2.0) if "soft_cap" in extra else z

    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    pair = losses.LogitDistance(losses.Head(weight_VD, **extra), centred)(first, states)
    ours = pair[centred]
    assert not pair[not centred].requires_grad
    apart = logits(second) - logits(states)
    literal = ((apart - apart.mean(1, keepdim=True) if centred else apart) ** 2).mean(1).sum()
    (0.3 * ours).backward()
    (0.3 * literal).backward()
    assert ours.item() == pytest.approx(literal.item(), rel=1e-4)
    assert torch.allclose(first.grad, second.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_no_memory_tokens_are_at_no_distance(soft_cap: float | None) -> None:
    """A micro-batch has no memory row if there are fewer rows than micro-batches."""
    hidden = torch.ones(2, 3, requires_grad=True)
    raw, centred = losses.LogitDistance(losses.Head(torch.ones(5, 3), soft_cap=soft_cap))(hidden[:0], hidden[:0])
    raw.backward()
    assert raw.item() == centred.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_a_head_with_a_large_mean_loses_nothing_to_rounding() -> None:
    """The rows of W share most of their length, as in real heads: W^T W less V w w^T would lose a share that float32 shows."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = 30.0 + 0.01 * torch.randn(4000, 16, generator=generator)
    student, states = torch.randn(9, 16, generator=generator), torch.randn(9, 16, generator=generator)
    apart = (student - states).double() @ weight_VD.double().T
    literal = [apart, apart - apart.mean(1, keepdim=True)]
    found = losses.LogitDistance(losses.Head(weight_VD))(student, states)
    for ours, logits in zip(found, literal, strict=True):
        assert float(ours) == pytest.approx(float(logits.square().mean(1).sum()), rel=1e-5)
    mean_D, d = weight_VD.mean(0), student - states
    naive = (((d @ (weight_VD.T @ weight_VD)) * d).sum() / 4000 - (d @ mean_D).square().sum()).item()
    assert abs(naive / float(found[1]) - 1) > 1e-3, "this head shows no cancellation: test is void"


def test_a_smaller_memory_is_a_prefix_of_a_larger_one(world: World, tmp_path: Path) -> None:
    safety = contract.make_rows("safety", 20, True, tmp_path / "safety")
    small, large = Memory.load(_memory(world, tmp_path / "small", safety)), Memory.load(world.memory)
    assert small.rows == large.rows[:5]
    assert all(torch.equal(a, b) for a, b in zip(small.states, large.states[:5], strict=True))
    assert [row.id for row in batches.read_rows(world.memory)] == [row.row_id for row in large.rows]


def test_memory_keeps_refusals_only_and_says_when_there_are_too_few(world: World, tmp_path: Path) -> None:
    refusals = contract.make_rows("refusal", 6, True, tmp_path / "refusal")
    helpful = contract.make_rows("help", 9, False, tmp_path / "help")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    batches.write_rows(batches.read_rows(helpful) + batches.read_rows(refusals), mixed)
    kept = batches.read_rows(_memory(world, tmp_path / "five", mixed))
    assert len(kept) == 5 and all(row.harmful and row.id.startswith("refusal/") for row in kept)
    with pytest.raises(ConfigError, match="6 usable refusals"):
        _memory(world, tmp_path / "seven", mixed, num_rows=7)


def test_the_head_check_notices_logits_that_the_head_does_not_make(world: World) -> None:
    base = model.load(world.model, "float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden, logits = base.model(ids).last_hidden_state[0], base(ids).logits[0]
    losses.check_head(losses.head_of(base), hidden, logits)
    with pytest.raises(PrerequisiteError, match="output layer"):
        losses.check_head(losses.head_of(base), hidden, logits * 1.1)
