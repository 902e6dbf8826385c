"""Studies and tracking in a real PostgreSQL, as several drivers on several machines share them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safecl.storage import open_storage, open_to_read
from safecl.study import CellStudy
from safecl.tracking import EXPERIMENT, Tracker
from tests.servers import postgres


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

    tracker = Tracker(f"{url}/tracking", tmp_path)
    tracker.trial("quick", "der", "0", {"weight": 0.5}, {"asr": 0.25}, [{"step": 0, "loss": 1.0}], {"note": "n"}, {})
    assert tracker.close(timeout_s=120), tracker.problem
    client = MlflowClient(f"{url}/tracking")
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert [run.data.metrics["asr"] for run in found if "asr" in run.data.metrics] == [0.25]
