"""What a sweep file can vary: sizes as shares, rows of a grid, names, counts by kind and by task, schedules, searched grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Training
from safecl.dtypes import resolved
from safecl.grid import Cell, cells
from safecl.overview import plan
from safecl.project import Project, load
from safecl.study import CellStudy, name_of
from safecl.templates import settle
from safecl.training import loop

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
TWO_TASKS = "tasks=[{task: mini, num_rows: 200}, {task: mini, num_rows: 40}]"


def grid(*settings: str) -> dict[str, Cell]:
    changes = ["models.0.name=m", "poison.ratios=[0.1]", *settings]
    sweep = settle(resolved(load(QUICKSTART, changes), "bfloat16")).sweep
    return {
        cell.label.removeprefix("m / "): cell for cell in cells(sweep) if cell.recipe.method not in ("base", "aligned")
    }


def refused(tmp_path: Path, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Project(load(QUICKSTART, [f"execution.root={tmp_path}", *settings]))
    return str(caught.value)


def test_a_share_is_that_of_each_tasks_rows_and_shares_the_stages_of_the_number() -> None:
    found = grid(TWO_TASKS, "methods=[{name: der, config: {memory_size: 5%}}]")
    assert [cell.recipe.params["memory_size"] for cell in found.values()] == [10, 2]
    share, number = (
        grid(TWO_TASKS, f"methods=[{{name: der, config: {{memory_size: {size}}}}}]")["mini num_rows=200 / p=0.1 / der"]
        for size in ("5%", "10")
    )
    assert share.key == number.key
    assert share.job({}, 0, "final").graph.tuned.key == number.job({}, 0, "final").graph.tuned.key
    [searched] = grid("methods=[{name: der, search: {memory_size: [10%, 0.1%, 250]}}]").values()
    assert searched.space == {"memory_size": [7, 1, 250]}  # of 72 rows


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "[{name: der, config: {memory_size: 0.05}}]",
            "methods[0].config.memory_size: Input should be a valid integer",
        ),
        (
            "[{name: der, config: {memory_size: 5 percent}}]",
            "methods[0].config.memory_size: Input should be a valid integer",
        ),
        ("[{name: der, config: {weight: 5%}}]", "methods[0].config.weight: Input should be a valid number"),
        ("[{name: der, label: sft}, {name: sft}]", "methods[0].label: 'sft' names two entries"),
        ("[{name: der, label: a/b}]", "methods.0.label"),
        (
            "[{name: der, label: aligned}]",
            "methods[0].label: 'aligned' is what the tables call a model without a finetune",
        ),
        ("[{name: der, grid: {memory_size: [50%, 36]}}]", "or is another way to write one number of rows"),
        ("[{name: der, grid: {weight: []}}]", "methods.0.grid.weight"),
        ("[{name: der, grid: {wight: [1.0]}}]", "methods[0].config.wight: unknown key. Did you mean 'weight'?"),
        (
            "[{name: der, grid: {weight: [1.0, -1.0]}}]",
            "methods[0].config.weight: Input should be greater than or equal",
        ),
        (
            "[{name: der, config: {weight: 2.0}, grid: {weight: [1.0]}}]",
            "methods[0].grid.weight: stands in `config` too",
        ),
        ("[{name: der, grid: {weight: [1.0, 1.0]}}]", "methods: names der twice"),
    ],
)
def test_what_is_no_size_name_or_grid_is_refused(methods: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, f"methods={methods}")


def test_a_share_of_all_there_is_needs_the_number(tmp_path: Path) -> None:
    said = refused(tmp_path, "methods=[{name: der, config: {memory_size: 5%}}]", "tasks.0.num_rows=null")
    assert said == "methods[0].config: 5% of the rows of mini: how many those are is not given (num_rows: null)"


def test_each_combination_of_a_grid_is_a_row_that_prints_what_differs() -> None:
    found = grid(
        "methods=[{name: sft}, {name: der, config: {memory_batch_size: 3}, grid: {weight: [1.0, 3.0], memory_size: [4, 8]}}]"
    )
    assert list(found) == [
        "mini / p=0.1 / sft",
        *(f"mini / p=0.1 / der weight={w}, memory_size={m}" for w in ("1.0", "3.0") for m in (4, 8)),
    ]
    params: Any = [cell.recipe.params for cell in found.values()]
    assert params[1:] == [{"memory_batch_size": 3, "weight": w, "memory_size": m} for w in (1.0, 3.0) for m in (4, 8)]
    plain = grid("methods=[{name: der, config: {memory_batch_size: 3, weight: 3.0, memory_size: 8}}]")
    assert plain["mini / p=0.1 / der"].key == found["mini / p=0.1 / der weight=3.0, memory_size=8"].key


def test_entries_of_one_method_may_have_names_and_no_name_enters_a_key() -> None:
    named = "{name: der, label: DER}, {name: der, label: DER (m = 1 %), config: {memory_size: 1}}"
    found = grid(
        f"methods=[{{name: sft, label: SFT}}, {named}, {{name: lwf, label: LwF, grid: {{weight: [1.0, 2.0]}}}}]"
    )
    assert [label.rpartition(" / ")[2] for label in found] == [
        "SFT",
        "DER",
        "DER (m = 1 %)",
        "LwF weight=1.0",
        "LwF weight=2.0",
    ]
    assert found["mini / p=0.1 / SFT"].key == grid("methods=[{name: sft}]")["mini / p=0.1 / sft"].key


def test_a_grid_is_searched_point_by_point_whatever_dies(tmp_path: Path) -> None:
    [cell] = grid(
        "methods=[{name: der, search: {weight: [0.5, 1.0], memory_size: [4, 8, 12]}}]", "search.sampler=grid"
    ).values()
    assert cell.num_trials == 6 and cell.space is not None
    wanted = [{"memory_size": m, "weight": w} for m in (4, 8, 12) for w in (0.5, 1.0)]
    url = f"sqlite:///{tmp_path}/study.db"

    def opened() -> CellStudy:
        return CellStudy("grid", cell.space or {}, cell.defaults, url, 0, cell.num_trials, "grid")

    study, asked = opened(), []
    for _ in range(2):
        number, params = study.ask()
        study.tell(number, 0.0, {})
        asked.append(params)
    study.ask()  # its driver dies
    study = opened()
    assert study.repair() == 1
    while study.remaining:
        number, params = study.ask()
        study.tell(number, 0.0, {})
        asked.append(params)
    assert sorted(asked, key=str) == sorted(wanted, key=str) and study.is_done
    sweeps = [load(QUICKSTART, [f"search.sampler={sampler}"]) for sampler in ("tpe", "random", "grid")]
    names = [name_of(cell, sweep) for sweep in sweeps]
    assert names[0] == names[1] != names[2]  # what another sampler has asked leaves no point of a grid out
    far = "methods=[{name: der, search: {weight: [0.5, 2.0], memory_size: [4, 8]}}]"  # the defaults are none of its points
    found = plan(
        Project(load(QUICKSTART, [f"execution.root={tmp_path}", far, "search.sampler=grid", "poison.ratios=[0.1]"]))
    )
    tuned = found["stages"]["finetune"]
    counts = (tuned["to run"], tuned["later"], found["cells"][-1]["trials"])
    assert counts == (1 + 3 + 4, 1, 4 + 1)  # the alignment, guards and points; a final trial; points and final
    assert "does not hold the default" in refused(tmp_path, far)
    said = refused(tmp_path, "methods=[{name: der, search: {}}]", "search.sampler=grid")
    assert "methods[0].search.weight: a grid is of lists of values (search.sampler: grid)" in said


def test_a_task_may_have_its_own_number_of_utility_prompts() -> None:
    tasks = "tasks=[{task: mini, num_rows: 200, utility_rows: {test: 7}}, {task: mini, num_rows: 40}]"
    found = []
    for cell in grid(tasks, "methods=[{name: sft}]").values():
        for role in ("search", "final"):
            rows: Any = cell.job({}, 0, role).evidence.metrics.inputs["utility.mini.rows"].config
            found.append((rows["role"], rows["parts"][0]["num_rows"]))
    assert found == [("utility.validation", 20), ("utility.test", 7), ("utility.validation", 20), ("utility.test", 40)]
    assert load(QUICKSTART, [tasks], limit=5).tasks[0].utility_rows.test == 5  # type: ignore[union-attr]


def test_rows_are_counted_by_kind(tmp_path: Path) -> None:
    from tests.stages.test_data import config, part, run

    counted = {**part("mini", "safety", 30), "kinds": {"harmful": 20, "benign": 10}}
    facts, rows, _ = run(tmp_path / "a", config(counted))
    assert (sum(row.harmful for row in rows), len(rows), facts["num_rows"]) == (20, 30, 30)
    assert facts["parts"] == {"mini/safety harmful": 20, "mini/safety benign": 10}
    _, more, _ = run(tmp_path / "b", config({**counted, "kinds": {"harmful": 25, "benign": 10}}))
    assert {row.id for row in rows} < {row.id for row in more}  # prefixes, as other counts are
    with pytest.raises(ConfigError, match="split 'safety benign': 9000 rows are asked for"):
        run(tmp_path / "c", config({**counted, "kinds": {"harmful": 1, "benign": 9000}}))
    sweep = load(QUICKSTART, ["align.safety=[{task: mini, num_harmful: 20, num_benign: 10}]"])
    assert sweep.align.safety[0].kinds == {"harmful": 20, "benign": 10} and sweep.align.safety[0].total == 30
    small = load(QUICKSTART, ["align.safety=[{task: mini, num_harmful: 20, num_benign: 10}]"], limit=8).align.safety[0]
    assert (small.kinds, small.num_rows) == ({"harmful": 4, "benign": 4}, None)
    [cell] = grid("align.safety=[{task: mini, num_harmful: 20, num_benign: 10}]", "methods=[{name: sft}]").values()
    [stage] = [s for s in cell.job({}, 0, "final").evidence.metrics.walk() if s.config.get("role") == "safety"]
    parts: Any = stage.config["parts"]
    assert (parts[0]["num_rows"], parts[0]["kinds"]) == (30, {"harmful": 20, "benign": 10})
    with pytest.raises(ConfigError, match=r"guard\.rows: a guard's rows come in pairs of both labels: give `num_rows`"):
        load(QUICKSTART, ["evaluate.judges.guard.rows=[{task: mini, num_harmful: 20, num_benign: 20}]"])
    with pytest.raises(ConfigError, match="give `num_rows`, or `num_harmful` and `num_benign`, not both"):
        load(QUICKSTART, ["align.safety=[{task: mini, num_rows: 9, num_harmful: 5}]"])


def test_settings_that_came_later_stay_out_of_every_key_at_their_default() -> None:
    methods, late = (
        "methods=[{name: der}]",
        "schedule: cosine, min_rate: 0.1, warmup_from_zero: false, utility_rows: null",
    )
    plain, said = (
        grid(methods, f"tasks=[{{task: mini, num_rows: 72{more}}}]")["mini / p=0.1 / der"] for more in ("", f", {late}")
    )
    assert plain.key == said.key
    assert plain.job({}, 0, "final").evidence.metrics.key == said.job({}, 0, "final").evidence.metrics.key
    for one in ("schedule: linear", "warmup_from_zero: true"):
        other = grid(methods, f"tasks=[{{task: mini, num_rows: 72, {one}}}]")["mini / p=0.1 / der"]
        assert other.job({}, 0, "final").graph.tuned.key != plain.job({}, 0, "final").graph.tuned.key


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("cosine", "cosine"),
        ("linear", "linear"),
        ("constant", "constant_with_warmup"),
        ("cosine_with_min_lr", "cosine_with_min_lr"),
    ],
)
@pytest.mark.parametrize(("num_steps", "ratio"), [(40, 0.1), (7, 0.3), (5, 0.0)])
def test_schedules_are_hugging_faces_step_by_step(ours: Any, theirs: str, num_steps: int, ratio: float) -> None:
    import math

    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    own = {"min_lr_rate": 0.25} if ours == "cosine_with_min_lr" else {}
    warm = math.ceil(ratio * num_steps)  # transformers.TrainingArguments.get_warmup_steps
    reference: Any = get_scheduler(theirs, optimizer, warm, num_steps, scheduler_specific_kwargs=own)
    least = {"min_rate": 0.25} if ours == "cosine_with_min_lr" else {}
    config = Training(learning_rate=0.3, warmup_ratio=ratio, schedule=ours, warmup_from_zero=True, **least)
    for step in range(num_steps):
        assert loop.learning_rate(config, step, num_steps) == pytest.approx(reference.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        reference.step()


def test_a_last_rate_that_no_schedule_would_look_at_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="min_rate goes with `schedule: cosine_with_min_lr`; linear would not look at it"
    ):
        load(QUICKSTART, ["tasks.0.min_rate=0.2", "tasks.0.schedule=linear"])
    assert load(QUICKSTART, ["tasks.0.min_rate=0.2", "tasks.0.schedule=cosine_with_min_lr"]).tasks[0].min_rate == 0.2


def test_where_an_endpoint_is_enters_no_cell_and_what_answers_there_does(tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        judge = {"judge": "llamaguard", "endpoint": "http://127.0.0.1:8001/v1", "model": "guard", **changes}
        return grid("methods=[{name: sft}]", f"evaluate.judges.asr={json.dumps(judge)}")["mini / p=0.1 / sft"].key

    moved = key(endpoint="https://elsewhere/v1", at_once=3, key_variable="A_KEY")
    assert key() == moved and len({key(), key(model="other"), key(version="2")}) == 3
    found = []
    for folder, text in (("a", "{}"), ("b", "{}"), ("c", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(text)
        found.append(key(tokenizer=str(tmp_path / folder)))
    assert found[0] == found[1] != found[2]


def test_full_fine_tuning_is_refused_in_a_line() -> None:
    for given in ("full", "none", "null"):
        with pytest.raises(ConfigError, match=r"lora: full fine-tuning is not there: .*The nearest is a high rank"):
            load(QUICKSTART, [f"lora={given}"])


def test_a_method_may_be_a_name_alone() -> None:
    named, whole = (load(QUICKSTART, [f"methods=[{one}, {{name: der}}]"]) for one in ("sft", "{name: sft}"))
    assert named == whole
