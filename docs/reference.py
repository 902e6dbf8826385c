"""Writes docs/sweep-file.md from safecl/config and docs/command-options.md from the command line itself.

    .venv/bin/python docs/reference.py

A test holds both.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from safecl import schema

HERE = Path(__file__).parent
SWEEP = """# The sweep file, key by key

Made by `python docs/reference.py` from `safecl/config/`. [Your own sweep](sweeps.md) says how the parts work together. For
completion and checks in an editor: `safecl schema > sweep.schema.json`, and as the first line of a sweep file
`# yaml-language-server: $schema=sweep.schema.json`.
"""
COMMANDS = """# Commands, option by option

Made by `python docs/reference.py` from the commands themselves. `safecl COMMAND --help` prints the same.
[Commands](commands.md) says what each is for.
"""


def sweep_file() -> str:
    parts = [SWEEP]
    for kind in schema.kinds():
        parts.append(f"## {kind.__name__}\n\n{_text(kind)}\n\n| key | type | default | |\n|---|---|---|---|")
        comments = schema.told(kind)
        for name, field in kind.model_fields.items():
            cells = (f"`{name}`", f"`{_type(field.annotation)}`", _default(field), comments.get(name, ""))
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _text(kind: type[BaseModel]) -> str:
    told, _, example = (inspect.getdoc(kind) or "").partition("Example:\n")
    return told.strip() + (f"\n\n```yaml\n{inspect.cleandoc(example)}\n```" if example else "")


def _type(kind: Any) -> str:
    """A type as a person writes it, without what Annotated adds: `int | None`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type, arguments))}]"
    named = {type(None): "None", Ellipsis: "..."}
    return named.get(kind) or getattr(kind, "__name__", str(kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return f"`{type(value).__name__}()`" if isinstance(value, BaseModel) else f"`{value!r}`"


def commands() -> str:
    import typer

    from safecl.cli import app

    parts = [COMMANDS]
    top = typer.main.get_command(app)
    for words, command in _every(top, ()):
        pieces = [_place(each) for each in command.params if each.param_type_name == "argument"]
        parts.append(f"## safecl {' '.join([*words, *pieces])}\n")
        parts.append((command.help or "").replace("\f", "").strip() + "\n")
        rows = [
            (", ".join(f"`{name}`" for name in each.opts), each.help or "")
            for each in command.params
            if each.param_type_name == "option" and not each.hidden and each.name != "help"
        ]
        if rows:
            parts += ["| option | |", "|---|---|"]
            parts += [
                "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows
            ]
            parts.append("")
    return "\n".join(parts)


def _place(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _every(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name in sorted(command.commands):
            yield from _every(command.commands[name], (*words, name))
    elif not command.hidden:
        yield words, command


PAGES = {"sweep-file.md": sweep_file, "command-options.md": commands}

if __name__ == "__main__":
    for name, made in PAGES.items():
        (HERE / name).write_text(made())
