"""Training on one GPU at the sizes people use, with random weights: safecl's loop and every method, against TRL's SFTTrainer
and Hugging Face's Trainer, both on PEFT; and the merge that puts an adapter into a served model.

    python benchmarks/gpu.py --minutes 9 [--out FOLDER]          # CUDA: Llama-2-7B, Mistral-7B and Gemma-2-2B shapes, bfloat16
    python benchmarks/gpu.py --tiny --device cpu --minutes 3     # every code path on small shapes

Needs PyTorch, transformers, peft, pydantic, psutil and safetensors: no Ray, no vLLM, no download. TRL is used where it is
installed. Weights are drawn on the device from one seed, so that all alternatives start equal; rows are of a fixed number
of tokens, half of them answer. What matters most is measured first, each number is written as soon as it is there, and
nothing is started that would not end in time. Alternatives run in turn; timed are the steps after the second.

Model FLOPs of a step (LoRA: 2 a weight and token forward, 2 backward; the head on answer tokens only; causal attention's
own products) are the same for all alternatives. MFU divides them by the card's dense bfloat16 peak; HFU counts also what
gradient checkpointing computes again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import _anchors
import _bench
import methods
import torch
from _shapes import SEED, SHAPES, World, build, quiet, without_files

WARM = 2  # steps before those timed
TOLERANCE = 3e-2  # of a step's loss, relative: bfloat16
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16 FLOP/s by name
MIXED = ("safeinstr", "grsap")  # SFT on more rows: a step is SFT's
ANCHORS = {"trl": ("padded autocast", "padded"), "hf": ("padded autocast", "padded")}


class Bench:
    """What is measured, with its time, device and file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.deadline = time.monotonic() + 60 * options.minutes
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.slowest = 0.0  # seconds of the longest run so far, with its set-up
        self.failed: list[str] = []
        self.anchors = {kind: list(variants) for kind, variants in ANCHORS.items()}  # later only each one's fastest

    @property
    def on_gpu(self) -> bool:
        return str(self.device) != "cpu"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def write(self) -> None:
        """Everything so far."""
        name = "gpu-tiny" if self.options.tiny else "gpu"
        _bench.write(name, {title: rows for title, rows in self.tables.items() if rows}, self.options.out)

    def peak_gib(self) -> float | None:
        """Of the run under way; on a CPU all runs share a process, whose peak says nothing of one."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None

    def clear(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def rounds(
        self,
        title: str,
        runs: Mapping[str, Callable[[], dict[str, Any]]],
        describe: Callable[[str, list[dict[str, Any]], float | None], dict[str, Any]],
    ) -> dict[str, list[dict[str, Any]]]:
        """Each run once a round; after each, `describe(name, its results, ratio to the first's)` is its row of the table.
        One that fails is not tried again. Ends early where time is short."""
        rows = self.tables.setdefault(title, [])
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        shown: dict[str, dict[str, Any]] = {}
        first, alive = next(iter(runs)), list(runs)
        for _ in range(self.options.repeats):
            for name in list(alive):
                if self.left() < 1.3 * self.slowest:
                    print(f"  no time left for {title}: {name}", flush=True)
                    return done
                started = time.monotonic()
                self.clear()
                try:
                    done[name].append(runs[name]())
                except Exception as error:
                    alive.remove(name)
                    message = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
                    print(f"  {name}: {message}", flush=True)
                    if self.options.debug:
                        raise
                    row: dict[str, Any] = {"alternative": name, "failed": message}
                else:
                    pairs = zip(done[name], done[first], strict=False)
                    ratios = [mine["seconds"] / its["seconds"] for mine, its in pairs]
                    row = describe(name, done[name], statistics.median(ratios) if ratios else None)
                    row["runs"] = len(done[name])
                    print("  " + "  ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)
                if name in shown:
                    rows[rows.index(shown[name])] = row
                else:
                    rows.append(row)
                shown[name] = row
                self.clear()
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.write()
        return done


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- one run -----------------------------------------------------------------------------------------------------------


def ours(world: World, method: str, checkpointing: bool) -> dict[str, Any]:
    """safecl's loop: seconds a step, peak memory, losses."""
    from safecl.config import Execution
    from safecl.stages import finetune
    from safecl.training import loop

    bench = world.bench
    asked = {"engine": "torch", "micro_batch_size": max(8, bench.options.rows), "checkpoint_every_s": 1e9}
    own = "gradient_checkpointing" in Execution.model_fields
    if own:
        asked["gradient_checkpointing"] = "on" if checkpointing else "off"
    execution = Execution(**asked).model_dump()
    inputs = world.plain() if method == "sft" else methods.inputs_of(method, world.ask())
    bench.clear()
    made = finetune.make_run(world.settings(method), inputs, execution, device=bench.device)
    if checkpointing and not own:
        made.run.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ends: list[float] = []

    def after_step(step: int) -> None:
        if step in (WARM, made.run.num_steps):
            bench.synchronise()
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        loop.train(made.method, made.run, Path(scratch), None, 1e9, after_step)
        lines = [json.loads(line) for line in (Path(scratch) / "curves.jsonl").read_text().splitlines()]
    seconds = (ends[-1] - ends[WARM - 1]) / (len(ends) - WARM)
    return {"seconds": seconds, "peak": bench.peak_gib(), "losses": [line["loss"] for line in lines]}


def theirs(world: World, kind: str, variant: str, checkpointing: bool) -> dict[str, Any]:
    """An anchor, likewise."""
    from transformers import AutoTokenizer

    from safecl.config import Training
    from safecl.training import batches, loop, tokens

    bench = world.bench
    settings = world.settings("sft")
    training = Training(**settings["training"])
    rows = batches.read_rows(world.folder / "user")
    encoded, _ = tokens.encode(rows, tokens.Tokenizer(world.model), settings["template"], False, 4096)
    order = batches.order(SEED, len(encoded), training.batch_size, 1.0)
    base = build(world.model, torch.bfloat16, bench.device)
    base.config.use_cache = False
    peft_model = _anchors.peft_model(base, world.folder / "safe" / "adapter", settings["lora"])
    with tempfile.TemporaryDirectory() as scratch:
        found = _anchors.train(
            kind, variant, peft_model, AutoTokenizer.from_pretrained(str(world.model)),
            [(encoded[i].ids, encoded[i].num_prompt) for indices in order for i in indices], training.batch_size,
            len(order), settings["training"],
            lambda step: loop.learning_rate(training, min(step, len(order) - 1), len(order)) / training.learning_rate,
            Path(scratch), bench.synchronise, checkpointing, WARM,
        )  # fmt: skip
    return {"seconds": found["seconds"] / (len(order) - WARM), "peak": bench.peak_gib(), "losses": found["losses"]}


# -- what is measured --------------------------------------------------------------------------------------------------


def against_anchors(world: World, checkpointing: bool) -> None:
    """safecl's SFT and the anchors, with or without gradient checkpointing."""
    bench = world.bench
    runs: dict[str, Callable[[], dict[str, Any]]] = {"safecl": lambda: ours(world, "sft", checkpointing)}
    for kind, variants in bench.anchors.items():
        for variant in variants:
            runs[f"{kind} {variant}"] = lambda k=kind, v=variant: theirs(world, k, v, checkpointing)
    curve: list[float] = []
    per_row = world.flops
    model_flops = bench.options.rows * (2 * per_row["forward"] + 2 * per_row["head"] + 3 * per_row["attention"])
    again = bench.options.rows * (per_row["forward"] + per_row["attention"]) if checkpointing else 0.0
    peak = next((v for k, v in PEAKS.items() if bench.on_gpu and k in torch.cuda.get_device_name()), None)

    def describe(name: str, found: list[dict[str, Any]], ratio: float | None) -> dict[str, Any]:
        seconds = statistics.median(result["seconds"] for result in found)
        if name == "safecl":
            curve[:] = found[0]["losses"]
        gap = max((abs(a / b - 1) for a, b in zip(found[0]["losses"], curve, strict=False)), default=None)
        if gap is not None and gap > TOLERANCE and bench.options.dropout == 0:
            bench.failed.append(f"{world.shape}, {name}: losses {gap:.1e} apart, expected at most {TOLERANCE}")
        return {
            "shape": world.shape, "checkpointing": checkpointing, "alternative": name,
            "tokens/s": bench.options.rows * bench.options.tokens / seconds, "safecl's speed over its": ratio,
            "TFLOP/s": model_flops / seconds / 1e12, "MFU": peak and model_flops / seconds / peak,
            "HFU": peak and (model_flops + again) / seconds / peak, "peak memory, GiB": found[0]["peak"],
            "largest difference of losses": gap,
        }  # fmt: skip

    print(f"{world.shape}, checkpointing {checkpointing} ({bench.left():.0f} s left)", flush=True)
    title = f"Throughput, {bench.options.rows} rows of {bench.options.tokens} tokens a step"
    done = bench.rounds(title, runs, describe)
    for kind, variants in bench.anchors.items():
        measured = {v: [result["seconds"] for result in done[f"{kind} {v}"]] for v in variants}
        if ran := {v: statistics.median(seconds) for v, seconds in measured.items() if seconds}:
            bench.anchors[kind] = [min(ran, key=ran.__getitem__)]


def every_method(world: World) -> None:
    """A step of each method over SFT's."""
    bench = world.bench
    world.ask()
    chosen = [m for m in methods.trained() if m not in MIXED and (m == "sft" or m in (bench.options.methods or [m]))]
    runs = {method: lambda m=method: ours(world, m, False) for method in chosen}

    def describe(name: str, found: list[dict[str, Any]], ratio: float | None) -> dict[str, Any]:
        if not all(map(math.isfinite, found[0]["losses"])):
            bench.failed.append(f"{world.shape}, {name}: losses {found[0]['losses']}")
        return {
            "shape": world.shape, "method": name, "a step, s": statistics.median(r["seconds"] for r in found),
            "over SFT's": ratio, "goal": methods.GOALS.get(name), "peak memory, GiB": found[0]["peak"],
        }  # fmt: skip

    print(f"{world.shape}, methods ({bench.left():.0f} s left)", flush=True)
    replayed = max(1, bench.options.rows // 5)
    bench.rounds(f"A step of each method, {bench.options.rows} user rows and {replayed} replayed", runs, describe)


def merging(world: World) -> None:
    """Base + adapter, merged in float32 as an engine is given them: on a CPU's threads and on the device. The base has
    the shape's first layers only, so that writing it takes seconds; its files are in the page cache."""
    import inspect

    from safetensors.torch import load_file, save_file

    from safecl.serving import swap

    bench = world.bench
    adapter = world.folder / "safe" / "adapter"
    base = world.folder / "written"
    base.mkdir()
    model = build(world.model, torch.bfloat16, bench.device)
    adapted = set(swap.changes(adapter))
    layers = min(8, world.config.num_hidden_layers)
    kept = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name in adapted and int(name.split("layers.")[1].split(".")[0]) < layers
    }
    del model
    bench.clear()
    save_file(kept, str(base / "model.safetensors"))
    part = world.folder / "part" / "adapter"
    shutil.copytree(adapter, part)
    factors = load_file(str(part / "adapter_model.safetensors"))
    names = {name.removesuffix(".weight") for name in kept}
    chosen = {n: t for n, t in factors.items() if any(f"base_model.model.{m}.lora_" in n for m in names)}
    save_file(chosen, str(part / "adapter_model.safetensors"), metadata={"format": "pt"})
    numbers = sum(tensor.numel() for tensor in kept.values())
    first: list[torch.Tensor] = []  # the last tensor, as one CPU thread merges it

    def run(place: str, threads: int) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        start = time.perf_counter()
        total, last = 0, torch.empty(0)
        for _, tensor in swap.merged(base, part, **({"device": bench.device} if place == "device" else {})):
            last, total = tensor.to(bench.device), total + tensor.numel()  # an engine's weights lie there
        bench.synchronise()
        seconds = time.perf_counter() - start
        torch.set_num_threads(before)
        if total != numbers:
            raise RuntimeError(f"merged {total} numbers, expected {numbers}")
        if not first:
            first.append(last.float())
        apart = float((last.float() - first[0]).abs().max() / first[0].abs().max())
        return {"seconds": seconds, "apart": apart}

    cores = os.cpu_count() or 1
    runs: dict[str, Callable[[], dict[str, Any]]] = {"CPU, 1 thread": lambda: run("cpu", 1)}
    if cores > 2:
        runs[f"CPU, {cores} threads"] = lambda: run("cpu", cores)
    if "device" in inspect.signature(swap.merged).parameters:
        runs["device"] = lambda: run("device", 1)

    def describe(name: str, found: list[dict[str, Any]], ratio: float | None) -> dict[str, Any]:
        seconds, apart = (statistics.median(result[key] for result in found) for key in ("seconds", "apart"))
        if apart > 2**-8:  # a rounding of the largest number to bfloat16
            bench.failed.append(f"{world.shape}, merging by {name}: {apart:.1e} apart")
        return {
            "shape": f"{world.shape}, {layers} layers", "alternative": name, "seconds": seconds,
            "10^9 numbers/s": numbers / seconds / 1e9, "its time over the first's": ratio, "largest difference": apart,
        }  # fmt: skip

    print(f"{world.shape}, merging {numbers / 1e9:.2f}e9 numbers ({bench.left():.0f} s left)", flush=True)
    bench.rounds(
        "Merging an adapter (rank 8, all linear layers) in float32 and putting it on the device", runs, describe
    )
    shutil.rmtree(base)


def plan(worlds: Mapping[str, Callable[[], World]]) -> list[tuple[str, Callable[[], None]]]:
    """What is measured, the most important first."""
    llama, gemma, mistral = (worlds[name] for name in ("llama-2-7b", "gemma-2-2b", "mistral-7b"))
    return [
        ("llama against anchors", lambda: against_anchors(llama(), False)),
        ("gemma against anchors", lambda: against_anchors(gemma(), False)),
        ("llama methods", lambda: every_method(llama())),
        ("mistral against anchors", lambda: against_anchors(mistral(), False)),
        ("gemma methods", lambda: every_method(gemma())),
        ("llama with checkpointing", lambda: against_anchors(llama(), True)),
        ("llama merging", lambda: merging(llama())),
        ("gemma with checkpointing", lambda: against_anchors(gemma(), True)),
        ("mistral methods", lambda: every_method(mistral())),
        ("mistral with checkpointing", lambda: against_anchors(mistral(), True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers, narrow: to try every code path")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rows", type=int, default=5, help="of a step")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA's; with any, curves are not compared")
    parser.add_argument("--methods", nargs="+", help="beside sft; default: all that train")
    parser.add_argument("--only", nargs="+", help="parts of the list, by words in their names: llama methods")
    parser.add_argument("--out", type=Path, default=_bench.RESULTS, help="folder of the result file")
    parser.add_argument("--debug", action="store_true", help="stop at the first failure")
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.steps = min(options.tokens, 64), 4  # Lisa needs 6 steps in all
    if options.device == "cpu":
        torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", message="The PEFT config's")
    bench = Bench(options)
    print(json.dumps({"machine": _bench.machine(), "versions": _bench.versions()}), flush=True)
    without_files(options.device)
    quiet()
    made: dict[str, World] = {}
    with tempfile.TemporaryDirectory() as folder:

        def world(shape: str) -> World:
            if shape not in made:
                made[shape] = World(bench, shape, Path(folder) / shape, WARM + options.steps)
            return made[shape]

        for name, measure in plan({shape: lambda s=shape: world(s) for shape in SHAPES}):
            if options.only and not all(word in name for word in options.only):
                continue
            if bench.left() < 2 * bench.slowest:
                print(f"no time left for: {name}", flush=True)
                continue
            try:
                measure()
            except Exception as error:
                if options.debug:
                    raise
                print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
                bench.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            bench.clear()
    bench.write()
    if bench.failed:
        raise SystemExit("\n".join(bench.failed))


if __name__ == "__main__":
    main()
