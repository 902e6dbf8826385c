"""Rows of one role -> rows.jsonl (a Row a line, in order) and poison.json.

Inputs: `exclude_*` hold prompts that these rows must not overlap (their rows.jsonl); `answers_*` hold generations whose
text becomes the answer of rows (benign requests that the base model answered itself), which are appended.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.store import Context
from safecl.tasks import Row, load
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import identity

VERSION = "1"


def run(context: Context) -> dict[str, Json]:
    """Raises ConfigError if too few rows are left, PrerequisiteError if a source is not what the plan saw."""
    config: Any = context.stage.config
    folder = Path(context.execution.data_dir).absolute() if context.execution.data_dir else None
    against = [
        line["prompt"]
        for name, path in sorted(context.inputs.items())
        if name.startswith("exclude_")
        for line in _lines(path / "rows.jsonl")
    ]
    rows: list[Row] = []
    dropped = 0
    for part in config["parts"]:
        drawn, lost = _draw(part, config["seed"], folder, against)
        rows, dropped = rows + drawn, dropped + lost
    poisoned: list[int] = []
    if config["poison"] is not None:
        num = math.floor(config["poison"]["ratio"] * len(rows))
        part = {**config["poison"], "split": "poison", "num_rows": num}
        harmful, lost = _draw(part, config["seed"], folder, against)
        dropped += lost
        rows, poisoned = _poison(rows, harmful, config["seed"])
    rows += _self_answered(context)
    if config["guard"] is not None:
        rows = [_as_judge_reads(row, config["guard"]) for row in rows]
    with (context.out / "rows.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
    (context.out / "poison.json").write_text(json.dumps({"indices": poisoned, "ids": [rows[i].id for i in poisoned]}))
    harmful_share = sum(row.harmful for row in rows) / max(1, len(rows))
    return {"num": len(rows), "overlaps_dropped": dropped, "poisoned": len(poisoned), "harmful_share": harmful_share}


def _draw(part: dict[str, Any], seed: int, folder: Path | None, against: list[str]) -> tuple[list[Row], int]:
    """The first `num_rows` rows of a split that overlap nothing they must not, and how many were dropped for it."""
    kind = load(part["task"])
    found = identity(kind, part["split"], folder)
    if found != part["source"]:
        raise PrerequisiteError(
            f"task {part['task']!r}: its data changed since the sweep was planned: expected {part['source']}, found {found}; "
            "run the command again"
        )
    rows = kind(folder).rows(part["split"], None, seed)
    kept, dropped = drop_overlaps(rows, against) if against else (rows, [])
    num = part["num_rows"]
    if num is not None and num > len(kept):
        raise ConfigError(
            f"task {part['task']!r}, split {part['split']!r}: {num} rows were asked for, {len(kept)} are left "
            f"({len(dropped)} overlap prompts that are held out); lower num_rows"
        )
    return [replace(row, id=f"{part['task']}/{row.id}") for row in kept[:num]], len(dropped)


def _poison(rows: list[Row], harmful: list[Row], seed: int) -> tuple[list[Row], list[int]]:
    """As many rows as there are harmful ones are replaced, then all are shuffled; the total stays what it was."""
    draw = random.Random(f"poison/{seed}")
    for index, row in zip(draw.sample(range(len(rows)), len(harmful)), harmful, strict=True):
        rows[index] = row
    draw.shuffle(rows)
    ids = {row.id for row in harmful}
    return rows, [i for i, row in enumerate(rows) if row.id in ids]


def _self_answered(context: Context) -> list[Row]:
    found = []
    for name, path in sorted(context.inputs.items()):
        if name.startswith("answers_"):
            for line in _lines(path / "generations.jsonl"):
                if line["text"].strip():
                    found.append(Row(line["id"], line["prompt"], line["text"].strip(), False, {"self_answered": True}))
    return found


def _as_judge_reads(row: Row, guard: dict[str, Any]) -> Row:
    from safecl.judges import load as load_judge

    kind: Any = load_judge(guard["judge"])
    judge = kind(kind.Config(**guard["config"]))
    return replace(row, prompt=judge.prompt(row.prompt, row.response), response=judge.target(row.harmful))


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]
