"""docs/extend.md, tried: each example as a file beside a sweep, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safecl import cli, registry
from safecl.overview import readable, write_report
from safecl.project import Project
from safecl.report import forms
from safecl.sweepfile import load
from tests import made_up

JUDGES = "evaluate.judges={asr: keywords, over_refusal: [xstest_match, polite]}"
REPOSITORY = Path(__file__).parents[1]
FILES = {
    name: text
    for name, text in re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", (REPOSITORY / "docs" / "extend.md").read_text(), re.S
    )
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The files of the page, and a sweep that names them."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    text = (REPOSITORY / "sweeps" / "quickstart.yaml").read_text()
    text = text.replace(
        "\nmethods:\n",
        "\nplugins: [./my_method.py, my_task.py, my_judge.py, my_metric.py]\n\nmethods:\n  - name: my_method\n",
    )
    text = re.sub(
        r"\ntasks:\n(  .*\n)+", "\ntasks: [{task: capitals, num_rows: 40, epochs: 1, max_tokens: 96}]\n", text
    )
    text = text.replace("\nevaluate:\n", "\nevaluate:\n  metrics: [polite, brief]\n")
    (tmp_path / "sweep.yaml").write_text(text)
    yield tmp_path
    registry.use([])


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["safecl", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    return out.out


def test_what_a_file_adds_is_everywhere(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ls, plan, table and page."""
    monkeypatch.chdir(folder)
    where = {"methods": "my_method", "tasks": "capitals", "judges": "polite", "metrics": "polite"}
    for what, name in where.items():
        rows = json.loads(said(capsys, monkeypatch, "ls", what, "sweep.yaml", "--json"))
        [found] = [row for row in rows if row[what[:-1]] == name]
        assert found["from"] == f"my_{what[:-1]}.py"
    settings = ["methods=[{name: sft}, {name: my_method}]", JUDGES]
    words = ["sweep.yaml", "--limit", "8", *(word for setting in settings for word in ("--set", setting))]
    assert "capitals / p=0.1 / my_method" in said(capsys, monkeypatch, "plan", *words)
    project = Project(load(Path("sweep.yaml"), settings, 8))
    made_up.finish(project)
    rows, found = readable(project)
    for table in (forms.plain(rows, found), forms.markdown(rows, found)):
        assert all(name in table for name in ("my_method", "capitals", "apologises", "under 20 words"))
    assert "over_refusal:polite" in rows[-1]["metrics"]


def test_a_file_of_answers_is_judged_by_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the judge's file asks it again."""
    monkeypatch.chdir(folder)
    lines = [{"prompt": "a", "response": "Sorry, no."}, {"prompt": "b", "response": "Yes."}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["judge", "score", "answers.jsonl", "--judge", "polite", "--plugin", "my_judge.py", "--json"]
    assert json.loads(said(capsys, monkeypatch, *words))["judges"]["polite"]["rate"]["value"] == 0.5
    (folder / "my_judge.py").write_text(FILES["my_judge.py"].replace('"sorry" in', '"" in'))
    assert json.loads(said(capsys, monkeypatch, *words))["judges"]["polite"]["rate"]["value"] == 1.0


@pytest.mark.slow
def test_a_page_shows_it(folder: Path) -> None:
    project = Project(load(folder / "sweep.yaml", [JUDGES, f"execution.root={folder}"], 8))
    made_up.finish(project)
    page = write_report(project, folder / "page").read_text()
    assert "my_method" in page and "beside it polite" in page


def test_the_contracts_of_the_page_hold(folder: Path) -> None:
    """Those that train nothing."""
    assert "6 passed" in proved(folder, "describes or fractions or sequence or cannot or bounds")


def test_a_contract_finds_a_metric_beyond_its_bounds(folder: Path) -> None:
    text = (folder / "my_metric.py").read_text()
    assert text.count("float(len(line") == 1
    (folder / "my_metric.py").write_text(text.replace("float(len(line", "2.0 * float(len(line"))
    assert "1 failed" in proved(folder, "bounds")


@pytest.mark.slow
def test_the_method_of_the_page_keeps_the_whole_contract(folder: Path) -> None:
    assert "18 passed" in proved(folder, "TestMine")


@pytest.mark.slow
def test_a_contract_finds_what_is_wrong(folder: Path) -> None:
    text = (folder / "my_method.py").read_text()
    assert text.count("cls.Config(weight=0.0)") == 1
    (folder / "my_method.py").write_text(text.replace("cls.Config(weight=0.0)", "cls.Config(weight=0.5)"))
    assert "1 failed" in proved(folder, "neutral")


def proved(folder: Path, chosen: str) -> str:
    """What pytest says at the end of the page's tests."""
    files = sorted(name for name in FILES if name.startswith("test_"))
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True).stdout
