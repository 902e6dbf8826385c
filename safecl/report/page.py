"""One self-contained HTML page: what came out, what it rests on, every setting. No script, no link, no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from safecl.report.caption import BOLD, caption, notes, params
from safecl.report.tables import Block, Detail, Facts, Row, blocks

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #24292f; background: #f6f7f9;
       margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 28px 60px; }
h1 { font-size: 27px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
.doubt { background: #fff1e5; border: 1px solid #f0b37e; border-radius: 8px; padding: 10px 14px; font-weight: 600; }
.about { color: #57606a; margin: 0 0 24px; max-width: 80ch; }
section, figure { background: #fff; border: 1px solid #e1e4e8; border-radius: 10px; padding: 6px 18px 16px;
                  margin: 0 0 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-size: 12.5px; font-weight: 600; color: #57606a; text-align: right; vertical-align: bottom; padding: 8px 10px;
     border-bottom: 2px solid #d0d7de; }
td { text-align: right; padding: 7px 10px; border-bottom: 1px solid #eceef1; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
td:first-child { font-weight: 600; }
td small { color: #6e7781; font-size: 12px; }
tr.reference td { color: #6e7781; } tr.reference td:first-child { font-weight: 400; }
tr.last td { border-bottom: 2px solid #d0d7de; }
td.best b { background: #e2f3e8; border-radius: 4px; padding: 1px 5px; }
details { margin-top: 10px; } summary { color: #57606a; font-size: 13.5px; cursor: pointer; }
ul { padding-left: 20px; margin: 10px 0 0; } li { margin: 3px 0; }
ul.caption { color: #57606a; font-size: 13.5px; }
code { font: 12.5px/1.5 ui-monospace, "SFMono-Regular", Menlo, monospace; overflow-wrap: anywhere; }
table.settings td { text-align: left; white-space: normal; vertical-align: top; font-weight: 400; }
table.settings td:first-child { width: 30%; font-weight: 600; }
figure { padding: 16px 18px; } figure img { max-width: 100%; display: block; margin: 0 auto; }
figcaption { color: #57606a; font-size: 13.5px; margin-top: 10px; }
"""


class Figure(NamedTuple):
    """A PNG file with its title and one line below it."""

    title: str
    caption: str
    path: Path


def html(rows: Sequence[Row], facts: Facts, figures: Sequence[Figure] = ()) -> str:
    """The whole page as text; figures go in as data URIs."""
    parts = [f"<h1>{escape(facts.name)}</h1>"]
    if facts.doubt:
        parts.append(f'<p class="doubt">{escape(facts.doubt)}</p>')
    if facts.about:
        parts.append(f'<p class="about">{escape(facts.about)}</p>')
    for block in blocks(rows, facts):
        parts.append(f"<section><h3>{escape(block.title)}</h3>{_table(block)}")
        parts += [_detail(detail) for detail in block.details]
        parts.append("</section>")
    lines = [*caption(rows, facts), BOLD, *notes(rows)]
    parts.append('<section><h3>How to read it</h3><ul class="caption">')
    parts.extend(f"<li>{escape(line)}</li>" for line in lines)
    parts.append("</ul></section>")
    if figures:
        parts.append("<h2>Figures</h2>")
        parts.extend(_figure(figure) for figure in figures)
    if params(rows):
        parts += ["<h2>Hyperparameters</h2><section>", _settings(params(rows)), "</section>"]
    if facts.settings:
        parts += ["<h2>Settings that the paper leaves open</h2><section>", _settings(list(facts.settings.items()))]
        parts.append("</section>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(facts.name)}</title>'
    )
    body = "\n".join(parts)
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>'
    return f"{top}\n<body><main>\n{body}\n</main></body></html>\n"


def write(path: Path, rows: Sequence[Row], facts: Facts, figures: Sequence[Figure] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(rows, facts, figures), encoding="utf-8")
    return path


def _table(block: Block) -> str:
    lines = ['<div class="wide"><table><thead><tr>']
    lines += [f"<th>{escape(name)}</th>" for name in block.header]
    lines.append("</tr></thead><tbody>")
    for position, line in enumerate(block.lines):
        kinds = " ".join(
            name for name, on in (("reference", line.is_reference), ("last", block.ends_references(position))) if on
        )
        lines.append(f'<tr class="{kinds}">' if kinds else "<tr>")
        best = {2 + i for i, cell in enumerate(line.cells) if cell.is_best}
        for index, text in enumerate(line.texts):
            value, bracket, rest = text.partition(" [")
            interval, _, marks = rest.partition("]")
            shown_value = f"<b>{escape(value)}</b>" if index in best else escape(value)
            small = f" <small>[{escape(interval)}]</small>{escape(marks)}" if bracket else ""
            lines.append(
                f'<td class="best">{shown_value}{small}</td>' if index in best else f"<td>{shown_value}{small}</td>"
            )
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _detail(detail: Detail) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in detail.header)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in detail.lines)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{escape(detail.title)}</summary>{table}</details>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    title, text = escape(figure.title), escape(figure.caption)
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption><b>{title}.</b> {text}</figcaption></figure>"


def _settings(pairs: Sequence[tuple[str, str]]) -> str:
    lines = [f"<tr><td>{escape(name)}</td><td><code>{escape(str(value))}</code></td></tr>" for name, value in pairs]
    return f'<div class="wide"><table class="settings"><tbody>{"".join(lines)}</tbody></table></div>'
