"""A stage by its name, the winning configuration, and two sweeps side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl import review
from safecl.base import ConfigError
from safecl.cli import main
from safecl.graph import REFERENCES
from safecl.project import Project, load
from tests import made_up
from tests.made_up import DER, QUICKSTART

SETTINGS = [
    f"methods=[{{name: sft}}, {DER}]",
    "search.trials=5",
    "models.0.dtype=float32",
    "evaluate.judges.asr=keywords",
]


def project(root: Path, *settings: str, finished: bool = True) -> Project:
    made = Project(load(QUICKSTART, [*SETTINGS, f"execution.root={root}", *settings]))
    if finished:
        made_up.search(made)
        made_up.finish(made)
    return made


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["safecl", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code in (0, None), err
    return out


def test_the_best_configuration_is_a_sweep_of_the_same_final_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = project(tmp_path / "runs")
    file, flags = tmp_path / "best.yaml", [word for one in SETTINGS for word in ("--set", one)]
    at = ["--set", f"execution.root={tmp_path / 'runs'}"]
    run(monkeypatch, capsys, "best", str(QUICKSTART), *flags, *at, "--out", str(file))
    again = Project(load(file, []))
    assert all(cell.space is None for cell in again.cells)

    def finals(of: Project) -> dict[str, list[str]]:
        return {c.recipe.method + f"{c.recipe.poison_ratio:g}": [job.evidence.metrics.key for job in jobs]
                for c, _, jobs, _ in of.finals() if c.recipe.method not in REFERENCES}  # fmt: skip

    assert finals(again) == finals(made) and len(finals(made)) == 4
    assert all(again.store.has(job.evidence.metrics) for _, _, jobs, _ in again.finals() for job in jobs)
    kept = yaml.safe_load(file.read_text())
    chosen = {cell.label: params for cell, params, *_ in made.finals() if params}
    assert [entry["config"]["weight"] for entry in kept["methods"] if entry["name"] == "der"] == list(
        dict.fromkeys(params["weight"] for params in chosen.values())
    )


def test_rows_without_a_choice_are_left_out_and_said(tmp_path: Path) -> None:
    made = project(tmp_path / "runs", finished=False)
    content, left = review.best(made, QUICKSTART, SETTINGS)
    assert [entry["name"] for entry in content["methods"]] == ["sft"] and len(left) == 2 and "0 of 5 trials" in left[0]
    assert {(some["ratios"][0], some["methods"][0]) for some in content["only"]} == {(0.0, "sft"), (0.1, "sft")}
    searched = project(tmp_path / "other", f"methods=[{DER}]", finished=False)
    with pytest.raises(ConfigError, match="no row of this sweep is chosen yet"):
        review.best(searched, QUICKSTART, [f"methods=[{DER}]"])


def test_a_stage_is_found_by_words_of_its_name_and_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = project(tmp_path / "runs", "methods=[{name: sft}]")
    job = next(
        jobs[0] for cell, _, jobs, _ in made.finals() if cell.recipe.method == "sft" and cell.recipe.poison_ratio
    )
    key = job.graph.tuned.key
    [(name, record)] = review.find(made.store, "finetune sft, mini p=0.1")
    assert record["key"] == key and name.startswith("finetune sft, mini p=0.1, seed 0")
    assert review.find(made.store, key[:10]) == [(name, record)]
    assert review.find(made.store, "no such words") == []
    many = run(monkeypatch, capsys, "show", "finetune", "--root", str(tmp_path / "runs"))
    assert len(many.splitlines()) >= 3 and str(made.store.folder(record)) in many


def test_two_sweeps_share_what_is_equal_and_are_tested_where_seeds_are_common(tmp_path: Path) -> None:
    one = project(tmp_path / "a", "methods=[{name: sft}, {name: lwf}]", "seeds=[0, 1]")
    same = review.compare(one, one)
    assert same["settings"] == [] and same["only_first"] == same["only_second"] == []
    assert all(row["weights"] and row["data"] and row["seeds"] == [0, 1] for row in same["rows"])
    for row in same["rows"]:
        for entry in row["metrics"].values():
            assert entry["first"] == entry["second"] and not entry["test"]["differs"] and entry["test"]["value"] == 0
    two = project(tmp_path / "a", "methods=[{name: sft}, {name: kl}]", "seeds=[0, 1]", "tasks.0.learning_rate=0.001")
    found: Any = review.compare(one, two)
    [setting] = [each for each in found["settings"] if "learning_rate" in each["setting"]]
    assert (setting["first"], setting["second"]) == (0.004, 0.001)
    by_row = {row["row"]: row for row in found["rows"]}
    sft = by_row["smollm2-135m / mini / p=0.1 / sft"]
    assert not sft["weights"] and sft["data"] and by_row["smollm2-135m / mini / base"]["weights"]
    assert found["only_first"] == [f"smollm2-135m / mini / p={p} / lwf" for p in ("0", "0.1")]
    shown = sft["metrics"]["asr"]
    assert shown["test"]["value"] == pytest.approx(shown["second"] - shown["first"])
    alone = review.compare(project(tmp_path / "b", "methods=[{name: sft}]", "seeds=[0]"), one)
    assert all("test" not in entry and "mcnemar" in entry for row in alone["rows"] for entry in row["metrics"].values())
    titles = [title for title, *_ in review.told(found)]
    assert titles == ["settings that differ", "numbers, percent", "rows of the first alone", "rows of the second alone"]
