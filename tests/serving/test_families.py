"""Trained against served, for every kind of model that is served: the check that every finetune goes through, with windows
and soft caps reached. An engine boots for each (about 30 s of CPU)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safecl.config import Execution, Template
from safecl.serving.client import Engines
from safecl.serving.deploy import deploy, ready, shutdown
from safecl.serving.messages import Settings
from safecl.stages import finetune, generate
from safecl.store import Context, Stage
from safecl.tasks import Row
from safecl.testing import world as contract
from safecl.training import batches
from tests.conftest import build_tokenizer

pytestmark = pytest.mark.slow
WINDOW = 24
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "mistral": {"tie_word_embeddings": False, "sliding_window": WINDOW},
    "qwen2": {"tie_word_embeddings": True, "head_dim": 32},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {
        "tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 64,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "pad_token_id": None,
    },
    "gemma3_text": {
        "tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 64, "pad_token_id": None,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # transformers reads a head_dim of its own, vLLM takes hidden / heads and the first rows of each matrix, without a word.
    "wide qwen2": {"tie_word_embeddings": True},
}  # fmt: skip


def build(folder: Path, kind: str) -> None:
    """A random float32 model whose attention scores are some units wide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind.removeprefix("wide "), vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=0, eos_token_id=2,
        **{"head_dim": 64, **FAMILIES[kind]},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(folder))
    build_tokenizer(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in FAMILIES), ("llama", "bfloat16"), ("gemma2", "bfloat16")]
)
def test_the_model_that_is_trained_is_the_model_that_is_served(
    kind: str, dtype: str, cluster: None, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    model.mkdir()
    build(model, kind)
    chance = random.Random(1)

    def text(num: int) -> str:
        return " ".join(chance.choice(contract.WORDS) for _ in range(num))

    (tmp_path / "rows").mkdir()
    rows = [Row(f"{i}", text(20 + 7 * i), text(9), True) for i in range(4)]
    batches.write_rows(rows, tmp_path / "rows")
    settings = contract.config("sft", dtype=dtype)
    settings["training"] |= {"learning_rate": 1e-2, "epochs": 4.0}
    finetune.train_rows(settings, {"model": model, "rows": tmp_path / "rows"}, tmp_path / "tuned", contract.execution())
    name = f"candidate-{kind.replace(' ', '-')}-{dtype}"
    small = {"memory_gib": 0.1, "max_model_len": 256, "log_dir": str(tmp_path)}
    deploy(Settings(name=name, dtype=dtype, **small), str(model), wait=False)
    try:
        ready(name, timeout_s=240)
        base, tuned = Stage("model", {}), Stage("finetune", {"kind": kind})
        config = {
            "template": Template().model_dump(mode="json"), "bos": False, "max_new_tokens": 4, "max_prompt_tokens": 64,
        }  # fmt: skip
        stage = Stage(
            "generate", config, {"model": base, "weights": tuned, "rows": Stage("data", {"role": "attack.test"})}
        )
        inputs = {"model": model, "weights": tmp_path / "tuned" / "result", "rows": tmp_path / "rows"}
        reach = Engines({f"candidate-{base.key[:8]}": (name,)})
        context = Context(stage, inputs, tmp_path, tmp_path, Execution(engine_max_tokens=250), lambda *_: None, reach)
        facts = generate.run(context)
    finally:
        shutdown(name)
    assert facts["served_tokens"] > 2 * WINDOW
    if kind == "wide qwen2":
        assert facts["served_mean"] > 0.5
        return
    assert facts["served_gap"] < (2e-3 if dtype == "float32" else 0.6) and facts["served_mean"] < 0.1
    # Another function would show: the library's default attention without caps, or with windows of another length.
    if kind in ("llama", "qwen2", "qwen3") or dtype != "float32":
        return
    probe = json.loads((tmp_path / "tuned" / "result" / "probe.json").read_text())
    changes = {"gemma2": {"attn_logit_softcapping": None}}.get(
        kind, {"sliding_window": None if kind == "mistral" else 999}
    )
    logprobs = []
    for change in ({}, changes):
        other = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float32, attn_implementation="eager", **change
        )
        with torch.no_grad():
            logprobs.append(
                other(torch.tensor([max(probe, key=lambda row: len(row["ids"]))["ids"]])).logits.log_softmax(-1)
            )
    assert (logprobs[0] - logprobs[1]).abs().max() > 0.1
