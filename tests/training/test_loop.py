from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from safecl.config import Training
from safecl.stages import finetune
from safecl.testing import ranks
from safecl.testing import world as contract
from safecl.training import checkpoints, loop


def test_the_schedule_warms_up_and_falls_to_zero_as_a_cosine() -> None:
    config = Training(learning_rate=2.0, warmup_ratio=0.2)
    rates = [loop.learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)  # half way down the 8 steps after warm-up
    assert loop.learning_rate(config, 10, 10) == pytest.approx(0.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_loss_is_the_mean_over_the_global_batchs_response_tokens(world: contract.World, tmp_path: Path) -> None:
    """The first step's loss against the model's own cross-entropy, row by row, summed over tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from safecl.training import batches
    from safecl.training.tokens import Tokenizer, encode

    settings = contract.config("sft", dropout=0.0)
    contract.train(world, tmp_path, settings)
    rows, _ = encode(batches.read_rows(world.user), Tokenizer(world.model), settings["template"], False, 256)
    safe = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), str(world.safe / "adapter"))
    total, count = 0.0, 0
    for index in batches.order(3, len(rows), 5, 1.5)[0]:
        row = rows[index]
        labels = torch.tensor([[-100] * row.num_prompt + row.ids[row.num_prompt :]])
        with torch.no_grad():
            total += float(safe(torch.tensor([row.ids]), labels=labels).loss) * row.num_targets
        count += row.num_targets
    first = contract.curves(tmp_path)[0]
    assert first["response_tokens"] == count
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_decay_takes_off_is_reported(world: contract.World, tmp_path: Path) -> None:
    contract.train(world, tmp_path, contract.config("sft"))
    facts = json.loads((tmp_path / "result" / "result.json").read_text())
    kept = math.prod(1 - 0.1 * line["learning_rate"] for line in contract.curves(tmp_path))
    assert facts["norm_lost"] == pytest.approx((1 - kept) * facts["norm_start"])
    assert facts["norm_lost"] > 0 and facts["rows"] == 23 and facts["steps"] == 7


@pytest.mark.parametrize("method", ["der", "kl", "safegrad"])
def test_fewer_rows_than_ranks_do_not_hang(method: str, world: contract.World, tmp_path: Path) -> None:
    """Batches of one row and a memory of one row on two ranks: one of them always has nothing to do."""
    settings = contract.config(method, memory_batch_size=1)
    settings["training"] = {**settings["training"], "batch_size": 1, "epochs": 0.1}  # 3 steps
    start, one = contract.adapter(world.safe.parent), contract.train(world, tmp_path / "one", settings)
    engines: dict[str, dict[str, Any]] = {"torch": {}}
    zeros = (1, 2, 3) if method == "der" else (3,)  # the one whose ranks must all run every forward
    engines |= {f"zero{zero}": {"engine": "deepspeed", "zero": zero} for zero in zeros}
    for name, where in engines.items():
        ranks.run(contract.train_on_rank, 2, world, str(tmp_path / name), settings, where)
        alone = one
        if name == "zero3":  # its layers are not fused: of elements whose gradient is next to 0 the first steps differ
            ranks.run(contract.train_on_rank, 1, world, str(tmp_path / "alone"), settings, where)
            alone = contract.adapter(tmp_path / "alone")
        assert contract.gap(alone, contract.adapter(tmp_path / name), start) < 1e-5


def test_a_killed_rank_ends_the_run_and_it_resumes_bit_for_bit(world: contract.World, tmp_path: Path) -> None:
    """SIGKILL of the only rank after step 4, and of one of two ranks under ZeRO 1."""
    settings = contract.config("der")
    for num, where in ((1, {}), (2, {"engine": "deepspeed", "zero": 1})):
        killed, whole = tmp_path / f"killed{num}", tmp_path / f"whole{num}"
        codes = ranks.codes(contract.train_and_die, num, world, str(killed), settings, where, 4)
        assert codes[-1] == -9 and not {0, "done"} & set(codes)
        assert not (killed / "result").exists()
        newest = checkpoints.newest(killed)
        assert newest is not None and json.loads((newest / "state.json").read_text())["step"] in (3, 4)
        # What a writer that was killed leaves behind: half a line, half a checkpoint.
        with (killed / "curves.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        (killed / "tmp-1-5").mkdir()
        for scratch in (killed, whole):
            ranks.run(contract.train_on_rank, num, world, str(scratch), settings, where)
        assert contract.same_bits(contract.adapter(killed), contract.adapter(whole))
        assert contract.curves(killed) == contract.curves(whole)
        assert [line["step"] for line in contract.curves(killed)] == list(range(1, 8))


def test_a_checkpoint_of_another_run_is_not_resumed(world: contract.World, tmp_path: Path) -> None:
    settings = contract.config("sft")
    codes = ranks.codes(contract.train_and_die, 1, world, str(tmp_path), settings, {}, 4)
    assert codes == [-9]
    settings["training"] = {**settings["training"], "epochs": 3.0}
    with pytest.raises(RuntimeError, match="7 steps, expected 14"):
        contract.train(world, tmp_path, settings)


def test_a_checkpoint_is_written_when_it_is_asked_for_and_told_of(world: contract.World, tmp_path: Path) -> None:
    """As the Broker does when a machine is about to be taken back: long before the next one is due."""
    told: list[tuple[int, dict[str, float]]] = []

    def report(done: int, total: int, metrics: dict[str, float]) -> bool:
        told.append((done, metrics))
        return done == 3 and "checkpoint" not in metrics

    settings = contract.config("sft")
    inputs = world.inputs("sft")

    def slowly(step: int) -> None:
        time.sleep(loop.REPORT_EVERY_S)

    finetune.train_rows(settings, inputs, tmp_path, contract.execution(), report=report, after_step=slowly)
    assert [metrics["checkpoint"] for _, metrics in told if "checkpoint" in metrics] == [4.0]
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "checkpoint-00000004"
