"""Another bound or objective: what is chosen changes, and no trial is run. And a search whose study is not here: the store
tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from safecl import cli, keep
from safecl.project import Project, load
from safecl.store import Stage, below
from safecl.study import Past
from safecl.watch import RUN
from tests import made_up
from tests.made_up import DER, QUICKSTART

SETTINGS = [f"methods=[{DER}]", "poison.ratios=[0.1]", "search.trials=6", "models.0.dtype=float32",
            "evaluate.judges.asr=keywords", "search.sampler=random"]  # fmt: skip
LOOSE, TIGHT = "search.objective.bounds={asr: 1.0}", "search.objective.bounds={asr: 0.0}"


def opened(root: Path, *settings: str, reads: bool = True) -> Project:
    return Project(load(QUICKSTART, [*SETTINGS, f"execution.root={root}", *settings]), reads=reads)


def searched(project: Project) -> Any:
    [cell] = [cell for cell in project.cells if cell.space is not None]
    return cell


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of a sweep whose search was told the numbers that its store holds."""
    made = opened(tmp_path / "runs", LOOSE, reads=False)
    schedule_all(made)
    return tmp_path / "runs"


def schedule_all(project: Project, at_most: int = 1000) -> int:
    """Runs what is missing as a driver would, by making it up; gives how many jobs had to run."""
    project.store.local.mkdir(parents=True, exist_ok=True)
    schedule, num = project.schedule(), 0
    while num < at_most and (job := schedule.next()) is not None:
        num += 1
        stages = below([job.evidence.metrics, job.aligned.evidence.metrics], project.store.has)
        made_up.put(project.store, stages)
        schedule.finish(job, "")
    return num


def test_a_tighter_bound_chooses_another_finished_trial_and_nothing_is_written(root: Path) -> None:
    loose, tight = opened(root, LOOSE), opened(root, TIGHT)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    first, second = (project.past(searched(project)) for project in (loose, tight))
    assert first is not None and second is not None and first.is_done and second.is_done
    assert [trial.params for trial in first.complete()] == [trial.params for trial in second.complete()]
    assert all(trial.feasible for trial in first.complete())
    for one, other in zip(first.complete(), second.complete(), strict=True):
        assert other.value == one.value and other.violations["asr"] == pytest.approx(one.violations["asr"] + 1)
    [(_, params, jobs, note)] = [final for final in tight.finals() if final[0] is searched(tight)]
    assert params in [trial.params for trial in second.complete()] and len(jobs) == 1 and "of 6 trials" in note
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_run_with_another_bound_tells_its_study_of_the_same_trials_and_runs_none(root: Path) -> None:
    again = opened(root, TIGHT, reads=False)
    assert schedule_all(again) <= 1  # the final trial, if another was chosen
    read = opened(root, TIGHT)
    cell = searched(read)
    past = read.past(cell)
    assert past is not None and past.is_done and len(past.complete()) == 6
    assert {trial.params["weight"] for trial in past.complete()} == {
        trial.params["weight"]
        for trial in opened(root, LOOSE).past(searched(opened(root, LOOSE))).complete()  # type: ignore[union-attr]
    }


def test_more_trials_run_only_what_is_new_and_another_space_takes_what_it_holds(root: Path) -> None:
    more = opened(root, TIGHT, "search.trials=8")
    past = more.past(searched(more))
    assert past is not None and not past.is_done and len(past.complete()) == 6  # two are still to be asked
    assert schedule_all(opened(root, TIGHT, "search.trials=8", reads=False)) in (2, 3)
    narrow = DER.replace("30.0", "1.5")
    other = opened(root, TIGHT, f"methods=[{narrow}]")
    from safecl.storage import open_to_read
    from safecl.study import elsewhere

    found = elsewhere(searched(other), other.sweep, open_to_read(other.study_url))
    assert found and all(0.1 <= params["weight"] <= 1.5 for params in found)  # type: ignore[operator]


@pytest.mark.parametrize(
    "how", [["search.sampler=tpe"], ["search.sampler=tpe", "search.at_once=2", "search.prune=wilcoxon"]]
)
def test_a_search_whose_study_is_not_here_is_read_from_the_store_alone(tmp_path: Path, how: list[str]) -> None:
    schedule_all(opened(tmp_path, *how, reads=False))
    known = opened(tmp_path, *how)
    study = known.past(searched(known))
    assert study is not None and study.is_done and not getattr(study, "is_replayed", False)
    needed, rows = keep.needed([known]), [(params, note) for _, params, _, note in known.finals()]
    (tmp_path / "study.db").unlink()
    read = opened(tmp_path, *how)
    past = read.past(searched(read))
    assert isinstance(past, Past) and past.is_replayed and past.is_done
    assert past.complete() == study.complete() and past.pruned == study.pruned
    assert [(params, note) for _, params, _, note in read.finals()] == rows and keep.needed([read]) == needed
    assert not (tmp_path / "study.db").exists()


def test_of_a_search_that_another_machine_is_at_gc_removes_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = opened(tmp_path / "there", "search.sampler=tpe", reads=False)
    schedule_all(there, at_most=5)
    for path in there.store.local.glob("store/*/*/record.json"):
        name = f"/chosen-anew/records/{path.parent.parent.name}/{path.parent.name}.json"
        fsspec.filesystem("memory").pipe_file(name, path.read_bytes())
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "here"))
    settings = [*SETTINGS, "execution.root=memory://chosen-anew", "search.sampler=tpe"]
    read = Project(load(QUICKSTART, settings), reads=True)
    past = read.past(searched(read))
    assert isinstance(past, Past) and past.is_replayed and not past.is_done and past.complete()
    assert keep.unseen([read]) == []  # no run has left a note: nothing is at work on it
    read.store.note(f"{RUN}far-1", {"sweep": "quickstart", "began": 1.0})
    assert keep.unseen([read]) == ["quickstart"]
    made_up.put(read.store, [Stage("data", {"of": "another sweep"})])
    before = keep.stages(read.store)
    said = CliRunner().invoke(
        cli.app, ["gc", str(QUICKSTART), *(x for each in settings for x in ("--set", each)), "--yes"]
    )
    assert said.exit_code == 0 and "stages stay: what sweep 'quickstart' searches is not finished" in said.stdout
    assert keep.stages(read.store) == before
