"""Stages as people know them: method, task, poison and seed, and the set that is answered, in place of a hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safecl.store import Stage


def label(stage: Stage, models: Mapping[str, str]) -> str:
    """`finetune der, mini p=0.1, seed 0`; `generate attack mini, validation: der, mini p=0.1, seed 0`. `models`: names by
    the key of a model stage; a model that is not there goes without saying."""
    config: Any = stage.config
    if stage.kind == "model":
        return f"model {models.get(stage.key, '')}".strip()
    if stage.kind == "tokenizer":
        return "tokenizer"
    if stage.kind == "data":
        parts = ", ".join(dict.fromkeys(part["task"] for part in config.get("parts", ())))
        return f"rows {config['role']}: {parts}" if parts else f"rows {config['role']}"
    if stage.kind == "finetune":
        return f"finetune {_weights(stage, models)}"
    if stage.kind in ("generate", "likelihood"):
        return f"{stage.kind} {_set(stage.inputs['rows'])}: {_weights(stage.inputs.get('weights'), models)}"
    if stage.kind == "judge":
        answers = stage.inputs.get("generations")
        if answers is None:  # the rows' own: a guard's held-out pairs, or what users bring
            of = "own answers" if stage.inputs["rows"].config["role"] == "user" else "held-out pairs"
        else:
            of = _weights(answers.inputs.get("weights"), models)
        return f"judge {config['judge']} {_set(stage.inputs['rows'])}: {of}"
    if stage.kind == "metrics":
        answers = next((other for other in stage.inputs.values() if other.kind == "generate"), None)
        of = "guard" if answers is None else _weights(answers.inputs.get("weights"), models)
        return f"metrics {_set(answers.inputs['rows']).rpartition(', ')[2]}: {of}" if answers else f"metrics: {of}"
    if stage.kind == "finalize":
        return f"merge {_weights(stage, models)}"
    if stage.kind == "memory":
        rows = stage.inputs["rows"]
        what = "teacher states" if config["num_rows"] is None else f"memory of {config['num_rows']} rows"
        return f"{what}, {_task(rows)}seed {config['seed']}"
    return f"{stage.kind} {config.get('step', '')}".strip() + (f", seed {config['seed']}" if "seed" in config else "")


def _weights(stage: Stage | None, models: Mapping[str, str]) -> str:
    """What was trained: `aligned, seed 0`, `guard`, `der, mini p=0.1, seed 0`; `base` without any."""
    if stage is None:
        return "base"
    config: Any = stage.config
    if stage.kind == "finalize":
        tuned = _weights(stage.inputs["tuned"], models)
        return f"{config['method']},{tuned.partition(',')[2]}"
    rows, model = stage.inputs["rows"], models.get(stage.inputs["model"].key)
    role = str(rows.config.get("role", ""))
    name = {"safety": "aligned", "guard": "guard"}.get(role, config["method"])
    seed = f"seed {config['seed']}"
    parts = [name, _task(rows) if role == "user" else "", seed, model or ""]
    return ", ".join(part.removesuffix(", ") for part in parts if part)


def _task(rows: Stage) -> str:
    """`mini p=0.1, ` of the user's rows, else nothing."""
    config: Any = rows.config
    if config.get("role") != "user":
        return ""
    poison = f" p={config['poison']['ratio']:g}" if config.get("poison") else ""
    return f"{config['parts'][0]['task']}{poison}, "


def _set(rows: Stage) -> str:
    """`attack mini, test` of rows that are answered."""
    config: Any = rows.config
    role, _, split = str(config.get("role", "")).partition(".")
    names = ", ".join(dict.fromkeys(part["task"] for part in config.get("parts") or ()))
    return f"{role} {names}".strip() + (f", {split}" if split else "")
