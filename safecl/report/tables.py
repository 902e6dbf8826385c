"""Tables of a report: one `Block` for each model and task, built once. `forms` prints it as text, `page` as HTML.

A row is a dict that `report/rows.py` reads from the store:
`{"model", "task", "poison": 0.1, "method", "params": {..}, "seeds": [0], "metrics": {name: {"value", "low", "high",
"num", "unparsed", "seeds", "sets", "pooled", "why"}}, "contrasts": {name: {"sft": .., "best": .., "mcnemar": ..}},
"agreement": {"num", "agree", "kappa", "skipped"}, "seconds": float, "note": str}`. A metric that is absent or null is printed
as `-`. The last four keys of a metric, the contrasts and the agreement may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import metrics
from safecl.graph import REFERENCES

if TYPE_CHECKING:
    from safecl.metrics import Metric
    from safecl.report.published import Beside

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Detail:
    """A smaller table below a block of the main table. `lines` are cells as text, method and poison first."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    in_every_form: bool = False  # shown also on a terminal and in plain text, which leave other details out
    of_judges: bool = False  # it says how good judges are, or how they agree
    metrics: Sequence[Metric] = ()  # of the columns after method and poison, for links to the answers


@dataclass(frozen=True)
class Facts:
    """Facts that a reader needs to understand the numbers. `facts.facts` fills it, and every form of the report prints it."""

    name: str  # name of the sweep
    about: str = ""
    doubt: str = ""  # a warning to read before any number
    judges: Mapping[str, str] = field(default_factory=dict)  # the deciding judge, by question
    adapter: str = "continue"
    templates: Mapping[str, str] = field(default_factory=dict)  # template of each model, in one line
    num_prompts: Mapping[str, int] = field(default_factory=dict)  # number of test prompts, by kind
    guard_agreement: str = ""  # one line: how often the judge agreed with known labels and with a rule
    settings: Mapping[str, str] = field(default_factory=dict)  # what the paper leaves open, and what was used
    notes: Sequence[str] = ()  # other notes, one line each (mixed library versions, missing cells)
    beside: Mapping[str, Detail] = field(default_factory=dict)  # tables of published numbers, by `model / task`
    published: Sequence[Beside] = ()  # the same published numbers, each with our number
    labelled: Mapping[str, Sequence[Detail]] = field(
        default_factory=dict
    )  # rates corrected by labels, by `model / task`


class Column(NamedTuple):
    """A metric column of a table with its header."""

    header: str
    metric: Metric


@dataclass(frozen=True)
class Cell:
    """One number of the main table with its interval: a fraction, or in the metric's own unit. None if not measured."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "%"
    marks: str = ""  # marks of its contrasts, see `marks`
    is_best: bool = False
    published: Sequence[Beside] = ()

    @property
    def number(self) -> str:
        return number({"value": self.value, "low": self.low, "high": self.high}, self.unit)

    @property
    def text(self) -> str:
        return f"{self.number} {self.marks}".rstrip()


@dataclass(frozen=True)
class Line:
    """One row of a block. `cells` are in the order of the block's columns."""

    row: Row
    cells: Sequence[Cell]

    @property
    def is_reference(self) -> bool:
        return self.row["method"] in REFERENCES

    @property
    def method(self) -> str:
        return str(self.row["method"])

    @property
    def poison(self) -> float | None:
        """The poison ratio, in [0, 1]. None for a reference (base, aligned), which belongs to every ratio."""
        return None if self.is_reference or self.row.get("poison") is None else float(self.row["poison"])

    @property
    def texts(self) -> list[str]:
        """The cells as text: method, poison, one metric a column with its marks, and wall time."""
        return [*lead(self.row), *(cell.text for cell in self.cells), duration(self.row.get("seconds"))]


@dataclass(frozen=True)
class Block:
    """The table of one model and task, with the smaller tables below it (`details`)."""

    model: str
    task: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    details: Sequence[Detail]

    @property
    def title(self) -> str:
        return f"{self.model} / {self.task}"

    @property
    def header(self) -> list[str]:
        return ["method", "poison", *(column.header for column in self.columns), "time"]

    @property
    def short(self) -> list[Detail]:
        """The smaller tables that every form shows."""
        return [detail for detail in self.details if detail.in_every_form]

    def ends_references(self, position: int) -> bool:
        """Whether the line at this position is the last reference before the first method."""
        following = self.lines[position + 1 : position + 2]
        return self.lines[position].is_reference and any(not line.is_reference for line in following)


def blocks(rows: Sequence[Row], facts: Facts) -> list[Block]:
    """The tables of a report: one block for each model and task, in the order of `rows`. All have the same columns."""
    shown = columns(rows, facts)
    return [
        Block(model, task, shown, _lines(members, shown, facts), details(members, rows, facts))
        for (model, task), members in groups(rows).items()
    ]


def _lines(members: Sequence[Row], shown: Sequence[Column], facts: Facts) -> list[Line]:
    tops = [best(members, column) for column in shown]
    return [
        Line(row, [_cell(row, column, position in top, facts) for column, top in zip(shown, tops, strict=True)])
        for position, row in enumerate(members)
    ]


def _cell(row: Row, column: Column, is_best: bool, facts: Facts) -> Cell:
    found, name = row["metrics"].get(column.metric.name) or {}, column.metric.name
    ends = (found.get("value"), found.get("low"), found.get("high"))
    which = (row["model"], row["task"], row.get("poison"), row["method"], name)
    theirs = [n for n in facts.published if (n.model, n.task, n.poison, n.method, n.metric) == which]
    return Cell(*ends, column.metric.unit, marks(row, name), is_best, theirs)


def columns(rows: Sequence[Row], facts: Facts) -> list[Column]:
    """Metric columns of the main table, in reading order.

    A metric that no row has is left out, unless it is always shown. A variant of another metric has a column only if the two
    differ in some row. Further metrics of the answers to utility prompts have columns only if there are at most `_MAX_SIDE`
    of them. The other metrics are in `details`.
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
    return Column(metric.header(facts.judges), metric)


def _value(row: Row, metric: str) -> float | None:
    value = row["metrics"].get(metric, {}).get("value")
    return None if value is None else float(value)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows grouped by (model, task), in the order of `rows`."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row["model"]), str(row["task"])), []).append(row)
    return found


def _number(row: Row, column: Column) -> str:
    return number(row["metrics"].get(column.metric.name), column.metric.unit)


def lead(row: Row) -> list[str]:
    """Method and poison as text, the first two cells of every line."""
    poison = "-" if row.get("poison") is None or row["method"] in REFERENCES else f"{100 * row['poison']:g} %"
    return [str(row["method"]), poison]


def number(metric: Mapping[str, Any] | None, unit: str = "%") -> str:
    """A metric as text, such as `12.3 [8.1, 17.0]`: a fraction is printed in percent, another unit as it is.

    Without an interval only the value is printed, and without a value `-`.
    """
    if metric is None or metric.get("value") is None:
        return "-"
    texts = [f"{100 * x:.1f}" if unit == "%" else f"{x:.3f}" for x in _bounds(metric)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]


def _bounds(metric: Mapping[str, Any]) -> list[float]:
    known = [metric["value"], metric.get("low"), metric.get("high")]
    return known[:1] if None in known else known


def duration(seconds: float | None) -> str:
    """Seconds as text: `83` -> `1 min 23 s`. `-` for None."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def marks(row: Row, metric: str) -> str:
    """The marks of one cell's contrasts. "a": differs from sft; "b": differs from the best method; "=a", "=b": alike. "" if
    neither was shown."""
    found, shown = row.get("contrasts", {}).get(metric, {}), []
    for family, letter in (("sft", "a"), ("best", "b")):
        contrast = found.get(family)
        shown += [letter] if contrast and contrast["differs"] else []
        shown += [f"={letter}"] if contrast and contrast["alike"] else []
    return " ".join(shown)


def best(rows: Sequence[Row], column: Column) -> set[int]:
    """Indices of the rows of one group that are best in a column among the rows of the same poison ratio.

    References are not compared. It is used only for emphasis. If all rows of a ratio are equal, none is emphasised.
    """
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


def details(members: Sequence[Row], rows: Sequence[Row], facts: Facts) -> list[Detail]:
    """The smaller tables below the table of one model and task.

    They are: other metrics, shares by set, kinds of degenerate answers, agreement of judges, contrasts, fronts of searches,
    rates corrected by labels, and published numbers. `members` are the rows of this table, `rows` those of the whole report.
    """
    main = columns(rows, facts)
    named = metrics.ordered(name for row in members for name in row["metrics"])
    shown_not = [_column(metric, facts) for metric in named if metric.shown != "nowhere"]
    side = [column for column in shown_not if column not in main]
    lines = [[*lead(row), *(_number(row, column) for column in side)] for row in members]
    header = ["method", "poison", *(column.header for column in side)]
    found = [Detail("Also measured", header, lines, metrics=[column.metric for column in side])]
    for metric in named:
        found += _by_set(members, metric) if metric.has_sets else []
        found += _by_kind(members, metric) if metric.has_kinds else []
    found += _judges(members, facts)
    shown = [column for column in main if column.metric.margin]
    for family, against in (("sft", "sft"), ("best", "the best method")):
        texts = [[*lead(row), *(_difference(row, c.metric.name, family) for c in shown)] for row in members]
        tested = [line for line in texts if any(text != "-" for text in line[2:])]
        title = (
            f"Difference from {against}, in points, with its own 95 % interval; p (differs) and p= (alike) after Holm"
        )
        found.append(Detail(title, ["method", "poison", *(c.header for c in shown)], tested))
    found += _fronts(members)
    where = f"{members[0]['model']} / {members[0]['task']}"
    found += [*facts.labelled.get(where, ()), *([facts.beside[where]] if where in facts.beside else [])]
    return [detail for detail in found if len(detail.header) > 2 and detail.lines]


def _fronts(members: Sequence[Row]) -> list[Detail]:
    """A table of the Pareto front of each search with several objectives. Each search has one table, even if several of its
    trials are rows."""
    found, told = [], set[str]()
    for row in members:
        search = row.get("search") or {}
        name = f"{row['method'].partition(' #')[0]}, {lead(row)[1]} poison"
        if "objectives" not in search or name in told:
            continue
        told.add(name)
        shown, lines = [metrics.of(objective) for objective in search["objectives"]], []
        for trial in sorted((t for t in search["tried"] if t["is_front"]), key=lambda t: -t["values"][shown[0].name]):
            values = [number({"value": trial["values"][metric.name]}, metric.unit) for metric in shown]
            params = ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial["params"].items()
            )
            lines.append([f"trial {trial['number']}", params, *values])
        num_within = sum(trial["feasible"] for trial in search["tried"])
        volume = "" if search["hypervolume"] is None else f"; hypervolume {search['hypervolume']:.3f} of 1"
        title = (
            f"Front of the search of {name}, on its validation prompts and seed: no claim about other prompts. "
            f"{num_within} of {len(search['tried'])} trials within the bounds{volume}"
        )
        found.append(Detail(title, ["trial", "values", *(metric.title for metric in shown)], lines))
    return found


def _by_set(members: Sequence[Row], metric: Metric) -> list[Detail]:
    """A table of each set's share. Empty if no row has several sets."""
    sets, lines = _names(members, metric.name, "sets"), []
    for row in members:
        of_row = row["metrics"].get(metric.name, {})
        parts = [of_row.get("sets", {}).get(name) for name in sets]
        lines.append([*lead(row), *map(number, parts), number(of_row), number(of_row.get("pooled"))])
    head = [name.rpartition("/")[2] for name in sets]
    title = f"{metric.title} by set: the mean over sets, as above, and all prompts pooled"
    header = ["method", "poison", *head, "mean", "pooled"]
    return [Detail(title, header, lines, metrics=[metric] * len(header[2:]))] if sets else []


def _by_kind(members: Sequence[Row], metric: Metric) -> list[Detail]:
    whys, lines = _names(members, metric.name, "why"), []
    for row in members:
        of_row = row["metrics"].get(metric.name, {})
        counts = [str(of_row.get("why", {}).get(why, 0)) if of_row else "-" for why in whys]
        lines.append([*lead(row), *counts, str(of_row.get("num", "-"))])
    title = f"{capital(metric.title)} answers by kind, counted"
    header = ["method", "poison", *whys, "of answers"]
    return [Detail(title, header, lines, metrics=[metric] * len(header[2:]))] if whys else []


def _judges(members: Sequence[Row], facts: Facts) -> list[Detail]:
    """Tables of how the judges of a question agree on the same answers, and of the judge of harm with the keyword list."""
    found = []
    harm, listed = metrics.plane()[0], metrics.of("non_refusal").judge
    decides, beside = facts.judges.get(harm.question, ""), _beside(members)
    if decides != listed and f"{harm.name}:{listed}" not in beside:
        title = (
            f"Two judges on the same attack answers, {decides} and {listed}: share agreed, Cohen's kappa (0: chance)"
        )
        lines = [[*lead(row), *_agreed(each)] for row in members if (each := row.get("agreement"))]
        found.append(Detail(title, ["method", "poison", "agree", "kappa", "answers"], lines, of_judges=True))
    for name in beside:
        question, _, label = name.partition(":")
        lines = []
        for row in members:
            if (each := row.get("beside", {}).get(name)) is not None:
                lines.append([*lead(row), number(row["metrics"].get(name)), *_agreed(each)])
        header = _column(metrics.of(question), facts).header
        title = (
            f"{header} and beside it {label}, on the same answers: its share, share agreed, Cohen's kappa (0: chance)"
        )
        head = ["method", "poison", label, "agree", "kappa", "answers"]
        found.append(Detail(title, head, lines, of_judges=True, metrics=[metrics.of(name)]))
    return found


def _names(members: Sequence[Row], metric: str, key: str) -> list[str]:
    return list(dict.fromkeys(name for row in members for name in row["metrics"].get(metric, {}).get(key, {})))


def _beside(members: Sequence[Row]) -> list[str]:
    """Metrics of further judges, which do not decide."""
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


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
