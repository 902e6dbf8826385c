"""What it costs to put another adapter into a live engine: safecl's swap, which loads the layers that differ, against a
reload of every tensor by vLLM's `reload_weights`, merged tensor by tensor on one thread as safecl did before.

    python benchmarks/swap.py [MODEL_FOLDER ...] [--sizes 60 200 400] [--repeats 3]

Without folders, random Llamas of about so many million parameters are made. In each the engine goes from one adapter to
another (rank 8; on q and v, and on all linear layers), both ways in turn; after each, the engine's weights are read back
(on a CPU from the packed copies that it computes with) and must be the same to the bit. One thread.
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

TARGETS = {"q, v": ("q_proj.weight", "v_proj.weight"), "all linear": ("_proj.weight",)}
WIDTHS = {
    60: (512, 1376, 14),
    200: (1024, 2752, 15),
    400: (1536, 4128, 14),
}  # million parameters: hidden, inner, layers
LLAMA_2_7B = 6_738_415_616
ENV = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1",
}  # fmt: skip


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


def make_model(folder: Path, million: int) -> None:
    """A random Llama in bfloat16, its head not tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers = WIDTHS[million]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def make_adapter(base: Path, folder: Path, targets: tuple[str, ...], seed: int, rank: int = 8) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    chance = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for name, shape in swap._shapes(base).items():
        if name.endswith(targets):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=chance)
            factors[f"{module}.lora_B.weight"] = 0.01 * torch.randn(shape[0], rank, generator=chance)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))


async def measure(base: Path, repeats: int) -> list[dict[str, Any]]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    on_gpu, booted = torch.cuda.is_available(), swap.stamp(base)
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(base), dtype="bfloat16", max_model_len=512, kv_cache_memory_bytes=2**28, skip_tokenizer_init=True,
            block_size=None if on_gpu else 32, distributed_executor_backend=None if on_gpu else "uni",
            enforce_eager=True, disable_log_stats=True, worker_extension_cls="benchmarks.swap.Timed",
        )
    )  # fmt: skip

    async def swapped(method: str, *args: str) -> dict[str, float]:
        start = time.perf_counter()
        await llm.pause_generation(mode="wait", clear_cache=True)
        parts: dict[str, float] = (await llm.collective_rpc(method, args=args))[0]
        await llm.update_weight_version(args[1])
        await llm.resume_generation()
        total = time.perf_counter() - start
        return {**parts, "pause, clear cache, resume": total - parts["worker"], "total": total}

    rows: list[dict[str, Any]] = []
    size = (await llm.collective_rpc("num_parameters"))[0] if on_gpu else 0
    size = size or sum(torch.Size(shape).numel() for shape in swap._shapes(base).values())
    with tempfile.TemporaryDirectory() as scratch:
        for targets, suffixes in TARGETS.items():
            first, second = (str(Path(scratch) / f"{suffixes[0]}{seed}") for seed in (0, 1))
            for seed, folder in enumerate((first, second)):
                make_adapter(base, Path(folder), suffixes, seed)
            await swapped("timed_swap", str(base), first, booted)
            ours: list[dict[str, float]] = []
            full: list[dict[str, float]] = []
            for _ in range(repeats):
                full.append(await swapped("full_reload", str(base), second))
                expected = (await llm.collective_rpc("digest"))[0]
                await swapped("timed_swap", str(base), first, booted)
                assert (await llm.collective_rpc("digest"))[0] != expected, "the adapters are alike: void"
                ours.append(await swapped("timed_swap", str(base), second, booted))
                assert (await llm.collective_rpc("digest"))[0] == expected, "the swap left other weights than a reload"
                await swapped("timed_swap", str(base), first, booted)
            middle = {part: statistics.median(run.get(part, 0.0) for run in ours) for part in ours[0]}
            rows.append(
                {
                    "model": base.name, "million parameters": round(size / 1e6), "adapted": targets,
                    "full reload, s": statistics.median(run["total"] for run in full), "swap, s": middle["total"],
                    "full / swap": statistics.median(f["total"] / o["total"] for f, o in zip(full, ours, strict=True)),
                    **{f"{part}, s": seconds for part, seconds in middle.items() if part not in ("total", "worker")},
                }
            )  # fmt: skip
    llm.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument(
        "--sizes", type=int, nargs="*", choices=list(WIDTHS), help="default: all, where no folder is given"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        _bench.say({"rows": asyncio.run(measure(options.only, options.repeats))})
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = [model.absolute() for model in options.models]
        for million in options.sizes if options.sizes is not None else () if models else WIDTHS:
            models.append(Path(scratch) / f"random Llama, {million}M")
            make_model(models[-1], million)
        for model in models:
            worker = _bench.Worker([__file__, "--only", str(model), "--repeats", str(options.repeats)], **ENV)
            rows += worker.ask()["rows"]
            worker.close()
            for row in rows[-len(TARGETS) :]:
                print(
                    "  ".join(
                        f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()
                    )
                )
    tables: dict[str, Any] = {"Swaps": rows}
    largest = max(
        (row for row in rows if "random" in row["model"]), key=lambda row: row["million parameters"], default=None
    )
    if largest is not None:
        scale = LLAMA_2_7B / 1e6 / largest["million parameters"]
        tables["Extrapolated by parameters to Llama-2-7B, not measured"] = [
            {
                "adapted": row["adapted"],
                "full reload, s": scale * row["full reload, s"],
                "swap, s": scale * row["swap, s"],
            }
            for row in rows
            if row["model"] == largest["model"]
        ]
    for row in tables.get("Extrapolated by parameters to Llama-2-7B, not measured", ()):
        print("extrapolated by parameters to 7B:", row)
    print(_bench.write("swap", tables))


if __name__ == "__main__":
    main()
