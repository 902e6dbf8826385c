"""One page of tables from all results of benchmarks.

    .venv/bin/python benchmarks/page.py

Writes docs/performance.md from the JSON files in benchmarks/results/ and from nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
HEAD = """# Performance

Made by `python benchmarks/page.py` from `benchmarks/results/*.json`: run a benchmark by its command, then that. Every
number is the median of runs of its alternatives in turn, on the machine named above its table.
"""


def cell(value: Any) -> str:
    """Four significant digits; nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return "" if value is None else str(value).replace("|", "\\|")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns in the order in which rows first name them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(record: Mapping[str, Any]) -> str:
    """One benchmark: what it ran on, and its tables."""
    machine = dict(record["machine"])
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}"
    parts = [machine["gpu"]] if "gpu" in machine else []
    parts.append(cpu)
    if "simulated" in machine:
        parts.append("instructions hidden by " + " ".join(f"{k}={v}" for k, v in machine["simulated"].items()))
    if "load_at_end" in machine:
        parts.append(f"load average {machine['load_at_end']} at the end")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = f"\n## {record['name']}\n\n{record['about']}\n\n`{record['command']}`\n\n"
    text += f"{record['date']}; {'; '.join(parts)}; {versions}.\n"
    for title, rows in record["numbers"].items():
        text += f"\n{title}\n\n{table([rows] if isinstance(rows, Mapping) else rows)}\n"
    return text


def page(folder: Path) -> str:
    """The page of all results in `folder`, by name."""
    return HEAD + "".join(section(json.loads(file.read_text())) for file in sorted(folder.glob("*.json")))


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(HERE / "results"))
    print(PAGE)


if __name__ == "__main__":
    main()
