from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import ConfigError
from safecl.dtypes import resolved
from safecl.grid import Cell, cells
from safecl.project import load
from safecl.templates import settle
from safecl.testing import world as contract
from safecl.testing.world import World
from tests.methods import reference

QUICKSTART = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"


def test_it_trains_to_what_a_plain_loop_gives(world: World, tmp_path: Path) -> None:
    """Two backward passes a step by autograd, the second at theta + rho g / |g|."""
    settings = contract.config("sam", dropout=0.0, rho=0.3)

    def backward(model: Any, rows: dict[str, reference.Rows], trained: list[torch.nn.Parameter]) -> None:
        grads = torch.autograd.grad(reference.cross_entropy(model, rows["user"]), trained)
        size = torch.cat([g.flatten() for g in grads]).norm()
        kept = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p, g in zip(trained, grads, strict=True):
                p.add_(0.3 * g / size)
        reference.cross_entropy(model, rows["user"]).backward()
        with torch.no_grad():
            for p, before in zip(trained, kept, strict=True):
                p.copy_(before)

    start = contract.adapter(world.safe.parent)
    expected = reference.train(world, reference.dealt(world, settings), backward)
    found = contract.train(world, tmp_path / "own", settings)
    assert contract.gap(expected, found, start) < 1e-3
    plain = contract.train(world, tmp_path / "sft", contract.config("sft", dropout=0.0))
    assert contract.gap(plain, found, start) > 0.01


def _grid(*settings: str) -> dict[str, Cell]:
    sweep = settle(resolved(load(QUICKSTART, ["models.0.name=m", "poison.ratios=[0.1]", *settings]), "bfloat16")).sweep
    return {cell.label: cell for cell in cells(sweep)}


def test_the_alignment_may_be_trained_by_another_method_and_sft_leaves_every_key_as_it_is() -> None:
    def safe(*settings: str) -> Any:
        return _grid(*settings)["m / mini / p=0.1 / sft"].job({}, 0, "final").graph.theta_safe

    assert safe("align.method=sft").key == safe("align.method={name: sft}").key == safe().key
    assert _grid("align.method=sft")["m / mini / p=0.1 / sft"].key == _grid()["m / mini / p=0.1 / sft"].key
    by_sam = safe("align.method={name: sam, config: {rho: 0.2}}")
    assert by_sam.key != safe().key and (by_sam.config["method"], by_sam.config["params"]) == ("sam", {"rho": 0.2})
    assert safe("align.method=sam").config["params"] == {"rho": 0.05}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("der", "der needs 'memory', which is made of theta_safe"),
        ("lwf", "needs 'teacher'"),
        ("magmax", "trains nothing"),
    ],
)
def test_a_method_that_needs_theta_safe_cannot_make_it(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"align.method: .*{message}"):
        _grid(f"align.method={name}")["m / mini / p=0.1 / sft"].job({}, 0, "final").graph.theta_safe  # noqa: B018


def test_what_is_wrong_with_it_is_said_at_once(tmp_path: Path) -> None:
    from safecl.project import Project

    for setting, message in (
        ("align.method={name: sam, config: {rh: 1}}", "align.method.config.rh: unknown key. Did you mean 'rho'"),
        ("align.method=samm", "align.method: unknown method 'samm'. Did you mean 'sam'"),
        ("align.method={name: sam, search: {}}", "align.method: one config is expected"),
    ):
        with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("'sam'", "")):
            Project(load(QUICKSTART, [setting, f"execution.root={tmp_path}"]))
