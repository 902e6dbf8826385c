"""N, p and m are what was trained on: a plan knows them from data and tokenizer alone, and refuses what cannot hold."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from safecl import trained
from safecl.base import ConfigError
from safecl.config import Execution
from safecl.overview import _plan_notes, plan
from safecl.project import Project, load
from safecl.stages import data, finetune
from safecl.store import Context, Stage
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.trained import Preview, notes, recorded
from safecl.training import batches
from safecl.training.run import Memory
from tests.made_up import finish

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def project(root: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [f"execution.root={root}", *settings]))


def made(stage: Stage, preview: Preview, root: Path) -> dict[str, Any]:
    """The facts of a data stage that is really run, on inputs of the preview."""
    inputs: dict[str, Path] = {}
    for name, below in stage.inputs.items():
        inputs[name] = root / below.key
        inputs[name].mkdir(exist_ok=True)
        if name == "tokenizer":
            inputs[name] = trained.tokenizer_folder(below)
        else:
            found = preview.rows(below)
            assert found is not None
            lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in found.rows)
            (inputs[name] / "rows.jsonl").write_text(lines)
    out = root / "out"
    out.mkdir()
    return data.run(Context(stage, inputs, out, out, Execution(), lambda *_: None))


def test_what_a_plan_says_is_what_the_stage_makes(tmp_path: Path) -> None:
    found = project(tmp_path / "runs", "tasks.0.max_tokens=34", "tasks.0.num_rows=40")
    cell = next(cell for cell in found.cells if cell.label.endswith("p=0.1 / der"))
    preview = Preview(found.store, None)
    facts = made(cell.job({}, 0, "final").graph.user_rows, preview, tmp_path)
    told = found.expected[cell.label]
    assert told == trained.of(facts, 20) and (told.rows, told.poison_rows) == (40, 4)
    assert told.too_long and told.cut_prompts == facts["cut_prompts"]
    text = plan(found)
    assert text["trained"][cell.label] == told._asdict()
    long = next(line for line in text["notes"] if line.startswith("Rows too long for max_tokens, passed over"))
    assert f"mini p=0.1 {told.too_long['mini/poison']} of mini/poison" in long
    assert any("template of smollm2-135m: '<|im_start|>user" in line for line in text["notes"])
    assert not (tmp_path / "runs").exists()  # reading writes nothing


def test_a_plan_refuses_what_cannot_hold_all_at_once(tmp_path: Path) -> None:
    both = ["poison.ratios=[0.1]", "methods.1.search=null"]
    with pytest.raises(ConfigError) as caught:
        plan(project(tmp_path, *both, "tasks.0.max_tokens=8", "methods.1.config={memory_size: 500}"))
    text = str(caught.value)
    assert "task 'mini', split 'user': 72 rows are asked for" in text and "longer than max_tokens = 8" in text
    assert "der: a memory of 500 rows is asked for, the safety rows hold" in text
    searched = project(tmp_path, "poison.ratios=[0.1]", "methods.1.search={memory_size: [20, 400]}")
    with pytest.raises(ConfigError, match="a memory of 400 rows is asked for"):  # what a search may ask for counts
        _ = searched.expected


def test_a_plan_refuses_what_the_rows_cannot_give_later_and_reads_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    whole = trained.compose
    monkeypatch.setattr(trained, "compose", lambda *args: calls.append(args[0]["role"]) or whole(*args))
    stratified = project(tmp_path, "memory_mix=stratified", "methods=[{name: der, config: {memory_size: 5000}}]")
    with pytest.raises(ConfigError, match="a memory of 5000 rows is asked for, the safety rows hold 600 rows"):
        _ = stratified.expected
    calls.clear()
    monkeypatch.setattr("safecl.check._read", lambda *_: None)
    methods = "methods=[{name: der, config: {memory_size: 10}}, {name: agem, config: {memory_size: 10}}]"
    with pytest.raises(ConfigError, match=r"split 'attack\.test': 4000 rows are asked for"):
        _ = project(tmp_path, methods, "evaluate.test.attack.0.num_rows=4000", "tasks.0.max_tokens=8").expected
    assert calls.count("attack.test") == 1 and calls.count("user") == 2  # of each ratio


def test_a_plan_says_what_the_alignment_leaves_out(tmp_path: Path) -> None:
    settings = ("methods=[{name: sft}]", "align.max_tokens=34", "align.safety.0.num_rows=")
    [long] = [line for line in _plan_notes(project(tmp_path, *settings)) if line.startswith("Rows too long")]
    assert re.search(r": alignment \d+ of mini/safety", long)


def test_a_guards_rows_that_do_not_fit_say_what_would(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = project(tmp_path, "methods=[{name: sft}]", "evaluate.judges.guard.max_tokens=50").expected
    found = re.search(
        r"in pairs of both labels .*ask for at most (\d+), or raise max_tokens to (\d+)", str(caught.value)
    )
    assert found is not None and int(found[1]) < 128 and int(found[2]) > 50
    assert project(tmp_path, "methods=[{name: sft}]", f"evaluate.judges.guard.max_tokens={found[2]}").expected


def test_every_data_stage_is_made_once_however_many_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = trained.compose
    monkeypatch.setattr(trained, "compose", lambda *args: calls.append(1) or whole(*args))
    methods = "methods=[{name: sft}, {name: lwf}, {name: magmax}, {name: ewc}, {name: agem, config: {memory_size: 9}}]"
    found = project(tmp_path, methods, "seeds=[0, 1, 2, 3, 4, 5, 6, 7]")
    assert len(found.expected) == 11
    graphs = [cell.job({}, 0, "final").graph for cell in found.cells[2:]]
    tops = [graph.evidence("test").metrics for graph in graphs]
    stages = {stage.key for top in tops for stage in top.walk() if stage.kind == "data"}
    assert len(calls) <= len(stages)


def test_a_damaged_data_stage_is_made_up_anew(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: sft}]")
    stages = found.cells[2].job({}, 0, "final").graph.user_rows.walk()
    for stage in stages:
        if stage.kind == "data":
            folder = found.store.new_folder()
            (folder / "rows.jsonl").write_text("{}")
            (found.store.publish(stage, folder, {}, 1.0) / "rows.jsonl").write_text("")
    assert found.expected[found.cells[2].label] is not None


def test_a_finished_sweep_reads_no_data_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = project(tmp_path, "methods=[{name: sft}, {name: der}]")
    finish(found)
    monkeypatch.setattr(trained, "compose", lambda *_: pytest.fail("read again"))
    assert found.expected == {}


def test_what_was_trained_is_read_from_records(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: sft}, {name: der, config: {memory_size: 20}}]")
    job = found.cells[3].job({}, 0, "final")
    assert recorded(job, found.store) is None
    user = {
        "num_rows": 72,
        "num_poison": 7,
        "poison_tokens": 0.5,
        "cut_prompts": 3,
        "too_long": {"mini/user": 0, "a/b": 2},
    }
    for stage, result in (
        (job.graph.user_rows, user),
        (job.graph.tuned, {"rows": 91, "dropped": 1, "memory_rows": 20, "poison_rows": 6, "cut_prompts": 2}),
    ):
        found.store.publish(stage, found.store.new_folder(), result, 1.0)
    told = recorded(job, found.store)
    assert told == {
        "rows": 72, "poison_rows": 6, "poison_tokens": 0.5, "too_long": {"a/b": 2}, "cut_prompts": 2, "memory_rows": 20,
        "trained_rows": 91, "left_out": 1, "filtered": 0, "filtered_poison": 0,
    }  # fmt: skip
    assert notes([("mini p=0.1", 0.1, told), ("mini p=0.1", 0.1, told)]) == [
        "Poison's share of the rows: mini p=0.1 6 of 91 (6.6%).",
        "Rows too long for max_tokens, passed over: mini p=0.1 2 of a/b.",
        "Requests cut to fit max_tokens (inside the template): mini p=0.1 2 of 91.",
        "Rows left out in training: mini p=0.1 1.",
    ]
    less = {
        **told,
        "filtered": 9,
        "filtered_poison": 5,
        "trained_rows": 62,
        "too_long": {},
        "cut_prompts": 0,
        "left_out": 0,
    }
    assert notes([("mini p=0.1", 0.1, less)])[1:] == [
        "User rows that a method filtered: mini p=0.1 9 of 72, 5 of them poison; trained on 62 rows."
    ]
    as_asked = {**told, "poison_rows": 8, "trained_rows": 80, "too_long": {}, "cut_prompts": 0, "left_out": 0}
    assert notes([("mini p=0.1", 0.1, as_asked)]) == []


def test_memory_rows_are_trained_on_whatever_the_tasks_own_limit(world: World) -> None:
    """They were dropped where they were longer than the task's rows may be, down to none: SafeInstr was SFT."""
    settings = contract.config("safeinstr", memory_size=8)
    inputs = world.inputs("safeinstr")
    kept = Memory.load(world.memory).rows
    limit = min(len(row.ids) for row in kept[:8]) + 1
    settings["training"]["max_tokens"] = limit
    run = finetune.make_run(settings, inputs, contract.execution()).run
    assert sum(len(row.ids) > limit for row in kept[:8]) >= 5  # else this tests nothing
    found = {row.row_id: row.ids for row in run.rows}
    assert [found[row.row_id] for row in kept[:8]] == [row.ids for row in kept[:8]]
    user = {row.id for row in batches.read_rows(world.user)}
    assert all(len(row.ids) <= limit for row in run.rows if row.row_id in user)


def test_rows_that_are_on_the_hub_still_are_not_fetched_by_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "safecl.graph.rows.identity", lambda task, split, folder, planned=False: {"hub": "a/b", "revision": "c"}
    )
    monkeypatch.setattr(trained, "compose", lambda *_: pytest.fail("fetched"))
    found = plan(project(tmp_path, "methods=[{name: sft}]"))
    assert set(found["trained"].values()) == {None}
    assert "what 3 cells are trained on is known once their data is here, which is on the hub" in found["notes"]
