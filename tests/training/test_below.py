"""Layers below the first adapted one are computed once a group of rows, and nothing else changes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.stages import finetune
from safecl.testing import world as contract
from safecl.training import below, fit, model
from safecl.training.batches import collate
from safecl.training.tokens import Encoded

LORA = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear", "last_layers": 1}
ROWS = [Encoded(str(n), list(range(3, 3 + n)), 2) for n in (30, 7, 230, 41, 9, 220)]  # two groups of three


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each group that was computed, from an empty store on."""
    found: list[int] = []
    compute = below.Below._compute

    def counted(self: below.Below, rows: Any) -> torch.Tensor:
        found.append(len(rows))
        return compute(self, rows)

    monkeypatch.setattr(below, "_kept", OrderedDict())
    monkeypatch.setattr(below.Below, "_compute", counted)
    yield found


def _train(world: contract.World, scratch: Path, method: str, **lora: Any) -> tuple[dict[str, Any], list[Any]]:
    settings = contract.config(method)
    settings["lora"] = {**settings["lora"], "last_layers": 1, **lora}
    inputs = {name: folder for name, folder in world.inputs(method).items() if name != "safe"}
    finetune.train_rows(settings, inputs, scratch, contract.execution())
    facts = json.loads((scratch / "result" / "result.json").read_text())
    return contract.adapter(scratch), [contract.curves(scratch), facts["kl_moved"]]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["sft", "der"])
def test_a_finetune_is_the_same_and_the_next_one_computes_nothing_below(
    architecture: str, method: str, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = contract.a_world(architecture)
    with monkeypatch.context() as patch:
        patch.setattr(below, "of", lambda *given: None)
        through, (curves, moved) = _train(world, tmp_path / "through", method)
    assert not computed
    first, known = _train(world, tmp_path / "first", method)
    # 23 rows; with DER 12 memory rows too. Two groups are tokens on which the model itself is asked.
    assert sum(computed) == 2 + 23 + 12 * (method == "der") and len(computed) <= 10
    for ours, theirs in zip(known[0], curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert known[1] == pytest.approx(moved, rel=1e-4)
    start = {name: torch.zeros_like(value) for name, value in first.items()}
    assert contract.gap(through, first, start) < 1e-5
    computed.clear()
    again, repeated = _train(world, tmp_path / "again", method)
    assert computed == [1, 1] and contract.same_bits(again, first) and repeated == known


def test_what_a_process_did_before_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's rows are known from a finetune by another method here; in the second run nothing is."""
    world = contract.a_world()
    _train(world, tmp_path / "before", "replay")
    after, _ = _train(world, tmp_path / "after", "der")
    below._kept.clear()
    alone, _ = _train(world, tmp_path / "alone", "der")
    assert contract.same_bits(after, alone)


def _states(folder: Path) -> model.HiddenStates:
    return model.HiddenStates(model.with_adapter(model.load(folder, "float32"), LORA, seed=1)).eval()


def test_rows_that_are_not_known_go_through_all_layers(tiny_model: Path, computed: list[int]) -> None:
    states = _states(tiny_model)
    both = [*ROWS[:2], Encoded("new", [5, 6, 7, 8], 2)]
    batch = collate(both, range(3), [0] * 3, 1, ROWS[0], "cpu")
    with torch.no_grad():
        whole_PD = states(batch)
        states.below = below.of(states, 1, "tiny", [below.Used(ROWS, len(ROWS))])
        computed.clear()
        assert torch.equal(states(batch), whole_PD) and not computed
        part_PD = states(collate(both[:2], range(2), [0] * 2, 1, ROWS[0], "cpu"))
    assert computed == [3]
    torch.testing.assert_close(part_PD, whole_PD[:37], rtol=1e-5, atol=1e-5)


def test_it_is_left_alone_where_it_would_cost_more_than_it_saves(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = _states(tiny_model)
    rare = below.Used(ROWS, len(ROWS) - 1)  # a group would be computed for a row of it
    assert below.of(states, 1, "tiny", [rare]) is None
    for last_layers in (None, 2):
        assert below.of(states, last_layers, "tiny", [below.Used(ROWS, 99)]) is None
    monkeypatch.setattr(below, "MOST", 128 * 4 * sum(len(row.ids) for row in ROWS) - 1)
    assert below.of(states, 1, "tiny", [below.Used(ROWS, 99)]) is None
    assert below.of(states, 1, "tiny", [below.Used(ROWS[:2], 99)]) is not None


def test_what_is_kept_is_bounded_over_all_finetunes(
    tiny_model: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 128 * 4 * sum(len(row.ids) for row in ROWS)
    monkeypatch.setattr(below, "MOST", most)
    batch = collate(ROWS, range(6), [0] * 6, 1, ROWS[0], "cpu")
    with torch.no_grad():
        for identity, groups in (("one", [3, 3]), ("two", [3, 3]), ("two", []), ("one", [3, 3])):
            states = _states(tiny_model)
            states.below = below.of(states, 1, identity, [below.Used(ROWS, 6)])
            computed.clear()
            states(batch)
            assert computed == groups and sum(kept.nbytes for kept in below._kept.values()) <= most


def test_a_finetune_that_is_out_of_memory_gets_that_of_known_states(tiny_model: Path) -> None:
    states = _states(tiny_model)
    states.below = below.of(states, 1, "tiny", [below.Used(ROWS, 6)])
    batch = collate(ROWS[:2], range(2), [0] * 2, 1, ROWS[0], "cpu")
    with torch.no_grad():
        first_PD = states(batch)
        assert below._kept
        fit.release("cpu")
        assert not below._kept and torch.equal(states(batch), first_PD)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_whose_upper_layers_read_more_than_hidden_states_goes_through_all(
    whole: bool, tiny_model: Path
) -> None:
    """What they read is of the batch's shape, so that the model fails, or of any, so that it gives something else."""
    states = _states(tiny_model)
    lower, upper = states.inner.layers
    left: list[torch.Tensor] = []
    own_lower, own_upper = lower.forward, upper.forward

    def leave(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        left[:] = [hidden if whole else hidden.mean()]
        found: torch.Tensor = own_lower(hidden, *args, **kwargs)
        return found

    def read(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = own_upper(hidden, *args, **kwargs) + left.pop()
        return found

    lower.forward, upper.forward = leave, read
    assert below.of(states, 1, "tiny", [below.Used(ROWS, 6)]) is None


def test_lower_layers_that_read_what_is_trained_are_computed_each_time(tmp_path: Path) -> None:
    """Gemma 4's layers all read a projection of the embeddings, which `all-linear` adapts with any `last_layers`."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=300, vocab_size_per_layer_input=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma4ForCausalLM(config).save_pretrained(tmp_path)
    states = _states(tmp_path)
    batch = collate(ROWS[:2], range(2), [0] * 2, 1, ROWS[0], "cpu")
    with torch.no_grad():
        states.below = below.of(states, 1, "gemma4", [below.Used(ROWS, 6)])
        states(batch)
        for name, factor in model.factors(states.peft_model).items():
            if "per_layer_model_projection.lora_B" in name:
                factor.fill_(0.1)
        torch.testing.assert_close(states(batch), states.through(batch), rtol=1e-5, atol=1e-5)
