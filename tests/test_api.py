"""The Python API: typed answers, by the code of the command line."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import safecl
from safecl import api
from safecl.base import ConfigError
from safecl.overview import plan as made

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "sweeps" / "quickstart.yaml"


def test_the_example_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert doctest.testmod(api, extraglobs={"folder": str(tmp_path)}) == (0, 4)


def test_a_plan_is_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a file is given or what it holds."""
    printed: dict[str, Any] = {}
    monkeypatch.setattr("safecl.overview.plan", lambda project: printed.update(made(project)) or printed)
    raw = yaml.safe_load(QUICKSTART.read_text())
    before = json.dumps(raw)
    few = {"execution.root": str(tmp_path), "methods": [{"name": "sft"}], "evaluate.judges": {"asr": "keywords"}}
    found = safecl.plan(raw, set=few, limit=8)
    assert json.dumps(raw) == before
    assert [cell.label for cell in found.cells] == [cell["cell"] for cell in printed["cells"]]
    assert {kind: count.to_run for kind, count in found.stages.items()} == {
        kind: count["to run"] for kind, count in printed["stages"].items()
    }
    assert found.hours == printed["hours"] > 0 and found.trials == sum(cell["trials"] for cell in printed["cells"])
    with pytest.raises(ConfigError, match="unknown key"):
        safecl.plan({**raw, "metods": []})


def test_a_run_does_what_is_missing_and_warns_of_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver itself is tested elsewhere (test_end_to_end.py)."""
    asked: dict[str, Any] = {}

    def run(project: Any, show: Any, max_hours: float | None) -> list[str]:
        asked.update(project=project, max_hours=max_hours)
        return ["a row"]

    monkeypatch.setattr("safecl.driver.run", run)
    with pytest.warns(UserWarning, match="missing: a row"):
        project = safecl.run(QUICKSTART, set={"execution.root": str(tmp_path)}, limit=8, max_hours=2.0)
    assert asked == {"project": project, "max_hours": 2.0} and project.sweep.name == "quickstart"


def test_importing_safecl_imports_nothing_else() -> None:
    code = (
        "import sys; import safecl; print([name for name in sys.modules if name.startswith(('safecl.', 'pydantic'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        safecl.plans  # noqa: B018
