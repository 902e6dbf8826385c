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
from safecl import api, cli
from safecl.base import ConfigError

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "sweeps" / "quickstart.yaml"


def test_the_example_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert doctest.testmod(api, extraglobs={"folder": str(tmp_path)}) == (0, 4)


def test_a_plan_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether a file is given or what it holds."""
    root = f"execution.root={tmp_path}"
    monkeypatch.setattr(sys, "argv", ["safecl", "plan", str(QUICKSTART), "--set", root, "--limit", "8", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = json.loads(capsys.readouterr().out)
    raw = yaml.safe_load(QUICKSTART.read_text())
    before = json.dumps(raw)
    found = safecl.plan(raw, set=[root], limit=8)
    assert json.dumps(raw) == before
    assert [cell.label for cell in found.cells] == [cell["cell"] for cell in printed["cells"]]
    assert {kind: count.to_run for kind, count in found.stages.items()} == {
        kind: count["to run"] for kind, count in printed["stages"].items()
    }
    assert found.hours > 0 and found.trials == sum(cell["trials"] for cell in printed["cells"])
    with pytest.raises(ConfigError, match="unknown key"):
        safecl.plan({**raw, "metods": []}, set=[root])


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
