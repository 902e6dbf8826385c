"""Arguments and output that several commands share."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

File = Annotated[Path, typer.Argument(help="A sweep file, e.g. sweeps/quickstart.yaml", show_default=False)]
Set = Annotated[
    list[str],
    typer.Option("--set", help="Override a key: `path=value`, e.g. `execution.num_workers=2`. May be repeated."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="At most N rows of every set: a quick look, kept apart from the real run")
]
Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]


def project_to_run(file: Path, settings: list[str], limit: int | None) -> Any:
    """The sweep of a file as a project that can be run (driver.open_to_run)."""
    from safecl import driver
    from safecl.project import load

    return driver.open_to_run(load(file, settings, limit))


def opened(file: Path, settings: list[str], limit: int | None, reads: bool = False, planned: bool = False) -> Any:
    """The sweep of a file as a project. `reads`, `planned`: see Project."""
    from safecl.project import Project, load

    return Project(load(file, settings, limit), reads=reads, planned=planned)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table with its title, not wider than the terminal."""
    from safecl.report.forms import text_table

    print(f"{title}\n{text_table(columns, rows, _width())}\n")


def print_found(
    found: Any, as_json: bool, tables: Callable[[Any], Iterable[Table]], lines: Callable[[Any], Iterable[str]]
) -> None:
    """Print a command's result: as JSON, or as tables with lines below them."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for table in tables(found):
        print_table(*table)
    for line in lines(found):
        print_hanging("", line, indent=2)


def print_hanging(lead: str, text: str, indent: int) -> None:
    """Print a line. On a terminal that is too narrow it continues below, indented by `indent` blanks."""
    width = _width() or sys.maxsize
    print(
        textwrap.fill(text or "-", width, initial_indent=lead, subsequent_indent=" " * indent, break_on_hyphens=False)
    )


def _width() -> int | None:
    """Width of the terminal in characters; None for a pipe or file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
