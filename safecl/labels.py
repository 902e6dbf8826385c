"""Parts of stages' names for people (`stages.Kind.label`). A name holds method, task, poison and seed, and the set that
is answered, in place of a hash: `finetune der, mini p=0.1, seed 0`; `generate attack mini, validation: der, mini p=0.1,
seed 0`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safecl.store import Stage


def weights(stage: Stage | None, models: Mapping[str, str]) -> str:
    """Name of trained weights: `aligned, seed 0`, `guard`, `der, mini p=0.1, seed 0`. Without a stage: the name that
    `models` gives for an empty key, else `base`."""
    if stage is None:
        return models.get("", "base")
    config: Any = stage.config
    if "tuned" in stage.inputs:  # the result of a post-hoc method
        tuned = weights(stage.inputs["tuned"], models)
        return f"{config['method']},{tuned.partition(',')[2]}"
    rows, model = stage.inputs["rows"], models.get(stage.inputs["model"].key)
    role = str(rows.config.get("role", ""))
    name = {"safety": "aligned", "guard": "guard"}.get(role, config["method"])
    seed = f"seed {config['seed']}"
    parts = [name, task(rows) if role == "user" else "", seed, model or ""]
    return ", ".join(part.removesuffix(", ") for part in parts if part)


def task(rows: Stage) -> str:
    """`mini p=0.1, ` for the user's rows, else ""."""
    config: Any = rows.config
    if config.get("role") != "user":
        return ""
    poison = f" p={config['poison']['ratio']:g}" if config.get("poison") else ""
    return f"{config['parts'][0]['task']}{poison}, "


def answered(rows: Stage) -> str:
    """`attack mini, test` for rows that are answered."""
    config: Any = rows.config
    role, _, split = str(config.get("role", "")).partition(".")
    names = ", ".join(dict.fromkeys(part["task"] for part in config.get("parts") or ()))
    return f"{role} {names}".strip() + (f", {split}" if split else "")
