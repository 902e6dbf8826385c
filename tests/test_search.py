"""Searches as the schedule drives them: several trials of one study at once, whatever fails, ends or is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safecl import upkeep
from safecl.grid import Job
from safecl.project import Project, load
from safecl.schedule import Schedule
from tests.made_up import put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def opened(root: Path, *settings: str) -> tuple[Project, Schedule]:
    fixed = ["models.0.dtype=float32", "poison.ratios=[0.1]", "evaluate.judges.asr=keywords", "search.at_once=4"]
    project = Project(load(QUICKSTART, [*fixed, f"execution.root={root}", *settings]))
    upkeep.check_writable(project.store, 0.0)
    return project, project.schedule()


def given(schedule: Schedule) -> Iterator[Job]:
    """All that may be started now."""
    while (job := schedule.next()) is not None:
        yield job


def finish(project: Project, schedule: Schedule, job: Job) -> None:
    wanted = (*job.evidence.targets, *(job.aligned.evidence.targets if job.is_bounded else ()))
    made = {stage.key: stage for target in wanted for stage in target.walk() if not project.store.has(stage)}
    put(project.store, made.values())
    schedule.finish(job, "")


def searched(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.role != "final"]


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
        assert queue.study is not None and queue.chosen
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


def test_a_front_is_printed_plotted_and_run_as_the_rule_says(tmp_path: Path) -> None:
    from safecl.overview import status, write_report
    from safecl.report.facts import readable
    from safecl.report.forms import markdown

    objective = "search.objective={pareto: [utility, asr, over_refusal], bounds: {}, choose: %s}"
    settings = ("search.trials=12", "methods=[sft, {name: der, search: {weight: {low: 0.1, high: 9.0}}}]")
    for rule in ("bounds", "front"):
        project, schedule = opened(tmp_path, objective % rule, *settings)
        num_asked = 0
        while jobs := list(given(schedule)):
            num_asked += len(searched(jobs))
            for job in jobs:
                finish(project, schedule, job)
        assert schedule.is_done and num_asked == (12 if rule == "bounds" else 0)  # another rule asks no trial anew
        rows, facts = readable(Project(project.sweep))
        told = [row for row in rows if row["search"]]
        search = told[0]["search"]
        front = [trial for trial in search["tried"] if trial["is_front"]]
        taken = [trial for trial in search["tried"] if trial["is_taken"]]
        assert 0 < search["hypervolume"] < 1 and len(search["tried"]) == 12 and len(front) > 1
        assert len(told) == len(taken) == (1 if rule == "bounds" else len(front))
        best = max(trial["values"]["utility"] for trial in search["tried"])
        assert taken[0]["values"]["utility"] == best == max(trial["values"]["utility"] for trial in taken)
        text = markdown(rows, facts)
        assert "Front of the search of der, 10 % poison" in text and f"hypervolume {search['hypervolume']:.3f}" in text
        if rule == "front":
            assert [row["method"] for row in told] == [f"der #{i + 1}" for i in range(len(front))]
            assert {row["params"]["weight"] for row in told} == {trial["params"]["weight"] for trial in front}
        assert "der #1" in write_report(Project(project.sweep), tmp_path / rule).read_text() or rule == "bounds"
        assert {row["state"] for row in status(Project(project.sweep))} == {"done"}


@pytest.mark.parametrize(
    ("pareto", "rule", "says"),
    [("[utility, hit_limit]", "bounds", "neither end of it is better"), ("[utility, nonsense]", "bounds", "no metric"),
     ("[asr, over_refusal]", "bounds", "is to be among them")],
)  # fmt: skip
def test_objectives_that_cannot_be_searched_are_refused(tmp_path: Path, pareto: str, rule: str, says: str) -> None:
    with pytest.raises(Exception, match=says):
        opened(tmp_path, f"search.objective={{pareto: {pareto}, choose: {rule}}}")


GRID = "methods=[{name: der, search: {weight: [0.1, 0.3, 1.0, 3.0, 9.0], memory_size: [4, 8, 12, 16]}}]"
BOUNDS = "search.objective.bounds={asr: 0.45, over_refusal: safe + 0.2}"


@pytest.mark.parametrize("order", [1, -1])
def test_pruning_by_bounds_spares_answers_and_chooses_the_same(tmp_path: Path, order: int) -> None:
    chosen = {}
    for prune in ("none", "bounds"):
        settings = (GRID, BOUNDS, "search.sampler=grid", f"search.prune={prune}")
        project, schedule = opened(tmp_path / prune, *settings)
        sizes, roles = [], list[str]()
        while jobs := list(given(schedule)):
            sizes.append(len(searched(jobs)))
            roles += [job.role for job in searched(jobs)]
            for job in jobs[::order]:
                finish(project, schedule, job)
        assert schedule.is_done and max(sizes) <= 4
        [queue] = [queue for queue in schedule.queues if queue.study is not None]
        assert queue.study is not None
        chosen[prune] = queue.chosen[0]
        if prune == "none":
            continue
        num = len(queue.study.pruned)
        assert 0 < num < 20 and len(queue.study.complete()) == 20 - num and queue.study.failures == []
        assert roles.count("search: attack") == 20 > roles.count("search: utility") > roles.count("search") == 20 - num
        pruned = [done for done in schedule.done if done.pruned]
        assert len(pruned) == num and not any(done.error for done in schedule.done) and schedule.missing() == []
        for done in pruned:
            whole = done.job.cell.trial(done.job.params)
            assert not project.store.has(whole.evidence.metrics)
            assert set(project.store.record(done.job.evidence.metrics)["result"]) == {
                *("asr", "asr_coherent", "hit_limit", "non_refusal", "degenerate", "off_topic"),
                *(["utility"] if done.job.role == "search: utility" else []),
            }
        again, replay = opened(tmp_path / prune, *settings)
        assert list(given(replay)) == [] and replay.is_done  # nothing is asked again
        [line] = [line for line in status_of(again) if "pruned" in line]
        assert line == f"{20 - num}/20 ({num} pruned)"
        [note] = [note for cell, _, _, note in again.finals() if cell.space]
        assert f"chosen of {20 - num} trials on validation prompts ({num} more were pruned)" in note
    assert chosen["none"] == chosen["bounds"]


def status_of(project: Project) -> list[str]:
    from safecl.overview import status

    return [row["search"] for row in status(project)]


def test_the_wilcoxon_pruner_sees_a_fourth_of_the_utility_prompts_first(tmp_path: Path) -> None:
    settings = (GRID, BOUNDS, "search.sampler=grid", "search.prune=wilcoxon")
    project, schedule = opened(tmp_path, *settings)
    roles: list[str] = []
    while jobs := list(given(schedule)):
        for job in jobs:
            roles.append(job.role)
            if job.role == "search: pilot":
                [rows] = [stage for name, stage in job.evidence.metrics.inputs.items() if name.endswith(".rows")]
                parts: Any = rows.config["parts"]
                assert parts[0]["num_rows"] == 5  # of 20
            finish(project, schedule, job)
    assert schedule.is_done and roles.count("search: attack") == 20 > roles.count("search: pilot")
    assert roles.count("search: pilot") >= roles.count("search: utility") >= roles.count("search") > 0


def test_worse_is_what_the_test_says_of_the_prompts_that_both_answered() -> None:
    from scipy.stats import wilcoxon

    from safecl.suggest import is_worse

    best = {f"p{i}": 1.0 for i in range(12)}
    for wrong in range(9):
        values = {f"p{i}": float(i >= wrong) for i in range(10)}  # p10 and p11 were not asked
        differences = [values[f"p{i}"] - 1.0 for i in range(10)]
        assert is_worse(values, best) == (
            wrong > 0 and wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue < 0.05
        )
    assert is_worse({f"p{i}": 0.0 for i in range(10)}, best) and not is_worse(best, best) and not is_worse({}, best)


def test_pruning_a_front_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"search\.prune: any trial may yet be on the front"):
        opened(tmp_path, "search.prune=bounds", "search.objective={pareto: [utility, asr]}")


def test_a_trial_whose_reference_was_never_measured_is_run_and_not_put_off_for_ever(tmp_path: Path) -> None:
    """A driver may die when a trial's metrics are there and theta_safe's on the same prompts are not."""
    project, schedule = opened(tmp_path, "search.at_once=1")
    [job] = searched(list(given(schedule)))
    put(project.store, {stage.key: stage for target in job.evidence.targets for stage in target.walk()}.values())
    project, schedule = opened(tmp_path, "search.at_once=1")
    [again] = searched(list(given(schedule)))
    assert again.params == job.params
    finish(project, schedule, again)
    assert not any(done.error for done in schedule.done)
