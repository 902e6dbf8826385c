"""Tokens a second through Ray Serve (as stages ask for them) against vLLM's offline engine with the same settings.

    .venv/bin/python benchmarks/serving.py MODEL_FOLDER [--requests 64] [--repeats 2]

Two kinds of work: `generate` (short prompts, 64 new tokens each) and `judge` (prompts of 260 tokens that share their
first 160, 3 new tokens each). The two engines run one after the other, in turn, each booted once; one thread each.
Prints seconds and tokens a second of each repeat, and the ratio of the best ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

WORK = {"generate": (40, 0, 64), "judge": (260, 160, 3)}  # tokens: of a prompt, those shared, new ones
MAX_TOKENS = 512


def prompts(kind: str, num: int, repeat: int) -> list[list[int]]:
    """Token ids; another repeat has other prompts, so that no prefix cache carries over but the shared beginning."""
    length, num_shared, _ = WORK[kind]
    chance = random.Random(f"{kind}/{repeat}")
    shared = [random.Random(kind).randrange(100, 40_000) for _ in range(num_shared)]
    return [shared + [chance.randrange(100, 40_000) for _ in range(length - num_shared)] for _ in range(num)]


def offline(model: str, num: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, by kind of work."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=model, dtype="bfloat16", max_model_len=MAX_TOKENS, max_num_seqs=64, kv_cache_memory_bytes=2**30,
        block_size=32, distributed_executor_backend="uni", enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    found: dict[str, list[float]] = {kind: [] for kind in WORK}
    for kind, (_, _, new) in WORK.items():
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        for repeat in range(-1, repeats):  # the first warms up
            asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts(kind, num, repeat)]
            start = time.perf_counter()
            done = llm.generate(asked, params, use_tqdm=False)
            assert sum(len(output.outputs[0].token_ids) for output in done) == num * new
            found[kind] += [time.perf_counter() - start] if repeat >= 0 else []
    return found


def served(model: str, num: int, repeats: int) -> dict[str, list[float]]:
    """Likewise, through Serve."""
    import ray

    from safecl.serving.engine import Engines, deploy, ready, shutdown_all
    from safecl.serving.messages import Request, Sampling, Settings, WeightsRef

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    deploy(Settings(name="bench", max_model_len=MAX_TOKENS), model, num_cpus=0, wait=False)
    ready("bench")
    found: dict[str, list[float]] = {kind: [] for kind in WORK}
    for kind, (_, _, new) in WORK.items():
        for repeat in range(-1, repeats):
            asked = [Request(str(i), ids) for i, ids in enumerate(prompts(kind, num, repeat))]
            start = time.perf_counter()
            done = Engines().generate("bench", WeightsRef("base", model), asked, Sampling(max_tokens=new))
            assert sum(len(answer.token_ids) for answer in done.values()) == num * new
            found[kind] += [time.perf_counter() - start] if repeat >= 0 else []
    shutdown_all()
    ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=["offline", "served"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run = {"offline": offline, "served": served}[options.only]
        print("RESULT " + json.dumps(run(str(options.model.absolute()), options.requests, options.repeats)))
        return
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    seconds: dict[str, dict[str, list[float]]] = {}
    for which in ("offline", "served"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
        said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        lines = [line for line in said.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{which} failed:\n{said.stderr[-2000:]}")
        seconds[which] = json.loads(lines[0].removeprefix("RESULT "))
    for kind, (length, _, new) in WORK.items():
        tokens = options.requests * (new if kind == "generate" else length + new)
        best = {which: min(found[kind]) for which, found in seconds.items()}
        for which, found in seconds.items():
            each = ", ".join(f"{s:.2f} s ({tokens / s:.0f} tokens/s)" for s in found[kind])
            print(f"{kind:9} {which:8} {each}")
        print(f"{kind:9} served/offline throughput: {best['offline'] / best['served']:.2f}")


if __name__ == "__main__":
    main()
