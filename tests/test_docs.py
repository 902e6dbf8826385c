"""What the documentation says of methods is what their files say."""

from __future__ import annotations

import runpy
from pathlib import Path

from safecl import methods

ROOT = Path(__file__).parents[1]


def test_the_pages_of_methods_are_made_of_the_methods() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "methods.py"))
    readme = (ROOT / "README.md").read_text()
    assert made["page"]() == (ROOT / "docs" / "methods.md").read_text(), "run docs/methods.py"
    assert made["readme"](readme) == readme, "run docs/methods.py"
    assert all(methods.load(name).source for name in methods.names())
