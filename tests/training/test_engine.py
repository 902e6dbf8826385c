"""Every engine against the reference, on real ranks: reading, replacing and clearing gradients, and their state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safecl.testing import ranks
from safecl.training import engine

KINDS = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]


class Two(torch.nn.Module):
    """Two trained matrices and a frozen bfloat16 one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(5, 4, generator=generator))
        self.second = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
        self.frozen = torch.nn.Parameter(torch.randn(3, 3, generator=generator).bfloat16(), requires_grad=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.tanh(ids_BT.float() @ self.first) @ self.second @ self.frozen.float()


def _inputs(rank: int, world_size: int, name: int) -> list[torch.Tensor]:
    """Two micro-batches a rank; over all ranks the same 4 rows for any number of them."""
    rows = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(name))
    mine = rows[rank::world_size]
    half = len(mine) // 2
    return [mine[:half], mine[half:]]


def exercise(rank: int, world_size: int, out: str) -> None:
    """An A-GEM-like step, twice, then save the state: a reference gradient is read and cleared, the batch's gradient
    read and changed."""
    for kind, zero in KINDS:
        module = Two()
        made = engine.make(kind, module, weight_decay=0.1, max_grad_norm=0.5, world_size=world_size, zero=zero)
        found: dict[str, torch.Tensor] = {}
        for step in range(2):
            for name in (10 + step, 20 + step):
                parts = _inputs(rank, world_size, name)
                for place, part in enumerate(parts):
                    loss = made.forward(part).square().sum() / 4
                    made.backward(loss, last=place == len(parts) - 1)
                for key, parameter in made.named.items():
                    found[f"{step}/{name}/{key}"] = made.full_grad(parameter)
                if name < 20:
                    made.clear_grads()
            for key, parameter in made.named.items():
                made.set_full_grad(parameter, found[f"{step}/{20 + step}/{key}"] - found[f"{step}/{10 + step}/{key}"])
            found[f"{step}/norm"] = torch.tensor(made.step(0.01))
        found.update({f"state/{key}": value for key, value in made.state().items()})
        found.update({key: parameter.detach().clone() for key, parameter in module.named_parameters()})
        assert module.first.dtype == torch.float32 and module.frozen.dtype == torch.bfloat16
        # The state of this engine carries on in every other one.
        for other_kind, other_zero in KINDS:
            copy = Two()
            copy.load_state_dict(module.state_dict())
            other = engine.make(
                other_kind, copy, weight_decay=0.1, max_grad_norm=0.5, world_size=world_size, zero=other_zero
            )
            other.load_state({key.removeprefix("state/"): v for key, v in found.items() if key.startswith("state/")})
            parts = _inputs(rank, world_size, 30)
            for place, part in enumerate(parts):
                other.backward(other.forward(part).square().sum() / 4, last=place == len(parts) - 1)
            other.step(0.01)
            found[f"next/{other_kind}{other_zero}"] = copy.first.detach().clone()
        if rank == 0:
            save_file({key: value.contiguous() for key, value in found.items()}, f"{out}/{world_size}-{kind}{zero}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for num in (1, 2):
        ranks.run(exercise, num, str(folder))
    return folder


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("kind", [f"{kind}{zero}" for kind, zero in KINDS])
def test_every_engine_and_number_of_ranks_is_the_reference(kind: str, num: int, results: Path) -> None:
    reference, found = load_file(results / "1-torch0"), load_file(results / f"{num}-{kind}")
    assert set(found) == set(reference)
    for key in reference:
        assert torch.allclose(found[key].float(), reference[key].float(), rtol=2e-5, atol=1e-6), key


def test_the_reference_is_the_gradient_of_the_whole_batch(results: Path) -> None:
    """Against one backward over all rows, and AdamW on the changed, clipped gradient."""
    found, module = load_file(results / "1-torch0"), Two()
    grads = []
    for name in (10, 20):
        rows = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(name))
        loss = module(rows).square().sum() / 4
        grads.append(torch.autograd.grad(loss, [module.first, module.second]))
        assert torch.allclose(found[f"0/{name}/first"], grads[-1][0], rtol=1e-5)
    change = [b - a for a, b in zip(*grads, strict=True)]
    norm = torch.cat([g.flatten() for g in change]).norm()
    assert float(found["0/norm"]) == pytest.approx(float(norm), rel=1e-5) and norm > 0.5


def test_half_precision_factors_are_refused() -> None:
    module = Two()
    module.first.data = module.first.data.bfloat16()
    with pytest.raises(AssertionError, match="float32"):
        engine.TorchEngine(module, weight_decay=0.0, max_grad_norm=1.0)
