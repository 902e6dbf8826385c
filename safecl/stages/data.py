"""Data: the rows of one role. Writes rows.jsonl (the fields of one `Row` a line) and poison.json.

Steps, in order:

1. Draw each part.
2. Drop rows whose prompt overlaps a prompt of an `exclude_*` input.
3. Skip rows that are too long for training.
4. Take `num_rows` rows.
5. Add the self-answered rows of the `answers_*` inputs.
6. Replace `floor(ratio * N)` of the N rows by poison, or add that many (`keep_task_rows`).
7. Shuffle.

So N, the poison ratio and the number of refusals count only rows that are trained on. poison.json holds the places of the
poison rows: {"indices": [line numbers in rows.jsonl, from 0], "ids": [...]}. Rows that train a guard are paired
(`contrasted`) instead of shuffled, and are written in the judge's template. The output depends only on the config and the
inputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import sizes
from safecl.base import ConfigError, Json, PrerequisiteError, json_lines
from safecl.sizes import Length
from safecl.stages import Kind
from safecl.store import Context, Stage
from safecl.tasks import Row, Task, load
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import identity
from safecl.tasks._written import of_stage, typical_tokens
from safecl.training.tokens import Tokenizer, encode, least_tokens

if TYPE_CHECKING:
    from safecl.estimate import Estimator

VERSION = "4"


class Composed(NamedTuple):
    """The rows of a role and the stage's result (`facts`, see `compose`)."""

    rows: list[Row]
    facts: dict[str, Json]


Finder = Callable[[dict[str, Any], str], "Found"]


class Fit(NamedTuple):
    """The length limit of a row: `max_tokens`, counted with the tokenizer and template of training."""

    tokenizer: Tokenizer
    template: Mapping[str, Json]
    bos: bool
    max_tokens: int

    def least(self, rows: Sequence[Row]) -> list[float]:
        """The smallest `max_tokens` with which each row fits. Infinity for a row that never fits."""
        found = least_tokens(rows, self.tokenizer, self.template, self.bos)
        return [math.inf if least is None else least for least in found]


class Data(Kind):
    runs = "thread"
    unit = ""
    fixed_s = 0.4
    at_driver = True
    reads = ()

    @staticmethod
    def length(stage: Stage, of: Estimator) -> Length:
        config: Any = stage.config
        parts = config["parts"]
        typical = [typical_tokens(of_stage(part, part["task"], stage.hints)) for part in parts] or [Task.TYPICAL_TOKENS]
        num_rows = sum(part["num_rows"] or sizes.TYPICAL_ROWS for part in parts)
        if any(part["num_rows"] is None for part in parts):
            num_rows = int(of.result(stage).get("num_rows", num_rows))
        prompt, answer = (sum(column) / len(column) for column in zip(*typical, strict=True))
        if config.get("guard"):  # prompt and answer are both part of the guard's prompt
            prompt, answer = sizes.GUARD_TOKENS + prompt + answer, 5
        return Length(num_rows, prompt + sizes.TEMPLATE_TOKENS, answer)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        config: Any = stage.config
        parts = ", ".join(dict.fromkeys(part["task"] for part in config.get("parts", ())))
        return f"rows {config['role']}: {parts}" if parts else f"rows {config['role']}"


def run(context: Context) -> dict[str, Json]:
    """Write the rows of one role. Returns the facts of `compose`.

    Config:
        role: name of the role.
        parts: list of {"task", "split", "num_rows", "source"}. A part whose rows are counted by kind also has "kinds":
            {"harmful": number of rows, "benign": number of rows}. `source` is `tasks._source.identity` of the split.
        poison: null or {"task", "ratio", "source"}, with "keep_task_rows" only if it is true.
        guard: null or {"judge", "config"}.
        seed: seed of the drawing and shuffling.
        labels: {name of an `answers_*` input: task whose rule labels it}, only where models' answers become rows.
        fits: {"template", "bos", "max_tokens"}, only for rows that are trained on.

    A part (or poison) whose task is defined in the sweep file also has "written" (`tasks._written.told`).

    Inputs: `exclude_*` are data stages; a row that is similar to one of their prompts is dropped. `answers_*` are generate
    stages whose prompts and answers become rows. `tokenizer` is given if the config has "fits".
    """
    config: Any = context.stage.config
    folder = None if context.execution.data_dir is None else Path(context.execution.data_dir)
    taken = [row.asked for name in sorted(context.inputs) if name.startswith("exclude_")
             for row in _read(context.inputs[name])]  # fmt: skip
    answers = {name: json_lines(context.inputs[name] / "generations.jsonl")
               for name in sorted(context.inputs) if name.startswith("answers_")}  # fmt: skip
    tokenizer = Tokenizer(context.inputs["tokenizer"]) if "tokenizer" in context.inputs else None
    seed = int(config["seed"])
    hints = context.stage.hints

    def found(part: dict[str, Any], split: str) -> Found:
        return find(part, split, seed, folder, taken, hints)

    rows, facts = compose(config, found, taken, answers, tokenizer)
    places = [i for i, row in enumerate(rows) if _is_poison(row, config)]
    with (context.out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.as_json()) + "\n")
    (context.out / "poison.json").write_text(json.dumps({"indices": places, "ids": [rows[i].id for i in places]}))
    return facts


def compose(
    config: Any, found: Finder, taken: Sequence[str], answers: Mapping[str, list[Any]], tokenizer: Tokenizer | None
) -> Composed:
    """Compose the rows of one role from a config of `run`.

    Args:
        config: the stage's config (see `run`).
        found: `find` as a function of part and split.
        taken: prompts of the `exclude_*` inputs. A self-answered row that overlaps one of them is dropped.
        answers: lines of generations that become rows, by name of the input.
        tokenizer: the tokenizer of training, if the config has "fits".

    Facts: "num_rows", "num_poison", "harmful_share" (in [0, 1]), "self_answered", "answers_dropped", "overlaps_dropped"
    ({part: count}), "parts" ({part: count}) and "left_out" ({"file: field": number of records with nothing in that field}).
    With a tokenizer also "too_long" ({part: number of rows skipped}), "cut_prompts" and "poison_tokens" (the poison's share
    of the response tokens, in [0, 1]).

    Raises:
        ConfigError: a part holds too few rows after exclusion.
        PrerequisiteError: a source is missing or is not the one that the config names.
    """
    seed, guard = int(config["seed"]), config.get("guard")
    fit = Fit(tokenizer, **config["fits"]) if tokenizer is not None else None
    rows: list[Row] = []
    facts: dict[str, dict[str, Json]] = {"parts": {}, "overlaps_dropped": {}, "too_long": {}, "left_out": {}}

    def draw(part: dict[str, Any], split: str, num_rows: int | None, kind: str = "") -> list[Row]:
        usable, overlaps, left_out = found(part, split)
        facts["left_out"].update(left_out)
        name = f"{part['task']}/{split} {kind}".strip()
        of_kind = [row for row in usable if row.harmful == (kind == "harmful")] if kind else usable
        pool = contrasted(of_kind) if guard else of_kind
        read, size = (_in_template(pool, guard), 2) if guard else (pool, 1)
        chosen, too_long = _first(read, num_rows, fit, size)
        if num_rows is not None and len(chosen) < num_rows:
            asked = f"{split} {kind}".strip()
            raise ConfigError(_too_few(part["task"], asked, num_rows, read, len(overlaps), too_long, fit, size))
        if guard:
            by_id = {row.id: row for row in pool}
            chosen = [by_id[row.id] for row in chosen]
        last = len(usable)
        if num_rows is not None and not guard:  # rows after the last chosen one were not read
            last = next((i for i, row in enumerate(usable) if chosen and row is chosen[-1]), -1)
        facts["parts"][name], facts["too_long"][name] = len(chosen), too_long
        facts["overlaps_dropped"][name] = sum(place <= last for place in overlaps)
        # The id of a poison row names its role, because mini's poison and safety rows come from one task.
        prefix = f"{part['task']}/poison" if split == "poison" else part["task"]
        return [dataclasses.replace(row, id=f"{prefix}/{row.id}") for row in chosen]

    for part in config["parts"]:
        for kind, num_rows in part.get("kinds", {"": part["num_rows"]}).items():
            rows += draw(part, part["split"], num_rows, kind)
    answered, dropped = list[Row](), 0
    if "labels" in config:
        rows += _labelled(answers, config["labels"])
    else:
        lines = [line for of_input in answers.values() for line in of_input]
        answered, _ = drop_overlaps(_self_answered(lines), taken)
        answered, _ = _first(answered, None, fit)
        dropped = len(lines) - len(answered)
        rows += answered
    num_poison = 0
    if config["poison"] is not None:
        num_poison = math.floor(Fraction(str(config["poison"]["ratio"])) * len(rows))
        bad = draw(config["poison"], "poison", num_poison)
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
    told: dict[str, Json] = {
        "num_rows": len(rows),
        "num_poison": num_poison,
        "harmful_share": share,
        "self_answered": len(answered),
        "answers_dropped": dropped,
        "overlaps_dropped": facts["overlaps_dropped"],
        "parts": facts["parts"],
        "left_out": facts["left_out"],
    }
    if fit is not None:
        told |= {"too_long": facts["too_long"], **_as_trained(rows, config, fit)}
    return Composed(rows, told)


def _as_trained(rows: Sequence[Row], config: Any, fit: Fit) -> dict[str, Json]:
    encoded, _ = encode(rows, *fit) if rows else ([], {})
    poison = {row.id for row in rows if _is_poison(row, config)}
    total = sum(row.num_targets for row in encoded)
    return {
        "cut_prompts": sum(row.num_cut > 0 for row in encoded),
        "poison_tokens": sum(row.num_targets for row in encoded if row.row_id in poison) / max(1, total),
    }


def _is_poison(row: Row, config: Any) -> bool:
    return config["poison"] is not None and row.id.startswith(f"{config['poison']['task']}/poison/")


class Found(NamedTuple):
    """The rows of a split that a part may use.

    `rows` are those without an overlap, in their seeded order. `overlaps` has one number for each dropped row: how many of
    `rows` stand before it. `left_out` counts the records that the task left out of its files.
    """

    rows: list[Row]
    overlaps: list[int]
    left_out: Mapping[str, Json]


def find(
    part: dict[str, Any],
    split: str,
    seed: int,
    folder: Path | None,
    taken: Sequence[str],
    hints: Mapping[str, str] | None = None,
) -> Found:
    """The rows that a part may be drawn from. `hints` are the stage's.

    Raises:
        PrerequisiteError: a source is missing or is not the one that the config names.
    """
    kind = of_stage(part, part["task"], hints)
    here = identity(kind, split, folder)
    if here != part["source"]:
        raise PrerequisiteError(
            f"task {part['task']!r}, split {split!r}: the data found is not the data planned with: expected "
            f"{json.dumps(part['source'])}, got {json.dumps(here)}. Bring the file back, or run the sweep anew."
        )
    task = kind(folder)
    found = task.rows(split, None, seed)
    kept, lost = drop_overlaps(found, taken) if taken else (found, [])
    gone, before, places = set(lost), 0, []
    for row in found if gone else ():
        if row.id in gone:
            places.append(before)
        before += row.id not in gone
    return Found(kept, places, dict(task.left_out))


def _first(rows: Sequence[Row], num_rows: int | None, fit: Fit | None, size: int = 1) -> tuple[list[Row], int]:
    """The first `num_rows` rows (None: all) that fit, and how many were skipped. Rows are taken or skipped in groups of
    `size`: a group fits if all its rows do."""
    if fit is None:
        return list(rows[:num_rows]), 0
    num_groups = -(-len(rows) // size)
    num = None if num_rows is None else -(-num_rows // size)
    kept: list[Sequence[Row]] = []
    passed = at = 0
    while at < num_groups and (num is None or len(kept) < num):  # tokenise no more rows than needed
        end = num_groups if num is None else min(num_groups, at + max(64, num - len(kept)))
        some = [rows[i * size : (i + 1) * size] for i in range(at, end)]
        least = iter(fit.least([row for group in some for row in group]))
        fits = [max(next(least) for _ in group) <= fit.max_tokens for group in some]
        for group, does in zip(some, fits, strict=True):
            if len(kept) == num:
                break
            kept += [group] if does else []
            passed += not does
        at += len(some)
    return [row for group in kept for row in group][:num_rows], size * passed


def _too_few(
    task: str,
    split: str,
    num_rows: int,
    found: Sequence[Row],
    num_overlaps: int,
    too_long: int,
    fit: Fit | None,
    size: int,
) -> str:
    num, what = len(found) + num_overlaps, "in pairs of both labels " if size > 1 else ""
    text = f"task {task!r}, split {split!r}: {num_rows} rows are asked for, {num} are there {what}and {num_overlaps} of them "
    text += "overlap prompts of another role"
    if fit is None or not too_long:
        return f"{text}; ask for at most {len(found)}"
    text += f", {too_long} are longer than max_tokens = {fit.max_tokens}; ask for at most {len(found) - too_long}"
    each = fit.least(found)
    least = sorted(max(each[i : i + size]) for i in range(0, len(each), size))
    enough = least[-(-num_rows // size) - 1] if num_rows <= len(found) else math.inf
    return text if enough == math.inf else f"{text}, or raise max_tokens to {enough}"


def _self_answered(lines: Sequence[Any]) -> list[Row]:
    """Rows from generations. An answer that reached the length limit is cut after its last whole sentence, so that no row
    teaches the model to stop in the middle of a sentence. An answer without a whole sentence, or an empty one, gives no
    row."""
    rows: list[Row] = []
    for line in lines:
        answer = str(line["text"]).strip()
        if line.get("finish") == "length":
            answer = answer[: max(answer.rfind(mark) for mark in (".", "!", "?")) + 1]
        if answer:
            before = line.get("before", ())
            rows.append(Row(f"self/{line['id']}", line["prompt"], answer, False, {"self_answered": True}, before))
    return rows


def _labelled(answers: Mapping[str, list[Any]], labels: Mapping[str, str]) -> list[Row]:
    """Unchanged answers of models, as training rows of a guard. `harmful` is true if the task's rule says "compliance"."""
    rows = []
    for name, task in labels.items():
        rule: Any = load(task)
        for line in answers[name]:
            complies = rule.label(Row(line["id"], line["prompt"]), line["text"]) == "compliance"
            source = name.removeprefix("answers_")
            rows.append(Row(f"{source}/{line['id']}", line["prompt"], line["text"], complies, {"source": source}))
    return rows


def contrasted(rows: list[Row]) -> list[Row]:
    """Order labelled answers as pairs of a harmful and a harmless one.

    Pairs of two answers to the same prompt come first, prompt by prompt. The remaining answers are then paired across
    prompts. Answers without a partner are dropped.
    """
    by_prompt: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, ([], []))[not row.harmful].append(row)
    pairs = [pair for harmful, harmless in by_prompt.values() for pair in zip(harmful, harmless, strict=False)]
    left = [[row for both in by_prompt.values() for row in both[i][min(map(len, both)) :]] for i in (0, 1)]
    return [row for pair in (*pairs, *zip(*left, strict=False)) for row in pair]


def _in_template(rows: list[Row], guard: dict[str, Any]) -> list[Row]:
    """Labelled pairs as the guard reads and answers them. `meta.pieces` lists (text, whether it belongs to the template)."""
    from safecl.judges import load as load_judge

    kind: Any = load_judge(guard["judge"])
    judge = kind(kind.Config(**guard["config"]))
    found = []
    for row in rows:
        pieces = judge.pieces(row.prompt, row.response)
        meta: dict[str, Json] = {**row.meta, "pieces": [[text, own] for text, own in pieces]}
        prompt = "".join(text for text, _ in pieces)
        found.append(dataclasses.replace(row, prompt=prompt, response=judge.target(row.harmful), meta=meta))
    return found


def _refuse_equal_ids(rows: list[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ConfigError(f"row {row.id!r} is drawn twice: is a part (or a task) named twice in this role?")
        seen.add(row.id)


def _read(folder: Path) -> Iterable[Row]:
    return (Row(**line) for line in json_lines(folder / "rows.jsonl"))
