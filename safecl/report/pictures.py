"""Charts as PNG files, for programs that cannot show Vega. The wheel vl-convert-python draws them without a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from safecl.report.charts import Chart

WIDTH = 720  # width in pixels of a chart that would fill its page


def pictures(charts: Mapping[str, Sequence[Chart]], folder: str = "plots") -> dict[str, bytes]:
    """PNG images by path, such as `plots/01-safety-and-usefulness-smol-mini-10-poison.png`, in the order of the charts.

    `charts` maps a subject, which begins the file's name, to its charts. A chart that cannot be drawn is left out.
    """
    found: dict[str, bytes] = {}
    for number, (of, chart) in enumerate(((of, chart) for of, some in charts.items() for chart in some), 1):
        name = re.sub(r"[^A-Za-z0-9.=]+", "-", f"{of} {chart.title}").strip("-")[:80]
        with suppress(ValueError):
            found[f"{folder}/{number:02d}-{name}.png"] = png(chart.title, chart.spec)
    return found


def png(title: str, spec: Mapping[str, Any]) -> bytes:
    """One chart as PNG on white. Raises ValueError for a specification that Vega-Lite does not accept."""
    import vl_convert

    fixed = {**spec, "title": title, "background": "white", "padding": 12}
    if fixed.get("width") == "container":
        fixed |= {"width": WIDTH, "autosize": {"type": "pad"}}
    found: bytes = vl_convert.vegalite_to_png(fixed, scale=1.5)
    return found
