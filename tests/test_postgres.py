"""Studies and tracking in a real PostgreSQL, as several drivers on several machines share them."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.project import Project, load
from safecl.storage import open_storage, open_to_read
from safecl.study import CellStudy
from safecl.tracking import EXPERIMENT, Tracker, ui
from tests.made_up import QUICKSTART
from tests.servers import mlflow, postgres
from tests.tracking.test_tracker import tell


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres() as found:
        yield found


def tables(url: str) -> list[str]:
    from sqlalchemy import create_engine, inspect

    engine = create_engine(url)
    found = inspect(engine).get_table_names()
    engine.dispose()
    return found


def test_a_study_is_searched_and_goes_on_from_another_process_and_reading_it_writes_nothing(url: str) -> None:
    assert open_to_read(f"{url}/studies") is None and tables(f"{url}/studies") == [], (
        "a look before the first search makes no tables"
    )
    space: dict[str, Any] = {"weight": {"low": 0.1, "high": 9.0, "log": True}}

    def opened() -> CellStudy:
        return CellStudy("cell", space, {"weight": 1.0}, open_storage(f"{url}/studies"), 0, 4)

    number, params = opened().ask()
    assert params == {"weight": 1.0}  # the defaults come first
    [found] = open_to_read(f"{url}/studies").get_all_studies()
    assert found.study_name == "cell"
    again = opened()  # as a driver on another machine does, after the first one died
    again.repair()
    assert again.ask() == (number + 1, params) and again.remaining == 3


def test_a_trial_is_tracked(url: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    with pytest.raises(ConfigError, match="nothing was tracked yet"), ui.opened(f"{url}/tracking", tmp_path):
        pass
    assert tables(f"{url}/tracking") == [], "a look makes no tables"
    tracker = Tracker(f"{url}/tracking", tmp_path)
    tell(tracker, "quick", "der", "0", params={"weight": 0.5}, metrics={"asr": 0.25}, curves=[{"step": 0, "loss": 1.0}])
    assert tracker.close(timeout_s=120), tracker.problem
    client = MlflowClient(f"{url}/tracking")
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert [run.data.metrics["asr"] for run in found if "asr" in run.data.metrics] == [0.25]


@pytest.mark.slow
def test_mlflows_pages_are_opened_on_it_and_its_address_is_in_no_command_line(url: str, tmp_path: Path) -> None:
    tracker = Tracker(f"{url}/tracking", tmp_path)
    tell(tracker, "shown", "der", "0", metrics={"asr": 0.5})
    assert tracker.close(timeout_s=120), tracker.problem
    with ui.opened(f"{url}/tracking", tmp_path) as address:
        asked = urllib.request.Request(
            f"{address.partition('/#')[0]}/api/2.0/mlflow/runs/search",
            json.dumps({"experiment_ids": ["1"], "filter": "tags.`safecl.sweep` = 'shown'"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert len(json.load(answer)["runs"]) == 3
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert f"{url}/tracking" not in running


@pytest.mark.slow
def test_a_server_on_it_takes_a_whole_sweep_and_its_artifacts_and_nothing_twice(url: str, tmp_path: Path) -> None:
    """Also where it is away for a while: what is told then waits on disk."""
    from mlflow import MlflowClient

    from tests.tracking import test_logbook

    with mlflow(f"{url}/server", tmp_path / "server") as address:
        of = test_logbook.project(tmp_path / "runs", f"execution.tracking_uri={address}")
        done = test_logbook.run(of)
        (tmp_path / "runs" / "tracked.jsonl").unlink()
        test_logbook.run(Project(of.sweep))
        read = MlflowClient(address)
        experiment = read.get_experiment_by_name(EXPERIMENT)
        assert experiment.artifact_location.startswith("mlflow-artifacts:")
        found = read.search_runs([experiment.experiment_id], "tags.`safecl.level` = 'trial'", max_results=1000)
        assert len(found) == len(done) and {run.info.status for run in found} == {"FINISHED"}
        assert all(len(read.get_metric_history(run.info.run_id, "asr")) == 1 for run in found)
        assert len(read.search_logged_models([experiment.experiment_id])) == 4
        [sweep] = read.search_runs([experiment.experiment_id], "tags.`safecl.level` = 'sweep'")
        plots = read.list_artifacts(sweep.info.run_id, "plots")
        picture = Path(read.download_artifacts(sweep.info.run_id, plots[0].path, str(tmp_path)))
        assert picture.read_bytes().startswith(b"\x89PNG") and not (tmp_path / "runs" / "artifacts").exists()
        assert ui._runs(address).startswith(f"{address}/#/experiments/{experiment.experiment_id}/runs?")
    away = Tracker(address, tmp_path / "runs")
    tell(away, "late", "c", "0", metrics={"asr": 0.5})
    assert not away.close(40) and away.num_spooled == 1


@pytest.mark.parametrize(
    ("uri", "kind", "said"),
    [
        ("postgres://me@127.0.0.1/x", ConfigError, "begins with postgresql://, not with postgres://"),
        ("postgresql+nosuch://me@127.0.0.1/x", ConfigError, "expected postgresql://USER@HOST/DATABASE"),
        (
            "postgresql://me:secret@127.0.0.1:1/x",
            PrerequisiteError,
            r"@127\.0\.0\.1:1/x': the database does not answer",
        ),
    ],
)
def test_an_address_of_studies_at_which_there_is_none_is_one_line(
    uri: str, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    searched = "methods=[{name: der, search: {weight: {low: 0.1, high: 9.0}}}]"
    settings = [searched, "models.0.dtype=float32", f"execution.root={tmp_path}", f"execution.study_uri={uri}"]
    for reads in (True, False):
        with pytest.raises(kind, match=said) as raised:
            project = Project(load(QUICKSTART, settings), reads=reads)
            project.finals() if reads else project.schedule()
        assert "secret" not in str(raised.value)
