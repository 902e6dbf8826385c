"""sweeps/paper and sweeps/small: the paper's tables as sweep files, planned without a hub, a model or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safecl import preflight
from safecl.base import PrerequisiteError
from safecl.overview import plan
from safecl.project import Project, load
from safecl.report import published

SWEEPS = Path(__file__).parents[1] / "sweeps"
PAPER = published.read(SWEEPS / "paper" / "published.yaml")
TABLES = [f"table{n}" for n in range(1, 7)]
DATA = ("advbench", "beavertails_train", "codealpaca", "directharm4", "do_not_answer", "do_not_answer_responses_human",
        "gsm8k_test", "gsm8k_train", "humaneval", "humaneval_plus_originfmt", "mbpp", "safety_tuned_llamas_train", "sst2_train",
        "sst2_validation", "xstest")  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the network, and there is no GPU (to look for one takes a process with torch)."""
    import huggingface_hub.constants as constants

    from safecl import dtypes, hardware

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in (hardware, dtypes):
        monkeypatch.setattr(module, "gpus", list)


def opened(folder: str, name: str, root: Path, *settings: str) -> Project:
    return Project(load(SWEEPS / folder / f"{name}.yaml", [f"execution.root={root}", *settings]), planned=True)


def rows_of(project: Project) -> set[tuple[str, str, float, str]]:
    found = ((cell.recipe.model.name, cell.task, cell.recipe.poison_ratio, cell.method) for cell in project.cells)
    return {row for row in found if row[3] not in ("base", "aligned")}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_paper_has_the_papers_rows_and_no_other(name: str, tmp_path: Path) -> None:
    project = opened("paper", name, tmp_path)
    theirs = {(r["model"], r["task"], r["poison"], r["method"]) for r in PAPER.rows if r["table"] == int(name[-1])}
    assert rows_of(project) == theirs
    fewer = (
        ["tasks.sst2.utility_rows.test: 872 here, 1000 there"]
        if "sst2" in [t.task for t in project.sweep.tasks]
        else []
    )
    fewer += ["evaluate.test.benign.orbench.num_rows: 1000 here, all there"]
    assert published.differences(project.sweep, PAPER, {}) == fewer


def test_one_file_holds_all_rows_once_and_shares_their_stages(tmp_path: Path) -> None:
    project = opened("paper", "paper", tmp_path)
    by_name = {"Lisa m=250": "Lisa", "DER m=250": "DER"}  # 5 % of 5,000
    theirs = {(r["model"], r["task"], r["poison"], by_name.get(r["method"], r["method"])) for r in PAPER.rows}
    assert (
        rows_of(project) == theirs and len(project.cells) == len(theirs) + 2 * 5
    )  # references of five models and tasks
    one: dict[str, str] = {}
    for cell in project.cells:
        one[cell.label] = cell.job({}, 0, "final").evidence.metrics.key
    for name in TABLES:  # the same keys, so that what one file has run the others find
        for cell in opened("paper", name, tmp_path).cells:
            label = cell.label.removesuffix(" m=250")
            assert one[label] == cell.job({}, 0, "final").evidence.metrics.key, cell.label


def test_a_plan_says_what_a_table_costs_and_what_only_a_run_can_know(tmp_path: Path) -> None:
    project = opened("paper", "table5", tmp_path)
    found = plan(project)
    trained = {"align": 3, "Lisa and DER of three sizes": 3 * 6}
    assert found["stages"]["finetune"]["to run"] == sum(trained.values())
    assert found["stages"]["memory"]["to run"] == 3 * (3 + 3)  # DER's hold states, Lisa's none
    assert 1 < found["hours"] <= found["device_hours"] < 100 and found["disk_gib"] > found["states_gib"] > 0
    said = "\n".join(found["warnings"])
    assert "the tokenizer of 'meta-llama/Llama-2-7b-hf'" in said and "allenai/wildjailbreak" in said
    with pytest.raises(PrerequisiteError, match="data set allenai/wildjailbreak cannot be read"):
        Project(project.sweep)  # as `run` opens it


@pytest.mark.parametrize("name", [*TABLES, "small"])
def test_the_small_twin_has_the_same_rows_of_a_model_that_is_here(name: str, tmp_path: Path) -> None:
    small, large = opened("small", name, tmp_path), opened("paper", "paper" if name == "small" else name, tmp_path)
    names: Any = {model.name: name for model, name in zip(small.sweep.models, [m.name for m in large.sweep.models])}  # noqa: B905
    sizes = {"m=3": "m=50", "m=5": "m=150", "m=8": "m=250"}

    def method(text: str) -> str:
        return next((text.replace(ours, theirs) for ours, theirs in sizes.items() if text.endswith(ours)), text)

    mine = {(names[model], task, ratio, method(text)) for model, task, ratio, text in rows_of(small)}
    if name != "small":
        assert mine == rows_of(large)
    assert {row[1:] for row in mine if "m=" not in row[3]} == {row[1:] for row in rows_of(large) if "m=" not in row[3]}


def test_models_of_judges_that_cannot_be_had_are_said_before_anything_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(stage: Any) -> Path:
        raise PrerequisiteError("cannot be fetched")

    monkeypatch.setattr(preflight, "tokenizer_folder", refused)
    monkeypatch.setattr(preflight, "check_isolation", lambda sweep: None)
    sweep = load(SWEEPS / "paper" / "table1.yaml", [])
    lacking = preflight.lacking_judges(sweep)
    assert ["llama-guard-3-8b" in lacking[0], "wildguard-7b" in lacking[1]] == [True, True]
    with pytest.raises(PrerequisiteError, match="wildguard"):
        preflight.check(sweep)
    assert preflight.lacking_judges(load(SWEEPS / "quickstart.yaml", [])) == []
