"""Puts new weights into a live vLLM engine: base + LoRA adapter (or dense deltas), merged in float32 inside the engine's
own worker.

    W_served = (float32(W_base) + scale * B @ A) cast to the engine's dtype,    scale = alpha / r  (alpha / sqrt(r): rslora)
    W_served = (float32(W_base) + delta) cast to the engine's dtype,            for a folder of dense deltas

vLLM loads `Swap` into its worker by qualified name (`worker_extension_cls`). Every swap starts from the pristine base
files, so nothing accumulates over swaps. The loader keeps references to the tensors that it is given until a layer is
complete, so each one is fresh memory; tensors come one at a time, so the merged model never exists as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# PEFT settings under which `W + scale * B @ A` would not be the adapter's meaning, and their harmless values.
_PLAIN = {
    "use_dora": (False, None), "use_qalora": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "modules_to_save": ([], None), "trainable_token_indices": ([], {}, None), "layer_replication": ([], None),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "alora_invocation_tokens": ([], None),
}  # fmt: skip
_PREFIX = "base_model.model."


def files(base: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file that holds it, for a folder in HF format. Raises FileNotFoundError."""
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
    """Read headers only. Raises FileNotFoundError or ValueError if `base` has not the tensors of `served` (the folder
    that the engine was started with), or if `adapter` could not be merged into it: bad weights are refused before a
    live engine's own are touched."""
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
    """What is added to one tensor of the base."""

    shape: list[int] | None  # None: its factors do not fit each other
    what: str
    add: Callable[[torch.Tensor], torch.Tensor]  # in float32


def changes(adapter: Path) -> dict[str, Change]:
    """Tensor name in the base -> change, for a PEFT folder or a folder of dense deltas. Reads headers only; values are
    read where `add` is called. Raises FileNotFoundError, or ValueError for anything that would not be applied."""
    if (adapter / "delta.json").is_file():
        shards = json.loads((adapter / "delta.json").read_text())
        opened_shards = {shard: _open(adapter / shard) for shard in set(shards.values())}
        return {name: _dense(opened_shards[shard], name) for name, shard in shards.items()}
    scale, file = _scale(adapter), adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{adapter}: expected a PEFT adapter with adapter_model.safetensors, got none")
    opened = _open(file)  # opened once: reading a factor costs next to nothing
    pairs = _factors(adapter, list(opened.keys()))
    return {f"{module}.weight": _low_rank(opened, *names, scale) for module, names in pairs.items()}


def _dense(opened: Any, name: str) -> Change:
    shape = opened.get_slice(name).get_shape()
    return Change(shape, f"has shape {shape}", lambda base_OI: base_OI.float() + opened.get_tensor(name).float())


def _low_rank(opened: Any, name_a: str, name_b: str, scale: float) -> Change:
    rank, dim_in = opened.get_slice(name_a).get_shape()
    dim_out, rank_b = opened.get_slice(name_b).get_shape()

    def add(base_OI: torch.Tensor) -> torch.Tensor:
        a_RI, b_OR = opened.get_tensor(name_a).float(), opened.get_tensor(name_b).float()
        return torch.addmm(base_OI.float(), b_OR, a_RI, alpha=scale)

    what = f"has A [{rank}, {dim_in}] and B [{dim_out}, {rank_b}]"
    return Change([dim_out, dim_in] if rank == rank_b else None, what, add)


def merged(base: Path, adapter: Path | None, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of `base` once, as (name, fresh tensor in `dtype`, else in the file's), the adapted ones merged
    in float32: the base is rounded to `dtype` first, as it was for training, and the sum again. Raises ValueError if the
    adapter holds anything that is not applied."""
    left = {} if adapter is None else changes(adapter)
    by_file: dict[Path, list[str]] = {}
    for name, file in files(base).items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        with _open(file) as opened:
            for name in names:
                tensor: torch.Tensor = opened.get_tensor(name)
                tensor = tensor if dtype is None else tensor.to(dtype)
                change = left.pop(name, None)
                yield name, tensor.clone() if change is None else change.add(tensor).to(tensor.dtype)
    if left:
        raise ValueError(f"{adapter}: changes of {sorted(left)} are not applied, expected these tensors in {base}")


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")


def _shapes(base: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in set(files(base).values()):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                shapes[name] = opened.get_slice(name).get_shape()
    return shapes


def _scale(adapter: Path) -> float:
    """alpha / r of the adapter's config. Raises ValueError for a kind of adapter that is not plain LoRA."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    odd = {key: config[key] for key, plain in _PLAIN.items() if key in config and config[key] not in plain}
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{adapter}: expected plain LoRA, got peft_type {config.get('peft_type')!r} with {odd}")
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _factors(adapter: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """Module -> (name of A, name of B). Raises ValueError for a lone factor or any other tensor."""
    factors: dict[str, tuple[str, str]] = {}
    known = set(names)
    for name in names:
        module, dot, side = name.removeprefix(_PREFIX).rpartition(".lora_")
        partner = name.replace(".lora_A.", ".lora_B.") if side == "A.weight" else name.replace(".lora_B.", ".lora_A.")
        if not name.startswith(_PREFIX) or not dot or side not in ("A.weight", "B.weight") or partner not in known:
            raise ValueError(f"{adapter}: got tensor {name!r}, expected pairs {_PREFIX}MODULE.lora_A.weight and lora_B")
        if side == "A.weight":
            factors[module] = (name, partner)
    return factors


class Swap:
    """Mixed into vLLM's worker, so `self` is that worker (`reload_weights`, `model_runner` are vLLM's)."""

    model_runner: Any
    model_config: Any
    reload_weights: Any

    def safecl_swap(self, base: str, adapter: str | None) -> int:
        """Load base + adapter (folders) in place; how many of vLLM's parameters were loaded. Raises RuntimeError when
        a parameter of the engine was left as it was: vLLM itself only warns, and would go on answering from a mixture.
        After any exception the engine's weights are undefined and it must not be used again."""
        folder, changer = Path(base), None if adapter is None else Path(adapter)
        model = self.model_runner.get_model()
        loaded: set[str] = set()
        original = model.load_weights

        def recording(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
            loaded.update(original(weights))
            return loaded

        model.load_weights = recording  # the only place where vLLM says what it loaded
        try:
            self.reload_weights(weights_iterator=merged(folder, changer, dtype=self.model_config.dtype))
        finally:
            del model.load_weights
        require_complete({name for name, _ in model.named_parameters()}, loaded)
        refresh_tied_heads(model)
        return len(loaded)


def require_complete(expected: set[str], loaded: set[str]) -> None:
    """Raise RuntimeError unless every expected parameter was loaded."""
    if missing := sorted(expected - loaded):
        raise RuntimeError(
            f"a swap left {len(missing)} of {len(expected)} parameters as they were (first: {missing[:3]}); "
            "expected the base folder to hold every weight of the engine's model"
        )


def refresh_tied_heads(model: torch.nn.Module) -> None:
    """Let heads that share the embedding's weight see the new one. The loader passes them by, as the file has no tensor
    of theirs, and on CPU vLLM computes from a packed copy: a head would go on answering from the old embedding."""
    for name, head in model.named_modules():
        if name.rpartition(".")[2] != "lm_head" or not hasattr(head, "quant_method"):
            continue
        weight = head.weight
        others = (other for other in model.modules() if other is not head)
        shared = [other for other in others if other._parameters.get("weight") is weight]
        if shared:
            head.quant_method.process_weights_after_loading(head)
        elif weight.numel() and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            raise RuntimeError(f"{name} is tied to the embedding, but shares no module's weight after a swap")
