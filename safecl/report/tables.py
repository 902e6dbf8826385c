"""The table: as rich, plain text, markdown and JSON. Percent is printed here and nowhere else; JSON keeps fractions.

A row is a dict built by the driver:
`{"model", "task", "poison": 0.1, "method", "params": {..}, "seeds": [0], "metrics": {name: {"value", "low", "high",
"num", "unparsed"}}, "seconds": float, "note": str}`. A metric that is absent or null prints as `-`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from safecl.base import Json

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
REFERENCES = ("base", "aligned")  # rows without a finetune
BOLD = "Bold: best value at its poison ratio, base and aligned apart; where intervals overlap it separates no methods."


@dataclass(frozen=True)
class Facts:
    """What a reader must know to read the numbers. The driver fills it; every form of the report prints it."""

    name: str  # of the sweep
    about: str = ""
    judge: str = "guard"  # who decided ASR
    over_refusal: str = "xstest_match"  # who decided over-refusal
    adapter: str = "continue"
    templates: Mapping[str, str] = field(default_factory=dict)  # prompt template by model name
    num_prompts: Mapping[str, int] = field(default_factory=dict)  # test prompts by evaluation set
    guard_agreement: str = ""  # one line: how often the judge agreed with what is known
    settings: Mapping[str, str] = field(default_factory=dict)  # what the paper leaves open, and what was used
    notes: Sequence[str] = ()  # anything else, one line each (mixed library versions, missing cells)


@dataclass(frozen=True)
class Column:
    header: str
    metric: str
    better: str  # "low", "high" or ""


def columns(rows: Sequence[Row], facts: Facts) -> list[Column]:
    """Metric columns, in reading order; those that no row has are left out, except ASR and utility."""
    every = [
        Column(f"ASR ({facts.judge})", "asr", "low"),
        Column("non-refusal (keywords)", "non_refusal", ""),
        Column(f"over-refusal ({facts.over_refusal})", "over_refusal", "low"),
        Column("degenerate", "degenerate", "low"),
        Column("utility", "utility", "high"),
    ]
    kept = {"asr", "utility"} | {name for row in rows for name in row["metrics"]}
    return [column for column in every if column.metric in kept]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (model, task), in the order given."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row["model"]), str(row["task"])), []).append(row)
    return found


def header(rows: Sequence[Row], facts: Facts) -> list[str]:
    return ["method", "poison", *(column.header for column in columns(rows, facts)), "time"]


def cells(row: Row, shown: Sequence[Column]) -> list[str]:
    """One row as text: method, poison, a metric a column, wall time."""
    poison = "-" if row.get("poison") is None or row["method"] in REFERENCES else f"{100 * row['poison']:g} %"
    values = [percent(row["metrics"].get(column.metric)) for column in shown]
    return [str(row["method"]), poison, *values, duration(row.get("seconds"))]


def percent(metric: Mapping[str, Any] | None) -> str:
    """`12.3 [8.1, 17.0]`, in percent; without an interval the value alone; `-` without a value."""
    if metric is None or metric.get("value") is None:
        return "-"
    value = f"{100 * metric['value']:.1f}"
    if metric.get("low") is None or metric.get("high") is None:
        return value
    return f"{value} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def caption(rows: Sequence[Row], facts: Facts) -> list[str]:
    """Lines under the table: what every number rests on."""
    lines = ["Percent, with 95 % intervals. ASR, over-refusal, degenerate: lower is better. Utility: higher is better."]
    lines.append(_seeds(rows))
    judges = f"ASR judged by {facts.judge}, over-refusal by {facts.over_refusal}"
    lines.append(f"{judges}; non-refusal is a keyword match, not harm.")
    if facts.guard_agreement:
        lines.append(f"Judge: {facts.guard_agreement}")
    unparsed = _unparsed(rows, facts)
    lines.append(f"Unparsed verdicts (left out, never counted as safe): {unparsed}.")
    if facts.num_prompts:
        sets = ", ".join(f"{name} {num}" for name, num in facts.num_prompts.items())
        lines.append(f"Test prompts: {sum(facts.num_prompts.values())} ({sets}).")
    lines.append(f"Adapter: {facts.adapter}.")
    for model, template in facts.templates.items():
        lines.append(f"Template of {model}: {template!r}")
    lines.extend(facts.notes)
    return lines


def _seeds(rows: Sequence[Row]) -> str:
    sets = {tuple(row["seeds"]) for row in rows}
    if not sets:
        return "Seeds: none."
    if all(len(seeds) == 1 for seeds in sets):
        names = ", ".join(str(s) for s in sorted({seeds[0] for seeds in sets}))
        return f"One seed ({names}): intervals are over prompts only (Wilson), no claim about seeds."
    if len(sets) == 1:
        (seeds,) = sets
        names = ", ".join(map(str, seeds))
        return f"Seeds {names}: t-intervals over {len(seeds)} seeds (over prompts where all seeds agree exactly)."
    counts = ", ".join(str(n) for n in sorted({len(seeds) for seeds in sets}))
    return (
        f"Rows differ in their number of seeds ({counts}): t-intervals over seeds; for one seed over prompts (Wilson)."
    )


def _unparsed(rows: Sequence[Row], facts: Facts) -> str:
    parts = []
    for column in columns(rows, facts):
        found = [row["metrics"][column.metric] for row in rows if row["metrics"].get(column.metric)]
        missing = sum(int(metric.get("unparsed") or 0) for metric in found)
        total = sum(int(metric.get("num") or 0) for metric in found) + missing
        if missing:
            parts.append(f"{column.header} {missing} of {total}")
    return ", ".join(parts) or "none"


def params(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(row, its hyperparameters) for every row that has any."""
    named = []
    for row in rows:
        if row.get("params"):
            where = f"{row['model']} / {row['task']} / {row['method']}, poison {100 * (row.get('poison') or 0):g} %"
            named.append((where, ", ".join(f"{k} {_short(v)}" for k, v in row["params"].items())))
    return named


def _short(value: Json) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def best(rows: Sequence[Row], column: Column) -> set[int]:
    """Indices of the rows of one group that are best in a column among rows of the same poison ratio, reference rows
    apart. For emphasis only; a tie of all emphasises none."""
    values: dict[float, dict[int, float]] = {}
    for i, row in enumerate(rows):
        metric = row["metrics"].get(column.metric)
        if row["method"] not in REFERENCES and metric is not None and metric.get("value") is not None:
            values.setdefault(float(row["poison"]), {})[i] = float(metric["value"])
    tops: set[int] = set()
    for of_ratio in values.values() if column.better else ():
        top = (min if column.better == "low" else max)(of_ratio.values())
        found = {i for i, value in of_ratio.items() if value == top}
        tops |= found if len(found) < len(of_ratio) else set()
    return tops


def rich_tables(rows: Sequence[Row], facts: Facts) -> list[Table]:
    """One rich table per model and task; the caption is under the last one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown, tables = columns(rows, facts), []
    for (model, task), members in groups(rows).items():
        table = Table(title=f"{model} / {task}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, name in enumerate(header(rows, facts)):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        tops = [best(members, column) for column in shown]
        for position, row in enumerate(members):
            texts = [Text(cell) for cell in cells(row, shown)]
            for index, top in enumerate(tops):
                if position in top:
                    texts[2 + index].stylize("bold")
            last = position + 1 < len(members) and row["method"] in REFERENCES
            section = last and members[position + 1]["method"] not in REFERENCES
            table.add_row(*texts, style="dim" if row["method"] in REFERENCES else None, end_section=section)
        tables.append(table)
    if tables:
        tables[-1].caption = "\n".join([*caption(rows, facts), BOLD, *notes(rows)])
        tables[-1].caption_justify = "left"
    return tables


def notes(rows: Sequence[Row]) -> list[str]:
    return [f"{row['method']} ({_where(row)}): {row['note']}" for row in rows if row.get("note")]


def _where(row: Row) -> str:
    return str(row["task"]) if row.get("poison") is None else f"{row['task']}, p = {row['poison']:g}"


def plain(rows: Sequence[Row], facts: Facts) -> str:
    """Aligned text for a pipe or a log, without colour or width limit."""
    shown, head, lines = columns(rows, facts), header(rows, facts), [facts.name]
    body = {key: [cells(row, shown) for row in members] for key, members in groups(rows).items()}
    lengths = [head, *(line for member in body.values() for line in member)]
    widths = [max(len(line[i]) for line in lengths) for i in range(len(head))]

    def aligned(line: Sequence[str]) -> str:
        texts = [t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(texts).rstrip()

    for (model, task), members in body.items():
        lines += ["", f"{model} / {task}", aligned(head), "  ".join("-" * w for w in widths)]
        lines += [aligned(member) for member in members]
    return "\n".join([*lines, "", *caption(rows, facts), *notes(rows)]) + "\n"


def markdown(rows: Sequence[Row], facts: Facts) -> str:
    """GitHub-flavoured tables, best values bold, then the caption as a list."""
    shown, head, lines = columns(rows, facts), header(rows, facts), [f"# {facts.name}"]
    if facts.about:
        lines += ["", facts.about]
    for (model, task), members in groups(rows).items():
        lines += ["", f"## {model} / {task}", "", _line(head), "|" + ":--|" + "--:|" * (len(head) - 1)]
        tops = [best(members, column) for column in shown]
        for position, row in enumerate(members):
            texts = cells(row, shown)
            bold = [2 + i for i, top in enumerate(tops) if position in top]
            lines.append(_line([f"**{text}**" if i in bold else text for i, text in enumerate(texts)]))
    lines += ["", *(f"- {line}" for line in [*caption(rows, facts), BOLD, *notes(rows)])]
    if params(rows):
        lines += ["", "Hyperparameters:", "", *(f"- {where}: {text}" for where, text in params(rows))]
    if facts.settings:
        lines += ["", "Settings that the paper leaves open:", ""]
        lines += [f"- {name}: {value}" for name, value in facts.settings.items()]
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def to_json(rows: Sequence[Row], facts: Facts) -> str:
    """Everything as fractions, for other programs. Raises ValueError on a NaN."""
    content = {"facts": asdict(facts), "caption": caption(rows, facts), "rows": [dict(row) for row in rows]}
    return json.dumps(content, indent=2, allow_nan=False, default=dict) + "\n"
