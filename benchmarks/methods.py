"""A training step of each method against a step of SFT: time, and the peak memory of each process.

    .venv/bin/python benchmarks/methods.py [--model wheel|gemma2|FOLDER] [--dtype bfloat16] [--only der lwf]

The user batch has 5 rows and a replay batch 1 (Lisa's own steps: 5). All rows are of one source (GSM8K), so that replayed
rows are as long as user rows. `gemma2`: a random Gemma-2 of two layers with a vocabulary of 256,000 and soft caps. SFT and
one method at a time run in turn, each in a process of its own, on the same rows; timed is from the end of the first step.
Ends with an error where user rows were not the same as SFT's, or a loss is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _bench
import train

GOALS = {"der": 1.35, "replay": 1.3, "lwf": 1.3, "agem": 1.6, "ewc": 1.02, "lisa": 1.1, "refresh": 2.2}
BATCH, REPLAYED, NUM_MEMORY = 5, 1, 15
SETTINGS: dict[str, dict[str, Any]] = {  # besides `memory_batch_size`, where there is one
    "lisa": {"cycles": 3, "alignment_share": 0.5, "memory_batch_size": BATCH},
    "safeinstr": {"memory_size": NUM_MEMORY},
}
SEED = 0


def config(method: str, dtype: str, rank: int = 8) -> dict[str, Any]:
    """What `make_run` is given."""
    from safecl import methods
    from safecl.config import Lora, Template, Training

    params = dict(SETTINGS.get(method, {}))
    if "memory_batch_size" in methods.load(method).Config.model_fields:
        params.setdefault("memory_batch_size", REPLAYED)
    return {
        "method": method, "params": params, "lora": Lora(rank=rank, alpha=2 * rank).model_dump(),
        "training": Training(epochs=1.0, batch_size=BATCH, learning_rate=1e-4).model_dump(),
        "template": Template().model_dump(), "bos": False, "dtype": dtype, "adapter": "continue", "seed": SEED,
    }  # fmt: skip


def execution() -> dict[str, Any]:
    from safecl.config import Execution

    return Execution(engine="torch", micro_batch_size=8, checkpoint_every_s=1e9).model_dump()


def model_folder(source: str, dtype: str) -> Path:
    if source != "gemma2":
        return train.model_folder(source, dtype)
    from tests import conftest

    out = train.cache() / "gemma2-256k"
    if not out.exists():
        out.mkdir()
        conftest.build_tokenizer(out)
        conftest.build_model(out, vocab_size=256_000, kind="gemma2")
    return out


def build_world(folder: Path, model: Path, data: Path, dtype: str, num_user: int, characters: int) -> dict[str, str]:
    """theta_safe, rows, and what methods ask for, by the stages' own code. Folders by the names of a finetune's inputs;
    `user` are the user rows."""
    from dataclasses import replace

    from safecl import tasks
    from safecl.config import Template
    from safecl.stages import finetune, fisher, memory
    from safecl.training import batches

    found = tasks.load("gsm8k")(data).rows("user", num_user + NUM_MEMORY, SEED)
    rows = [replace(row, prompt=row.prompt[:characters], response=row.response[:characters]) for row in found]
    parts = {"user": rows[:num_user], "safety": [replace(row, harmful=True) for row in rows[num_user:]]}
    for name in ("user", "safety", "memory", "teacher", "fisher"):
        (folder / name).mkdir()
    for name, part in parts.items():
        batches.write_rows(part, folder / name)
    finetune.train_rows(
        config("sft", dtype), {"model": model, "rows": folder / "safety"}, folder / "align", execution()
    )
    inputs = {"model": model, "safe": folder / "align" / "result"}
    text = {"seed": SEED, "template": Template().model_dump(), "bos": False, "dtype": dtype, "max_tokens": 512}
    settings = {**text, "positions": "response", "adapter": "continue", "num_rows": NUM_MEMORY}
    memory.remember(settings, {**inputs, "rows": folder / "safety"}, folder / "memory")
    memory.remember({**settings, "num_rows": None}, {**inputs, "rows": folder / "user"}, folder / "teacher")
    fisher.estimate(
        {**text, "num_rows": 5, "labels": "empirical"}, {**inputs, "rows": folder / "safety"}, folder / "fisher", 5
    )
    named = {name: str(folder / name) for name in ("user", "memory", "fisher", "teacher")}
    return {**named, "model": str(model), "safe": str(inputs["safe"]), "replay": named["memory"]}


def inputs_of(method: str, world: Mapping[str, str]) -> dict[str, Path]:
    """What a finetune by this method is given."""
    from safecl import methods

    class Names:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: name

    kind = methods.load(method)
    asked: Any = kind(kind.Config()).requires(Names())  # type: ignore[arg-type]
    named = {"model": world["model"], "safe": world["safe"], "rows": world["user"]}
    return {name: Path(path) for name, path in {**named, **{name: world[name] for name in asked}}.items()}


def trained() -> list[str]:
    """Methods that train, SFT first."""
    from safecl import methods

    found = [name for name in methods.names() if methods.load(name).trains_as is None]
    return ["sft", *(name for name in found if name != "sft")]


def worker() -> None:
    """Builds the world where asked to, and runs methods in it."""

    def answer(build: list[Any] | None = None, **run: Any) -> dict[str, Any]:
        if build is not None:
            folder, model, data, *rest = build
            return build_world(Path(folder), Path(model), Path(data), *rest)
        return step(**run)

    _bench.serve(answer)


def step(method: str, dtype: str, world: Mapping[str, str]) -> dict[str, Any]:
    """Train by a method: seconds a step after the first, by the clock and of this process's CPU time, and what to compare."""
    import gc

    from safecl.stages import finetune
    from safecl.training import loop

    made = finetune.make_run(config(method, dtype), inputs_of(method, world), execution())
    ends: list[tuple[float, float]] = []

    def after_step(_: int) -> None:
        ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as scratch:
        loop.train(made.method, made.run, Path(scratch), None, 1e9, after_step)
        lines = [json.loads(line) for line in (Path(scratch) / "curves.jsonl").read_text().splitlines()]
    (start, cpu_start), (end, cpu_end) = ends[0], ends[-1]
    num = len(ends) - 1
    del made
    gc.collect()
    return {
        "seconds": (end - start) / num, "cpu_s": (cpu_end - cpu_start) / num, "losses": [line["loss"] for line in lines],
        "response_tokens": [line["response_tokens"] for line in lines], "peak_rss_gib": _bench.peak_rss_gib(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel", help="wheel (SmolLM2-135M), gemma2, or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="+", help="methods")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run, at least 5")
    parser.add_argument("--characters", type=int, default=120, help="questions and answers are cut to so many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", type=Path, help="another checkout of safecl, measured instead of this one")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        num_user = BATCH * (options.steps + 1)
        model = model_folder(options.model, options.dtype)
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if options.base:
            environment["PYTHONPATH"] = str(options.base)
        arguments = [__file__, "--worker"]
        builder, sft = (_bench.Worker(arguments, **environment) for _ in range(2))
        asked = [name, str(model), str(options.data.absolute()), options.dtype, num_user, options.characters]
        common = {"dtype": options.dtype, "world": builder.ask(build=asked)}
        builder.close()
        plain = sft.ask(method="sft", **common)
        for method in options.only or trained()[1:]:
            other = _bench.Worker(arguments, **environment)
            said: dict[str, Any] = {method: other.ask(method=method, **common)}  # warms up
            cpu: dict[str, list[float]] = {"sft": [], method: []}

            def once(kind: str, process: _bench.Worker, said: dict[str, Any] = said, cpu: Any = cpu) -> float:
                said[kind] = process.ask(method=kind, **common)
                cpu[kind].append(said[kind]["cpu_s"])
                return float(said[kind]["seconds"])

            runs = {"sft": lambda: once("sft", sft), method: lambda m=method, p=other, o=once: o(m, p)}
            found = _bench.interleaved(runs, options.repeats)
            other.close()
            goal = GOALS.get(method)
            row = {
                "method": method, "a step, s": found[method]["median"], "SFT's, s": found["sft"]["median"],
                "over SFT's": found[method]["ratio"],
                "by CPU time": statistics.median(b / a for a, b in zip(cpu["sft"], cpu[method], strict=True)),
                "goal": goal, "peak RSS, GiB": said[method]["peak_rss_gib"],
                "SFT's, GiB": plain["peak_rss_gib"],
            }  # fmt: skip
            table.append(row)
            step, plain_step, ratio, by_cpu = (
                row[key] for key in ("a step, s", "SFT's, s", "over SFT's", "by CPU time")
            )
            print(
                f"{method:10} {step:.3f} s   SFT {plain_step:.3f} s   ratio {ratio:.2f} (by CPU time {by_cpu:.2f})   "
                f"goal {goal or '-'}   "
                f"peak {said[method]['peak_rss_gib']:.2f} GiB (SFT {plain['peak_rss_gib']:.2f})",
                flush=True,
            )
            if not all(map(math.isfinite, said[method]["losses"])):
                failed.append(f"{method}: losses {said[method]['losses']}, expected finite ones")
            if method not in ("safeinstr", "grsap") and said[method]["response_tokens"] != plain["response_tokens"]:
                failed.append(f"{method}: its user rows are not SFT's")
            title = f"{options.model}, {options.dtype}, {BATCH} user rows and {REPLAYED} replayed"
            file = _bench.write(options.name or f"methods-{options.model}-{options.dtype}", {title: table})
        sft.close()
    print(file)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
