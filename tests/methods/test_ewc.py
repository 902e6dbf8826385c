from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import ConfigError
from safecl.config import Template
from safecl.methods.ewc import Ewc
from safecl.stages import fisher
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import batches, tokens
from tests.methods import stub


def _fisher(world: World, rows: Path, out: Path, batch_size: int = 4, **changes: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    out.mkdir()
    settings = {
        "seed": 3, "template": Template().model_dump(), "bos": False, "dtype": "float32", "max_tokens": 256, "num_rows": 9,
        "labels": "empirical", **changes,
    }  # fmt: skip
    fisher.estimate(settings, {"model": world.model, "safe": world.safe, "rows": rows}, out, batch_size)
    return load_file(str(out / "fisher.safetensors"))


def test_the_fisher_is_the_mean_of_each_rows_squared_gradient(world: World, tmp_path: Path) -> None:
    """Row by row through autograd, log-probabilities from a PEFT model's own logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = contract.make_rows("few", 9, True, tmp_path / "rows")
    found = _fisher(world, rows, tmp_path / "fisher")
    encoded, _ = tokens.encode(
        batches.read_rows(rows), tokens.Tokenizer(world.model), Template().model_dump(), False, 256
    )
    base = AutoModelForCausalLM.from_pretrained(world.model)
    model = PeftModel.from_pretrained(base, str(world.safe / "adapter"), is_trainable=True).eval()
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in encoded:
        logits = model(torch.tensor([row.ids])).logits[0]
        chances = torch.log_softmax(logits, -1)
        model.zero_grad()
        sum(chances[t - 1, row.ids[t]] for t in range(row.num_prompt, len(row.ids))).backward()
        for name, p in named.items():
            expected[name] += p.grad**2 / len(encoded)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-6 * float(value.max())), name


def test_the_batch_size_changes_only_rounding_and_labels_may_be_sampled(world: World, tmp_path: Path) -> None:
    rows = contract.make_rows("few", 9, True, tmp_path / "rows")
    one, nine = (_fisher(world, rows, tmp_path / str(n), n) for n in (1, 9))
    assert all(torch.allclose(one[k], nine[k], rtol=1e-3, atol=1e-6 * float(one[k].max())) for k in one)
    true = [_fisher(world, rows, tmp_path / f"true{n}", n, labels="true") for n in (2, 9)]
    assert all(torch.allclose(true[0][k], true[1][k], rtol=1e-3, atol=1e-6 * float(true[0][k].max())) for k in one)
    assert not any(torch.allclose(true[0][k], one[k], rtol=0.01) for k in one)


def test_the_penalty_by_hand() -> None:
    """F = (2, .5), theta - theta* = (3, -2), lambda = 4: the sum is 2 * 9 + .5 * 4 = 20, the gradient of 4/2 times it
    4 F (theta - theta*) = (24, -4), on top of what the rows gave."""
    run = stub.run(a=[5.0], b=[0.0])
    run.fisher = lambda norm: torch.tensor([2.0, 0.5])
    run.theta_safe = lambda: torch.tensor([2.0, 2.0])
    run.set_gradient(torch.ones(2))
    method = Ewc(Ewc.Config(weight=4.0))
    method.prepare(run)
    method.after_backward(run, None)  # type: ignore[arg-type]
    assert run.logged["ewc"] == pytest.approx(20.0)
    assert [float(p.grad) for p in run.parameters().values()] == pytest.approx([25.0, -3.0])


def test_the_fisher_given_to_methods_has_mean_one_whatever_its_scale(world: World) -> None:
    from safecl.stages import finetune

    run = finetune.make_run(contract.config("ewc"), world.inputs("ewc"), contract.execution()).run
    normal, raw = run.fisher("mean"), run.fisher("none")
    assert float(normal.mean()) == pytest.approx(1.0, rel=1e-4)
    ratios = [
        float(r.sum() / n.sum()) for r, n in zip(*(torch.split(f, run.sizes()) for f in (raw, normal)), strict=True)
    ]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)


def test_a_heavier_weight_keeps_the_important_parameters_nearer(world: World, tmp_path: Path) -> None:
    last = {}
    for weight in (1e-3, 1e3):
        contract.train(world, tmp_path / str(weight), contract.config("ewc", dropout=0.0, weight=weight))
        lines = contract.curves(tmp_path / str(weight))
        assert lines[0]["ewc"] == 0.0  # at theta_safe
        last[weight] = lines[-1]["ewc"]
    assert last[1e3] < 0.5 * last[1e-3]


@pytest.mark.parametrize("name", ["ewc", "refresh"])
def test_a_fresh_adapter_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    from safecl.project import Project, load

    quickstart = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
    changes = ["adapter=stack", f"methods=[{{name: {name}}}, {{name: sft}}]", f"execution.root={tmp_path}"]
    with pytest.raises(ConfigError, match="B = 0"):
        Project(load(quickstart, changes))
