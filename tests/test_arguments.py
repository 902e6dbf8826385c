"""What an engine is made with: fields of vLLM's own arguments, and settings that contradict each other refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from safecl.base import ConfigError
from safecl.config import Execution, Model
from safecl.devices import Holder
from safecl.fleet import MOST_THREADS, Fleet, Group
from safecl.models import model_stage, tokenizer_stage
from safecl.project import load
from safecl.serving.deploy import environment
from safecl.serving.engine import arguments
from safecl.serving.messages import Settings
from safecl.store import Store

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def made(model: Path, **settings: Any) -> dict[str, Any]:
    return arguments(str(model), Settings(name="e", max_model_len=64, **settings))


def test_every_argument_is_one_of_vllms(tiny_model: Path) -> None:
    from vllm import AsyncEngineArgs

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for use_gpu in (False, True):
        given = made(tiny_model, use_gpu=use_gpu, num_gpus=2, quantization="fp8")
        assert set(given) <= fields
        AsyncEngineArgs(**given)


def test_vllm_makes_its_own_config_of_them(tiny_model: Path) -> None:
    """Tensor parallel and quantised, as far as a machine without a GPU goes: vLLM's checks of names and values."""
    from vllm import AsyncEngineArgs

    args = AsyncEngineArgs(**made(tiny_model, memory_gib=0.25, max_num_seqs=3))
    config = args.create_engine_config()
    assert config.parallel_config.tensor_parallel_size == 1 and config.scheduler_config.max_num_seqs == 3
    assert config.cache_config.kv_cache_memory_bytes == 2**28


def test_memory_and_sequences_by_device(tiny_model: Path) -> None:
    on_cpu, on_gpu = made(tiny_model), made(tiny_model, use_gpu=True, num_gpus=4)
    assert on_cpu["kv_cache_memory_bytes"] == 2**30 and "gpu_memory_utilization" not in on_cpu
    assert on_gpu["kv_cache_memory_bytes"] is None and on_gpu["gpu_memory_utilization"] == 0.9
    assert (on_cpu["max_num_seqs"], on_gpu["max_num_seqs"]) == (64, 256)
    assert (on_gpu["tensor_parallel_size"], on_gpu["distributed_executor_backend"]) == (4, "mp")
    assert made(tiny_model, use_gpu=True, memory_gib=2)["kv_cache_memory_bytes"] == 2**31
    assert made(tiny_model, use_gpu=True, num_gpus=0.5)["tensor_parallel_size"] == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine_units": 1.5}, "engine_units: expected a part of one, or a whole number"),
        ({"engine_units": 0}, "engine_units"),
        ({"worker_units": 0.5}, "the same for both, a half, a quarter, a fifth .*, got 0.5 and 1"),
        ({"worker_units": 0.4, "engine_units": 0.4}, "got 0.4 and 0.4"),
        ({"worker_units": 0.5, "engine_units": 0.5, "num_workers": 2}, "ranks of one finetune cannot share a device"),
        ({"engine_gpu_memory": 0.5}, "engine_gpu_memory: goes with `use_gpu`"),
        ({"engine_gpu_memory": 0.5, "engine_memory_gib": 4, "use_gpu": True}, "goes without engine_memory_gib"),
        (
            {"engine_gpu_memory": 0.6, "engine_units": 0.5, "worker_units": 0.5, "use_gpu": True},
            "at most engine_units 0.5",
        ),
        ({"unit": "slot"}, "go with a cluster that is joined"),
        ({"may_bring": 4}, "go with a cluster that is joined"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Execution(**settings)


LLAMA = {"name": "lg", "source": "meta-llama/Llama-Guard-3-8B", "revision": "a" * 40, "dtype": "bfloat16"}


def test_a_judge_may_be_packed_which_changes_what_it_is_and_a_candidate_may_not(tmp_path: Path) -> None:
    judge = {"judge": "llamaguard", "model": {**LLAMA, "quantization": "fp8"}}
    chosen = ["execution.use_gpu=true", f"evaluate.judges.asr={json.dumps(judge)}"]
    [(_, packed)] = load(QUICKSTART, chosen).evaluate.judges.models.items()
    plain = packed.model_copy(update={"quantization": None})
    assert model_stage(packed).key != model_stage(plain).key == model_stage(Model(**LLAMA)).key
    assert tokenizer_stage(packed).key == tokenizer_stage(plain).key
    fleet = Fleet.__new__(Fleet)
    fleet.execution, fleet.store = Execution(use_gpu=True), Store(str(tmp_path))
    group = Group("judge-1", "judge", model_stage(packed))
    assert fleet._settings(group, Holder("judge-1-1", "judge-1", 1.0)).quantization == "fp8"
    for settings, said in (
        ([*chosen, "execution.use_gpu=false"], "quantization: goes with execution.use_gpu"),
        (["execution.use_gpu=true", "models.0.quantization=fp8"], "for models of judges"),
        ([chosen[0], chosen[1].replace("fp8", "int1")], "fp8"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(QUICKSTART, settings)


@pytest.mark.parametrize(
    ("chosen", "num_threads"),
    [
        ({}, min(MOST_THREADS, os.cpu_count() or 1)),  # every core of this machine that is free
        ({"batch_invariant": True}, 1),  # how a sum is split over threads would be the machine's
        ({"address": "auto"}, 1),  # as many as it asks the cluster for
        ({"address": "auto", "engine_units": 4}, 4),
    ],
)
def test_an_engine_on_cpus_computes_with_the_cores_that_it_may_have(
    chosen: dict[str, Any], num_threads: int, tmp_path: Path
) -> None:
    fleet = Fleet.__new__(Fleet)
    fleet.execution, fleet.store = Execution(**chosen), Store(str(tmp_path))
    settings = fleet._settings(
        Group("judge-1", "judge", model_stage(Model(**LLAMA))), Holder("judge-1-1", "judge-1", 1.0)
    )
    assert settings.num_threads == num_threads
    assert environment(settings)["OMP_NUM_THREADS"] == str(num_threads)
