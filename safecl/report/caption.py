"""The lines below a report's tables, which explain the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from safecl.base import Json
from safecl.report.tables import Facts, Row, capital, columns

BOLD = "Bold: best value at its poison ratio, base and aligned apart. Emphasis, no claim: only marks separate methods."


def caption(rows: Sequence[Row], facts: Facts) -> list[str]:
    """Lines that explain the numbers: direction, seeds, marks, judges, unparsed verdicts, prompts, templates."""
    shown = [column.metric for column in columns(rows, facts)]
    ends = [(capital(", ".join(names)), end) for end, better in (("lower", "low"), ("higher", "high"))
            if (names := [metric.title for metric in shown if metric.better == better and metric.unit == "%"
                          and metric.shown != "side" and not metric.where_differ])]  # fmt: skip
    lines = ["Percent, with 95 % intervals. " + " ".join(f"{names}: {end} is better." for names, end in ends)]
    over_sets = [metric.title for metric in shown if metric.has_sets and ":" not in metric.name]
    lines += [
        f"{name} is the mean over sets; each set, the pooled rate and kinds of degenerate answers: page and --format json."
        for name in over_sets
    ]
    lines.append("Time: the wall times of a row's own stages added up; on a shared engine they wait for one another.")
    lines += [_seeds(rows), *legend(rows, facts)]
    judged = [
        f"{metric.title} by {facts.judges[metric.question]}" for metric in shown if metric.question in facts.judges
    ]
    lines += [f"Judged: {', '.join(judged)}."] if judged else []
    lines += [metric.note for metric in shown if metric.note]
    if facts.guard_agreement:
        lines.append(f"Judge: {facts.guard_agreement}")
    lines.append(f"Unparsed verdicts (left out, never counted as safe): {_unparsed(rows, facts)}.")
    if facts.num_prompts:
        sets = ", ".join(f"{name} {num}" for name, num in facts.num_prompts.items())
        lines.append(f"Test prompts: {sum(facts.num_prompts.values())} ({sets}).")
    lines.append(f"Adapter: {facts.adapter}.")
    for model, template in facts.templates.items():
        lines.append(f"Template of {model}: {template}")
    lines.extend(facts.notes)
    return lines


def legend(rows: Sequence[Row], facts: Facts) -> list[str]:
    """Lines that explain the marks. Empty if no row has a contrast."""
    if not any(_tested(row) for row in rows):
        return []
    shown = [column.metric for column in columns(rows, facts) if column.metric.margin]
    usual = shown[0].margin or 0  # of ASR
    others = [
        f"; {metric.title}: "
        + ("at most {:g} below" if metric.better == "high" else "within {:g}").format(100 * metric.margin)
        for metric in shown
        if metric.margin and (metric.margin, metric.better) != (usual, "low")
    ]
    alike = f"within {100 * usual:g} points{''.join(others)}"
    return [
        "Marks, from differences on the same seeds and prompts, by metric and poison ratio: a differs from sft, b from the "
        f"best method; =a, =b is like it ({alike}). They are to hold for other seeds and other such prompts, at .05 after "
        "Holm, over all methods for a, over all pairs of methods for b, because the best was picked by the same data. No "
        "mark: these seeds and prompts cannot tell."
    ]


def _tested(row: Row) -> bool:
    return any(family in found for found in row.get("contrasts", {}).values() for family in ("sft", "best"))


def _seeds(rows: Sequence[Row]) -> str:
    sets = {tuple(row["seeds"]) for row in rows if row["seeds"]}
    if not sets:
        return "Seeds: none."
    if all(len(seeds) == 1 for seeds in sets):
        names = ", ".join(str(s) for s in sorted({seeds[0] for seeds in sets}))
        return (
            f"One seed ({names}): intervals are over prompts only (Wilson). No claim about methods: another seed may turn "
            "any order around."
        )
    if len(sets) == 1:
        (seeds,) = sets
        names = ", ".join(map(str, seeds))
        return f"Seeds {names}: intervals over {len(seeds)} seeds and the prompts (Student, Wilson)."
    counts = ", ".join(str(n) for n in sorted({len(seeds) for seeds in sets}))
    return (
        f"Rows differ in their number of seeds ({counts}): intervals over seeds and prompts (one seed: prompts only)."
    )


def _unparsed(rows: Sequence[Row], facts: Facts) -> str:
    parts = []
    for column in columns(rows, facts):
        found = [entry for row in rows if (entry := row["metrics"].get(column.metric.name))]
        missing = sum(int(metric.get("unparsed") or 0) for metric in found)
        total = sum(int(metric.get("num") or 0) for metric in found) + missing
        if missing:
            parts.append(f"{column.header} {missing} of {total}")
    return ", ".join(parts) or "none"


def notes(rows: Sequence[Row]) -> list[str]:
    """The notes of single rows, one line each."""
    return [f"{row['method']} ({_where(row)}): {row['note']}" for row in rows if row.get("note")]


def _where(row: Row) -> str:
    return str(row["task"]) if row.get("poison") is None else f"{row['task']}, p = {row['poison']:g}"


def params(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(row, its hyperparameters) as text, for every row that has hyperparameters."""
    named = []
    for row in rows:
        if row.get("params"):
            where = f"{row['model']} / {row['task']} / {row['method']}, poison {100 * (row.get('poison') or 0):g} %"
            named.append((where, ", ".join(f"{k} {short(v)}" for k, v in row["params"].items())))
    return named


def short(value: Json) -> str:
    """A hyperparameter's value as short text (numbers with 4 digits)."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
