"""Engines of their own: replicas of one judge, one of them frozen in its work; answers that do not depend on company."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from safecl.serving.client import Engines
from safecl.serving.deploy import deploy, ready, shutdown
from safecl.serving.messages import Request, Sampling, Settings, WeightsRef

REQUESTS = [Request(f"row-{i}", list(range(3 + i % 40, 15 + i % 40))) for i in range(600)]
SAMPLING = Sampling(max_tokens=24)


def _engines_of(name: str, num: int) -> dict[int, int]:
    """Replica pid -> pid of vLLM's own process below it, for all replicas."""
    import psutil

    found: dict[int, int] = {}
    for _ in range(200):
        pid = Engines().status(name)["pid"]
        children = psutil.Process(pid).children(recursive=True)
        found[pid] = max(children, key=lambda child: child.memory_info().rss).pid
        if len(found) == num:
            return found
    raise AssertionError(f"expected {num} replicas, saw {found}")


@pytest.mark.slow
def test_a_frozen_engine_is_noticed_and_replaced_and_every_answer_comes_once(tiny_model: Path, tmp_path: Path) -> None:
    """A stopped process is alive for every flag; only the tokens that do not come tell."""
    import psutil
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        settings = Settings(name="judge", memory_gib=0.1, max_model_len=128, stall_s=10.0, log_dir=str(tmp_path))
        deploy(settings, str(tiny_model), num_replicas=2, wait=False)
        ready("judge", timeout_s=240)
        weights = WeightsRef("base", str(tiny_model))
        expected = Engines().generate("judge", weights, REQUESTS, SAMPLING)
        before = _engines_of("judge", 2)
        replica, frozen = next(iter(before.items()))
        progress: list[int] = []

        def freeze_at_a_third(done: int, total: int) -> None:
            progress.append(done)
            if done == total // 3:
                os.kill(frozen, signal.SIGSTOP)

        started = time.monotonic()
        got = Engines().generate("judge", weights, REQUESTS, SAMPLING, on_progress=freeze_at_a_third, timeout_s=180)
        assert time.monotonic() - started > 10  # some answers were lost with the frozen engine, and asked for again
        assert progress == list(range(1, len(REQUESTS) + 1)), "each answer is counted once"
        assert {i: c.token_ids for i, c in got.items()} == {i: c.token_ids for i, c in expected.items()}
        ready("judge", timeout_s=240)
        after = _engines_of("judge", 2)
        assert replica not in after and len(after.keys() & before.keys()) == 1
        assert not psutil.pid_exists(frozen), "the frozen engine's process is still there"
        shutdown("judge")
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_batch_invariant_engine_gives_the_same_bits_in_any_company(tiny_model: Path, tmp_path: Path) -> None:
    """Log-probabilities of the sampled tokens, in bfloat16 and at a width where another batch rounds otherwise."""
    import ray
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    weights, sampling = WeightsRef("base", str(tmp_path / "model")), Sampling(max_tokens=16, logprobs=5)
    shared = [Request(f"row-{i}", [*range(3, 60), 5 + i, 70 - i]) for i in range(24)]  # a long common beginning

    def likely(requests: list[Request]) -> dict[str, object]:
        done = Engines().generate(name, weights, requests, sampling)
        return {id: (completion.token_ids, completion.likely) for id, completion in done.items()}

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    same: dict[bool, bool] = {}
    try:
        for invariant in (True, False):
            name = f"engine-{invariant}".lower()
            settings = Settings(
                name=name, memory_gib=0.1, max_model_len=128, batch_invariant=invariant, log_dir=str(tmp_path)
            )
            deploy(settings, weights.base, wait=False)
            ready(name, timeout_s=240)
            together = likely(shared)
            alone = {id: found for request in shared[:6] for id, found in likely([request]).items()}
            same[invariant] = all(together[id] == found for id, found in alone.items())
            shutdown(name)
    finally:
        ray.shutdown()
    assert same == {True: True, False: False}, "an ordinary engine that does the same makes this test void"
