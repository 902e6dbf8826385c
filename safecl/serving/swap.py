"""Swap: put new weights into a running vLLM engine.

The weights are base + LoRA adapter (or dense deltas). They are merged in float32 inside the engine's worker, on the device
that holds the engine's weights.

    W_served = (float32(W_base) + scale * B @ A) cast to the engine's dtype,    scale = alpha / r  (alpha / sqrt(r): rslora)
    W_served = (float32(W_base) + delta) cast to the engine's dtype,            for a folder of dense deltas

vLLM loads `Swap` into its worker (worker.py). A swap loads only the layers that differ between
the weights held and the weights wanted, that is, the layers that either of them changes in the base. Every tensor is computed
from the unchanged base files, so no error accumulates over swaps. Tensors are made one at a time, so the merged model is
never in memory as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from safecl import peft_files


def files(base: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file that holds it, for a folder in HF format.

    Raises FileNotFoundError if the folder has no safetensors model.
    """
    index = base / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text())["weight_map"]
        return {name: base / shard for name, shard in shards.items()}
    single = base / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{base}: expected model.safetensors or model.safetensors.index.json, got neither")
    with _open(single) as opened:
        return dict.fromkeys(opened.keys(), single)


def check(served: Path, base: Path, adapter: Path | None) -> None:
    """Check that base + adapter can be loaded into an engine, before the engine's weights are changed. Reads only headers.

    `served` is the folder that the engine was started with. Raises FileNotFoundError or ValueError if the tensors of `base`
    differ from those of `served` in name or shape, or if `adapter` cannot be merged into `base`.
    """
    shapes = _shapes(base)
    expected = shapes if served == base else _shapes(served)
    odd = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if odd:
        raise ValueError(
            f"{base}: {len(odd)} tensors differ in name or shape from those of the served {served}, first: {odd[0]} "
            f"expected {expected.get(odd[0])}, got {shapes.get(odd[0])}"
        )
    for name, change in changes(adapter).items() if adapter is not None else ():
        if name not in shapes:
            raise ValueError(
                f"{adapter}: adapts {name.removesuffix('.weight')}, expected a tensor {name} in {base}, got none"
            )
        if change.shape != shapes[name]:
            raise ValueError(f"{adapter}: {name} {change.what}, expected a change of shape {shapes[name]} as in {base}")


@dataclass(frozen=True)
class Change:
    """The change that an adapter (or a delta) adds to one tensor of the base."""

    shape: list[int] | None  # None: the shapes of its factors A and B do not match
    what: str  # its shapes in words, for error messages
    add: Callable[[torch.Tensor], object]  # adds the change in place to a float32 tensor, on that tensor's device


def changes(adapter: Path) -> dict[str, Change]:
    """Tensor name in the base -> change, for a PEFT folder or a folder of dense deltas.

    Reads only headers; values are read when `add` is called. Raises FileNotFoundError if there is no adapter, or ValueError
    for anything in it that would not be applied.
    """
    if (adapter / "delta.json").is_file():
        shards = json.loads((adapter / "delta.json").read_text())
        opened_shards = {shard: _open(adapter / shard) for shard in set(shards.values())}
        return {name: _dense(opened_shards[shard], name) for name, shard in shards.items()}
    scale, file = peft_files.scale(adapter), adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{adapter}: expected a PEFT adapter with adapter_model.safetensors, got none")
    opened = _open(file)  # opened once: reading a factor costs next to nothing
    pairs = peft_files.factors(adapter, opened.keys())
    return {f"{module}.weight": _low_rank(opened, *names, scale) for module, names in pairs.items()}


def _dense(opened: Any, name: str) -> Change:
    shape = opened.get_slice(name).get_shape()
    return Change(shape, f"has shape {shape}", lambda sums: sums.add_(opened.get_tensor(name).to(sums.device).float()))


def _low_rank(opened: Any, name_a: str, name_b: str, scale: float) -> Change:
    rank, dim_in = opened.get_slice(name_a).get_shape()
    dim_out, rank_b = opened.get_slice(name_b).get_shape()

    def add(sums_OI: torch.Tensor) -> torch.Tensor:
        a_RI, b_OR = (opened.get_tensor(name).to(sums_OI.device).float() for name in (name_a, name_b))
        return sums_OI.addmm_(b_OR, a_RI, alpha=scale)

    what = f"has A [{rank}, {dim_in}] and B [{dim_out}, {rank_b}]"
    return Change([dim_out, dim_in] if rank == rank_b else None, what, add)


def merged(
    base: Path,
    adapter: Path | None,
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of base + adapter once (or only the names in `only`), as (name, tensor).

    Tensors have `dtype` (None: that of the file). Adapted tensors are merged in float32 on `device`: the base is rounded to
    `dtype` first, as for training, and the sum is rounded again. Other tensors stay in CPU memory. Raises ValueError if the
    adapter holds anything that is not applied.
    """
    left = {} if adapter is None else changes(adapter)
    by_file: dict[Path, list[str]] = {}
    for name, file in files(base).items():
        if only is None or name in only:
            by_file.setdefault(file, []).append(name)
    # One buffer for all sums: on a CPU, new memory for each sum takes a third of the merge's time.
    largest = max((math.prod(change.shape or ()) for change in left.values()), default=0)
    sums = torch.empty(largest, dtype=torch.float32, device=device)
    for file, names in by_file.items():
        with _open(file) as opened:
            for name in names:
                tensor: torch.Tensor = opened.get_tensor(name)
                tensor = tensor if dtype is None else tensor.to(dtype)
                change = left.pop(name, None)
                yield name, tensor if change is None else _merge(tensor, change, sums)
    if left:
        raise ValueError(f"{adapter}: changes of {sorted(left)} are not applied, expected these tensors in {base}")


@torch.no_grad()
def _merge(base: torch.Tensor, change: Change, sums: torch.Tensor) -> torch.Tensor:
    # Not in blocks of rows: a product of another shape may sum in another order, and results must be equal to the bit.
    # Copy to the device first: a copy that also changes the dtype would convert on the CPU.
    total = sums[: base.numel()].view(base.shape).copy_(base.to(sums.device))
    change.add(total)
    return total.to(base.dtype, copy=True)


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")


def _shapes(base: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in set(files(base).values()):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                shapes[name] = opened.get_slice(name).get_shape()
    return shapes


def stamp(base: Path) -> str:
    """A text that identifies the weight files of a folder in their present state. Reads no weights.

    Another folder, a replaced file or a changed file gives another stamp.
    """
    stats = {file.name: file.stat() for file in sorted(set(files(base).values()))}
    return json.dumps([[name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns] for name, s in stats.items()])


@dataclass(frozen=True)
class Held:
    """The weights in an engine: those of the files with this stamp, except the tensors in `changed`."""

    stamp: str
    changed: frozenset[str]


class Swap:
    """Mixin of vLLM's worker. `self` is that worker, and the attributes declared here are vLLM's."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: torch.device

    def safecl_swap(self, base: str, adapter: str | None, booted: str) -> int:
        """Load the layers in which base + adapter (folders) differ from the weights held.

        Returns the number of vLLM's parameters that were loaded. `booted` is the stamp of the folder that the engine was
        started from. Raises RuntimeError if a parameter that must change was not loaded. (vLLM itself only warns, and would
        answer from a mixture of weights.) After any exception the engine's weights are undefined, and it must not be used
        again.
        """
        folder, changer = Path(base), None if adapter is None else Path(adapter)
        held = getattr(self, "safecl_held", Held(booted, frozenset()))
        self.safecl_held = Held("", frozenset())  # undefined until all is loaded
        wanted = Held(stamp(folder), frozenset() if changer is None else frozenset(changes(changer)))
        stale = held.changed | wanted.changed if held.stamp == wanted.stamp else frozenset(files(folder))
        loaded = self._safecl_load(folder, changer, stale) if stale else set()
        self.safecl_held = wanted
        return len(loaded)

    def _safecl_load(self, base: Path, adapter: Path | None, stale: Collection[str]) -> set[str]:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        if not hasattr(self, "safecl_owners"):
            self.safecl_owners = owners(model, _shapes(base), self.model_config.dtype)
        parameters = {name for name, _ in model.named_parameters()}
        needed = set(self.safecl_owners)
        if all(self.safecl_owners[name] for name in stale):
            # A layer is always loaded as a whole. A stacked layer (q, k and v in one) needs all of its tensors.
            layers = {_layer(parameter) for name in stale for parameter in self.safecl_owners[name]}
            parameters = {parameter for parameter in parameters if _layer(parameter) in layers}
            needed = {name for name, owned in self.safecl_owners.items() if not parameters.isdisjoint(owned)}
        modules = [model.get_submodule(layer) for layer in sorted({_layer(parameter) for parameter in parameters})]
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # no bfloat16 or TF32 in the merge, whatever vLLM was told
        try:
            with set_current_vllm_config(self.vllm_config):
                for module in modules:
                    initialize_layerwise_reload(module)
                loaded = set(model.load_weights(merged(base, adapter, self.model_config.dtype, needed, self.device)))
                for module in modules:
                    finalize_layerwise_reload(module, self.model_config)
        finally:
            torch.set_float32_matmul_precision(precision)
        require_complete(parameters, loaded)
        refresh_tied_heads(model, loaded)
        return loaded


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def owners(model: torch.nn.Module, shapes: Mapping[str, list[int]], dtype: torch.dtype) -> dict[str, set[str]]:
    """Tensor name in the files -> names of vLLM's parameters that it is loaded into.

    The names are empty if the loader skips the tensor when it comes alone. The model's own loader is called with empty (meta)
    tensors and writes nothing.
    """

    def ask(name: str, shape: list[int]) -> set[str]:
        try:
            return set(model.load_weights([(name, torch.empty(shape, dtype=dtype, device="meta"))]))  # type: ignore[operator]
        except ValueError:  # the loader raises it for a head that is tied to the embedding
            return set()

    parameters = list(model.parameters())
    kept = [getattr(parameter, "weight_loader", None) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.weight_loader = lambda *_, **__: None  # type: ignore[attr-defined]
        return {name: ask(name, shape) for name, shape in shapes.items()}
    finally:
        for parameter, loader in zip(parameters, kept, strict=True):
            if loader is None:
                del parameter.weight_loader  # type: ignore[attr-defined]
            else:
                parameter.weight_loader = loader  # type: ignore[attr-defined]


def require_complete(expected: set[str], loaded: set[str]) -> None:
    """Raise RuntimeError unless every expected parameter was loaded."""
    if missing := sorted(expected - loaded):
        raise RuntimeError(
            f"a swap left {len(missing)} of {len(expected)} parameters as they were (first: {missing[:3]}); "
            "expected the base folder to hold every weight of the engine's model"
        )


def refresh_tied_heads(model: torch.nn.Module, loaded: set[str]) -> None:
    """Update heads that share the embedding's weight, if the embedding is among the parameters `loaded`.

    The loader skips such heads, because the file has no tensor for them. On CPU vLLM computes from a packed copy of the
    weight, so a head would keep using the old embedding. Raises RuntimeError if a tied head shares no module's weight.
    """
    for name, head in model.named_modules():
        if name.rpartition(".")[2] != "lm_head" or not hasattr(head, "quant_method"):
            continue
        weight, others = head.weight, (other for other in model.named_modules() if other[1] is not head)
        shared = [f"{other}.weight" for other, module in others if module._parameters.get("weight") is weight]
        if not loaded.isdisjoint(shared):
            head.quant_method.process_weights_after_loading(head)
        elif not shared and weight.numel() and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            raise RuntimeError(f"{name} is tied to the embedding, but shares no module's weight after a swap")
