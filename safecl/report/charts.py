"""Charts of a page as Vega-Lite specifications: plain dicts that the page draws. Shares are in percent, as in the tables.

Text and grid have the page's own colour (`currentColor`), so that one drawing works in light mode, dark mode and print. A
method has the same colour and shape in every chart; base and aligned are grey. 8 colours that colour-blind readers can
distinguish and 8 shapes give a different pair to each of 64 methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from safecl import metrics
from safecl.graph import REFERENCES
from safecl.objective import hypervolume, pareto_front
from safecl.report.tables import Block, Facts, Row, groups

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # identifies the language; nothing is downloaded
# The palette of Okabe and Ito, with two other colours at the end.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#9A6324", "#7A4B94")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
_GREY = "#8A8F98"
_POINTS = 40  # points of a training curve; more cannot be distinguished at its width


class Chart(NamedTuple):
    """A chart with its title and a caption of one line."""

    title: str
    caption: str
    spec: dict[str, Any]


Spec = dict[str, Any]


def scales(methods: Sequence[str]) -> dict[str, Spec]:
    """Vega-Lite encodings of colour and shape by method. They are the same in every chart."""
    own = [method for method in methods if method not in REFERENCES]
    colour = {method: _COLOURS[i % 8] for i, method in enumerate(own)}
    shape = {method: _SHAPES[(i + i // 8) % 8] for i, method in enumerate(own)}
    colour |= dict.fromkeys(REFERENCES, _GREY)
    shape |= {"base": "square", "aligned": "diamond"}
    domain = [method for method in methods if method in colour]
    legend = {"title": None, "orient": "bottom", "columns": 6, "symbolLimit": 0}
    return {
        "color": {
            "field": "method",
            "type": "nominal",
            "scale": {"domain": domain, "range": [colour[method] for method in domain]},
            "legend": legend,
        },
        "shape": {
            "field": "method",
            "type": "nominal",
            "scale": {"domain": domain, "range": [shape[method] for method in domain]},
            "legend": legend,
        },
    }


def methods_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["method"]) for row in rows))


def _chart(data: Sequence[Mapping[str, Any]], **spec: Any) -> Spec:
    fit = {"type": "fit-x", "contains": "padding"}
    return {"$schema": SCHEMA, "data": {"values": list(data)}, "width": "container", "autosize": fit, **spec}


def _ends(row: Row, name: str, key: str) -> dict[str, Any] | None:
    """A metric's value and interval in percent, under `key`, `key_low` and `key_high`. None without a value."""
    found = row["metrics"].get(name)
    if found is None or found.get("value") is None:
        return None
    value = 100 * float(found["value"])
    low, high = (value if found.get(end) is None else 100 * float(found[end]) for end in ("low", "high"))
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def front(rows: Sequence[Row], facts: Facts) -> list[Chart]:
    """Charts of harm against usefulness, one for each model, task and poison ratio.

    They show intervals, the Pareto front and its hypervolume. A hollow mark is the stricter measure of harm (coherent ASR),
    drawn if it differs.
    """
    harm, use = metrics.plane()
    strict = next((m.name for m in metrics.METRICS if m.where_differ == (harm.name, m.name)), "")
    encoding, charts = scales(methods_of(rows)), []
    for (model, task), ratios in panels(rows).items():
        for ratio, members in ratios.items():
            points = []
            for row in members:
                x, y = _ends(row, harm.name, "x"), _ends(row, use.name, "y")
                if x is not None and y is not None:
                    less = _ends(row, strict, "strict") or {"strict": x["x"]}
                    points.append({"method": str(row["method"]), **x, **y, "strict": less["strict"]})
            if points:
                volume, seeds = _volume(members)
                title = f"{model} / {task}, {100 * ratio:g} % poison"
                caption = f"Left and up is better. Hypervolume of the methods: {volume}{seeds}"
                charts.append(Chart(title, caption, _front(points, harm.header(facts.judges), use.title, encoding)))
    return charts


def panels(rows: Sequence[Row]) -> dict[tuple[str, str], dict[float, list[Row]]]:
    """Rows by (model, task), then by poison ratio. Base and aligned are in the panel of every ratio."""
    found = {}
    for key, members in groups(rows).items():
        ratios = sorted({float(r["poison"]) for r in members if r["method"] not in REFERENCES} or {0.0})
        found[key] = {
            ratio: [r for r in members if r["method"] in REFERENCES or float(r["poison"]) == ratio] for ratio in ratios
        }
    return found


def _volume(members: Sequence[Row]) -> tuple[str, str]:
    """Hypervolume as text: the share of the unit square (1 - harm, use) that the methods dominate, in [0, 1], and its mean
    with a 95 % t-interval over seeds."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    harm, use = metrics.plane()
    own = [row for row in members if row["method"] not in REFERENCES]

    def area(pairs: list[tuple[Any, Any]]) -> float:
        return hypervolume([(x, 1 - y) for x, y in pairs if x is not None and y is not None])

    whole = area([tuple(row["metrics"].get(m.name, {}).get("value") for m in (harm, use)) for row in own])
    told = f"{whole:.3f}"
    of_row = [[row["metrics"].get(m.name, {}).get("seeds", {}) for m in (harm, use)] for row in own]
    shared = set.intersection(*(set(x) & set(y) for x, y in of_row)) if of_row else set()
    if len(shared) < 2:
        return told, " (1: all useful, no harm)."
    areas = [area([(x[seed], y[seed]) for x, y in of_row]) for seed in sorted(shared)]
    half = float(stdtrit(len(areas) - 1, 0.975)) * stdev(areas) / math.sqrt(len(areas))
    low, high = max(0.0, mean(areas) - half), min(1.0, mean(areas) + half)
    return told, f"; over {len(areas)} seeds {mean(areas):.3f} [{low:.3f}, {high:.3f}] (1: all useful, no harm)."


def _axis(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _front(points: list[dict[str, Any]], harm: str, use: str, encoding: Mapping[str, Spec]) -> Spec:
    own = [point for point in points if point["method"] not in REFERENCES]
    best = [own[i] for i in pareto_front([(-point["x"], point["y"]) for point in own])]
    stairs = [{"x": x, "y": y} for x, y in sorted((point["x"], point["y"]) for point in best)]
    most = min(100.0, max(point["x_high"] for point in points) + 2)
    x = _axis("x", f"{harm}, %  (left is safer)", scale={"domain": [0, max(10.0, most)]})
    y = _axis("y", f"{use}, %  (up is more useful)", scale={"zero": False})
    tip = [{"field": "method", "type": "nominal"},
           *(_axis(name, title, format=".1f") for name, title in
             (("x", harm), ("x_low", "low"), ("x_high", "high"), ("y", use), ("y_low", "low"), ("y_high", "high")))]  # fmt: skip
    line = {"strokeWidth": 1, "opacity": 0.6}
    layers: list[Spec] = [
        {"mark": {"type": "rule", **line}, "encoding": {"x": _axis("x_low", x["title"]), "x2": {"field": "x_high"},
         "y": y, "color": encoding["color"]}},
        {"mark": {"type": "rule", **line}, "encoding": {"x": x, "y": _axis("y_low", y["title"]), "y2": {"field": "y_high"},
         "color": encoding["color"]}},
        {"transform": [{"filter": "datum.strict != datum.x"}], "mark": {"type": "rule", "strokeDash": [2, 2]},
         "encoding": {"x": _axis("strict", x["title"]), "x2": {"field": "x"}, "y": y, "color": encoding["color"]}},
        {"transform": [{"filter": "datum.strict != datum.x"}], "mark": {"type": "point", "size": 60},
         "encoding": {"x": _axis("strict", x["title"]), "y": y, **encoding}},
        {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
         "encoding": {"x": x, "y": y, **encoding, "tooltip": tip}},
        {"mark": {"type": "text", "dx": 9, "dy": -9, "align": "left", "fontSize": 11, "color": "currentColor"},
         "encoding": {"x": x, "y": y, "text": {"field": "method"}}},
    ]  # fmt: skip
    if len(stairs) > 1:
        dashed = {"type": "line", "interpolate": "step-after", "strokeDash": [5, 4], "strokeWidth": 1}
        layers.insert(
            0,
            {
                "data": {"values": stairs},
                "mark": {**dashed, "color": "currentColor"},
                "encoding": {"x": x, "y": y, "order": {"field": "x"}},
            },
        )
    return _chart(points, height=320, layer=layers)


def fronts(rows: Sequence[Row]) -> list[Chart]:
    """Charts of all trials of searches with several objectives, on validation prompts.

    There is one chart for each search and further objective, drawn against the first objective. A row of such a search has
    `search`: `{"objectives": [name, ..], "tried": [{"number", "values": {name: float}, "feasible", "is_front",
    "is_taken"}]}`. Rows from the same front share it.
    """
    charts, done = [], set[str]()
    for row in rows:
        found = row.get("search") or {}
        name = str(row["method"]).partition(" #")[0]
        where = f"{row['model']} / {row['task']}, {name}, {100 * (row.get('poison') or 0):g} % poison"
        if "objectives" not in found or where in done:
            continue
        done.add(where)
        across, *others = (metrics.of(objective) for objective in found["objectives"])
        for other in others:
            points = []
            for trial in found["tried"]:
                state = "run" if trial["is_taken"] else "front" if trial["is_front"] else "beaten"
                state = state if trial["feasible"] or trial["is_taken"] else "violates a bound"
                x, y = (trial["values"][m.name] * (100 if m.unit == "%" else 1) for m in (other, across))
                points.append({"number": trial["number"], "x": x, "y": y, "state": state})
            states = {"domain": ["run", "front", "beaten", "violates a bound"],
                      "range": [_COLOURS[2], _COLOURS[0], _GREY, _COLOURS[1]]}  # fmt: skip
            state_of: Spec = {"field": "state", "type": "nominal", "title": None, "scale": states}
            shape = {**state_of, "scale": {**states, "range": ["diamond", "circle", "square", "cross"]}}
            x_axis = _axis("x", f"{other.title}, validation", scale={"zero": False})
            y_axis = _axis("y", f"{across.title}, validation", scale={"zero": False})
            line = {"type": "line", "strokeDash": [5, 4], "strokeWidth": 1, "color": "currentColor"}
            spec = _chart(points, height=260, layer=[
                {"transform": [{"filter": "datum.state == 'run' || datum.state == 'front'"}], "mark": line,
                 "encoding": {"x": x_axis, "y": y_axis, "order": {"field": "x"}}},
                {"mark": {"type": "point", "filled": True, "size": 80},
                 "encoding": {"x": x_axis, "y": y_axis, "color": state_of, "shape": shape,
                              "tooltip": [_axis("number", "trial"), x_axis, y_axis]}},
            ])  # fmt: skip
            charts.append(Chart(where, "Each trial, on the search's own seed and validation prompts.", spec))
    return charts


def by_setting(rows: Sequence[Row], facts: Facts, key: str, title: str) -> list[Chart]:
    """Charts of harm by a number that differs between rows (`poison`, `memory`), one for each model and task with several
    values of it."""
    harm, encoding, charts = metrics.plane()[0], scales(methods_of(rows)), []
    for (model, task), members in groups(rows).items():
        points = []
        for row in members:
            at, found = row.get(key), _ends(row, harm.name, "y")
            if row["method"] not in REFERENCES and at is not None and found is not None:
                scaled = 100 * at if key == "poison" else at
                points.append(
                    {"method": str(row["method"]), "x": scaled, "poison": f"{100 * row['poison']:g} %", **found}
                )
        several = {
            method: {point["x"] for point in points if point["method"] == method} for method in methods_of(members)
        }
        if not any(len(values) > 1 for values in several.values()) and (
            key == "poison" or len({p["x"] for p in points}) < 2
        ):
            continue
        dash: Spec = {} if key == "poison" else {"strokeDash": {"field": "poison", "type": "nominal"}}
        x = _axis("x", title, scale={"zero": key == "poison"})
        y = _axis("y", f"{harm.header(facts.judges)}, %", scale={"domain": [0, 100]})
        spec = _chart(points, height=260, layer=[
            {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": {"x": x, "y": y, "color": encoding["color"], **dash}},
            {"mark": {"type": "rule", "opacity": 0.5},
             "encoding": {"x": x, "y": _axis("y_low", y["title"]), "y2": {"field": "y_high"}, "color": encoding["color"]}},
            {"mark": {"type": "point", "filled": True, "size": 70},
             "encoding": {"x": x, "y": y, **encoding, "tooltip": [{"field": "method", "type": "nominal"}, x,
                          _axis("y", "ASR", format=".1f"), {"field": "poison", "type": "nominal"}]}},
        ])  # fmt: skip
        charts.append(Chart(f"{model} / {task}", "With 95 % intervals.", spec))
    return charts


def dots(blocks: Sequence[Block]) -> list[Chart]:
    """Charts of every metric of the main table with its interval: one chart for each block, one panel for each metric."""
    charts = []
    for block in blocks:
        points = []
        for line in block.lines:
            where = line.method if line.poison is None else f"{line.method}, {100 * line.poison:g} %"
            for column, cell in zip(block.columns, line.cells, strict=True):
                if cell.value is not None and column.metric.unit == "%":
                    ends = (
                        cell.value if cell.low is None else cell.low,
                        cell.value if cell.high is None else cell.high,
                    )
                    point = {"row": where, "method": line.method, "metric": column.header, "value": 100 * cell.value}
                    points.append({**point, "low": 100 * ends[0], "high": 100 * ends[1]})
        if not points:
            continue
        order = list(dict.fromkeys(point["row"] for point in points))
        y = {"field": "row", "type": "nominal", "title": None, "sort": order}
        x = _axis("value", "%", scale={"domain": [0, 100]})
        encoding = scales(methods_of([line.row for line in block.lines]))
        hidden = {name: {**each, "legend": None} for name, each in encoding.items()}
        charts.append(Chart(block.title, "With 95 % intervals.", {
            "$schema": SCHEMA, "data": {"values": points}, "columns": 3,
            "facet": {"field": "metric", "type": "nominal", "title": None,
                      "sort": [column.header for column in block.columns]},
            "spec": {"width": 180, "height": {"step": 16}, "layer": [
                {"mark": "rule", "encoding": {"x": _axis("low", "%"), "x2": {"field": "high"}, "y": y,
                                              "color": hidden["color"]}},
                {"mark": {"type": "point", "filled": True, "size": 60}, "encoding": {"x": x, "y": y, **hidden}},
            ]},
        }))  # fmt: skip
    return charts


def curves(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Charts of training curves, one for each logged quantity.

    With many runs, each method is drawn as its median with a band of its middle half. Single runs are thin lines, and the run
    under the pointer is named.

    `runs`: `{"run": name, "method", "points": [{"step", name: float, ..}]}`.
    """
    names = list(dict.fromkeys(name for run in runs for point in run["points"] for name in point if name != "step"))
    encoding, charts = scales(list(dict.fromkeys(str(run["method"]) for run in runs))), []
    for name in names:
        points = []
        for run in runs:
            steps = max((point["step"] for point in run["points"]), default=1)
            for share, value in _thinned([(p["step"], p[name]) for p in run["points"] if _is_number(p.get(name))]):
                done = round(100 * share / steps, 1)
                points.append({"run": run["run"], "method": run["method"], "x": done, "y": float(f"{value:.4g}")})
        if not points:
            continue
        x = _axis("x", "% of training")
        y = _axis("y", name.replace("_", " "), scale={"zero": False, "nice": True})
        few = len(runs) <= 8
        layers: list[Spec] = [
            # A click on a name in the legend shows only that method.
            {"params": [{"name": "picked", "select": {"type": "point", "fields": ["method"]}, "bind": "legend"}],
             "mark": {"type": "line", "strokeWidth": 1.4 if few else 0.6},
             "encoding": {"x": x, "y": y, "detail": {"field": "run"}, "color": encoding["color"],
                          "opacity": _if_picked(0.9 if few else 0.25), "tooltip": [{"field": "run", "type": "nominal"}]}},
        ]  # fmt: skip
        if not few:
            band = [{"bin": {"step": 5, "extent": [0, 100]}, "field": "x", "as": "at"},
                    {"aggregate": [{"op": "median", "field": "y", "as": "mid"},
                                   {"op": "q1", "field": "y", "as": "low"}, {"op": "q3", "field": "y", "as": "high"}],
                     "groupby": ["at", "method"]}]  # fmt: skip
            at, mid = _axis("at", "% of training"), _axis("mid", y["title"])
            marks = [*band, {"filter": "datum.at % 20 == 0"}]
            layers += [
                {"transform": band, "mark": "area",
                 "encoding": {"x": at, "y": _axis("low", y["title"]), "y2": {"field": "high"}, "color": encoding["color"],
                              "opacity": _if_picked(0.18)}},
                {"transform": band, "mark": {"type": "line", "strokeWidth": 2},
                 "encoding": {"x": at, "y": mid, "color": encoding["color"], "opacity": _if_picked(1)}},
                {"transform": marks, "mark": {"type": "point", "filled": True, "size": 45},
                 "encoding": {"x": at, "y": mid, **encoding, "opacity": _if_picked(1)}},
            ]  # fmt: skip
        many = "thin; with marks: median of a method and its middle half. Click a name for it alone"
        told = f"{len(runs)} runs" + ("" if few else f", {many}")
        charts.append(Chart(name.replace("_", " "), told + ".", _chart(points, height=220, layer=layers)))
    return charts


def _if_picked(opacity: float) -> Spec:
    return {"condition": {"param": "picked", "value": opacity}, "value": opacity / 25}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _POINTS points: each is the mean of a stretch of points."""
    size = -(-len(points) // _POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(mean(step for step, _ in part), mean(value for _, value in part)) for part in parts]


def search(found: Mapping[str, Any]) -> list[Chart]:
    """Charts of one search: its history, the feasible region over its two most important parameters, the importance of all
    parameters, and all trials as parallel coordinates."""
    trials, space = found["trials"], found["space"]
    metric = metrics.of(found["maximise"]) if found["maximise"] in metrics.names() else None
    title = found["maximise"] if metric is None else metric.title
    states = {"domain": ["feasible", "violates a bound", "chosen"], "range": ["#0072B2", "#D55E00", "#009E73"]}
    state: Spec = {"field": "state", "type": "nominal", "title": None, "scale": states}
    shape = {**state, "scale": {**states, "range": ["circle", "cross", "diamond"]}}
    points = []
    for trial in trials:
        kind = "feasible" if trial["feasible"] else "violates a bound"
        kind = "chosen" if trial["number"] == found["chosen"] else kind
        numbers = {"number": trial["number"], "value": 100 * trial["value"], "excess": 100 * trial["excess"]}
        best = None if trial["best"] is None else 100 * trial["best"]
        points.append({**numbers, "best": best, "state": kind, **{f"p_{k}": v for k, v in trial["params"].items()}})
    tip = [_axis("number", "trial"), _axis("value", f"{title}, %", format=".1f"),
           _axis("excess", "beyond its bounds, points", format=".1f"),
           *({"field": f"p_{name}", "title": name} for name in space)]  # fmt: skip
    x = _axis("number", "trial", axis={"tickMinStep": 1, "format": "d"})
    y = _axis("value", f"{title} (validation), %", scale={"zero": False})
    mark = {"type": "point", "filled": True, "size": 60, "opacity": 0.85}
    history = _chart(points, height=220, layer=[
        {"mark": {"type": "line", "interpolate": "step-after", "color": "currentColor", "strokeDash": [5, 4]},
         "encoding": {"x": x, "y": _axis("best", y["title"])}},
        {"mark": mark, "encoding": {"x": x, "y": y, "color": state, "shape": shape, "tooltip": tip}},
    ])  # fmt: skip
    charts = [Chart("History", "Dashed: the best feasible trial so far.", history)]
    order = [*found["importance"], *(name for name in space if name not in found["importance"])]
    first, second = [*order, "", ""][:2]
    charts.append(Chart("Feasible region", f"Over {' and '.join(filter(None, (first, second)))}.", _chart(
        points, height=220, mark=mark, encoding={
            "x": _scaled(first, space), "y": _scaled(second, space) if second else y, "color": state, "shape": shape,
            "tooltip": tip}))) if first else None  # fmt: skip
    if found["importance"]:
        shares = [{"parameter": name, "share": 100 * share} for name, share in found["importance"].items()]
        charts.append(Chart("Importance", "Share of what tells good trials from others (PED-ANOVA).", _chart(
            shares, height=24 * len(shares), mark={"type": "bar", "color": _COLOURS[0]},
            encoding={"x": _axis("share", "%"), "y": {"field": "parameter", "type": "nominal", "sort": "-x", "title": None}},
        )))  # fmt: skip
    if len(space) > 1:
        charts.append(_parallel(trials, points, space, title, state))
    return charts


def _scaled(name: str, space: Mapping[str, Any]) -> Spec:
    form = space[name]
    if isinstance(form, list | tuple):
        return {"field": f"p_{name}", "type": "ordinal", "title": name}
    scale = {"type": "log", "nice": False} if form.get("log") else {"zero": False, "nice": False}
    return _axis(f"p_{name}", name, scale=scale)


def _parallel(
    trials: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    space: Mapping[str, Any],
    title: str,
    state: Spec,
) -> Chart:
    """A chart in parallel coordinates. Every axis is scaled to its own range. A choice is placed by its position in the
    list."""
    lines = []
    values = [point["value"] for point in points]
    low, high = min(values), max(values)
    for trial, point in zip(trials, points, strict=True):
        for name, form in space.items():
            at, said = _place(trial["params"][name], form), trial["params"][name]
            lines.append(
                {"number": point["number"], "state": point["state"], "axis": name, "at": at, "said": str(said)}
            )
        at = (point["value"] - low) / (high - low) if high > low else 0.5
        value = f"{point['value']:.1f} %"
        lines.append({"number": point["number"], "state": point["state"], "axis": title, "at": at, "said": value})
    axes = [*space, title]
    spec = _chart(lines, height=240, mark={"type": "line", "opacity": 0.5, "strokeWidth": 1.2}, encoding={
        "x": {"field": "axis", "type": "nominal", "sort": axes, "title": None, "axis": {"labelAngle": 0}},
        "y": _axis("at", "place in its range", axis={"values": [0, 0.5, 1]}), "detail": {"field": "number"},
        "color": state, "tooltip": [_axis("number", "trial"), {"field": "axis"}, {"field": "said"}],
    })  # fmt: skip
    return Chart("Parallel coordinates", "A line is a trial.", spec)


def _place(value: Any, form: Any) -> float:
    """The position of a value in its range, in [0, 1]."""
    if isinstance(form, list | tuple):
        return form.index(value) / max(1, len(form) - 1) if value in form else 0.0
    low, high, at = float(form["low"]), float(form["high"]), float(value)
    if form.get("log"):
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.5


def cost(found: Mapping[str, Any]) -> list[Chart]:
    """A chart of the time of one trial's own stages, in minutes, by method."""
    points = [{"method": each["method"], "minutes": each["mean"] / 60} for each in found["methods"] if each["mean"] > 0]
    if not points:
        return []
    y = {"field": "method", "type": "nominal", "sort": "-x", "title": None}
    spec = _chart(points, height=20 * len(points), mark={"type": "bar", "color": _COLOURS[0]},
                  encoding={"x": _axis("minutes", "minutes of its own stages, a trial"), "y": y})  # fmt: skip
    return [
        Chart(
            "Cost of one trial", "What only this method's trials needed. Stages that methods share are left out.", spec
        )
    ]
