"""A report as one self-contained HTML page: results, facts, every setting, and the answers behind every number.

`page.html` is a jinja2 template that includes `page.css` and `page.js`. Vega-Lite's code comes from the wheel
vl-convert-python, so the page needs no server. The answers of a large sweep are in the folder `answers/` next to the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safecl import metrics
from safecl.report import charts
from safecl.report.answers import INLINE
from safecl.report.caption import BOLD, caption, notes, params
from safecl.report.charts import Chart
from safecl.report.tables import Block, Cell, Detail, Facts, Line, Row, blocks

HERE = Path(__file__).parent


@dataclass
class More:
    """What a page shows in addition to tables, read from the store (searches.py, costs.py, rows.curves, answers.py)."""

    searches: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    costs: Mapping[str, Any] = field(default_factory=dict)
    methodology: Sequence[str] = ()
    chunks: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]] = ()


def html(rows: Sequence[Row], facts: Facts, more: More | None = None, answers: Path | None = None) -> str:
    """The whole page as HTML. `answers` is the folder for the answers if they are many; None: all are put into the page."""
    more, found = more or More(), blocks(rows, facts)
    index, inline = _kept(more.chunks, answers)
    parts = _sections(rows, facts, found, more)
    specs = [chart.spec for _, _, shown in parts for chart in shown]
    text: str = template("page.html").render(
        facts=facts,
        blocks=found,
        overviews=_overviews(found),
        sections=parts,
        num_searches=len(more.searches),
        harm=metrics.plane()[0],
        titles={metric.question: metric.title for metric in metrics.METRICS if metric.question},
        lines=[*caption(rows, facts), BOLD, *notes(rows)],
        params=params(rows),
        costs=more.costs,
        methodology=more.methodology,
        num_rows=len(rows),
        has_answers=bool(index),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        vega=_vega() if specs else "",
        specs=embedded(specs),
        index=embedded({"chunks": index, "metrics": _told(facts, rows)}),
        inline=[embedded(chunk) for chunk in inline],
        link=lambda block, line, metric: _link(block, line, metric, index),
        hrefs=lambda block, detail: [_hrefs(block, detail, texts, index) for texts in detail.lines],
        sort=_sorted_by,
    )
    return text


def write(path: Path, rows: Sequence[Row], facts: Facts, more: More | None = None) -> Path:
    """Write the page, and if the answers are many, write them to the folder `answers` next to it. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(rows, facts, more, path.parent / "answers"), encoding="utf-8")
    return path


def _sections(
    rows: Sequence[Row], facts: Facts, found: Sequence[Block], more: More
) -> list[tuple[str, str, list[Chart]]]:
    """(id, heading, charts) of each section. Sections without charts are left out."""
    parts = [
        ("front", "Safety against usefulness", charts.front(rows, facts)),
        ("poison", "ASR by poison ratio", charts.by_setting(rows, facts, "poison", "poison, % of the task's rows")),
        ("memory", "ASR by memory size", charts.by_setting(rows, facts, "memory", "safety rows kept")),
        ("metrics", "Every metric", charts.dots(found)),
    ]
    parts.append(("fronts", "What searches could have", charts.fronts(rows)))
    for number, each in enumerate(more.searches):
        parts.append((f"search-{number}", f"Search: {each['label']}", charts.search(each)))
    parts.append(("curves", "Training curves", charts.curves(more.curves)))
    parts.append(("cost", "Cost", charts.cost(more.costs) if more.costs else []))
    return [part for part in parts if part[2]]


def _overviews(found: Sequence[Block]) -> list[dict[str, Any]]:
    """Tables as in the paper, for each model with several tasks: one line for each method and poison ratio, with harm and
    usefulness on each task."""
    plane, made = metrics.plane(), []
    for model in dict.fromkeys(block.model for block in found):
        own = [block for block in found if block.model == model]
        if len(own) < 2:
            continue
        lines: dict[tuple[str, float | None], dict[str, tuple[Block, Line, list[tuple[metrics.Metric, Cell]]]]] = {}
        for block in own:
            for line in block.lines:
                every = zip(block.columns, line.cells, strict=True)
                cells = [(column.metric, cell) for column, cell in every if column.metric in plane]
                lines.setdefault((line.method, line.poison), {})[block.task] = (block, line, cells)
        headers = [column.header for column in own[0].columns if column.metric in plane]
        made.append({"model": model, "tasks": [block.task for block in own], "headers": headers, "lines": lines})
    return made


def _told(facts: Facts, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Facts of each metric for the view of answers: its name, which direction is better, whether it measures harm, its unit."""
    harm = metrics.plane()[0]
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {
        metric.name: {
            "title": metric.header(facts.judges),
            "better": metric.better,
            "harm": metric.name == harm.name or metric.name.startswith(f"{harm.name}:"),
            "unit": metric.unit,
        }
        for metric in metrics.ordered(names)
        if metric.shown != "nowhere"
    }


def _kept(
    chunks: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], folder: Path | None
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """An index entry for each chunk, and the chunks to put into the page.

    All chunks are put into the page, unless they are larger than INLINE and `folder` is given. Then none is, and each entry
    names the chunk's file.
    """
    index: list[dict[str, Any]] = []
    waiting: list[Mapping[str, Any]] = []
    size = 0
    if folder is not None and folder.is_dir():  # files of an earlier report
        for file in folder.glob("*.json"):
            file.unlink()

    def put(number: int, chunk: Mapping[str, Any]) -> None:
        assert folder is not None
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.json").write_text(embedded(chunk), encoding="utf-8")
        index[number]["file"] = f"{folder.name}/{number}.json"

    for number, (where, chunk) in enumerate(chunks):
        index.append({**where, "methods": chunk["methods"], "num": len(chunk["prompts"])})
        if folder is not None and size > INLINE:
            put(number, chunk)
            continue
        waiting.append(chunk)
        size += len(embedded(chunk))
        if folder is not None and size > INLINE:
            for place, each in enumerate(waiting):
                put(place, each)
            waiting = []
    return index, waiting


def _link(block: Block, line: Line, metric: metrics.Metric, index: Sequence[Mapping[str, Any]]) -> str:
    """Link to the answers behind a number. "" if there are none."""
    for number, chunk in enumerate(index):
        at = line.poison is None or chunk["poison"] == line.poison
        role = str(chunk["set"]).partition("/")[0]
        same = (chunk["model"], chunk["task"]) == (block.model, block.task) and line.method in chunk["methods"]
        if same and at and (not metric.roles or role in metric.roles):
            return f"#answers?c={number}&m={line.method}&k={metric.name}"
    return ""


def _hrefs(block: Block, detail: Detail, texts: Sequence[str], index: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Links to the answers behind the numbers in a line of a smaller table, by column."""
    of = next((line for line in block.lines if line.texts[:2] == [*texts[:2]]), None)
    return {} if of is None else {i: _link(block, of, metric, index) for i, metric in enumerate(detail.metrics, 2)}


def _sorted_by(cell: Cell) -> str:
    return "" if cell.value is None else f"{cell.value:.6g}"


def embedded(value: Any) -> str:
    """A value as JSON that is safe inside a `script` element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=dict)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _vega() -> str:
    """The JavaScript code of Vega, Vega-Lite and Vega-Embed."""
    import vl_convert

    found: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return found.replace("</script", "<\\/script")


@cache
def _templates() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(HERE)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def template(name: str) -> Any:
    """A jinja2 template of this folder. Values are escaped."""
    return _templates().get_template(name)
