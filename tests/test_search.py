"""Searches as the schedule drives them: several trials of one study at once, whatever fails, ends or is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safecl.grid import Job
from safecl.project import Project, load
from safecl.schedule import Schedule
from tests.made_up import put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def opened(root: Path, *settings: str) -> tuple[Project, Schedule]:
    fixed = ["models.0.dtype=float32", "poison.ratios=[0.1]", "evaluate.judges.asr=keywords", "search.at_once=4"]
    project = Project(load(QUICKSTART, [*fixed, f"execution.root={root}", *settings]))
    project.store.check_writable(0.0)
    return project, project.schedule()


def given(schedule: Schedule) -> Iterator[Job]:
    """All that may be started now."""
    while (job := schedule.next()) is not None:
        yield job


def finish(project: Project, schedule: Schedule, job: Job) -> None:
    wanted = (*job.evidence.targets, *(job.aligned.evidence.targets if job.role == "search" else ()))
    made = {stage.key: stage for target in wanted for stage in target.walk() if not project.store.has(stage)}
    put(project.store, made.values())
    schedule.finish(job, "")


def searched(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.role == "search"]


def trials(project: Project) -> list[Any]:
    [study] = [queue.study for queue in project.schedule().queues if queue.study is not None]
    found: list[Any] = study._study.trials  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("order", [1, -1])
def test_so_many_trials_of_a_study_run_at_once_in_batches_and_their_order_is_nothing(
    tmp_path: Path, order: int
) -> None:
    chosen = []
    for root, turn in ((tmp_path / "a", 1), (tmp_path / "b", order)):
        project, schedule = opened(root, "search.trials=10")
        under_way, sizes = [], []
        while jobs := list(given(schedule)):
            under_way = searched(jobs)
            sizes += [len(under_way)] if under_way else []
            for job in jobs[::turn]:
                finish(project, schedule, job)
        assert sizes == [4, 4, 2] and schedule.is_done
        [queue] = [queue for queue in schedule.queues if queue.study is not None]
        assert queue.study is not None and queue.chosen is not None
        chosen.append((queue.study.complete(), queue.chosen))
    assert chosen[0] == chosen[1]


def test_a_fault_of_the_machine_ends_no_other_trial_of_its_batch(tmp_path: Path) -> None:
    project, schedule = opened(tmp_path, "search.trials=8")
    jobs = list(given(schedule))
    first, second, third, fourth = searched(jobs)
    schedule.finish(second, "a node was lost", "infrastructure")
    assert schedule.next() is None  # its search waits
    schedule.finish(first, "the loss is NaN", "trial")
    for job in (fourth, third):
        finish(project, schedule, job)
    for job in jobs:
        if job.role == "final":
            finish(project, schedule, job)
    assert schedule.is_done
    assert [line for line in schedule.missing() if "der" in line] == [
        f"smollm2-135m / mini / p=0.1 / der (search, {_text(second)}): a node was lost"
    ]
    told = [trial.state.name for trial in trials(project)]
    assert told == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "WAITING"]  # the last is the second's copy
    project, schedule = opened(tmp_path, "search.trials=8")
    [again] = searched(list(given(schedule)))
    assert again.params == second.params and again is not second
    finish(project, schedule, again)
    assert len(searched(list(given(schedule)))) == 4
    [study] = [queue.study for queue in schedule.queues if queue.study is not None]
    assert study.failures == ["the loss is NaN"] and [trial.number for trial in study.complete()] == [1, 2, 3]


def _text(job: Job) -> str:
    from safecl.store import canonical

    return canonical(job.params)


def test_a_run_that_stops_leaves_no_trial_running_and_the_next_asks_the_same(tmp_path: Path) -> None:
    project, schedule = opened(tmp_path, "search.trials=8")
    first = searched(list(given(schedule)))
    finish(project, schedule, first[2])
    schedule.close()
    schedule.close()
    assert "RUNNING" not in {trial.state.name for trial in trials(project)}
    project, schedule = opened(tmp_path, "search.trials=8")
    again = searched(list(given(schedule)))
    assert [job.params for job in again] == [first[i].params for i in (0, 1, 3)]
    del schedule  # a driver that was killed closes nothing
    project, schedule = opened(tmp_path, "search.trials=8")
    assert [job.params for job in searched(list(given(schedule)))] == [first[i].params for i in (0, 1, 3)]


def test_two_trials_of_one_batch_that_are_one_configuration_run_once_and_are_both_told(tmp_path: Path) -> None:
    project, schedule = opened(
        tmp_path,
        "search.trials=8",
        "methods=[{name: der, search: {memory_size: [100, 20]}, config: {memory_size: 20}}]",
    )
    given_out: list[str] = []
    while jobs := list(given(schedule)):
        given_out += [_text(job) for job in searched(jobs)]
        for job in jobs:
            finish(project, schedule, job)
    assert sorted(given_out) == sorted(set(given_out)) and len(given_out) <= 2
    assert [trial.state.name for trial in trials(project)] == ["COMPLETE"] * 8


def test_a_grid_runs_as_many_points_as_it_may_and_waits_for_no_batch(tmp_path: Path) -> None:
    grid = "methods=[{name: der, search: {weight: [0.5, 1.0], memory_size: [4, 8, 12]}}]"
    project, schedule = opened(tmp_path, grid, "search.sampler=grid", "search.at_once=3")
    jobs = searched(list(given(schedule)))
    assert len(jobs) == 3
    finish(project, schedule, jobs[1])
    more = searched(list(given(schedule)))
    assert len(more) == 1  # the next one, at once
    for job in (*more, jobs[0], jobs[2]):
        finish(project, schedule, job)
    rest = searched(list(given(schedule)))
    assert len({_text(job) for job in (*jobs, *more, *rest)}) == 6
