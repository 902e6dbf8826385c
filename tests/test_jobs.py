"""The jobs of a grid's cells: what they share is built once, and who runs them finds them without a search."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.grid import Cell, cells
from safecl.project import load
from safecl.schedule import Schedule
from safecl.templates import settle
from tests.made_up import finish
from tests.test_cost import QUICKSTART, project


def test_shared_stages_are_those_that_a_graph_of_its_own_builds(tmp_path: Path) -> None:
    """Every field of a recipe changes in turn; with and without sharing all keys are equal."""
    wild = ["tasks.0.num_rows=60", "align.epochs=2", "lora.rank=4", "adapter=stack", "memory_mix=stratified",
            "poison.keep_task_rows=true", "evaluate.max_new_tokens=9", "models.0.bos=true", "seeds=[3]",
            "methods=[{name: magmax}, {name: lwf}, {name: safeinstr}]", "poison.ratios=[0.2]"]  # fmt: skip
    grids = [cells(settle(load(QUICKSTART, ["models.0.dtype=bfloat16", setting])).sweep) for setting in wild]
    mixed = grids[0][0].shared
    for grid in grids:
        for cell in grid:
            alone = cell.job({}, cell.recipe.seed, "final").evidence
            together = (
                Cell(cell.recipe, cell.space, mixed, cell.search_seeds).job({}, cell.recipe.seed, "final").evidence
            )
            assert [s.key for s in alone.targets] == [s.key for s in together.targets]


def test_equal_recipes_of_a_sweep_hold_the_same_stages_not_equal_ones(tmp_path: Path) -> None:
    found = [cell.job({}, 0, "final").graph for cell in project(tmp_path).cells]
    assert len({id(graph.theta_safe) for graph in found}) == 1
    assert len({id(graph.user_rows) for graph in found[2:]}) == 2  # by poison ratio


def test_one_job_for_the_same_values(tmp_path: Path) -> None:
    cell = project(tmp_path).cells[-1]
    assert cell.job({"weight": 1.0, "memory_size": 10}, 0, "search") is cell.job(
        {"memory_size": 10, "weight": 1.0}, 0, "search"
    )
    assert cell.job({}, 0, "search") is not cell.job({}, 0, "final")


def test_a_job_in_another_process_has_the_same_stages(tmp_path: Path) -> None:
    import pickle

    job = project(tmp_path).cells[-1].job({"weight": 2.0}, 0, "search")
    keys = [stage.key for stage in job.evidence.targets]
    text = pickle.dumps(job)
    assert len(text) < 20_000  # values, not what was derived of them
    again = pickle.loads(text)
    assert [stage.key for stage in again.evidence.targets] == keys
    assert again.aligned.evidence.metrics.key == job.aligned.evidence.metrics.key


def test_finishing_a_job_finds_its_queue_without_comparing_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path, "methods=[{name: sft}]")
    finish(found)
    monkeypatch.setattr(Cell, "__eq__", lambda self, other: self is other or pytest.fail("compared"))
    schedule = Schedule(found.sweep, found.store, found.cells, lambda cell: None)
    assert schedule.next() is None and schedule.is_done and len(schedule.done) == len(found.cells)


def test_searches_begin_first_and_results_are_told_in_the_tables_order(tmp_path: Path) -> None:
    """The quickstart's DER is searched: a chain of four trials, where SFT has one."""
    schedule = project(tmp_path).schedule()
    given = []
    while (job := schedule.next()) is not None:
        given.append(job.cell.recipe.method)
    assert given == ["der", "der", "base", "aligned", "sft", "sft"]
    assert [queue.cell.recipe.method for queue in schedule.queues] == ["base", "aligned", "sft", "der", "sft", "der"]
