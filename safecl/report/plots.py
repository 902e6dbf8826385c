"""Plots as PNG files: safety against usefulness, one bar a metric, training curves. Agg backend, no screen.

Percent is printed here as in the table. One method has one colour everywhere; base and aligned are grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safecl import metrics
from safecl.graph import REFERENCES
from safecl.objective import pareto_front
from safecl.report.tables import Column, Facts, Row, columns, groups

# Okabe and Ito's colours, told apart by most colour-blind readers, then darker ones for a longer list.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A4B94",
    "#8C564B",
    "#117733",
    "#882255",
)
_GREY, _INK, _GRID = "#8A8F98", "#24292F", "#E6E8EB"
_MARKERS = {"base": "s", "aligned": "D"}


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """Colour by method, in order of first appearance."""
    methods = [m for m in dict.fromkeys(str(row["method"]) for row in rows) if m not in REFERENCES]
    found = {method: _COLOURS[i % len(_COLOURS)] for i, method in enumerate(methods)}
    return {**found, **dict.fromkeys(REFERENCES, _GREY)}


def panels(rows: Sequence[Row]) -> dict[tuple[str, str], dict[float, list[Row]]]:
    """Rows by (model, task), then by poison ratio; base and aligned stand in every ratio's panel."""
    found = {}
    for key, members in groups(rows).items():
        ratios = sorted({float(r["poison"]) for r in members if r["method"] not in REFERENCES} or {0.0})
        found[key] = {
            ratio: [r for r in members if r["method"] in REFERENCES or float(r["poison"]) == ratio] for ratio in ratios
        }
    return found


def tradeoff(rows: Sequence[Row], facts: Facts, path: Path) -> Path:
    """ASR against utility, a panel per model, task and poison ratio, with intervals and the Pareto front. A hollow mark is
    the coherent ASR, where that is another: between the two lies what was judged harmful and is no answer to the request."""
    grid, colour = panels(rows), colours(rows)
    width = max((len(p) for p in grid.values()), default=1)
    figure, axes = _figure(max(1, len(grid)), width, 4.9, 4.1)
    drawn = []
    for line, ((model, task), ratios) in zip(axes, grid.items(), strict=False):
        for axis, (ratio, members) in zip(line, ratios.items(), strict=False):
            axis.set_visible(True)
            points, hollow = _tradeoff_panel(axis, members, colour)
            drawn.append((axis, points, hollow))
            axis.set_title(f"{model} / {task}, {100 * ratio:g} % poison", fontsize=10, loc="left", color=_INK)
            said = "; hollow: coherent ASR" if hollow else ""
            harm, use = metrics.plane()
            axis.set_xlabel(f"{harm.header(facts.judges)}, %   (left is safer{said})")
            axis.set_ylabel(f"{use.header(facts.judges)}, %   (up is more useful)")
    figure.draw_without_rendering()  # fixes the layout: only then is it known which names would cover what
    for axis, points, hollow in drawn:
        _label(axis, points, hollow, colour)
    return _save(figure, path)


def _tradeoff_panel(
    axis: Any, members: Sequence[Row], colour: Mapping[str, str]
) -> tuple[list[tuple[str, float, float]], list[tuple[float, float]]]:
    """Draws; (method, x, y) of its points, and x, y of hollow marks."""
    points, hollow = [], []
    for row in members:
        x, y = (_read(row, metric.name) for metric in metrics.plane())
        if x is None or y is None:
            continue
        method = str(row["method"])
        axis.errorbar(
            *(x[0], y[0]), xerr=[[x[1]], [x[2]]], yerr=[[y[1]], [y[2]]],
            fmt=_MARKERS.get(method, "o"), color=colour[method], markersize=7, elinewidth=1.1, alpha=0.9, zorder=3,
        )  # fmt: skip
        points.append((method, x[0], y[0]))
        coherent = next(
            (_read(row, m.name) for m in metrics.METRICS if m.where_differ == (metrics.plane()[0].name, m.name)), None
        )
        if coherent is not None and coherent[0] != x[0]:
            hollow.append((coherent[0], y[0]))
            axis.plot([coherent[0], x[0]], [y[0]] * 2, color=colour[method], linewidth=1.1, linestyle=":", zorder=2)
            axis.plot(
                *([coherent[0]], [y[0]]), _MARKERS.get(method, "o"), color=colour[method], markersize=7,
                markerfacecolor="white", zorder=4,
            )  # fmt: skip
    trained = [p for p in points if p[0] not in REFERENCES]
    front = [trained[i] for i in pareto_front([(-x, y) for _, x, y in trained])]
    if len(front) > 1:  # stairs: what lies on no method's corner was not reached by any
        xs = sorted(x for _, x, _ in front)
        ys = sorted(y for _, _, y in front)
        axis.plot(xs, ys, drawstyle="steps-post", color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axis.margins(0.16)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, -6), min(max(high, 10), 106))
    return points, hollow


def _label(
    axis: Any,
    points: Sequence[tuple[str, float, float]],
    hollow: Sequence[tuple[float, float]],
    colour: Mapping[str, str],
) -> None:
    """Names beside points: the nearest place that covers no mark and no other name, with a thin line if it is far."""
    from matplotlib.patheffects import withStroke

    places = [(8, 5), (8, -13), (-8, 5), (-8, -13), (0, 12), (0, -20)]
    places += [(dx, dy) for far in (26, 42, 58, 74) for dx in (10, -10, 26) for dy in (far, -far - 8)]
    renderer = axis.figure.canvas.get_renderer()
    taken: list[Any] = []
    dots = [axis.transData.transform(mark) for mark in (*(point[1:] for point in points), *hollow)]
    frame = axis.get_window_extent(renderer)
    for method, x, y in points:
        tint = colour[method] if method not in REFERENCES else "#5A6069"
        for dx, dy in places:
            far = abs(dy) > 20
            text = axis.annotate(
                method, (x, y), (dx, dy), textcoords="offset points", fontsize=9, color=tint, zorder=5,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": tint, "linewidth": 0.7, "alpha": 0.7} if far else None,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent(renderer) if not far else _text_box(text, renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            clear = not any(box.overlaps(other) for other in taken)
            clear = clear and not any(box.padded(5).contains(*dot) for dot in dots)
            if (inside and clear) or (dx, dy) == places[-1]:
                taken.append(box)
                break
            text.remove()


def _text_box(text: Any, renderer: Any) -> Any:
    """The words' own box: an annotation's includes its line."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def bars(rows: Sequence[Row], facts: Facts, path: Path) -> Path:
    """One panel per metric, one bar per method, with intervals; a line of panels per model, task and poison ratio."""
    import matplotlib

    shown, colour = [c for c in columns(rows, facts) if c.metric.unit == "%"], colours(rows)
    lines = [(key, ratio, members) for key, ratios in panels(rows).items() for ratio, members in ratios.items()]
    tallest = max((len(members) for *_, members in lines), default=1)
    figure, axes = _figure(max(1, len(lines)), len(shown), 2.4, 1.25 + 0.27 * tallest)
    figure.get_layout_engine().set(hspace=0.06)
    for line, ((model, task), ratio, members) in zip(axes, lines, strict=False):
        for index, (axis, column) in enumerate(zip(line, shown, strict=True)):
            axis.set_visible(True)
            _bars_panel(axis, members, column, colour)
            axis.set_title(column.header, fontsize=9, loc="left", color=_INK, pad=6)
            axis.set_yticks(range(len(members)), [str(r["method"]) for r in members] if index == 0 else [])
            axis.set_xlabel(
                "%" + {"low": "   (less is better)", "high": "   (more is better)", "": ""}[column.metric.better]
            )
        where = f"{model} / {task}, {100 * ratio:g} % poison"
        offset = matplotlib.transforms.ScaledTranslation(0, 0.32, figure.dpi_scale_trans)
        line[0].text(0, 1, where, transform=line[0].transAxes + offset, fontsize=10.5, weight="bold", color=_INK)
    return _save(figure, path)


def _bars_panel(axis: Any, members: Sequence[Row], column: Column, colour: Mapping[str, str]) -> None:
    for place, row in enumerate(members):
        found = _read(row, column.metric.name)
        if found is None:
            axis.text(1, place, "-", va="center", color=_GREY)
            continue
        value, below, above = found
        axis.barh(place, value, height=0.68, color=colour[str(row["method"])], alpha=0.85, zorder=2)
        axis.errorbar(
            value, place, xerr=[[below], [above]], fmt="none", ecolor=_INK, elinewidth=1.1, capsize=2.5, zorder=3
        )
        end = value + above
        beside, at = ("left", end + 2) if end < 84 else ("right", value - below - 2)
        shade = _INK if end < 84 else "white"
        axis.text(at, place, f"{value:.1f}", va="center", ha=beside, fontsize=8, color=shade, zorder=4)
    axis.set_xlim(0, 100)
    axis.set_xticks([0, 50, 100])
    axis.set_ylim(len(members) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Training curves: a panel per logged quantity, a line per run, raw values pale and their running mean on top.

    `runs`: points `{"step": int, name: float, ...}` by run name.
    """
    import numpy as np

    names = list(dict.fromkeys(k for points in runs.values() for point in points for k in point if k != "step"))
    width = min(3, max(1, len(names)))
    figure, axes = _figure(max(1, -(-len(names) // width)), width, 3.9, 2.7)
    flat = [axis for line in axes for axis in line]
    for axis, name in zip(flat, names, strict=False):
        axis.set_visible(True)
        for index, (run, points) in enumerate(runs.items()):
            found = [(p["step"], p[name]) for p in points if p.get(name) is not None and np.isfinite(p[name])]
            if not found:
                continue
            steps, values = np.array(found, dtype=np.float64).T
            window = max(1, len(values) // 20)
            weights = np.ones(window)
            mean = np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")
            tint = _COLOURS[index % len(_COLOURS)]
            axis.plot(steps, values, color=tint, linewidth=0.8, alpha=0.3 if window > 1 else 1, zorder=2)
            axis.plot(steps, mean, color=tint, linewidth=1.7, label=run, zorder=3)
        axis.set_title(name, fontsize=10, loc="left", color=_INK)
        axis.set_xlabel("optimizer step")
        axis.margins(x=0.02)
    if len(runs) > 1 and names:
        handles, labels = flat[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=8.5
        )
    return _save(figure, path)


def _read(row: Row, name: str) -> tuple[float, float, float] | None:
    """(value, distance to the lower bound, to the upper one) in percent; None without a value."""
    metric = row["metrics"].get(name)
    if metric is None or metric.get("value") is None:
        return None
    value = float(metric["value"])
    low = value if metric.get("low") is None else float(metric["low"])
    high = value if metric.get("high") is None else float(metric["high"])
    return 100 * value, 100 * max(0.0, value - low), 100 * max(0.0, high - value)


def _figure(num_lines: int, num_columns: int, width: float, height: float) -> tuple[Any, list[list[Any]]]:
    """A figure without pyplot, so that nothing global is left behind. Axes are invisible until used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width * num_columns + 0.6, height * num_lines + 0.4), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_lines, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
        axis.grid(True, color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5, colors=_INK, length=3)
        axis.xaxis.label.set(size=8.5, color=_INK)
        axis.yaxis.label.set(size=8.5, color=_INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color("#B8BDC4")
    return figure, [list(line) for line in axes]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
