"""The pages that are made of the package say what it says today; links between pages hold; the README stays short."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from safecl import methods, schema
from safecl.config import Execution, Sweep

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_page_of_methods_is_made_of_the_methods() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "methods.py"))
    assert made["page"]() == (ROOT / "docs" / "methods.md").read_text(), "run docs/methods.py"
    assert all(methods.load(name).source for name in methods.names())


@pytest.mark.parametrize("page", ["sweep-file.md", "command-options.md"])
def test_the_reference_is_made_of_the_schema_and_the_commands(page: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    assert made["PAGES"][page]() == (ROOT / "docs" / page).read_text(), "run docs/reference.py"


def test_types_of_keys_are_whole() -> None:
    kinds = re.findall(r"^\| `\w+` \| `([^`]*)`", (ROOT / "docs" / "sweep-file.md").read_text(), re.MULTILINE)
    assert len(kinds) > 100 and "int \\| None" in kinds
    assert [kind for kind in kinds if kind.count("[") != kind.count("]") or ")" in kind] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_hold(page: Path) -> None:
    """mkdocs checks those of docs/ itself, and their anchors (`make docs`)."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_every_key_of_execution_is_explained_or_plain() -> None:
    """The comment beside a key reaches its description in the schema that editors read."""
    described = schema.sweep_file()["$defs"]["Execution"]["properties"]
    assert described["root"]["description"].startswith("folder")
    assert described["gradient_checkpointing"]["description"].startswith("Compute layers again")
    assert set(described) == set(Execution.model_fields)
    assert {kind.__name__ for kind in schema.kinds()} >= {"Sweep", "Model", "Training", "Judge"} - {"Training"}


def test_the_schema_is_printed_and_takes_the_shipped_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    words = [sys.executable, "-m", "safecl.cli", "schema"]
    said = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    from safecl.sweepfile import read_yaml

    for file in sorted((ROOT / "sweeps").rglob("*.yaml")):
        raw = read_yaml(file)
        if "methods" in raw:
            jsonschema.validate(raw, said)
    assert said["title"] == Sweep.__name__
