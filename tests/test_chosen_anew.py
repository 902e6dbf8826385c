"""Another bound or objective: what is chosen changes, and no trial is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safecl.project import Project, load
from safecl.store import below
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


def schedule_all(project: Project) -> int:
    """Runs what is missing as a driver would, by making it up; gives how many jobs had to run."""
    project.store.local.mkdir(parents=True, exist_ok=True)
    schedule, num = project.schedule(), 0
    while (job := schedule.next()) is not None:
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
    assert more.past(searched(more)) is None  # two are still to be asked
    assert schedule_all(opened(root, TIGHT, "search.trials=8", reads=False)) in (2, 3)
    narrow = DER.replace("30.0", "1.5")
    other = opened(root, TIGHT, f"methods=[{narrow}]")
    from safecl.storage import open_to_read
    from safecl.study import elsewhere

    found = elsewhere(searched(other), other.sweep, open_to_read(other.study_url))
    assert found and all(0.1 <= params["weight"] <= 1.5 for params in found)  # type: ignore[operator]
