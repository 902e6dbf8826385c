"""A sweep as frames: every trial and cell with its numbers, every answer with its verdicts; and the examples in docstrings."""

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
from safecl import frames, overview
from safecl.project import Project, load
from safecl.report import facts
from safecl.report.rows import rows
from tests.made_up import finish, put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
SETTINGS = ["methods=[{name: sft}]", "poison.ratios=[0.1]", "models.0.dtype=float32", "evaluate.judges.asr=keywords"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file in the current folder, of two seeds, all of whose trials are finished."""
    given = load(QUICKSTART, [*SETTINGS, "seeds=[0, 1]", "execution.root=runs"])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(given.model_dump(mode="json")))
    project = Project(load(path, []))
    for stage in finish(project):
        folder = tmp_path / "runs" / "store" / stage.kind / stage.key
        if stage.kind == "generate":
            answers = [{"id": str(i), "text": f"answer {i}", "finish": "stop", "num_tokens": 2} for i in range(20)]
            (folder / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
        if stage.kind == "data":
            asked = [
                {"id": str(i), "prompt": f"ask {i}", "response": "gold", "harmful": False, "meta": {}}
                for i in range(20)
            ]
            (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return path


def test_results_hold_each_trial_and_each_cell_with_the_tables_numbers(sweep: Path) -> None:
    frame = safecl.results(sweep)
    assert tuple(frame.columns) == frames.RESULTS
    table = {row["method"]: row for row in rows(Project(load(sweep, [])))}
    cells = frame[frame.seed.isna()]
    for line in cells.itertuples():
        entry = table[line.method]["metrics"][line.metric]
        assert (line.value, line.low, line.high, line.num) == tuple(entry[k] for k in ("value", "low", "high", "num"))
    trials = frame[frame.seed.notna()]
    assert len(trials) == 2 * len(cells) and set(trials.seed) == {0, 1} and set(frame.split) == {"test"}
    one = trials[(trials.method == "sft") & (trials.metric == "utility")].set_index("seed")
    assert one.value.to_dict() == {int(k): v for k, v in table["sft"]["metrics"]["utility"]["seeds"].items()}
    assert (
        all(one.low < one.value)
        and set(one.num) == {20}
        and set(one.better) == {"high"}
        and set(one.unit) == {"fraction"}
    )
    [key] = {keys["weights"] for keys in trials[(trials.method == "sft") & (trials.seed == 1)]["keys"]}
    assert key == table["sft"]["weights"][1]
    assert frame[frame.method == "aligned"].poison.isna().all() and (frame[frame.method == "sft"].poison == 0.1).all()


def test_status_prints_the_keys_that_export_asks_for(sweep: Path) -> None:
    project = Project(load(sweep, []), reads=True)
    table = {row["method"]: row for row in rows(project)}
    shown = {row["cell"].rpartition(" / ")[2]: row["weights"] for row in overview.status(project)}
    assert shown == {"base": "-", **{name: table[name]["weights"][0][:12] for name in ("aligned", "sft")}}


def test_a_sweep_without_a_search_says_nothing_of_one(sweep: Path) -> None:
    project = Project(load(sweep, []), reads=True)
    assert not any("Search" in note for note in facts.facts(project, rows(project)).notes)
    searched = Project(load(sweep, ["methods=[{name: ewc, search: {}}]"]), reads=True)
    assert any("Search: 3 trials" in note for note in facts.facts(searched, rows(searched)).notes)


def test_searched_trials_are_there_on_request_with_what_they_tried(tmp_path: Path) -> None:
    project = Project(load(QUICKSTART, [*SETTINGS[1:], f"execution.root={tmp_path}", "methods.0.name=ewc"]))
    cell = next(cell for cell in project.cells if cell.space is not None)
    study: Any = project.study(cell)
    number, params = study.ask()
    put(project.store, [s for s in cell.trial(params).evidence.metrics.walk()])
    study.tell(number, 0.5, {})
    assert safecl.results(project).empty
    frame = safecl.results(project, searched=True)
    assert set(frame.split) == {"validation"} and set(frame.method) == {"der"} and set(frame.seed) == {1000}
    assert all(given.items() >= params.items() for given in frame.params)


def test_generations_hold_each_answer_beside_its_verdicts(sweep: Path) -> None:
    frame = safecl.generations(sweep)
    assert set(frames.GENERATIONS) < set(frame.columns) and len(frame) == 3 * 2 * 3 * 20  # methods, seeds, sets
    project = Project(load(sweep, []))
    job = next(cell for cell in project.cells if cell.recipe.method == "sft").job({}, 1, "final")
    outcome = (project.outcomes(job) or [])[-1]
    at = f"method == 'sft' and seed == 1 and role == 'utility' and id == '{outcome['id']}'"
    [line] = frame.query(at).to_dict("records")
    assert line[outcome["metric"]] == outcome["value"] and line["set"] == "mini"
    assert (line["prompt"], line["answer"], line["reference"]) == (f"ask {line['id']}", f"answer {line['id']}", "gold")
    assert frame[frame.role == "benign"].asr.isna().all() and set(frame[frame.role == "attack"].asr) == {0.0, 1.0}


def test_what_a_guard_no_better_than_chance_decided_is_left_out_with_a_warning(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "doubt", lambda project, accepted: "THE GUARD IS NO BETTER THAN CHANCE")
    with pytest.warns(UserWarning, match="NO BETTER THAN CHANCE"):
        left = set(safecl.results(sweep).metric)
    with pytest.warns(UserWarning, match="NO BETTER THAN CHANCE"):
        kept = set(safecl.results(sweep, accept_judge=True).metric)
    assert kept - left == {"asr", "asr_coherent"} and "utility" in left


def test_nothing_finished_is_an_empty_frame_and_a_bad_file_one_error(tmp_path: Path) -> None:
    empty = [*SETTINGS, f"execution.root={tmp_path}"]
    assert tuple(safecl.results(QUICKSTART, set=empty).columns) == frames.RESULTS
    assert len(safecl.results(QUICKSTART, set=empty)) == len(safecl.generations(QUICKSTART, set=empty)) == 0
    with pytest.raises(Exception, match=r"no-such\.yaml"):
        safecl.results("no-such.yaml")


def test_the_examples_in_docstrings_are_true(sweep: Path) -> None:
    for function in (frames.results, frames.generations):
        examples = doctest.DocTestFinder(recurse=False).find(function, function.__name__)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        for example in examples:
            runner.run(example)
        assert runner.tries > 1 and runner.failures == 0


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, safecl; assert not {'pandas', 'pydantic', 'yaml', 'safecl.frames'} & set(sys.modules); safecl.results"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"results", "generations"} <= set(dir(safecl)) and facts.doubt is frames.doubt
    with pytest.raises(AttributeError, match="no attribute 'result'"):
        safecl.result  # noqa: B018
