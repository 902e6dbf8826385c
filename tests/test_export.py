"""What `safecl export` writes loads in transformers, PEFT and vLLM, and answers as the trial did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl import export
from safecl.base import ConfigError
from safecl.stages import finalize
from safecl.store import Stage, Store
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import shards

IDS = torch.tensor([[5, 9, 40, 41, 30, 7]])


def _publish(store: Store, stage: Stage, source: Path | None = None, pointer: Path | None = None) -> Stage:
    import shutil

    made = store.new_folder()
    if source is not None:
        shutil.copytree(source, made, dirs_exist_ok=True)
    if pointer is not None:
        (made / "where.json").write_text(json.dumps({"path": str(pointer)}))
    store.publish(stage, made, {}, 1.0)
    return stage


@pytest.fixture(scope="module")
def stored(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    """A store with a finetune of the tiny model, and a dense result resting on it."""
    folder = tmp_path_factory.mktemp("exported")
    store = Store(str(folder / "root"))
    contract.train(world, folder / "sft", contract.config("sft"))
    model = _publish(store, Stage("model", {"dtype": "float32"}, {}, "1"), pointer=world.model)
    safe = _publish(store, Stage("finetune", {"method": "sft", "n": 0}, {"model": model}, "1"), world.safe)
    inputs = {"model": model, "safe": safe}
    tuned = _publish(store, Stage("finetune", {"method": "sft", "n": 1}, inputs, "1"), folder / "sft" / "result")
    config: dict[str, Any] = {"method": "magmax", "params": {"scale": 0.5}, "dtype": "float32"}
    (folder / "max").mkdir()
    paths = {"safe": world.safe, "tuned": folder / "sft" / "result"}
    finalize.finalize(config, paths, folder / "max")
    dense = _publish(store, Stage("finalize", config, {"safe": safe, "tuned": tuned}, "1"), folder / "max")
    return store, {"low": tuned.key, "dense": dense.key}


def test_an_adapter_loads_in_peft_and_gives_the_merged_models_logits(
    stored: tuple[Store, dict[str, str]], world: World, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store, keys = stored
    adapter = export.export(store, keys["low"][:12], tmp_path / "adapter", merged=False)
    merged = export.export(store, keys["low"], tmp_path / "merged", merged=True)
    base = AutoModelForCausalLM.from_pretrained(world.model)
    with torch.no_grad():
        plain = base(IDS).logits
        first = PeftModel.from_pretrained(base, str(adapter)).eval()(IDS).logits
        second = AutoModelForCausalLM.from_pretrained(merged).eval()(IDS).logits
    assert torch.allclose(first, second, atol=1e-3) and not torch.allclose(first, plain, atol=1e-2)
    assert (
        AutoTokenizer.from_pretrained(merged)("the cup").input_ids
        == AutoTokenizer.from_pretrained(world.model)("the cup").input_ids
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_merged_model_is_in_the_dtype_that_it_was_served_in(world: World, tmp_path: Path) -> None:
    """The base's files are float32, its stage says bfloat16."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    store = Store(str(tmp_path / "root"))
    model = _publish(store, Stage("model", {"dtype": "bfloat16"}, {}, "1"), pointer=world.model)
    safe = _publish(store, Stage("finetune", {"method": "sft"}, {"model": model}, "1"), world.safe)
    merged = export.export(store, safe.key, tmp_path / "merged", merged=True)
    assert {tensor.dtype for tensor in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16


def test_shards_are_read_through_their_index(
    stored: tuple[Store, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    store, keys = stored
    whole = export.export(store, keys["dense"], tmp_path / "whole", merged=True)
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    sharded = export.export(store, keys["dense"], tmp_path / "sharded", merged=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits for folder in (whole, sharded)]
    assert torch.equal(*logits)


def test_what_cannot_be_written_is_said_and_leaves_nothing(
    stored: tuple[Store, dict[str, str]], tmp_path: Path
) -> None:
    store, keys = stored
    with pytest.raises(ConfigError, match="--merged"):
        export.export(store, keys["dense"], tmp_path / "out", merged=False)
    with pytest.raises(ConfigError, match="no stages"):
        export.export(store, "nothing", tmp_path / "out", merged=False)
    with pytest.raises(ConfigError, match="4 stages"):
        export.export(store, "", tmp_path / "out", merged=False)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="already"):
        export.export(store, keys["low"], tmp_path / "there", merged=False)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow  # three engines boot
def test_vllm_loads_the_merged_model_and_the_adapter_and_both_say_the_same(
    stored: tuple[Store, dict[str, str]], world: World, tmp_path: Path
) -> None:
    """In a process of its own: an engine holds memory until its process ends."""
    import subprocess
    import sys

    store, keys = stored
    export.export(store, keys["low"], tmp_path / "adapter", merged=False)
    export.export(store, keys["low"], tmp_path / "merged", merged=True)
    script = f"""
import os
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_USE_V1="1")
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
prompt, greedy = {{"prompt_token_ids": {IDS[0].tolist()}}}, SamplingParams(temperature=0, max_tokens=4, logprobs=0)
def answers(model, adapter, **more):
    llm = LLM(model, dtype="float32", max_model_len=64, enforce_eager=True, **more)
    request = LoRARequest("a", 1, adapter) if adapter else None
    answer = llm.generate([prompt], greedy, lora_request=request, use_tqdm=False)[0].outputs[0]
    return [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs)]
print("ANSWER", answers({str(tmp_path / "merged")!r}, None))
print("ANSWER", answers({str(world.model)!r}, {str(tmp_path / "adapter")!r}, enable_lora=True, max_lora_rank=8))
print("ANSWER", answers({str(world.model)!r}, None))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    merged, adapter, base = (json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("ANSWER"))
    assert merged == pytest.approx(adapter, abs=1e-3), done.stdout
    assert base != pytest.approx(adapter, abs=1e-2), "the adapter changes nothing: test is void"
