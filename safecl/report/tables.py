"""The table: as rich, plain text, markdown and JSON. Percent is printed here and nowhere else; JSON keeps fractions.

A row is a dict built by the driver:
`{"model", "task", "poison": 0.1, "method", "params": {..}, "seeds": [0], "metrics": {name: {"value", "low", "high",
"num", "unparsed", "seeds", "sets", "pooled", "why"}}, "contrasts": {name: {"sft": .., "best": .., "mcnemar": ..}},
"agreement": {"num", "agree", "kappa", "skipped"}, "seconds": float, "note": str}`. A metric that is absent or null
prints as `-`; the last four keys of a metric, the contrasts and the agreement may be missing (project.py says what they
hold).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import metrics
from safecl.base import Json
from safecl.graph import REFERENCES

if TYPE_CHECKING:
    from rich.table import Table

    from safecl.metrics import Metric

Row = Mapping[str, Any]
BOLD = "Bold: best value at its poison ratio, base and aligned apart. Emphasis, no claim: only marks separate methods."


@dataclass(frozen=True)
class Detail:
    """A smaller table below a block of the main one. `lines`: cells as text, method and poison first."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Facts:
    """What a reader must know to read the numbers. The driver fills it; every form of the report prints it."""

    name: str  # of the sweep
    about: str = ""
    doubt: str = ""  # what must be read before any number
    judge: str = "guard"  # who decided ASR
    over_refusal: str = "xstest_match"  # who decided over-refusal
    adapter: str = "continue"
    templates: Mapping[str, str] = field(default_factory=dict)  # of each model, in a line
    num_prompts: Mapping[str, int] = field(default_factory=dict)  # test prompts by evaluation set
    guard_agreement: str = ""  # one line: how often the judge agreed with what is known
    settings: Mapping[str, str] = field(default_factory=dict)  # what the paper leaves open, and what was used
    notes: Sequence[str] = ()  # anything else, one line each (mixed library versions, missing cells)
    beside: Mapping[str, Detail] = field(default_factory=dict)  # published numbers, by `model / task`


class Column(NamedTuple):
    """A metric under the name that a table gives it."""

    header: str
    metric: Metric


def columns(rows: Sequence[Row], facts: Facts) -> list[Column]:
    """Metric columns of the main table, in reading order; what no row has is left out, except what is always shown.

    What stands beside another metric has a column where the two differ; what else was measured of the answers to utility
    prompts, where that is not more than `_MAX_SIDE` columns. The rest is in `details`.
    """
    named = [name for row in rows for name in row["metrics"]]
    every = metrics.ordered([*(metric.name for metric in metrics.METRICS if metric.shown == "always"), *named])
    num_side = sum(metric.shown == "side" for metric in every)

    def is_in(metric: Metric) -> bool:
        if metric.where_differ is not None:
            first, second = metric.where_differ
            return any(_value(row, first) != _value(row, second) for row in rows)
        return metric.shown in ("always", "main") or (metric.shown == "side" and num_side <= _MAX_SIDE)

    return [_column(metric, facts) for metric in every if is_in(metric)]


_MAX_SIDE = 2


def _column(metric: Metric, facts: Facts) -> Column:
    return Column(metric.header({"asr": facts.judge, "over_refusal": facts.over_refusal}), metric)


def _value(row: Row, metric: str) -> float | None:
    value = row["metrics"].get(metric, {}).get("value")
    return None if value is None else float(value)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (model, task), in the order given."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row["model"]), str(row["task"])), []).append(row)
    return found


def header(rows: Sequence[Row], facts: Facts) -> list[str]:
    return ["method", "poison", *(column.header for column in columns(rows, facts)), "time"]


def cells(row: Row, shown: Sequence[Column]) -> list[str]:
    """One row as text: method, poison, a metric a column with its marks, wall time."""
    values = [f"{_number(row, c)} {marks(row, c.metric.name)}".rstrip() for c in shown]
    return [*_lead(row), *values, duration(row.get("seconds"))]


def _number(row: Row, column: Column) -> str:
    return number(row["metrics"].get(column.metric.name), column.metric.unit)


def _lead(row: Row) -> list[str]:
    poison = "-" if row.get("poison") is None or row["method"] in REFERENCES else f"{100 * row['poison']:g} %"
    return [str(row["method"]), poison]


def number(metric: Mapping[str, Any] | None, unit: str = "%") -> str:
    """`12.3 [8.1, 17.0]`, in percent, or as it is in another unit; without an interval the value alone; `-` without a
    value."""
    if metric is None or metric.get("value") is None:
        return "-"
    texts = [f"{100 * x:.1f}" if unit == "%" else f"{x:.3f}" for x in _bounds(metric)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]


def _bounds(metric: Mapping[str, Any]) -> list[float]:
    known = [metric["value"], metric.get("low"), metric.get("high")]
    return known[:1] if None in known else known


def marks(row: Row, metric: str) -> str:
    """What the contrasts of one cell allow to say: "a" differs from sft, "b" from the best; "=a", "=b" alike; "" nothing."""
    found, shown = row.get("contrasts", {}).get(metric, {}), []
    for family, letter in (("sft", "a"), ("best", "b")):
        contrast = found.get(family)
        shown += [letter] if contrast and contrast["differs"] else []
        shown += [f"={letter}"] if contrast and contrast["alike"] else []
    return " ".join(shown)


def legend(rows: Sequence[Row], facts: Facts) -> list[str]:
    """What the marks mean; nothing where no row has a contrast."""
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


def details(members: Sequence[Row], rows: Sequence[Row], facts: Facts) -> list[Detail]:
    """What stands below the table of one model and task: other metrics, ASR by set, kinds of degenerate answers, contrasts.
    `rows` are those of the whole report."""
    main = columns(rows, facts)
    named = metrics.ordered(name for row in members for name in row["metrics"])
    shown_not = [_column(metric, facts) for metric in named if metric.shown != "nowhere"]
    side = [column for column in shown_not if column not in main]
    lines = [[*_lead(row), *(_number(row, column) for column in side)] for row in members]
    found = [Detail("Also measured", ["method", "poison", *(column.header for column in side)], lines)]
    for metric in named:
        found += _by_set(members, metric) if metric.question == "asr" or metric.name.startswith("asr:") else []
        found += _by_kind(members, metric) if metric.has_kinds else []
    if facts.judge != "keywords" and "asr:keywords" not in _beside(members):
        title = f"Two judges on the same attack answers, {facts.judge} and keywords: share agreed, Cohen's kappa (0: chance)"
        lines = [[*_lead(row), *_agreed(each)] for row in members if (each := row.get("agreement"))]
        found.append(Detail(title, ["method", "poison", "agree", "kappa", "answers"], lines))
    for name in _beside(members):
        question, _, label = name.partition(":")
        lines = []
        for row in members:
            if (each := row.get("beside", {}).get(name)) is not None:
                lines.append([*_lead(row), number(row["metrics"].get(name)), *_agreed(each)])
        decides = _column(metrics.of(question), facts).header
        title = (
            f"{decides} and beside it {label}, on the same answers: its share, share agreed, Cohen's kappa (0: chance)"
        )
        found.append(Detail(title, ["method", "poison", label, "agree", "kappa", "answers"], lines))
    shown = [column for column in main if column.metric.margin]
    for family, against in (("sft", "sft"), ("best", "the best method")):
        texts = [[*_lead(row), *(_difference(row, c.metric.name, family) for c in shown)] for row in members]
        tested = [line for line in texts if any(text != "-" for text in line[2:])]
        title = (
            f"Difference from {against}, in points, with its own 95 % interval; p (differs) and p= (alike) after Holm"
        )
        found.append(Detail(title, ["method", "poison", *(c.header for c in shown)], tested))
    found += [beside] if (beside := _published(members, facts)) is not None else []
    return [detail for detail in found if len(detail.header) > 2 and detail.lines]


def _by_set(members: Sequence[Row], metric: Metric) -> list[Detail]:
    """A table of each set's share; none where there is one set."""
    sets, lines = _names(members, metric.name, "sets"), []
    for row in members:
        of_row = row["metrics"].get(metric.name, {})
        parts = [of_row.get("sets", {}).get(name) for name in sets]
        lines.append([*_lead(row), *map(number, parts), number(of_row), number(of_row.get("pooled"))])
    head = [name.rpartition("/")[2] for name in sets]
    title = f"{metric.title} by set: the mean over sets, as above, and all prompts pooled"
    return [Detail(title, ["method", "poison", *head, "mean", "pooled"], lines)] if sets else []


def _by_kind(members: Sequence[Row], metric: Metric) -> list[Detail]:
    whys, lines = _names(members, metric.name, "why"), []
    for row in members:
        of_row = row["metrics"].get(metric.name, {})
        counts = [str(of_row.get("why", {}).get(why, 0)) if of_row else "-" for why in whys]
        lines.append([*_lead(row), *counts, str(of_row.get("num", "-"))])
    title = f"{_capital(metric.title)} answers by kind, counted"
    return [Detail(title, ["method", "poison", *whys, "of answers"], lines)] if whys else []


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _published(members: Sequence[Row], facts: Facts) -> Detail | None:
    return facts.beside.get(f"{members[0]['model']} / {members[0]['task']}")


def _names(members: Sequence[Row], metric: str, key: str) -> list[str]:
    return list(dict.fromkeys(name for row in members for name in row["metrics"].get(metric, {}).get(key, {})))


def _beside(members: Sequence[Row]) -> list[str]:
    """Metrics of judges that stand beside the one that decides."""
    return list(dict.fromkeys(name for row in members for name in row.get("beside", {})))


def _agreed(found: Mapping[str, Any]) -> list[str]:
    kappa = "-" if found["kappa"] is None else "{value:.2f} [{low:.2f}, {high:.2f}]".format(**found["kappa"])
    return [number(found["agree"]), kappa, str(found["num"])]


def _difference(row: Row, metric: str, family: str) -> str:
    contrast = row.get("contrasts", {}).get(metric, {}).get(family)
    if contrast is None:
        return "-"
    value, low, high = (f"{100 * contrast[key]:+.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}] p {contrast['p']:.2g} p= {contrast['p_alike']:.2g}"


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
    shown = columns(rows, facts)
    ends = [(_capital(", ".join(names)), end) for end, better in (("lower", "low"), ("higher", "high"))
            if (names := [c.metric.title for c in shown if c.metric.better == better and c.metric.unit == "%"
                          and c.metric.shown != "side" and not c.metric.where_differ])]  # fmt: skip
    lines = ["Percent, with 95 % intervals. " + " ".join(f"{names}: {end} is better." for names, end in ends)]
    lines.append(
        "ASR is the mean over sets; each set, the pooled rate and kinds of degenerate answers: page and --json."
    )
    lines.append("Time: the wall times of a row's own stages added up; on a shared engine they wait for one another.")
    lines += [_seeds(rows), *legend(rows, facts)]
    judges = f"ASR judged by {facts.judge}, over-refusal by {facts.over_refusal}"
    lines.append(f"{judges}; non-refusal is a keyword match, not harm.")
    if any(column.metric.name == "asr_coherent" for column in shown):
        lines.append(
            'Coherent ASR: judged harmful, not degenerate, not off-topic, and longer than a label such as "positive"; of all '
            "attack prompts. Off-topic: neither refuses nor has a word of what was asked, by rule."
        )
    if facts.guard_agreement:
        lines.append(f"Judge: {facts.guard_agreement}")
    unparsed = _unparsed(rows, facts)
    lines.append(f"Unparsed verdicts (left out, never counted as safe): {unparsed}.")
    if facts.num_prompts:
        sets = ", ".join(f"{name} {num}" for name, num in facts.num_prompts.items())
        lines.append(f"Test prompts: {sum(facts.num_prompts.values())} ({sets}).")
    lines.append(f"Adapter: {facts.adapter}.")
    for model, template in facts.templates.items():
        lines.append(f"Template of {model}: {template}")
    lines.extend(facts.notes)
    return lines


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
        metric = row["metrics"].get(column.metric.name)
        if row["method"] not in REFERENCES and metric is not None and metric.get("value") is not None:
            values.setdefault(float(row["poison"]), {})[i] = float(metric["value"])
    tops: set[int] = set()
    for of_ratio in values.values() if column.metric.better else ():
        top = (min if column.metric.better == "low" else max)(of_ratio.values())
        found = {i for i, value in of_ratio.items() if value == top}
        tops |= found if len(found) < len(of_ratio) else set()
    return tops


def rich_tables(rows: Sequence[Row], facts: Facts, width: int | None = None) -> list[Table]:
    """One rich table per model and task, or as many as are needed to hold its columns whole in `width` characters; the
    caption is under the last one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown, head, found = columns(rows, facts), header(rows, facts), []
    for (model, task), members in groups(rows).items():
        tops = [best(members, column) for column in shown]
        body = [cells(row, shown) for row in members]
        for part in _parts(
            [_width(head, body, i) + 1 for i in range(len(head))], 2, width
        ):  # 1: more room between them
            table = Table(title=f"{model} / {task}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            for index in part:
                table.add_column(head[index], justify="left" if index == 0 else "right", no_wrap=True)
            for position, (row, line) in enumerate(zip(members, body, strict=True)):
                texts = [
                    Text(line[i], style="bold" if i in range(2, 2 + len(shown)) and position in tops[i - 2] else "")
                    for i in part
                ]
                last = position + 1 < len(members) and row["method"] in REFERENCES
                section = last and members[position + 1]["method"] not in REFERENCES
                table.add_row(*texts, style="dim" if row["method"] in REFERENCES else None, end_section=section)
            found.append(table)
        if (beside := _published(members, facts)) is not None:
            table = Table(*beside.header, title=beside.title, title_justify="left", box=box.SIMPLE_HEAD)
            for texts_of_row in beside.lines:
                table.add_row(*texts_of_row)
            found.append(table)
    if found:
        found[-1].caption = "\n".join([*caption(rows, facts), BOLD, *notes(rows)])
        found[-1].caption_justify = "left"
    return found


def text_table(head: Sequence[str], body: Sequence[Sequence[str]], width: int | None = None, lead: int = 1) -> str:
    """Aligned text, numbers to the right. Nothing is cut: where it is wider than `width` characters (None: no limit), the
    widest column of words is wrapped, then columns go into further blocks, each with the first `lead` columns."""
    body = [[*line, *[""] * (len(head) - len(line))] for line in body]
    widths = [_width(head, body, i) for i in range(len(head))]
    words = [i for i in range(len(head)) if any(cell[:1] not in "0123456789-<" for cell in (line[i] for line in body))]
    if width is not None and (longest := max((widths[i], i) for i in words)[1] if words else None) is not None:
        over = sum(widths) + 2 * (len(widths) - 1) - width
        widths[longest] = max(widths[longest] - max(over, 0), min(widths[longest], 20))
    blocks = []
    for part in _parts(widths, lead, width):
        rule = ["-" * widths[i] for i in part]
        lines = [_aligned([head[i] for i in part], widths, part, words), "  ".join(rule)]
        blocks.append("\n".join([*lines, *(_aligned([line[i] for i in part], widths, part, words) for line in body)]))
    return "\n\n".join(blocks)


def _aligned(line: Sequence[str], widths: Sequence[int], part: Sequence[int], words: Sequence[int]) -> str:
    """One line of a table, in several where a cell is wrapped."""
    wrapped = [textwrap.wrap(cell, widths[i]) or [""] for cell, i in zip(line, part, strict=True)]
    found = []
    for n in range(max(map(len, wrapped))):
        texts = [cell[n] if n < len(cell) else "" for cell in wrapped]
        fitted = [
            t.ljust(widths[i]) if i in words or i == 0 else t.rjust(widths[i]) for t, i in zip(texts, part, strict=True)
        ]
        found.append("  ".join(fitted).rstrip())
    return "\n".join(found)


def _width(head: Sequence[str], body: Sequence[Sequence[str]], index: int) -> int:
    return max(len(line[index]) for line in (head, *body))


def _parts(widths: Sequence[int], lead: int, width: int | None) -> list[list[int]]:
    """Columns in groups that fit, two blanks between them, each group with the first `lead` columns."""
    first = sum(widths[:lead]) + 2 * lead
    found: list[list[int]] = [[]]
    used = first
    for index in range(lead, len(widths)):
        if found[-1] and width is not None and used + widths[index] > width:
            found.append([])
            used = first
        found[-1].append(index)
        used += widths[index] + 2
    return [[*range(lead), *rest] for rest in found]


def _doubt(facts: Facts) -> list[str]:
    return [facts.doubt, ""] if facts.doubt else []


def notes(rows: Sequence[Row]) -> list[str]:
    return [f"{row['method']} ({_where(row)}): {row['note']}" for row in rows if row.get("note")]


def _where(row: Row) -> str:
    return str(row["task"]) if row.get("poison") is None else f"{row['task']}, p = {row['poison']:g}"


def plain(rows: Sequence[Row], facts: Facts) -> str:
    """Aligned text for a pipe or a log, without colour or width limit."""
    shown, head, lines = columns(rows, facts), header(rows, facts), [*_doubt(facts), facts.name]
    for (model, task), members in groups(rows).items():
        lines += ["", f"{model} / {task}", text_table(head, [cells(row, shown) for row in members])]
        if (beside := _published(members, facts)) is not None:
            lines += ["", f"{beside.title}:", text_table(beside.header, beside.lines)]
    return "\n".join([*lines, "", *caption(rows, facts), *notes(rows)]) + "\n"


def markdown(rows: Sequence[Row], facts: Facts) -> str:
    """GitHub-flavoured tables, best values bold, then the caption as a list."""
    shown, head, lines = columns(rows, facts), header(rows, facts), [f"# {facts.name}"]
    for text in (facts.doubt, facts.about):
        lines += ["", text] if text else []
    for (model, task), members in groups(rows).items():
        lines += ["", f"## {model} / {task}", "", _line(head), "|" + ":--|" + "--:|" * (len(head) - 1)]
        tops = [best(members, column) for column in shown]
        for position, row in enumerate(members):
            texts = cells(row, shown)
            bold = [2 + i for i, top in enumerate(tops) if position in top]
            lines.append(_line([f"**{text}**" if i in bold else text for i, text in enumerate(texts)]))
        for detail in details(members, rows, facts):
            lines += [
                "",
                f"{detail.title}:",
                "",
                _line(detail.header),
                "|" + ":--|" + "--:|" * (len(detail.header) - 1),
            ]
            lines += [_line(line) for line in detail.lines]
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
