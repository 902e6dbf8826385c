"""A report as text: for a terminal, as plain text, Markdown, LaTeX, CSV and JSON. All forms print the same `Block`s.

Shares are printed in percent, except in CSV and JSON, which are for programs and keep fractions.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from safecl import metrics
from safecl.report.caption import BOLD, caption, notes, params
from safecl.report.tables import Facts, Line, Row, blocks, marks

if TYPE_CHECKING:
    from rich.table import Table

_LEAD = 2  # number of columns that every part of a wide table repeats: method and poison


def terminal(rows: Sequence[Row], facts: Facts, width: int | None = None) -> list[Table]:
    """One rich table for each model and task. The caption is below the last one.

    If a table is wider than `width` characters, it is split into several, each with whole columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = []
    for block in blocks(rows, facts):
        head, body = block.header, [line.texts for line in block.lines]
        widths = [_width(head, body, i) + 1 for i in range(len(head))]  # 1: more room between them
        for part in _parts(widths, _LEAD, width):
            table = Table(title=block.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            for index in part:
                table.add_column(head[index], justify="left" if index == 0 else "right", no_wrap=True)
            for position, line in enumerate(block.lines):
                bold = _bold(line)
                texts = [Text(line.texts[i], style="bold" if i in bold else "") for i in part]
                style = "dim" if line.is_reference else None
                table.add_row(*texts, style=style, end_section=block.ends_references(position))
            found.append(table)
        for detail in block.short:
            table = Table(*detail.header, title=detail.title, title_justify="left", box=box.SIMPLE_HEAD)
            for texts_of_row in detail.lines:
                table.add_row(*texts_of_row)
            found.append(table)
    if found:
        found[-1].caption = "\n".join([*caption(rows, facts), BOLD, *notes(rows)])
        found[-1].caption_justify = "left"
    return found


def _bold(line: Line) -> set[int]:
    """Indices of the best numbers among a line's texts."""
    return {_LEAD + i for i, cell in enumerate(line.cells) if cell.is_best}


def plain(rows: Sequence[Row], facts: Facts) -> str:
    """The report as aligned text for a pipe or a log, without colour or width limit."""
    lines = [*([facts.doubt, ""] if facts.doubt else []), facts.name]
    for block in blocks(rows, facts):
        lines += ["", block.title, text_table(block.header, [line.texts for line in block.lines])]
        for detail in block.short:
            lines += ["", f"{detail.title}:", text_table(detail.header, detail.lines)]
    return "\n".join([*lines, "", *caption(rows, facts), *notes(rows)]) + "\n"


def markdown(rows: Sequence[Row], facts: Facts) -> str:
    """The report as GitHub-flavoured Markdown: tables with the best values in bold, then the caption as a list."""
    lines = [f"# {facts.name}"]
    for text in (facts.doubt, facts.about):
        lines += ["", text] if text else []
    for block in blocks(rows, facts):
        lines += ["", f"## {block.title}", "", *markdown_table(block.header, [strong(line) for line in block.lines])]
        for detail in block.details:
            lines += ["", f"{detail.title}:", "", *markdown_table(detail.header, detail.lines)]
    lines += ["", *(f"- {line}" for line in [*caption(rows, facts), BOLD, *notes(rows)])]
    if params(rows):
        lines += ["", "Hyperparameters:", "", *(f"- {where}: {text}" for where, text in params(rows))]
    if facts.settings:
        lines += ["", "Settings that the paper leaves open:", ""]
        lines += [f"- {name}: {value}" for name, value in facts.settings.items()]
    return "\n".join(lines) + "\n"


def strong(line: Line) -> list[str]:
    """A line's texts for Markdown, with its best numbers in bold."""
    bold = _bold(line)
    return [f"**{text}**" if i in bold else text for i, text in enumerate(line.texts)]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of one Markdown table."""

    def joined(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return [joined(head), "|" + ":--|" + "--:|" * (len(head) - 1), *map(joined, body)]


def latex(rows: Sequence[Row], facts: Facts) -> str:
    """A LaTeX `table` for each model and task, for a paper (needs booktabs). The caption's lines are comments."""
    made = [f"% {line}" for line in [facts.name, *([facts.doubt] if facts.doubt else []), *caption(rows, facts), BOLD]]
    for block in blocks(rows, facts):
        made += ["", r"\begin{table}", r"\centering", rf"\caption{{{_tex(f'{facts.name}: {block.title}')}}}"]
        made += [rf"\begin{{tabular}}{{l{'r' * (len(block.header) - 1)}}}", r"\toprule"]
        made += [_tex_line(block.header), r"\midrule"]
        for position, line in enumerate(block.lines):
            bold = _bold(line)
            made.append(_tex_line(line.texts, bold))
            made += [r"\midrule"] if block.ends_references(position) else []
        made += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(made) + "\n"


def _tex_line(texts: Sequence[str], bold: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    parts = [rf"\textbf{{{_tex(text)}}}" if i in bold else _tex(text) for i, text in enumerate(texts)]
    return " & ".join(parts) + r" \\"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


_CSV = (
    *("model", "task", "poison", "method", "metric", "value", "low", "high", "unit", "better", "num", "unparsed"),
    *("seeds", "marks"),
)


def to_csv(rows: Sequence[Row], facts: Facts) -> str:
    """CSV with one line for every metric of every row, also those below the main table.

    Shares are fractions. References have no poison ratio.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, lineterminator="\n")
    writer.writeheader()
    for block in blocks(rows, facts):
        for line in block.lines:
            who = {"model": block.model, "task": block.task, "poison": line.poison, "method": line.method}
            for metric in metrics.ordered(line.row["metrics"]):
                found = line.row["metrics"][metric.name]
                told = {key: found.get(key) for key in ("value", "low", "high", "num", "unparsed")}
                unit = "fraction" if metric.unit == "%" else metric.unit
                more = {"seeds": " ".join(map(str, line.row["seeds"])), "marks": marks(line.row, metric.name)}
                writer.writerow({**who, "metric": metric.name, **told, "unit": unit, "better": metric.better, **more})
    return text.getvalue()


def to_json(rows: Sequence[Row], facts: Facts) -> str:
    """All facts and rows as JSON for other programs, shares as fractions. Raises ValueError for a NaN."""
    content = {"facts": asdict(facts), "caption": caption(rows, facts), "rows": [dict(row) for row in rows]}
    return json.dumps(content, indent=2, allow_nan=False, default=dict) + "\n"


# What `safecl report --format` takes.
FORMS: Mapping[str, Callable[[Sequence[Row], Facts], str]] = {
    "table": plain, "markdown": markdown, "latex": latex, "csv": to_csv, "json": to_json,
}  # fmt: skip


def text_table(head: Sequence[str], body: Sequence[Sequence[str]], width: int | None = None, lead: int = 1) -> str:
    """A table as aligned text, with numbers at the right.

    No text is cut. If the table is wider than `width` characters (None: no limit), the widest column of words is wrapped. If
    that is not enough, the table is split into blocks of columns, each with the first `lead` columns.
    """
    body = [[*line, *[""] * (len(head) - len(line))] for line in body]
    widths = [_width(head, body, i) for i in range(len(head))]
    words = [i for i in range(len(head)) if any(cell[:1] not in "0123456789-<" for cell in (line[i] for line in body))]
    if width is not None and (longest := max((widths[i], i) for i in words)[1] if words else None) is not None:
        over = sum(widths) + 2 * (len(widths) - 1) - width
        widths[longest] = max(widths[longest] - max(over, 0), min(widths[longest], 20))
    parts = []
    for part in _parts(widths, lead, width):
        rule = ["-" * widths[i] for i in part]
        lines = [_aligned([head[i] for i in part], widths, part, words), "  ".join(rule)]
        parts.append("\n".join([*lines, *(_aligned([line[i] for i in part], widths, part, words) for line in body)]))
    return "\n\n".join(parts)


def _aligned(line: Sequence[str], widths: Sequence[int], part: Sequence[int], words: Sequence[int]) -> str:
    """One line of a table as text. It takes several lines of text if a cell is wrapped."""
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
    """Indices of columns in groups that fit into `width`, with two spaces between columns. Each group has the first `lead`
    columns."""
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
