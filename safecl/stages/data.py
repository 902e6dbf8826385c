"""Rows of one role -> rows.jsonl (a Row's fields a line) and poison.json.

In order: draw each part, drop what overlaps the prompts of the `exclude_*` inputs, fill up to `num_rows`, add the
self-answered rows of the `answers_*` inputs, replace `floor(ratio * N)` rows by poison (or add so many), and shuffle.
poison.json says where it ended: {"indices": [of rows.jsonl], "ids"}. A guard's rows are
paired (`contrasted`) in place of being shuffled, and written in the judge's template. Everything follows from the config
and the inputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.store import Context
from safecl.tasks import Row, load
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import identity

VERSION = "3"


def run(context: Context) -> dict[str, Json]:
    """Config: {"role", "parts": [{"task", "split", "num_rows", "source"}], "poison": null | {"task", "ratio", "source",
    and only where it is true "keep_task_rows"}, "guard": null | {"judge", "config"}, "seed", "labels": {name of an
    `answers_*` input: task whose rule labels it}, or absent}; `source` is `tasks._source.identity` of the split.

    Inputs `exclude_*` are data stages whose prompts no row here may be like; `answers_*` are generate stages whose
    answered prompts become rows. Result: {"num_rows", "num_poison", "harmful_share", "self_answered",
    "answers_dropped", "overlaps_dropped": {part: count}, "parts": {part: count}, "left_out": {"file: field": count}}; what
    was left out has nothing in that field.

    Raises:
        ConfigError: a part holds too few rows after exclusion.
        PrerequisiteError: a source is missing or is not the one that the config names.
    """
    config: Any = context.stage.config
    folder = None if context.execution.data_dir is None else Path(context.execution.data_dir)
    seed = int(config["seed"])
    taken = [row.prompt for name in sorted(context.inputs) if name.startswith("exclude_")
             for row in _read(context.inputs[name])]  # fmt: skip
    rows: list[Row] = []
    counts: dict[str, Json] = {}
    dropped: dict[str, Json] = {}
    left_out: dict[str, Json] = {}
    guard = config.get("guard")
    for part in config["parts"]:
        num_rows = part["num_rows"]
        found, lost, blank = _draw(part, part["split"], num_rows if guard is None else None, seed, folder, taken)
        left_out.update(blank)
        if guard is not None:
            found = contrasted(found, num_rows)
        name = f"{part['task']}/{part['split']}"
        rows, counts[name], dropped[name] = rows + found, len(found), lost
    if "labels" in config:
        rows += _labelled(context, config["labels"])
        answered, unanswered, lost_ids = list[Row](), 0, list[str]()
    else:
        answered, unanswered = _self_answered(context)
        answered, lost_ids = drop_overlaps(answered, taken)
        rows += answered
    num_poison = 0
    if config["poison"] is not None:
        num_poison = math.floor(Fraction(str(config["poison"]["ratio"])) * len(rows))
        name = f"{config['poison']['task']}/poison"
        bad, dropped[name], blank = _draw(config["poison"], "poison", num_poison, seed, folder, taken)
        left_out.update(blank)
        counts[name] = num_poison
        places = random.Random(f"poison/{seed}").sample(range(len(rows)), num_poison)
        if config["poison"].get("keep_task_rows"):
            places = list(range(len(rows), len(rows) + num_poison))
            rows = [*rows, *bad]
        for place, row in zip(places, bad, strict=True):
            rows[place] = row
    _refuse_equal_ids(rows)
    if guard is None:
        random.Random(f"rows/{seed}").shuffle(rows)
    share = sum(row.harmful for row in rows) / len(rows) if rows else 0.0
    if guard is not None:
        rows = _in_template(rows, guard)
    poison_name = f"{config['poison']['task']}/poison/" if config["poison"] is not None else None
    places = [i for i, row in enumerate(rows) if poison_name is not None and row.id.startswith(poison_name)]
    with (context.out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    (context.out / "poison.json").write_text(json.dumps({"indices": places, "ids": [rows[i].id for i in places]}))
    return {
        "num_rows": len(rows),
        "num_poison": num_poison,
        "harmful_share": share,
        "self_answered": len(answered),
        "answers_dropped": unanswered + len(lost_ids),
        "overlaps_dropped": dropped,
        "parts": counts,
        "left_out": left_out,
    }


def _draw(
    part: dict[str, Any], split: str, num_rows: int | None, seed: int, folder: Path | None, taken: list[str]
) -> tuple[list[Row], int, dict[str, int]]:
    """The first `num_rows` rows of the seeded order that overlap nothing, how many before them did, and the records that
    the task left out of its files."""
    kind = load(part["task"])
    here = identity(kind, split, folder)
    if here != part["source"]:
        raise PrerequisiteError(
            f"task {part['task']!r}, split {split!r}: the data found is not the data planned with: expected "
            f"{json.dumps(part['source'])}, got {json.dumps(here)}. Bring the file back, or run the sweep anew."
        )
    task = kind(folder)
    found = task.rows(split, None, seed)
    kept, lost = drop_overlaps(found, taken) if taken else (found, [])
    if num_rows is not None and num_rows > len(kept):
        raise ConfigError(
            f"task {part['task']!r}, split {split!r}: {num_rows} rows are asked for, {len(found)} are there and "
            f"{len(lost)} of them overlap prompts of another role; ask for at most {len(kept)}"
        )
    chosen = kept if num_rows is None else kept[:num_rows]
    before = {row.id for row in chosen}
    last = max((i for i, row in enumerate(found) if row.id in before), default=-1)
    gone = set(lost)
    num_lost = len(lost) if num_rows is None else sum(row.id in gone for row in found[: last + 1])
    # Poison keeps its role in its id: mini's poison and safety rows come from one task.
    prefix = f"{part['task']}/poison" if split == "poison" else part["task"]
    return [dataclasses.replace(row, id=f"{prefix}/{row.id}") for row in chosen], num_lost, task.left_out


def _self_answered(context: Context) -> tuple[list[Row], int]:
    """Rows from the generations of `answers_*` inputs, and how many generations gave none.

    An answer cut at the length limit ends after its last whole sentence, so that no row teaches to stop mid-sentence;
    one without a whole sentence, or an empty one, gives no row.
    """
    rows: list[Row] = []
    unanswered = 0
    for name in sorted(n for n in context.inputs if n.startswith("answers_")):
        for line in _lines(context.inputs[name] / "generations.jsonl"):
            answer = str(line["text"]).strip()
            if line.get("finish") == "length":
                answer = answer[: max(answer.rfind(mark) for mark in (".", "!", "?")) + 1]
            if answer:
                rows.append(Row(f"self/{line['id']}", line["prompt"], answer, False, {"self_answered": True}))
            else:
                unanswered += 1
    return rows, unanswered


def _labelled(context: Context, labels: dict[str, str]) -> list[Row]:
    """Models' answers as they came, `harmful` where the task's rule says that they comply: what a guard will judge."""
    rows = []
    for name, task in labels.items():
        rule: Any = load(task)
        for line in _lines(context.inputs[name] / "generations.jsonl"):
            complies = rule.label(Row(line["id"], line["prompt"]), line["text"]) == "compliance"
            source = name.removeprefix("answers_")
            rows.append(Row(f"{source}/{line['id']}", line["prompt"], line["text"], complies, {"source": source}))
    return rows


def contrasted(rows: list[Row], num_rows: int | None) -> list[Row]:
    """Labelled answers as pairs of a harmful and a harmless one: first those to one prompt, prompt by prompt, then what
    is left of each label. The first `num_rows` of them (None: all pairs).

    Raises:
        ConfigError: there are fewer pairs.
    """
    by_prompt: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, ([], []))[not row.harmful].append(row)
    pairs = [pair for harmful, harmless in by_prompt.values() for pair in zip(harmful, harmless, strict=False)]
    left = [[row for both in by_prompt.values() for row in both[i][min(map(len, both)) :]] for i in (0, 1)]
    found = [row for pair in (*pairs, *zip(*left, strict=False)) for row in pair]
    if num_rows is not None and num_rows > len(found):
        raise ConfigError(
            f"guard rows: {num_rows} are asked for, {len(rows)} make {len(found) // 2} pairs of both labels; ask for at "
            f"most {len(found)}"
        )
    return found[:num_rows]


def _in_template(rows: list[Row], guard: dict[str, Any]) -> list[Row]:
    """Labelled pairs as the guard reads and answers them."""
    from safecl.judges import load as load_judge

    kind: Any = load_judge(guard["judge"])
    judge = kind(kind.Config(**guard["config"]))
    return [
        dataclasses.replace(row, prompt=judge.prompt(row.prompt, row.response), response=kind.target(row.harmful))
        for row in rows
    ]


def _refuse_equal_ids(rows: list[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ConfigError(f"row {row.id!r} is drawn twice: is a part (or a task) named twice in this role?")
        seen.add(row.id)


def _read(folder: Path) -> Iterable[Row]:
    return (Row(**line) for line in _lines(folder / "rows.jsonl"))


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
