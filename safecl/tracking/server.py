"""Server: sends messages to MLflow. The tracker imports it, and with it mlflow, in its own thread.

A sweep's runs are listed once, by their tags. After that each message needs as few requests as its size allows. Objects that
must not be duplicated are looked up first: a run by its path, a model by its run, an output by its model. MLflow itself
recognises data sets and artifacts that it already has.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.base import sqlite_path, sqlite_url
from safecl.tracking import messages
from safecl.tracking.messages import EXPERIMENT, LEVELS, VIEW, Message
from safecl.tracking.spool import one_at_a_time

_METRICS, _PAIRS, _ALL = 1000, 100, 1000  # MLflow's limits on one log_batch
_PAGE = 1000
_STALE = ("safecl.error", "safecl.failure", "mlflow.note.content")  # tags that are deleted when they are no longer true


@dataclass
class _Known:
    """The server's state of a run, kept so that it need not be asked again."""

    id: str
    status: str
    start: int
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def at(self) -> float:
        return float(self.tags.get("safecl.at", 0))


def client(uri: str) -> Any:
    """An MLflow client that gives up after seconds (one retry, 15 s timeout) and sends no telemetry."""
    for name, value in {  # before the import: mlflow reads these once
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where a server is used; the table goes there
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make(file: Path) -> None:
    """Create an SQLite database with MLflow's tables, completely or not at all.

    MLflow creates the tables in dozens of steps. If the process is killed between them, MLflow can never use the database.
    """
    from mlflow.store.db import utils

    half = file.with_name(f"{file.name}.half")
    half.unlink(missing_ok=True)
    engine = utils.create_sqlalchemy_engine_with_retry(sqlite_url(half))
    utils._initialize_tables(engine)
    engine.dispose()
    half.replace(file)


class Server:
    """A connection to MLflow. Creating one imports mlflow and creates the database and the experiment, or raises."""

    def __init__(self, uri: str, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._runs: dict[str, dict[tuple[str, ...], _Known]] = {}  # by sweep and path
        with one_at_a_time(root / ".creating"):  # concurrent first use of an SQLite database fails
            self._client = client(uri)
            if (file := sqlite_path(uri)) is not None and not file.exists():
                _make(file)
            misread = Path(uri.removeprefix("sqlite:///")).parent
            if (database := sqlite_path(uri)) is not None and misread != database.parent:
                with suppress(OSError):
                    misread.rmdir()  # mlflow makes the folder that an encoded name spells
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                local = not uri.startswith(("http", "databricks", "uc"))
                location = (root / "artifacts").as_uri() if local else None  # else the server knows better
                self._experiment = self._client.create_experiment(
                    EXPERIMENT, artifact_location=location, tags=_EXPERIMENT_TAGS
                )
            else:
                self._experiment = experiment.experiment_id
                if experiment.lifecycle_stage == "deleted":
                    self._client.restore_experiment(self._experiment)
                for key, value in _EXPERIMENT_TAGS.items():
                    if key not in experiment.tags:  # what a person chose stays
                        self._client.set_experiment_tag(self._experiment, key, value)

    def ping(self) -> None:
        self._client.get_experiment(self._experiment)

    def send(self, message: Message) -> None:
        """Create or update the run that the message names. The runs above it are created if they do not exist."""
        path = tuple(message["path"])
        parent = None
        for depth in range(1, len(path)):
            parent = self._run(path[:depth], parent, {"name": path[depth - 1], "began": message["began"]})
        run = self._run(path, parent, message)
        if message["at"] < run.at:
            return  # it waited on disk while a later message was sent
        if run.tags.get("safecl.digest") != message["digest"]:
            if any(run.params.get(key, value) != value for key, value in message["params"].items()):
                run = self._anew(path, run, message)  # MLflow's params cannot change
            self._write(run, message)
        if run.status != message["status"]:
            self._end(run, message["status"], message["ended"])
        if message["view"]:
            self._show(message["view"])

    def _run(self, path: tuple[str, ...], parent: _Known | None, message: Message) -> _Known:
        of_sweep = self._of_sweep(path[0])
        if path not in of_sweep:
            of_sweep[path] = self._create(path, parent, message)
        return of_sweep[path]

    def _of_sweep(self, sweep: str) -> dict[tuple[str, ...], _Known]:
        """Runs of a sweep by path. If two runs have the same path (only two drivers at once can cause this), the earlier one."""
        if sweep not in self._runs:
            found: dict[tuple[str, ...], _Known] = {}
            token = None
            while True:
                page = self._client.search_runs(
                    [self._experiment],
                    f"tags.`safecl.sweep` = '{sweep}'",
                    max_results=_PAGE,
                    order_by=["start_time ASC"],
                    page_token=token,
                )
                for run in page:
                    tags = run.data.tags
                    path = tuple(tags[f"safecl.{level}"] for level in LEVELS if f"safecl.{level}" in tags)
                    info, params, metrics = run.info, dict(run.data.params), dict(run.data.metrics)
                    known = _Known(info.run_id, info.status, info.start_time, dict(tags), params, metrics)
                    found.setdefault(path, known)
                if not (token := page.token):
                    break
            self._runs[sweep] = found
        return self._runs[sweep]

    def _create(self, path: tuple[str, ...], parent: _Known | None, message: Message) -> _Known:
        tags = {f"safecl.{level}": name for level, name in zip(LEVELS, path, strict=False)}
        tags["safecl.level"] = LEVELS[len(path) - 1]
        if parent is not None:
            tags["mlflow.parentRunId"] = parent.id
        made = self._client.create_run(
            self._experiment, start_time=message["began"], tags=tags, run_name=message["name"]
        )
        return _Known(made.info.run_id, made.info.status, made.info.start_time, dict(made.data.tags))

    def _anew(self, path: tuple[str, ...], old: _Known, message: Message) -> _Known:
        """Replace a run whose params are no longer true by a new one. The old one is deleted (MLflow keeps it in its bin)."""
        of_sweep = self._of_sweep(path[0])
        parent = of_sweep.get(path[:-1]) if len(path) > 1 else None
        made = of_sweep[path] = self._create(path, parent, message)
        for below, run in of_sweep.items():
            if below[:-1] == path:
                self._client.set_tag(run.id, "mlflow.parentRunId", made.id)
        self._client.delete_run(old.id)
        return made

    def _end(self, run: _Known, status: str, ended: int | None) -> None:
        if status == "RUNNING":
            self._client.update_run(run.id, status=status)
        else:
            # A run that is tracked after its end, without its own start time, would have a negative duration.
            self._client.set_terminated(run.id, status, None if ended is None else max(ended, run.start))
        run.status = status

    def _write(self, run: _Known, message: Message) -> None:
        from mlflow.entities import Metric, Param, RunTag

        model = self._model(run, message) if message["model"] is not None else None
        if message["data"]:
            self._client.log_inputs(run.id, _inputs(message["data"]))
        if message["files"]:
            with _folder(message["files"]) as folder:
                self._client.log_artifacts(run.id, folder)
        tags = {**message["tags"], "mlflow.runName": message["name"], "safecl.at": repr(message["at"])}
        for key in _STALE:
            if key in run.tags and key not in tags:
                self._client.delete_tag(run.id, key)
                del run.tags[key]
        # Curve points get their time from their step, so that the database recognises equal points and a curve that is sent
        # again adds nothing. Final metrics get the message's time, and only changed ones are sent: the run shows the last one.
        at = int(1000 * message["at"])
        changed = {k: v for k, v in message["metrics"].items() if run.metrics.get(k) != v}
        metrics = [
            Metric(k, v, at, 0, model_id=model) for k, v in changed.items()
        ]  # first: as MLflow's pages list them
        metrics += [
            Metric(k, v, run.start + int(p["step"]), int(p["step"])) for p in message["curves"] for k, v in p["values"]
        ]
        params = [Param(key, value) for key, value in message["params"].items() if key not in run.params]
        pairs = [RunTag(key, value) for key, value in tags.items()]
        while metrics or params or len(pairs) >= _PAIRS:
            batch = {"params": params[:_PAIRS], "tags": pairs[: _PAIRS - 1]}
            room = min(_METRICS, _ALL - sum(map(len, batch.values())))
            if len(metrics) <= room and len(params) <= _PAIRS and len(pairs) < _PAIRS:
                break
            self._client.log_batch(run.id, metrics=metrics[:room], **batch)
            metrics, params, pairs = metrics[room:], params[_PAIRS:], pairs[_PAIRS - 1 :]
        # Last: a run without the digest is written again.
        digest = RunTag("safecl.digest", message["digest"])
        self._client.log_batch(run.id, metrics=metrics, params=params, tags=[*pairs, digest])
        run.tags |= {**tags, "safecl.digest": message["digest"]}
        run.params |= message["params"]
        run.metrics |= message["metrics"]

    def _model(self, run: _Known, message: Message) -> str:
        """Id of the LoggedModel of a run. It is created if it does not exist."""
        from mlflow.entities import LoggedModelOutput

        told = message["model"]
        found = self._client.search_logged_models([self._experiment], f"source_run_id = '{run.id}'")
        if found:
            model = found[0]
        else:
            model = self._client.create_logged_model(
                self._experiment, told["name"], run.id, told["tags"], told["params"], "adapter"
            )
        if str(model.status) != "READY":
            with _folder({**told["files"], "MLmodel": {"text": _mlmodel(model, run.id)}}) as folder:
                self._client.log_model_artifacts(model.model_id, folder)
            self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(run.id).outputs if found else None
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self._client.log_outputs(run.id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def _show(self, view: Message) -> None:
        """Set the shared view VIEW of the table of runs to that of the newest sweep."""
        primary = next((name.split("`")[1] for name in view["selectedColumns"] if name.startswith("metrics.")), "")
        self._client.set_experiment_tag(self._experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
        self._client.set_experiment_tag(self._experiment, "mlflow.experiment.primaryMetric.name", primary)


# These let the UI open on the runs, not on traces.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Runs of `safecl`: sweep, its cells (rows of the table), their trials. `safecl ui` opens it with the "
    "columns of the newest sweep.",
}


def _inputs(data: Sequence[Message]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(each["name"], each["digest"], "local", each["source"], profile=each["profile"]),
            [InputTag("mlflow.data.context", each["context"])],
        )
        for each in data
    ]


def _mlmodel(model: Any, run_id: str) -> str:
    """MLflow's own description of a model, with a prompt as input and an answer as output."""
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    signature = ModelSignature(
        Schema([ColSpec(DataType.string, "prompt")]), Schema([ColSpec(DataType.string, "answer")])
    )
    kept = Model(artifact_path=model.artifact_location, run_id=run_id, signature=signature, model_id=model.model_id)
    found: str = kept.to_yaml()
    return found


@contextmanager
def _folder(files: dict[str, dict[str, str]]) -> Iterator[str]:
    """A temporary folder with the files of a message. It is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="safecl-") as name:
        for path, kept in files.items():
            file = Path(name) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(messages.content(kept))
        yield name
