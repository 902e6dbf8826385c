"""The tracker against real MLflow on SQLite."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safecl.base import sqlite_url
from safecl.tracking import EXPERIMENT, Run, Tracker
from safecl.tracking.messages import DataSet, Model
from safecl.tracking.server import Server

CURVE = [{"step": step, "loss": 1 / (step + 1), "safety_loss": 2.0} for step in range(30)]


def client(root: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(sqlite_url(root / "mlflow.db"))


def runs(root: Path, wanted: str = "") -> list[Any]:
    found = client(root).search_runs([client(root).get_experiment_by_name(EXPERIMENT).experiment_id], wanted)
    return list(found)


def tell(tracker: Tracker, *path: str, name: str = "", **told: Any) -> None:
    """Put a run, made of all that is told of it."""
    tracker.put(path, repr(told), lambda: Run(name or path[-1], **told))


def fill(tracker: Tracker, asr: float = 0.25) -> None:
    for trial in ("0", "1"):
        for cell in ("der", "sft"):
            params = {"weight": 0.5, "rows": 8}
            tell(tracker, "quick", cell, trial, params=params, metrics={"asr": asr}, curves=CURVE, tags={"note": "n"})
    tell(tracker, "quick", "der", params={"weight": 0.5}, metrics={"asr": asr}, name=f"der, asr {asr}")
    tell(tracker, "quick", "sft", params={"weight": 0.5}, metrics={"asr": asr})
    tell(tracker, "quick", metrics={"trials": 4.0})


FILL = """import sys
from pathlib import Path
from tests.tracking.test_tracker import fill
from safecl.tracking import Run, Tracker
"""


def test_a_root_of_any_name_holds_its_database(template: Path, tmp_path: Path) -> None:
    root = tmp_path / "what?x=1#y %20"
    root.mkdir()
    shutil.copy(template / "mlflow.db", root / "mlflow.db")
    tracker = Tracker(None, root)
    fill(tracker)
    assert tracker.close(60), tracker.problem
    assert len(runs(root)) == 7 and [*tmp_path.iterdir()] == [root]


def test_sweep_cell_and_trial_are_nested_and_found_by_their_tags(root: Path) -> None:
    tracker = Tracker(None, root)
    fill(tracker)
    assert tracker.close(60), tracker.problem
    assert len(runs(root)) == 1 + 2 + 4
    (sweep,) = runs(root, "tags.`safecl.level` = 'sweep'")
    (cell,) = runs(root, "tags.`safecl.level` = 'cell' and tags.`safecl.cell` = 'der'")
    (trial,) = runs(root, "tags.`safecl.cell` = 'der' and tags.`safecl.trial` = '1'")
    assert {sweep.data.tags["safecl.sweep"], cell.data.tags["safecl.sweep"]} == {"quick"}
    assert cell.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert trial.data.tags["mlflow.parentRunId"] == cell.info.run_id
    assert trial.data.params == {"weight": "0.5", "rows": "8"} and trial.data.metrics["asr"] == 0.25
    assert trial.data.tags["note"] == "n"
    assert cell.data.params == {"weight": "0.5"} and cell.info.run_name == "der, asr 0.25"
    history = client(root).get_metric_history(trial.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(p["step"], p["loss"]) for p in CURVE]
    assert {r.info.status for r in runs(root)} == {"FINISHED"}


def test_running_twice_updates_and_duplicates_nothing(root: Path) -> None:
    for asr in (0.25, 0.25, 0.75):
        tracker = Tracker(None, root)
        fill(tracker, asr)
        assert tracker.close(60), tracker.problem
    assert len(runs(root)) == 7
    (trial,) = runs(root, "tags.`safecl.cell` = 'der' and tags.`safecl.trial` = '1'")
    assert trial.data.metrics["asr"] == 0.75
    assert [m.value for m in client(root).get_metric_history(trial.info.run_id, "asr")] == [0.25, 0.75]
    assert len(client(root).get_metric_history(trial.info.run_id, "loss")) == len(CURVE)
    (cell,) = runs(root, "tags.`safecl.level` = 'cell' and tags.`safecl.cell` = 'der'")
    assert cell.info.run_name == "der, asr 0.75"
    (sweep,) = runs(root, "tags.`safecl.level` = 'sweep'")
    assert [m.value for m in client(root).get_metric_history(sweep.info.run_id, "trials")] == [4.0]


def test_all_of_a_run_stands_once_however_often_it_is_sent(root: Path) -> None:
    """Also where the server took everything and the note of it was lost, and where it took a part."""
    model = Model("der w=4.5 / seed 0", {"weight": 4.5}, {"safecl.stage.served": "k" * 64}, {"README.md": "# card"})
    whole: dict[str, Any] = {
        "metrics": {"asr": 0.5, "asr.low": 0.25},
        "data": [DataSet("mini rows", "d" * 64, "training", {"stage": "d"}, 20), DataSet("attack", "e", "evaluation")],
        "files": {"plots/a.png": b"\x89PNG\x00", "sweep.yaml": "name: quick"},
        "tables": {"answers/attack.json": [{"prompt": "p", "answer": "a", "asr": 1.0}, {"prompt": "q", "asr": None}]},
        "model": model,
        "note": "| a |\n|--|",
        "began": 1_000_000.0,
        "ended": 1_000_060.0,
    }
    for broken in (True, False, False):
        tracker = Tracker(None, root)
        if broken:
            tell(
                tracker,
                "quick",
                "der",
                "0",
                **{**whole, "tags": {"": "refused at the end"}},
            )
            assert not tracker.close(60) and "refused quick/der/0" in str(tracker.problem)
            continue
        tell(tracker, "quick", "der", "0", **whole, tags={"again": "x"})
        assert tracker.close(60), tracker.problem
        (root / "tracked.jsonl").unlink()
    (run,) = runs(root, "tags.`safecl.trial` = '0'")
    own, read = run.info.run_id, client(root)
    assert (run.info.start_time, run.info.end_time) == (1_000_000_000, 1_000_060_000)
    found = {(each.dataset.name, each.dataset.digest, each.tags[0].value) for each in run.inputs.dataset_inputs}
    assert (
        found == {("mini rows", "d" * 36, "training"), ("attack", "e", "evaluation")}
        and len(run.inputs.dataset_inputs) == 2
    )
    assert {name: len(read.get_metric_history(own, name)) for name in ("asr", "asr.low")} == {"asr": 1, "asr.low": 1}
    import pandas as pd

    table = pd.read_json(
        read.download_artifacts(own, "answers/attack.json"), orient="split"
    )  # as mlflow.load_table does
    assert table.prompt.to_list() == ["p", "q"] and table.asr[0] == 1.0 and table.answer[0] == "a"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "answers/attack.json", "type": "table"}]
    assert Path(read.download_artifacts(own, "plots/a.png")).read_bytes() == b"\x89PNG\x00"
    [logged] = read.search_logged_models([run.info.experiment_id])
    assert logged.name == "der w=4·5 - seed 0" and str(logged.status) == "READY"
    assert {metric.key: metric.value for metric in logged.metrics} == {"asr": 0.5, "asr.low": 0.25}
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    from mlflow.models import Model as Loaded

    folder = Path(logged.artifact_location.removeprefix("file://"))
    assert (folder / "README.md").read_text() == "# card"
    assert Loaded.load(folder / "MLmodel").signature.inputs.input_names() == ["prompt"]


def test_a_cell_begins_with_its_first_trial_and_no_run_ends_before_it_began(root: Path) -> None:
    """Also where all of it is told long after."""
    tracker = Tracker(None, root)
    tell(tracker, "s", "c", "0", began=100.0, ended=160.0)
    tell(tracker, "s", "c", ended=160.0)
    tell(tracker, "s", "late", ended=160.0)
    assert tracker.close(60), tracker.problem
    spans = {run.info.run_name: (run.info.start_time, run.info.end_time) for run in runs(root)}
    assert spans["c"] == spans["0"] == (100_000, 160_000) and spans["late"][0] == spans["late"][1]


def test_the_experiment_opens_on_its_runs_with_the_sweeps_columns(root: Path) -> None:
    tracker = Tracker(None, root)
    tell(tracker, "quick", "der", metrics={"asr": 0.5})
    tell(tracker, "quick", view={"selectedColumns": ["attributes.`Duration`", "metrics.`asr`"]})
    assert tracker.close(60), tracker.problem
    tags = client(root).get_experiment_by_name(EXPERIMENT).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == "asr"
    view = json.loads(tags["mlflow.sharedViewState.safecl"])
    assert view["selectedColumns"][1] == "metrics.`asr`"


def test_a_failed_trial_is_shown_as_failed_until_it_succeeds(root: Path) -> None:
    for status, error in (("FAILED", {"safecl.error": "loss is NaN"}), ("RUNNING", {}), ("FINISHED", {})):
        tracker = Tracker(None, root)
        tell(tracker, "quick", "der", "0", tags=error, status=status, note=error.get("safecl.error", ""))
        assert tracker.close(60), tracker.problem
        (trial,) = runs(root, "tags.`safecl.trial` = '0'")
        assert trial.info.status == status
        told = {trial.data.tags.get("safecl.error"), trial.data.tags.get("mlflow.note.content")}
        assert told == {error.get("safecl.error")}, "a reason goes with what it was said of"


def test_what_is_not_a_number_becomes_a_tag_and_not_a_number(root: Path) -> None:
    tracker = Tracker(None, root)
    curve = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": math.inf}, {"step": 2, "loss": math.nan}]
    metrics = {"asr": None, "u": math.nan, "v": -math.inf}
    tell(tracker, "s", 'it\'s "odd"', "0", params={"a b(c)": "x" * 9000}, metrics=metrics, curves=curve)
    assert tracker.close(60), tracker.problem
    (trial,) = runs(root, "tags.`safecl.trial` = '0'")
    assert trial.data.metrics == {"loss": 1.0}
    noted = {k.rsplit(".", 1)[1]: v for k, v in trial.data.tags.items() if "not_finite" in k}
    assert noted == {"asr": "None", "u": "nan", "v": "-inf", "loss": "2 point(s) of the curve, first at step 1"}
    assert trial.data.params["a b_c_"].endswith("(cut short)") and trial.data.tags["safecl.cell"] == "it_s _odd_"


def test_a_run_whose_params_are_no_longer_true_is_made_anew_with_those_below_it(root: Path) -> None:
    for weight in (1, 2):
        tracker = Tracker(None, root)
        tell(tracker, "s", "c", "0", metrics={"asr": 0.5})
        tell(tracker, "s", "c", params={"weight": weight}, metrics={"asr": float(weight)})
        assert tracker.close(60), tracker.problem
    (cell,) = runs(root, "tags.`safecl.level` = 'cell'")
    (trial,) = runs(root, "tags.`safecl.trial` = '0'")
    assert cell.data.params == {"weight": "2"} and cell.data.metrics == {"asr": 2.0}
    assert trial.data.tags["mlflow.parentRunId"] == cell.info.run_id


def test_what_waited_on_disk_does_not_undo_what_was_told_later(root: Path) -> None:
    dead = Tracker("http://127.0.0.1:9", root)
    tell(dead, "s", "c", metrics={"asr": 0.1})
    tell(dead, "s", "d", metrics={"asr": 0.1})
    assert not dead.close(20)
    [waiting] = [
        path for path in (root / "spool").glob("*.jsonl") if "0.1" in path.read_text() and '"c"' in path.read_text()
    ]
    kept = waiting.read_text()
    alive = Tracker(None, root)
    tell(alive, "s", "c", metrics={"asr": 0.9})
    assert alive.close(60), alive.problem
    waiting.write_text(kept)  # another driver's copy of it
    late = Tracker(None, root)
    assert late.close(60), late.problem
    found = {run.info.run_name: run.data.metrics for run in runs(root, "tags.`safecl.level` = 'cell'")}
    assert found == {"c": {"asr": 0.9}, "d": {"asr": 0.1}}


def test_a_dead_server_never_raises_and_its_spool_is_sent_at_the_next_start(root: Path) -> None:
    spool = root / "spool"
    dead = Tracker("http://127.0.0.1:9", root)  # the discard port: nobody listens
    fill(dead)
    start = time.monotonic()
    assert not dead.close(20) and time.monotonic() - start < 25
    assert dead.num_spooled == 7 and dead.problem and "127.0.0.1:9" in dead.problem
    lines = [json.loads(line) for path in spool.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(m["path"] for m in lines) == sorted(
        [["quick"], ["quick", "der"], ["quick", "sft"]]
        + [["quick", cell, trial] for cell in ("der", "sft") for trial in "01"]
    )
    alive, start = Tracker(None, root), time.monotonic()
    assert alive.close(60), alive.problem
    assert time.monotonic() - start < 50  # it ends when all is sent
    assert len(runs(root)) == 7 and not list(spool.glob("*.jsonl"))


@pytest.mark.parametrize("uri", ["no-such-scheme://x", "sqlite:////proc/nowhere/mlflow.db", "http://"])
def test_a_bogus_uri_spools(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, tmp_path)
    tell(tracker, "s", "c", "0", metrics={"asr": 0.5})
    assert not tracker.close(30)
    assert tracker.num_spooled == 1 and len(list((tmp_path / "spool").glob("*.jsonl"))) == 1 and tracker.problem


def test_with_nowhere_to_write_at_all_it_says_so_and_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tracker = Tracker(None, tmp_path / "file" / "root")
    tell(tracker, "s", "c", "0", metrics={"asr": 0.5})
    assert not tracker.close(30) and "neither sent nor spooled" in str(tracker.problem)
    tell(tracker, "s", "c", "1", metrics={"asr": 0.5})  # after closing as well


def test_a_message_the_server_refuses_does_not_hold_up_the_others(root: Path) -> None:
    tracker = Tracker(None, root)
    tell(tracker, "s", "c", "bad", metrics={"n" * 239: 1.0}, tags={"": "empty"})
    tell(tracker, "s", "c", "good", metrics={"asr": 0.5})
    assert not tracker.close(60) and "refused s/c/bad" in str(tracker.problem)
    assert len(runs(root, "tags.`safecl.trial` = 'good'")) == 1
    assert len(list((root / "spool").glob("*.refused"))) == 1 and not list((root / "spool").glob("*.jsonl"))


def test_close_is_bounded_and_spools_what_the_thread_still_holds(tmp_path: Path) -> None:
    tracker = Tracker(None, tmp_path)  # an empty folder: the thread is busy creating its database for seconds
    fill(tracker)
    start = time.monotonic()
    assert not tracker.close(0.01) and time.monotonic() - start < 1
    assert tracker.num_spooled == 7
    tell(tracker, "late", "c", "0")
    assert tracker.num_spooled == 8
    tracker._thread.join(60)  # let it end before its folder goes


def trial(tracker: Tracker, i: int) -> None:
    curve = [{"step": s, "loss": 1.0} for s in range(50)]
    tell(tracker, "kill", "c", str(i), params={"i": i}, metrics={"asr": i / 1000}, curves=curve)


CHILD = """
import sys, time
from pathlib import Path
from safecl.tracking import Tracker
from tests.tracking.test_tracker import trial
tracker = Tracker(None, Path(sys.argv[1]))
for i in range(1000):
    trial(tracker, i)
print("queued", flush=True)
if len(sys.argv) > 2:
    time.sleep(60)
"""


def test_a_killed_driver_leaves_nothing_that_the_next_run_cannot_mend(root: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(root), "hang"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "queued\n"
    while len(runs(root)) < 4:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    before = len(runs(root))
    tracker = Tracker(None, root)
    for i in range(before):
        trial(tracker, i)
    assert tracker.close(60), tracker.problem
    trials = runs(root, "tags.`safecl.level` = 'trial'")
    assert sorted(int(t.data.tags["safecl.trial"]) for t in trials) == list(range(before))
    for run in trials:
        assert run.info.status == "FINISHED" and run.data.metrics["asr"] == int(run.data.params["i"]) / 1000
        assert len(client(root).get_metric_history(run.info.run_id, "loss")) == 50


@pytest.mark.slow
def test_a_database_that_was_half_made_when_its_process_was_killed_is_made_anew(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "hang"], stdout=subprocess.DEVNULL) as child:
        while not any(file.stat().st_size > 50_000 for file in tmp_path.glob("mlflow.db*")):  # of a megabyte in the end
            assert child.poll() is None
        child.kill()
    Server(sqlite_url(tmp_path / "mlflow.db"), tmp_path)
    assert client(tmp_path).get_experiment_by_name(EXPERIMENT) is not None
    assert [file.name for file in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]


def test_mlflow_prints_no_address_of_a_run_that_ends_at_a_server(root: Path) -> None:
    from mlflow.tracking import MlflowClient

    Server(sqlite_url(root / "mlflow.db"), root)
    MlflowClient("http://127.0.0.1:9")._tracking_client._log_url("0" * 32)  # else it asks the server for what to print


def test_what_was_sent_is_not_sent_again_and_mlflow_not_even_imported(root: Path) -> None:
    tracker = Tracker(None, root)
    fill(tracker)
    assert tracker.close(60), tracker.problem
    code = f"{FILL}t = Tracker(None, Path(sys.argv[1])); fill(t); print(t.close(60), 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=90)
    assert done.stdout == "True False\n", done.stderr
    tracker = Tracker(None, root)
    fill(tracker, asr=0.5)
    assert tracker.close(60) and "mlflow" in sys.modules
    assert {run.data.metrics["asr"] for run in runs(root, "tags.`safecl.level` = 'trial'")} == {0.5}


def test_a_database_that_is_gone_is_made_again_and_the_terminal_hears_nothing_of_it(root: Path) -> None:
    """By the next run's process: MLflow keeps what it once opened."""
    tracker = Tracker(None, root)
    fill(tracker)
    assert tracker.close(60), tracker.problem
    assert len(runs(root)) == 7
    (root / "mlflow.db").unlink()
    code = f"{FILL}t = Tracker(None, Path(sys.argv[1])); fill(t)\n"
    code += "t.put(('s', 'c', '0'), 1, lambda: Run('a', files={'a': 'x'})); print(t.close(60))"
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == ("True\n", "")
    with sqlite3.connect(root / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (7 + 3,)
    assert sorted(p.name for p in root.iterdir()) == [".creating", "artifacts", "mlflow.db", "tracked.jsonl"]
