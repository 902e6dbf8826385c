"""Files of a PEFT folder: the meaning of its settings, and which tensors are a module's factors. Reads no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PREFIX = "base_model.model."
# Settings with which the adapter would not mean `W + scale * B @ A`, and their harmless values.
_PLAIN = {
    "use_dora": (False, None), "use_qalora": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "modules_to_save": ([], None), "trainable_token_indices": ([], {}, None), "layer_replication": ([], None),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "alora_invocation_tokens": ([], None),
}  # fmt: skip


def scale(folder: Path) -> float:
    """alpha / r of the adapter's config, or alpha / sqrt(r) for rslora. Raises ValueError if the adapter is not plain
    LoRA of one rank and alpha."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    odd = {key: config[key] for key, plain in _PLAIN.items() if key in config and config[key] not in plain}
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{folder}: expected plain LoRA, got peft_type {config.get('peft_type')!r} with {odd}")
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def factors(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module -> (name of its A, name of its B), from the names of a folder's tensors. Raises ValueError for a factor
    without its partner, and for any other tensor."""
    known = set(names)
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(known):
        module, dot, side = name.removeprefix(PREFIX).rpartition(".lora_")
        partner = name.replace(".lora_A.", ".lora_B.") if side == "A.weight" else name.replace(".lora_B.", ".lora_A.")
        if not name.startswith(PREFIX) or not dot or side not in ("A.weight", "B.weight") or partner not in known:
            raise ValueError(f"{folder}: got tensor {name!r}, expected pairs {PREFIX}MODULE.lora_A.weight and lora_B")
        if side == "A.weight":
            found[module] = (name, partner)
    return found
