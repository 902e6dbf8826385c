"""Descriptions of a sweep file's keys: the JSON schema for editors, and the page of the documentation."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

from pydantic import BaseModel

from safecl import config
from safecl.config import Sweep


def sweep_file() -> dict[str, Any]:
    """The JSON schema of a sweep file, each key with the comment that stands beside it in `safecl/config`.

    Example:
        `safecl schema > sweep.schema.json`, and in a sweep file's first line
        `# yaml-language-server: $schema=sweep.schema.json`
    """
    schema = Sweep.model_json_schema()
    described = {**schema["$defs"], "Sweep": schema}
    for kind in kinds():
        comments = told(kind)
        for name, entry in described.get(kind.__name__, {}).get("properties", {}).items():
            entry.pop("title", None)
            if name in comments:
                entry["description"] = comments[name]
    return schema


def kinds() -> list[type[BaseModel]]:
    """The classes that a sweep file consists of: the whole file first, and each class before those that its keys
    hold."""
    every = {name: getattr(config, name) for name in config.__all__}
    named = {name: kind for name, kind in every.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    found: list[type[BaseModel]] = [Sweep]
    for kind in found:
        for field in kind.model_fields.values():
            names = str(field.annotation)
            found += [
                other
                for name, other in named.items()
                if f".{name}" in names and other not in found and other is not kind
            ]
    return found


@cache
def told(kind: type[BaseModel]) -> dict[str, str]:
    """{key: the comment before it or on its line}, of a class's own keys and of inherited ones."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel and base.__module__.startswith("safecl."):
            found |= _comments(textwrap.dedent(inspect.getsource(base)))
    return found


def _comments(source: str) -> dict[str, str]:
    lines = source.splitlines()
    [made] = ast.parse(source).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for node in made.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            own = [line for line in lines[first : node.lineno - 1]]
            own += [part for line in lines[node.lineno - 1 : node.end_lineno] if (part := _after(line))]
            if text := " ".join(line.strip().lstrip("# ") for line in own):
                found[node.target.id] = text
    return found


def _after(line: str) -> str:
    """The comment at the end of a line of code; "" if there is none."""
    before, mark, text = line.partition("  # ")
    return text if mark and before.strip() else ""
