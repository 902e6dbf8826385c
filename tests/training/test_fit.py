"""A finetune is made to fit into memory, and that changes rounding only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from safecl.base import PrerequisiteError
from safecl.config import Execution, Lora
from safecl.stages import finetune
from safecl.testing import world as contract
from safecl.training import fit, losses
from safecl.training.tokens import Encoded

CONFIG = LlamaConfig(
    hidden_size=100, intermediate_size=300, num_hidden_layers=10, num_attention_heads=5, num_key_value_heads=1
)
ROWS = [Encoded(str(n), list(range(n)), 2) for n in (10, 40, 20, 30)]


def test_the_estimate_is_what_the_formula_says() -> None:
    queries = 20 * (5 + 2)  # five heads of 20 and one of keys and of values
    layer = 4 * (7 * 100 + 4 * 300 + 2 * queries)
    lora: dict[str, Any] = {"dropout": 0.0, "last_layers": None}
    assert fit.activations(CONFIG, lora, 9, 4, False) == pytest.approx(1.2 * 9 * 10 * layer)
    assert fit.activations(CONFIG, {**lora, "last_layers": 3}, 9, 4, False) == pytest.approx(1.2 * 9 * 3 * layer)
    assert fit.activations(CONFIG, lora, 9, 4, True) == pytest.approx(1.2 * 9 * (10 * 4 * 100 + layer))
    dropped = layer + 6 * 100 + 300
    assert fit.activations(CONFIG, {**lora, "dropout": 0.1}, 9, 4, False) == pytest.approx(1.2 * 9 * 10 * dropped)


def test_rows_a_forward_and_checkpointing_follow_the_free_memory() -> None:
    lora = Lora(dropout=0.0).model_dump()

    def need(size: int, checkpointing: bool, drawn: int = 0) -> float:
        tokens = sum([40, 30, 20, 10][:size]) + drawn
        return fit.activations(CONFIG, lora, tokens, 2, checkpointing) / fit.SHARE

    def chosen(free: float, drawn: int = 0, **where: Any) -> tuple[int, bool]:
        execution = Execution(**where).model_dump()
        beside = [Encoded("m", list(range(drawn)), 1)] if drawn else []
        return fit.choose(CONFIG, lora, ROWS, beside, execution, free, 2)[:2]

    assert chosen(need(4, False) * 1.01) == (4, False)  # 8 are allowed, 4 are there
    assert chosen(need(4, False) * 0.99) == (4, True)
    assert chosen(need(4, False) * 0.99, gradient_checkpointing="off") == (2, False)
    assert chosen(need(4, False) * 1.01, gradient_checkpointing="on") == (4, True)
    assert chosen(need(4, True) * 0.99) == (2, True)
    assert chosen(need(4, True) * 1.01, drawn=20)[0] == 2  # what a draw adds counts
    assert chosen(need(2, False) * 1.01, micro_batch_size=2) == (2, False)
    assert chosen(0.0) == (1, True) and chosen(0.0, gradient_checkpointing="off") == (1, False)


def test_the_estimate_holds_what_a_backward_keeps(world: contract.World) -> None:
    """Against the tensors that autograd saves on a tiny Llama, whose shapes are nothing like those of the formula's."""
    settings = contract.config("sft")
    run = finetune.make_run(settings, world.inputs(), contract.execution()).run
    run.hidden_states.train()
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = run.share(list(range(8)), 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.forward(batch)
    kept = sum(saved.values())
    estimate = fit.activations(run.hidden_states.base.config, settings["lora"], len(batch.ids_P), 4, False)
    assert kept < estimate < 2 * kept


@pytest.mark.parametrize("method", ["sft", "der", "refresh"])
def test_layers_computed_again_give_the_same_bits(method: str, world: contract.World, tmp_path: Path) -> None:
    """With dropout, and with a memory forward between a user forward and its backward (agem, refresh: several)."""
    settings = contract.config(method)
    plain = contract.train(world, tmp_path / "off", settings, gradient_checkpointing="off")
    again = contract.train(world, tmp_path / "on", settings, gradient_checkpointing="on")
    assert contract.same_bits(again, plain)
    facts = json.loads((tmp_path / "on" / "result" / "result.json").read_text())
    assert facts["gradient_checkpointing"] is True


def _fails_above(monkeypatch: pytest.MonkeyPatch, tokens: int, at_call: int = 0) -> None:
    """The device is out of memory in the first forward after `at_call` others with more targets than `tokens`."""
    real, calls = losses.cross_entropy_sum, [0]

    def limited(hidden_ND: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > at_call and len(hidden_ND) > tokens:
            raise torch.OutOfMemoryError("made up")
        return real(hidden_ND, *rest)

    monkeypatch.setattr(losses, "cross_entropy_sum", limited)


@pytest.mark.parametrize("method", ["sft", "refresh"])
def test_out_of_memory_goes_on_with_half_the_rows_and_the_same_result(
    method: str, world: contract.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = contract.config(method, **({"memory_batch_size": 1} if method == "refresh" else {}))
    few = contract.train(world, tmp_path / "few", settings, micro_batch_size=2)
    whole = contract.train(world, tmp_path / "whole", settings, micro_batch_size=5)
    start = contract.adapter(world.safe.parent)
    # More than the longest two rows hold (12 words of at most 6 bytes each and an end), less than the first five.
    most = max(sum(sorted((row.num_targets for row in run_rows(world, settings)), reverse=True)[:2]), 1)
    _fails_above(monkeypatch, most)
    found = contract.train(world, tmp_path / "found", settings, micro_batch_size=5)
    assert contract.same_bits(found, few) and contract.gap(found, whole, start) < 1e-5
    facts = json.loads((tmp_path / "found" / "result" / "result.json").read_text())
    assert facts["micro_batch_size"] == 2 and facts["gradient_checkpointing"] is True
    assert [line["step"] for line in contract.curves(tmp_path / "found")] == list(range(1, 8))


def run_rows(world: contract.World, settings: dict[str, Any]) -> list[Encoded]:
    return finetune.make_run(settings, world.inputs(settings["method"]), contract.execution()).run.rows


def test_it_goes_on_from_the_last_checkpoint(
    world: contract.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = contract.config("sft")
    _fails_above(monkeypatch, 0, at_call=4)
    seen: list[int] = []
    with pytest.raises(PrerequisiteError, match="out of memory with one row a forward"):
        finetune.train_rows(
            settings, world.inputs(), tmp_path, contract.execution(checkpoint_every_s=1e-9, micro_batch_size=5),
            after_step=seen.append,
        )  # fmt: skip
    assert seen == [1, 2, 3, 4]  # then 5, 2 and 1 rows a forward were tried, from step 4 on
    now = {"micro_batch_size": 8, "gradient_checkpointing": "auto"}
    assert fit.noted(tmp_path, now) == {"micro_batch_size": 1, "gradient_checkpointing": "on"}
    assert fit.noted(tmp_path / "new", now) == {}
