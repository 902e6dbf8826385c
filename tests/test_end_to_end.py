"""One tiny sweep through every real part: Ray Train + DeepSpeed, Ray Tune + Optuna, Ray Serve + vLLM, MLflow on SQLite.

The model is random, so numbers mean nothing; what is held is that every part runs, that a rerun runs nothing, that a
lost judge record reruns that stage alone, and that tracking shows what the store holds. A missing part fails here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from safecl import cli
from tests.browser import Browser
from tests.mini import TRAINING, mini
from tests.serving.test_endpoint import Server

# What the run that is stopped does without, so that it soon has something to be stopped at.
FEWER = ("--set", "execution.num_judge_replicas=0")


def sweep(model: Path, root: Path, endpoint: str) -> dict[str, Any]:
    """Beside what tests/mini.py holds: methods that search and merge, a guard, judges side by side, DeepSpeed."""
    found = mini(model, root)
    found["name"] = "tiny"
    found["methods"] = [
        {"name": "sft"},
        {"name": "der", "config": {"memory_size": 4}, "search": {"weight": {"low": 0.1, "high": 9.0, "log": True}}},
        {"name": "magmax"},
    ]
    # A guard that always answers the same is readable, which is all that is needed here: --accept-judge.
    # The one that decides is a published guard behind an endpoint; it stands beside that on the same answers.
    found["evaluate"]["judges"] = {
        "asr": [{"judge": "llamaguard", "label": "there", "endpoint": endpoint, "model": "lg"}, "guard"],
        "over_refusal": ["xstest_match", "keywords"],
        "guard": {"rows": [{"task": "mini", "num_rows": 16}], "seeds": [0, 1],
                  "heldout": [{"task": "mini", "num_rows": 6}], "epochs": 12, **TRAINING},
    }  # fmt: skip
    found["search"] = {"trials": 2}
    # One trainer: a second is 20 s of CPU, and trainers side by side are of test_kills.py.
    found["execution"] = {"root": str(root), "engine": "deepspeed", "engine_max_tokens": 2048, "engine_memory_gib": 0.2,
                          "num_trials_at_once": 1}  # fmt: skip
    return found


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def safecl(*arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "safecl.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


def here(*arguments: str) -> str:
    """What a verb prints that starts no run, in this process: a start of one is 2 s."""
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def records(root: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in (root / "store").glob("*/*/record.json")}


def without_seconds(table: str) -> list[dict[str, Any]]:
    """The rows; what a stage took differs when it is run again."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in json.loads(table)["rows"]]


class Interrupted(NamedTuple):
    """What a run left that was told to stop once its first rows were recorded: its trainer and its engine were starting. One
    that is stopped between two finetunes is of test_kills.py."""

    file: Path
    root: Path
    code: int
    errors: str
    left: list[str]  # its processes that are there after 30 s
    status: str


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    served = Server()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(scope="module")
def interrupted(tiny_model: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    folder = tmp_path_factory.mktemp("sweep")
    file, root = folder / "tiny.yaml", folder / "root"
    file.write_text(yaml.safe_dump(sweep(tiny_model, root, url_of(server))))
    running = subprocess.Popen(
        [sys.executable, "-m", "safecl.cli", "run", str(file), *FEWER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "SAFECL_TEST_RUN": str(root)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while not list((root / "store" / "data").glob("*/record.json")):
            assert running.poll() is None and time.monotonic() < deadline, running.communicate(timeout=60)
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)  # what a terminal does: to the whole foreground group
        _, errors = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            running.kill()
    deadline = time.monotonic() + 30
    while left := [p.name() for p in psutil.process_iter() if is_of(p, root)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return Interrupted(file, root, running.returncode, errors, left, here("status", str(file), "--json"))


@pytest.fixture(scope="module")
def finished(interrupted: Interrupted) -> tuple[Path, Path, str]:
    """(sweep file, root, the table as JSON that the same command printed when it was run again, to the end). In between a
    finished stage lost its record, as one does whose machine lost its power."""
    kept = records(interrupted.root)
    lost = next(key for key, record in kept.items() if record["kind"] == "data")
    (interrupted.root / "store" / "data" / lost / "record.json").unlink()
    done = safecl("run", str(interrupted.file), "--json", "--accept-judge", timeout_s=420)
    logs = "\n".join(
        p.read_text()[-1500:] for p in (interrupted.root / "logs").glob("*.log") if "Error" in p.read_text()
    )
    assert done.returncode == 0, done.stderr[-3000:] + logs
    made = records(interrupted.root)
    assert made[lost]["created"] > kept[lost]["created"] and made[lost]["result"] == kept[lost]["result"]
    del kept[lost]
    assert kept.items() <= made.items()  # nothing else that was finished ran again
    return interrupted.file, interrupted.root, done.stdout


def test_ctrl_c_stops_everything_soon_and_keeps_what_is_finished(interrupted: Interrupted) -> None:
    assert interrupted.code == 130 and "run the same command to continue" in interrupted.errors
    assert "Traceback" not in interrupted.errors and not interrupted.left
    kept = records(interrupted.root)
    assert json.loads(interrupted.status)["cells"] and any(record["kind"] == "data" for record in kept.values())


def test_every_row_has_every_metric(finished: tuple[Path, Path, str]) -> None:
    rows = json.loads(finished[2])["rows"]
    assert [row["method"] for row in rows] == ["base", "aligned", "sft", "der", "magmax"]
    assert any(
        line.startswith("Judge: ") and "guard, beside it, agrees with the labels of" in line
        for line in json.loads(finished[2])["caption"]
    )
    for row in rows:
        assert {"asr", "non_refusal", "over_refusal", "degenerate", "utility"} <= set(row["metrics"])
        assert all(0 <= m["low"] <= m["value"] <= m["high"] <= 1 for m in row["metrics"].values())
        assert row["seeds"] == [0] and row["seconds"] > 0
        assert row["agreement"]["num"] == row["metrics"]["asr"]["num"]  # of endpoint and keyword list


def test_an_endpoint_decides_and_the_guard_judges_the_same_answers_beside_it(
    finished: tuple[Path, Path, str], server: Server
) -> None:
    for row in json.loads(finished[2])["rows"]:
        metrics = row["metrics"]
        assert metrics["asr:guard"]["num"] == metrics["asr"]["num"] and metrics["asr"]["unparsed"] == 0
        assert set(row["beside"]) == {"asr:guard", "over_refusal:keywords"}
        assert metrics["over_refusal:keywords"]["num"] == metrics["over_refusal"]["num"]
    judged = [record for record in records(finished[1]).values() if record["config"].get("remote")]
    assert {tuple(record["result"]["answered_by"]) for record in judged} == {("m",)}
    assert sum(record["result"]["num"] for record in judged) <= len(server.bodies), "each answer was asked for there"
    assert not any(url_of(server) in json.dumps(record) for record in judged), "where it answers is no part of a result"


def test_training_ran_under_ray_train_with_deepspeed_and_serving_under_serve_with_vllm(
    finished: tuple[Path, Path, str],
) -> None:
    root = finished[1]
    finetunes = [record for record in records(root).values() if record["kind"] == "finetune"]
    assert len(finetunes) >= 4  # aligned, guard, sft, der
    by_key = records(root)
    [merged] = [record for record in by_key.values() if record["kind"] == "finalize"]
    assert (
        merged["result"]["dense_bytes"] > 0 and merged["inputs"]["tuned"] in by_key
    )  # the SFT that has a row of its own
    for record in finetunes:
        assert record["result"]["engine"] == "deepspeed", record["result"]
    assert {log.name.split("-")[1] for log in (root / "logs").glob("engine-*.log")} == {"candidate", "judge"}


def test_a_rerun_runs_nothing_and_prints_the_same_table(finished: tuple[Path, Path, str]) -> None:
    file, root, table = finished
    before = records(root)
    assert not (root / "tune").exists()  # Tune's own folder is never read back
    again = safecl("run", str(file), "--json", "--accept-judge", timeout_s=60)
    assert again.returncode == 0 and again.stdout == table
    assert records(root) == before
    assert "starting Ray" not in again.stderr and "nothing left to do" in again.stderr


@pytest.mark.slow  # a run of its own; `finished` has a record that was lost of another stage
def test_a_lost_judge_record_reruns_that_stage_alone_and_restores_the_row(finished: tuple[Path, Path, str]) -> None:
    file, root, table = finished
    before = records(root)

    def on_test(record: dict[str, Any]) -> bool:  # of a losing trial, on validation prompts, nobody would ask for it
        return str(before[record["inputs"]["rows"]]["config"]["role"]).endswith(".test")

    judged = {key: r for key, r in before.items() if r["kind"] == "judge" and r["config"]["judge"] == "keywords"}
    lost = next(key for key, record in judged.items() if on_test(record))
    (root / "store" / "judge" / lost / "record.json").unlink()
    again = safecl("run", str(file), "--json", "--accept-judge", timeout_s=120)
    assert again.returncode == 0 and without_seconds(again.stdout) == without_seconds(table), again.stderr[-2000:]
    after = records(root)
    changed = {key for key in after if after[key]["created"] != before[key]["created"] or key not in before}
    assert changed == {lost} and after[lost]["result"] == before[lost]["result"]


def test_the_searched_values_are_the_chosen_trials_and_trial_0_is_the_defaults(
    finished: tuple[Path, Path, str],
) -> None:
    import optuna

    from safecl.study import _GHOST

    [study] = optuna.study.get_all_study_summaries(f"sqlite:///{finished[1] / 'study.db'}")
    trials = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{finished[1] / 'study.db'}").trials
    # The one that Ctrl-C left is asked again, by the same parameters.
    trials = [trial for trial in trials if _GHOST not in trial.user_attrs]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert trials[0].params == {"weight": 1.0}
    [der] = [row for row in json.loads(finished[2])["rows"] if row["method"] == "der"]
    assert der["params"]["weight"] in [trial.params["weight"] for trial in trials]


def test_mlflow_shows_sweep_cells_and_trials_with_the_stores_numbers(finished: tuple[Path, Path, str]) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished[1] / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    trials = [run for run in runs if run.data.tags["safecl.level"] == "trial"]
    assert len(trials) == 7  # base, aligned, sft, der, magmax on test; two searched trials on validation
    [sft] = [run for run in trials if run.data.tags["safecl.method"] == "sft"]
    [row] = [row for row in json.loads(finished[2])["rows"] if row["method"] == "sft"]
    assert sft.data.metrics["utility"] == pytest.approx(row["metrics"]["utility"]["value"])
    assert len(client.get_metric_history(sft.info.run_id, "train/loss")) == 3  # ceil(20 / 8) steps
    assert sft.outputs.model_outputs and {run.info.status for run in runs} == {"FINISHED"}
    profiles = {d.dataset.name: json.loads(d.dataset.profile) for d in sft.inputs.dataset_inputs}
    assert all(profile["num_rows"] > 0 for profile in profiles.values())


def test_the_best_row_is_promoted_with_its_weights_and_again_changes_nothing(finished: tuple[Path, Path, str]) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished[1] / 'mlflow.db'}")
    for _ in range(2):
        told = here("promote", str(finished[0]), "--row", "sft")
        assert told.startswith("models:/safecl-tiny@best is version 1: sft · mini")
    version = client.get_model_version_by_alias("safecl-tiny", "best")
    assert [each.version for each in client.search_model_versions("name = 'safecl-tiny'")] == [version.version]
    kept = {path.name for path in (Path(version.source.removeprefix("file://")) / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= kept


@contextmanager
def ui(root: Path) -> Iterator[str]:
    """The address that `safecl ui` prints, for as long as it runs."""
    command = [sys.executable, "-m", "safecl.cli", "ui", "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            [address] = re.findall(r"MLflow: (\S+)", process.stdout.readline())
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


def test_mlflows_own_pages_show_the_sweep_and_a_model_is_promoted_through_their_server(
    finished: tuple[Path, Path, str], web: Browser
) -> None:
    """As `safecl ui` opens them, by real clicks. SAFECL_PICTURES: a folder for what a reader sees."""
    file, root, _ = finished

    def shown(*words: str) -> None:
        for word in words:
            web.wait(f"document.body.innerText.includes({json.dumps(word)})")
        if folder := os.environ.get("SAFECL_PICTURES"):
            web.picture(Path(folder) / f"mlflow-{re.sub('[^a-z]+', '-', words[0].lower())}.png")

    with ui(root) as address:
        server = address.partition("/#")[0]
        assert server.startswith("http://127.0.0.1:") and address.endswith("&viewStateShareKey=safecl")
        web.size(2400)
        web.open(address)
        shown("asr", "over_refusal", "utility", "seconds", "sft · mini p=.1", "base · mini")
        assert "seed 0" not in web.js("document.body.innerText"), "the rows of the table"
        web.click("label:has(input[value=CHART])")
        web.wait("document.querySelectorAll('.js-plotly-plot .scatterlayer .js-line').length >= 3")  # sft, der, magmax
        shown("train/loss", "asr vs. utility")
        web.click("label:has(input[value=ARTIFACT])")
        shown("[asr ", "answers/attack.mini.json")
        web.click("label:has(input[value=TABLE])")
        boxes = "[...document.querySelectorAll('.ag-row input[type=checkbox]')].filter((box) => box.getClientRects().length)"
        web.wait(f"{boxes}.length >= 2")
        for place in (0, 1):
            web.js(f"{boxes}[{place}].id = 'box{place}'")
            web.click(f"#box{place}")
        web.click("[data-testid=runs-compare-button]")
        shown("Comparing 2 Runs from 1 Experiment", "Show diff only")
        told = here("promote", str(file), "--row", "sft", "--merged", "--set", f"execution.tracking_uri={server}")
        assert told.startswith("models:/safecl-tiny@best is version 1: sft · mini")
        web.open(f"{server}/#/models/safecl-tiny/versions/1")
        shown("sft · mini p=.1 · seed 0", "best")
    kept = {path.name for path in (root / "artifacts").glob("models/*/artifacts/model/*")}
    assert {"config.json", "model.safetensors"} <= kept


def test_report_status_plan_show_and_logs_work_on_the_finished_sweep(finished: tuple[Path, Path, str]) -> None:
    file, root, table = finished
    assert without_seconds(here("report", str(file), "--json", "--accept-judge")) == without_seconds(table)
    page = root / "report" / "tiny" / "index.html"
    assert page.stat().st_size > 10_000 and "http" not in page.read_text().split("<body>")[1].split("<script")[0]
    status = json.loads(here("status", str(file), "--json"))
    assert {row["state"] for row in status["cells"]} == {"done"}
    assert status["run"]["how"] == "ended" and status["run"]["stages"]["finetune"]["done"] > 0
    traced = here("trace", str(file), "--out", str(file.parent / "trace.json"), "--json")
    kinds = {e.get("cat") for e in json.loads((file.parent / "trace.json").read_text())["traceEvents"]}
    assert "trainer" in kinds and any(line.startswith("the end waited for: ") for line in json.loads(traced)["summary"])
    plan = json.loads(here("plan", str(file), "--json"))
    assert {counts["to run"] for counts in plan["stages"].values()} == {0} and plan["open_trials"] == 0
    key = next(iter(records(root)))
    assert json.loads(here("show", key[:12], "--root", str(root)))["key"] == key
    assert "engine-candidate" in here("logs", "--root", str(root), "--num", "1000")


def is_of(process: psutil.Process, root: Path) -> bool:
    """Whether it is one of the run's: what a run starts inherits its environment, and others' clusters do not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SAFECL_TEST_RUN") == str(root)
    except psutil.Error:
        return False
