"""The benchmarks' harness. No number that a machine gave is held here."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import _bench, page

ROOT = Path(__file__).parent.parent


def test_alternatives_run_in_turn_and_ratios_are_of_the_same_round() -> None:
    """Of three rounds the second takes twice the time for both; the ratios 2, 2 and 3 have the median 2."""
    calls: list[str] = []
    seconds = {"first": iter([1.0, 2.0, 1.0]), "second": iter([2.0, 4.0, 3.0])}

    def run(name: str) -> float:
        calls.append(name)
        return next(seconds[name])

    found = _bench.interleaved({name: lambda n=name: run(n) for name in seconds}, 3)
    assert calls == ["first", "second", "second", "first", "first", "second"]
    assert found["second"] == {"median": 3.0, "all": [2.0, 4.0, 3.0], "ratio": 2.0}
    assert found["first"]["ratio"] == 1.0


def test_the_page_is_made_of_the_results_alone() -> None:
    """Whoever measures anew makes the page anew (`python benchmarks/page.py`)."""
    written = ROOT / "docs" / "performance.md"
    assert written.read_text() == page.page(ROOT / "benchmarks" / "results")


def test_a_result_says_what_it_ran_on_and_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    file = _bench.write("some", {"A table": [{"a": 1.0}, {"b": None}]}, tmp_path)
    record = json.loads(file.read_text())
    assert list(record) == ["name", "about", "command", "date", "machine", "versions", "numbers"]
    assert {"cpu", "flags", "cores"} <= set(record["machine"]) and "python" in record["versions"]
    assert str(ROOT) not in file.read_text()
    assert "| a | b |\n| --- | --- |\n| 1 |  |\n|  |  |" in page.page(tmp_path)
