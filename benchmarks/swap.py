"""What it costs to put another adapter into a live engine: safecl's swap, which loads the layers that differ, against a
reload of every tensor by vLLM's `reload_weights`, merged tensor by tensor, as safecl did before.

    python benchmarks/swap.py [MODEL_FOLDER ...] [--sizes 60 200 7b-layer] [--repeats 3]

`--sizes`: random Llamas of about so many million parameters, or with one layer of Llama-2-7B (default, without folders:
all three). Two engines, each a process with its way's environment, go from one adapter to another (rank 8; on q and v, on
all linear layers, and on those of the upper half of the layers) in turn. After each swap the engine's weights are read
back (on a CPU from the packed copies that it computes with) and must be the same to the bit. One thread.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # for this process; the engine's own gets it by PYTHONPATH

from benchmarks import _bench
from safecl.serving import swap

TARGETS = {"q, v": ("q_proj.weight", "v_proj.weight"), "all linear": ("_proj.weight",), "upper half": ("_proj.weight",)}
SIZES = {"60": (512, 1376, 14), "200": (1024, 2752, 15), "7b-layer": (4096, 11008, 1)}  # hidden, inner, layers
LAYERS_OF_7B = 32
NEW_HERE = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # of the engine's environment


class Timed(swap.Swap):
    """The worker's side. Each method times itself and its parts, in seconds."""

    def timed_swap(self, base: str, adapter: str, booted: str) -> dict[str, float]:
        from vllm.model_executor.layers import utils
        from vllm.model_executor.model_loader import reload

        parts: dict[str, float] = {}
        patched = [
            (swap, "owners", "ask the loader which layers"), (swap, "_merge", "merge"),
            (reload, "initialize_layerwise_reload", "open and close layers"),
            (reload, "finalize_layerwise_reload", "open and close layers"),
            (utils, "dispatch_cpu_unquantized_gemm", "pack for the CPU's kernels"),
            (swap, "refresh_tied_heads", "tied head"), (swap, "stamp", "stamp"),
        ]  # fmt: skip
        kept = [(module, name, getattr(module, name)) for module, name, _ in patched]
        for module, name, label in patched:
            setattr(module, name, _counted(getattr(module, name), label, parts))
        start = time.perf_counter()
        try:
            self.safecl_swap(base, adapter, booted)
        finally:
            total = time.perf_counter() - start
            for module, name, original in kept:
                setattr(module, name, original)
        return {**parts, "read and copy": total - sum(parts.values()), "worker": total}

    def full_reload(self, base: str, adapter: str) -> dict[str, float]:
        """As safecl did before: every tensor, unchanged ones as a copy."""
        start = time.perf_counter()
        self.reload_weights(weights_iterator=_all_merged(Path(base), Path(adapter)))  # type: ignore[attr-defined]
        model = self.model_runner.get_model()
        swap.refresh_tied_heads(model, {name for name, _ in model.named_parameters()})
        self.safecl_held = swap.Held(swap.stamp(Path(base)), frozenset(swap.changes(Path(adapter))))
        return {"worker": time.perf_counter() - start}

    def digest(self) -> str:
        """Of all weights, as the engine computes with them: a packed layer times the identity is its weight."""
        hash = hashlib.sha256()
        for name, module in self.model_runner.get_model().named_modules():
            tensors = dict(module.named_parameters(recurse=False))
            if hasattr(module, "cpu_linear"):
                width = getattr(module, "input_size_per_partition", None) or module.weight.shape[1]
                dtype = next(p.dtype for p in tensors.values())
                tensors["packed"] = module.cpu_linear(torch.eye(width, dtype=dtype), module.weight, None)
            for key, tensor in tensors.items():
                hash.update(f"{name}.{key}".encode())
                hash.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return hash.hexdigest()

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model_runner.get_model().parameters())


def _counted(function: Callable[..., Any], label: str, parts: dict[str, float]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        start, before = time.perf_counter(), sum(parts.values())
        try:
            return function(*args, **options)
        finally:  # less what was counted inside
            inside = sum(parts.values()) - before
            parts[label] = parts.get(label, 0.0) + time.perf_counter() - start - inside

    return counted


def _all_merged(base: Path, adapter: Path) -> Iterator[tuple[str, torch.Tensor]]:
    changes = swap.changes(adapter)
    for name, tensor in swap.merged(base, None):
        if name not in changes:
            yield name, tensor.clone()
            continue
        total = tensor.float()
        changes[name].add(total)
        yield name, total.to(tensor.dtype)


def make_model(folder: Path, size: str) -> None:
    """A random Llama in bfloat16, its head not tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def make_adapter(base: Path, folder: Path, targets: str, seed: int, rank: int = 8) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    shapes, chance = swap._shapes(base), torch.Generator().manual_seed(seed)
    half = json.loads((base / "config.json").read_text())["num_hidden_layers"] // 2 if targets == "upper half" else 0
    factors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith(TARGETS[targets]) and int(name.split(".")[2]) >= half:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=chance)
            factors[f"{module}.lora_B.weight"] = 0.01 * torch.randn(shape[0], rank, generator=chance)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))


def serve_engine(base: str) -> None:
    """One engine, in a process of its own."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    on_gpu, booted = torch.cuda.is_available(), swap.stamp(Path(base))
    loop = asyncio.new_event_loop()

    async def boot() -> AsyncLLM:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=base, dtype="bfloat16", max_model_len=512, kv_cache_memory_bytes=2**28, skip_tokenizer_init=True,
                block_size=None if on_gpu else 32, distributed_executor_backend=None if on_gpu else "uni",
                enforce_eager=True, disable_log_stats=True, worker_extension_cls="benchmarks.swap.Timed",
            )
        )  # fmt: skip

    llm = loop.run_until_complete(boot())

    async def swapped(method: str, adapter: str) -> dict[str, Any]:
        start = time.perf_counter()
        await llm.pause_generation(mode="wait", clear_cache=True)
        args = (base, adapter, booted) if method == "timed_swap" else (base, adapter)
        parts: dict[str, Any] = (await llm.collective_rpc(method, args=args))[0]
        await llm.update_weight_version(adapter)
        await llm.resume_generation()
        parts["total"] = time.perf_counter() - start
        parts["pause, clear cache, resume"] = parts["total"] - parts.pop("worker")
        return {"seconds": parts, "digest": (await llm.collective_rpc("digest"))[0]}

    _bench.serve(lambda method, adapter: loop.run_until_complete(swapped(method, adapter)))
    llm.shutdown()


def compare(base: Path, scratch: Path, repeats: int) -> list[dict[str, Any]]:
    """One row for each set of targets."""
    from safecl.serving.deploy import environment
    from safecl.serving.messages import Settings

    env = environment(Settings(name="bench", max_model_len=512, use_gpu=torch.cuda.is_available()))
    before = {name: value for name, value in env.items() if name not in NEW_HERE}
    arguments = [__file__, "--only", str(base)]
    workers = {"timed_swap": _bench.Worker(arguments, **env), "full_reload": _bench.Worker(arguments, **before)}
    size = sum(torch.Size(shape).numel() for shape in swap._shapes(base).values())
    rows: list[dict[str, Any]] = []
    for targets in TARGETS:
        adapters = [scratch / f"{base.name} {targets} {seed}" for seed in (0, 1)]
        for seed, adapter in enumerate(adapters):
            make_adapter(base, adapter, targets, seed)
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in workers}
        for number in range(2 * repeats + 2):
            said = {
                method: worker.ask(method=method, adapter=str(adapters[number % 2]))
                for method, worker in workers.items()
            }
            assert len({one["digest"] for one in said.values()}) == 1, "the swap left other weights than a reload"
            for method, one in said.items():
                runs[method] += [one["seconds"]] if number > 1 else []  # the first two warm up
        middle = {
            part: statistics.median(run.get(part, 0.0) for run in runs["timed_swap"]) for part in runs["timed_swap"][0]
        }
        ratios = [
            full["total"] / ours["total"] for full, ours in zip(runs["full_reload"], runs["timed_swap"], strict=True)
        ]
        rows.append(
            {
                "model": base.name, "million parameters": round(size / 1e6), "adapted": targets,
                "full reload, s": statistics.median(run["total"] for run in runs["full_reload"]),
                "swap, s": middle.pop("total"), "full / swap": statistics.median(ratios),
                **{f"{part}, s": seconds for part, seconds in middle.items()},
            }
        )  # fmt: skip
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in rows[-1].items()
            )
        )
    for worker in workers.values():
        worker.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        serve_engine(options.only)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = [model.absolute() for model in options.models]
        for size in options.sizes if options.sizes is not None else () if models else SIZES:
            models.append(scratch / f"random Llama, {size}")
            make_model(models[-1], size)
        for model in models:
            rows += compare(model, scratch, options.repeats)
            file = _bench.write("swap", tables(rows))  # a run that is cut short keeps what it has measured
    print(file)


def tables(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and what they say of Llama-2-7B."""
    found: dict[str, Any] = {"Swaps": rows}
    layer = {row["adapted"]: row for row in rows if row["model"].endswith("7b-layer")}
    if layer:
        fixed = "pause, clear cache, resume, s"
        found["Extrapolated to Llama-2-7B by its number of layers, not measured"] = [
            {
                "adapted": adapted,
                **{way: LAYERS_OF_7B * (row[way] - row[fixed]) + row[fixed] for way in ("full reload, s", "swap, s")},
            }
            for adapted, row in layer.items()
            if adapted != "upper half"
        ]
    return found


if __name__ == "__main__":
    main()
