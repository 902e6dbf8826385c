"""What MLflow is told of a sweep, from a store that looks as if it had run, on a real SQLite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safecl.graph import REFERENCES
from safecl.project import Project, load
from safecl.report.rows import rows as table
from safecl.schedule import Done
from safecl.tracking import EXPERIMENT, Logbook, Tracker
from safecl.tracking.names import Names, abbreviated, number
from tests import made_up
from tests.made_up import DER, QUICKSTART

SETTINGS = [
    f"methods=[{{name: sft}}, {DER}]",
    "poison.ratios=[0.1]",
    "search.trials=3",
    "seeds=[0, 1]",
    "models.0.dtype=float32",
    "evaluate.judges.asr=keywords",
]


def project(root: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [*SETTINGS, f"execution.root={root}", *settings]))


def run(of: Project, error: str = "", kind: Any = "trial") -> list[Done]:
    """What a driver does with a schedule, each job made up; `error`: of every trial with poison."""
    of.store.local.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(of.sweep.execution.tracking_uri, of.store.local)
    logbook = Logbook(tracker, of)
    schedule = of.schedule(on_done=logbook.done)
    first = schedule.next()
    if first is not None:
        schedule.give_back(first)
        logbook.begin()
    while (job := schedule.next()) is not None:
        fails = error and job.cell.recipe.method not in REFERENCES
        stages = {s.key: s for top in (job.evidence.metrics, job.aligned.evidence.metrics) for s in top.walk()}
        if not fails:
            made_up.put(of.store, [stage for stage in stages.values() if not of.store.has(stage)])
        schedule.finish(job, error if fails else "", kind)
    logbook.end(schedule.missing())
    assert tracker.close(300), tracker.problem
    return schedule.done


def client(of: Project) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{of.store.local / 'mlflow.db'}")


def runs(of: Project, level: str) -> dict[str, Any]:
    """Runs of a level by name; every name once."""
    read = client(of)
    found = read.search_runs(
        [read.get_experiment_by_name(EXPERIMENT).experiment_id], f"tags.`safecl.level` = '{level}'", max_results=1000
    )
    named = {each.info.run_name: each for each in found}
    assert len(named) == len(found)
    return named


@pytest.fixture(scope="module")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, list[Done]]:
    root = tmp_path_factory.mktemp("finished")
    shutil.copy(template / "mlflow.db", root)
    of = project(root)
    return of, run(of)


def test_trials_have_names_and_params_that_people_know_and_the_stores_numbers(
    finished: tuple[Project, list[Done]],
) -> None:
    of, done = finished
    found, names = runs(of, "trial"), Names(of.cells)
    assert found.keys() == {names.trial(each.job) for each in done} and len(found) == 2 + 2 + 2 + 3 + 2
    for each in done:
        shown, job = found[names.trial(each.job)], each.job
        assert each.result is not None
        for name, value in each.result.items():
            if value["value"] is not None:
                assert shown.data.metrics[name] == pytest.approx(value["value"])
                assert shown.data.metrics[f"{name}.low"] <= value["value"] <= shown.data.metrics[f"{name}.high"]
        own = [of.store.record(stage)["seconds"] for stage in job.own or [job.evidence.metrics]]
        assert shown.data.metrics["seconds"] == pytest.approx(sum(own))
        assert shown.data.params["seed"] == str(job.seed) and shown.info.status == "FINISHED"
    [best] = [name for name in found if name.startswith("der") and name.endswith("seed 0")]
    weight = float(found[best].data.params["weight"])
    size = found[best].data.params["memory_size"]
    assert best == f"der w={number(weight)} m={size} · mini p=.1 · seed 0"
    assert {"model", "task", "poison", "method", "learning_rate", "prompts"} <= found[best].data.params.keys()
    assert "label_weight" not in found[best].data.params, "what no row has otherwise is noise"
    history = client(of).get_metric_history(found[best].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(i, 9 - i) for i in range(9)]


def test_final_trials_have_their_data_answers_and_adapter(finished: tuple[Project, list[Done]]) -> None:
    of, done = finished
    found, read = runs(of, "trial"), client(of)
    [job] = [d.job for d in done if d.job.cell.recipe.method == "sft" and d.job.seed == 0]
    shown = found["sft · mini p=.1 · seed 0"]
    rows = {each.dataset.digest: each.tags[0].value for each in shown.inputs.dataset_inputs}
    assert rows[job.graph.user_rows.key[:36]] == "training" and list(rows.values()).count("evaluation") == 3
    tables = json.loads(shown.data.tags["mlflow.loggedArtifacts"])
    assert [each["path"] for each in tables] == [
        f"answers/{role}.mini.json" for role in ("attack", "benign", "utility")
    ]
    table = json.loads(Path(read.download_artifacts(shown.info.run_id, tables[0]["path"])).read_text())
    lines = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    outcomes = {
        o["id"]: o["value"] for o in of.outcomes(job) or () if (o["metric"], o["set"]) == ("asr", "attack/mini")
    }
    assert {line["id"]: line["asr"] for line in lines} == outcomes
    assert all(line["prompt"].startswith("ask") and line["answer"].startswith("answer") for line in lines)
    assert table["columns"][:2] == ["prompt", "judged"], "how MLflow opens it: rows by the first, the second compared"
    assert all(line["judged"].startswith(f"{line['answer']}\n\n[asr {line['asr']:g} · ") for line in lines)
    [output] = shown.outputs.model_outputs
    model = read.get_logged_model(output.model_id)
    assert model.tags["safecl.stage.served"] == job.graph.final.key
    assert "safecl export" in model.tags["mlflow.note.content"] and "| ASR |" in shown.data.tags["mlflow.note.content"]
    assert not found["base · mini · seed 0"].outputs or not found["base · mini · seed 0"].outputs.model_outputs


def test_cells_and_sweep_carry_choice_numbers_table_and_plots(finished: tuple[Project, list[Done]]) -> None:
    of, _ = finished
    cells, [sweep] = runs(of, "cell"), runs(of, "sweep").values()
    read = client(of)
    reported = {row["method"]: row for row in table(of)}
    [der] = [each for name, each in cells.items() if name.startswith("der")]
    for shown, row in ((der, reported["der"]), (cells["sft · mini p=.1"], reported["sft"])):
        assert shown.info.status == "FINISHED" and shown.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        for name, entry in row["metrics"].items():
            for end, key in (("", "value"), (".low", "low"), (".high", "high")):
                assert shown.data.metrics[f"{name}{end}"] == pytest.approx(entry[key])
        assert shown.data.metrics["seconds"] == pytest.approx(row["seconds"])
        assert len(read.get_metric_history(shown.info.run_id, "train/loss")) == 9, "of its first seed"
        assert {each.tags[0].value for each in shown.inputs.dataset_inputs} == {"training", "evaluation"}
    assert float(der.data.params["weight"]) == reported["der"]["params"]["weight"]
    assert "3 trials on validation prompts" in der.data.tags["mlflow.note.content"]
    assert [each.path for each in read.list_artifacts(der.info.run_id)] == ["answers", "plots"]
    kept = {each.path for each in read.list_artifacts(sweep.info.run_id)}
    assert {"sweep.yaml", "plan.json", "environment.json", "requirements.txt", "results.md", "results.csv"} < kept
    plots = [each.path for each in read.list_artifacts(sweep.info.run_id, "plots")]
    assert plots[0].startswith("plots/01-safety-and-usefulness-smollm2-135m-mini-") and not any(
        "%" in name for name in plots
    )
    picture = Path(read.download_artifacts(sweep.info.run_id, plots[0])).read_bytes()
    assert len(plots) >= 4 and picture.startswith(b"\x89PNG")
    note = sweep.data.tags["mlflow.note.content"]
    assert "| der | 10 % |" in note and "results.md" in note and sweep.data.tags["safecl.version"]
    again = load(Path(read.download_artifacts(sweep.info.run_id, "sweep.yaml")), [])
    assert again.methods == of.sweep.methods and again.tasks == of.sweep.tasks
    view = json.loads(read.get_experiment_by_name(EXPERIMENT).tags["mlflow.sharedViewState.safecl"])
    assert {"metrics.`asr`", "metrics.`utility`", "params.`method`", "params.`seed`"} <= {*view["selectedColumns"]}
    kinds = {chart["type"]: chart for chart in view["compareRunCharts"]}
    assert kinds["LINE"]["metricKey"] == "train/loss"
    assert kinds["PARALLEL"]["selectedParams"] == ["method"], "what every row of a method has"


def test_a_rerun_sends_nothing_and_a_lost_note_doubles_nothing(finished: tuple[Project, list[Done]]) -> None:
    of, done = finished
    note = of.store.local / "tracked.jsonl"
    before = note.read_text()
    run(Project(of.sweep))
    assert note.read_text() == before
    note.unlink()
    run(Project(of.sweep))
    assert len(runs(of, "trial")) == len(done) and len(runs(of, "cell")) == 4 and len(runs(of, "sweep")) == 1
    read = client(of)
    for each in (*runs(of, "trial").values(), *runs(of, "cell").values()):
        assert len(read.get_metric_history(each.info.run_id, "asr")) == 1
    models = read.search_logged_models([each.info.experiment_id])
    assert len(models) == 4


def test_failed_trials_are_there_with_their_reason_until_they_succeed(root: Path) -> None:
    of = project(root, "methods=[{name: sft}]", "seeds=[0]")
    run(of, "loss is NaN", "infrastructure")
    [failed] = [each for name, each in runs(of, "trial").items() if name.startswith("sft")]
    [cell] = [each for name, each in runs(of, "cell").items() if name.startswith("sft")]
    [sweep] = runs(of, "sweep").values()
    for each in (failed, cell, sweep):
        assert each.info.status == "FAILED" and "loss is NaN" in each.data.tags["safecl.error"]
        assert "loss is NaN" in each.data.tags["mlflow.note.content"]
    assert failed.data.tags["safecl.failure"] == "infrastructure" and "asr" not in failed.data.metrics
    run(Project(of.sweep))
    for level in ("trial", "cell", "sweep"):
        for each in runs(of, level).values():
            assert each.info.status == "FINISHED" and "safecl.error" not in each.data.tags


def test_each_configuration_on_a_front_has_a_run_of_its_own(root: Path) -> None:
    pareto = "search.objective={pareto: [utility, asr, over_refusal], choose: front, bounds: {}}"
    of = project(root, f"methods=[{DER}]", pareto, "search.trials=10", "seeds=[0]")
    run(of)
    rows = [params for cell, params, jobs, _ in of.finals() if cell.space is not None and jobs]
    cells = runs(of, "cell")
    own = [each for name, each in cells.items() if " #" in name]
    assert len(rows) > 1 and len(own) == len(rows), "the made-up trials have a front"
    assert sorted(float(each.data.params["weight"]) for each in own) == sorted(row["weight"] for row in rows)
    [search] = [each for name, each in cells.items() if name.endswith("· search")]
    below = {each.data.tags["mlflow.parentRunId"] for each in runs(of, "trial").values()}
    assert {search.info.run_id, *(each.info.run_id for each in own)} <= below


def test_names_tell_a_row_from_every_other(tmp_path: Path) -> None:
    grid = "methods=[{name: der, grid: {weight: [1, 9], memory_size: [10]}}, {name: sft, label: plain}]"
    of = project(tmp_path, grid, "poison.ratios=[0.0, 0.25]")
    names = Names(of.cells)
    found = [names.cell(cell, {}) for cell in of.cells]
    assert "der w=9 · mini p=.25" in found and "plain · mini p=0" in found and len({*found}) == len(found)
    assert names.params(of.cells[-1], {})["method"] == "plain"
    assert abbreviated(["rho", "rank", "weight"]) == {"rho": "rho", "rank": "rank", "weight": "w"}
