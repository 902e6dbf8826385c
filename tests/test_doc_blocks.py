"""Code in README and docs works: commands parse, pieces of a sweep file make a sweep, examples of a key are of its kind.

docs/extend.md's files are run by test_extend.py. Blocks of `text` and blocks without a command show output: they are not run.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from safecl import schema
from safecl.cli import app
from safecl.sweepfile import load
from tests.mini import mini

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
OF_KINDS = "sweep-file.md"  # its blocks are the examples of docstrings


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.M | re.S):
            if found == language:
                yield page.name, text


def commands() -> Iterator[str]:
    """Every `safecl ...` of a block, and every one within a line of text."""
    for _, text in blocks(""):
        for line in text.splitlines():
            yield from re.findall(r"(?:^|&& )(safecl [a-z][^#&]*)", line)
    for page in PAGES:
        yield from re.findall(r"`(safecl [a-z]+ [^`]*)`", page.read_text())


@pytest.mark.parametrize("command", sorted({c for c in commands() if "..." not in c and "|" not in c}))
def test_a_command_takes_these_arguments(command: str) -> None:
    words = shlex.split(re.sub(r"\[|\]", "", command))[1:]  # [--merged]: an option that may be left out
    if ">" in words:
        words = words[: words.index(">")]
    group: Any = typer.main.get_command(app)
    context = click.Context(group, info_name="safecl")
    while hasattr(group, "commands"):
        name, group, words = group.resolve_command(context, words)
        context = click.Context(group, info_name=name, parent=context)
    group.make_context(name, words, resilient_parsing=True)  # what is named in a text may lack its files


@pytest.mark.parametrize(("page", "text"), [b for b in blocks("yaml") if b[0] not in {OF_KINDS, "extend.md"}])
def test_a_piece_of_a_sweep_file_makes_a_sweep(page: str, text: str, tmp_path: Path) -> None:
    sweep = mini(tmp_path, tmp_path / "root")
    piece = yaml.safe_load(text.replace("COMMIT", "a" * 40))
    if "judges" in piece:
        piece = {"evaluate": piece}
    for key, value in piece.items():
        sweep[key] = {**sweep.get(key, {}), **value} if isinstance(value, dict) else value
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    load(file, [])


@pytest.mark.parametrize("kind", schema.kinds(), ids=lambda kind: kind.__name__)
def test_an_example_is_of_its_kind(kind: Any) -> None:
    for line in (inspect.getdoc(kind) or "").partition("Example:\n")[2].splitlines():
        example = re.split(r" {3,}", line.strip())[0]
        if example.startswith("{"):
            kind.model_validate(yaml.safe_load(example))
