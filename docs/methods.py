"""Writes what the documentation says of methods from the methods themselves.

    .venv/bin/python docs/methods.py

docs/methods.md: a table of all, and every method's docstring. A test holds it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from safecl import methods

HERE = Path(__file__).parent
HEAD = """# Methods

Made by `python docs/methods.py` from the files of `safecl/methods/`, which open with what stands here: the equation, the paper's
symbols against the code's names, the source, and where the two differ. `safecl ls methods` has hyperparameters and search spaces.
[What methods share](about-methods.md): the contract, what they cost, and what a sweep can change.
"""


def kinds() -> Iterator[tuple[str, type[methods.Method]]]:
    return ((name, methods.load(name)) for name in methods.names())


def table() -> str:
    """One line a method."""
    lines = ["| method | what is trained | source | time of a finetune |", "|---|---|---|---|"]
    for name, kind in kinds():
        cells = (f"[`{name}`](#{name})", f"`{kind.equation}`", kind.source, kind.cost)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page() -> str:
    parts = [HEAD, table() + "\n"]
    for name, kind in kinds():
        told = inspect.getdoc(sys.modules[kind.__module__])
        parts.append(f"## {name}\n\n```text\n{told}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "methods.md").write_text(page())
