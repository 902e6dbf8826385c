"""Messages: one MLflow run as plain JSON, with names and lengths that MLflow accepts. They are sent, or wait on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

EXPERIMENT = "safecl"
VIEW = "safecl"  # view of the table of runs in MLflow's UI; its address ends with `?viewStateShareKey=safecl`
LEVELS = ("sweep", "cell", "trial")
TEXT = 5000  # most characters of a tag that every backend accepts
_NAME = re.compile(r"[^A-Za-z0-9_\-. :/]")
_QUOTES = re.compile(r"['\"`\\%]")  # a name is looked up in MLflow's filter language, which cannot escape them

Message = dict[str, Any]
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DataSet:
    """Rows that a run read. `digest` identifies their content. `source` says what they are made of, as JSON."""

    name: str
    digest: str
    context: Literal["training", "evaluation"]
    source: Mapping[str, Any] = field(default_factory=dict)
    num_rows: int | None = None


@dataclass(frozen=True)
class Model:
    """Weights that a run made. `files` are the texts that MLflow keeps, by path. The weights themselves stay in the store."""

    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """The content of one MLflow run.

    `curves` are points `{"step": int, name: float, ...}`. A metric that is None, NaN or infinite cannot be plotted, so it becomes
    a tag `safecl.not_finite.<name>`. Such points of a curve become one tag with their count. `files` are texts, or bytes of a
    picture, by path. `tables` are rows by path, which MLflow's evaluation view compares across runs. `note` is Markdown. `began`
    and `ended` are seconds since the epoch. `view`, only for a sweep, says how MLflow's UI shows the table of runs
    (sweeps.view).
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "FINISHED"
    note: str = ""
    data: Sequence[DataSet] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    model: Model | None = None
    began: float | None = None
    ended: float | None = None
    view: Mapping[str, Any] = field(default_factory=dict)


def path_of(path: Sequence[str]) -> list[str]:
    """The names of a sweep, its cell and its trial, changed so that MLflow's filter language can look them up."""
    return [_QUOTES.sub("_", str(part)) for part in path]


def digest_of(made_of: Any) -> str:
    """sha256 (hex) of the plain values that decide a run's content."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def message(path: Sequence[str], digest: str, at: float, run: Run) -> Message:
    """The message for a run. `at` is when its content was known, in seconds since the epoch. Of two messages on one run the
    later one is valid."""
    notes: dict[str, str] = {}
    final = {}
    for name, value in run.metrics.items():
        if value is None or not math.isfinite(value):
            notes[f"safecl.not_finite.{_name(name)}"] = str(value)
        else:
            final[_name(name)] = float(value)
    points, unread = _curves(run.curves)
    notes |= {f"safecl.not_finite.{name}": said for name, said in unread.items()}
    tables = {path: _table(rows) for path, rows in run.tables.items() if rows}
    if run.note:
        notes["mlflow.note.content"] = shortened(run.note)
    if tables:
        notes["mlflow.loggedArtifacts"] = json.dumps([{"path": path, "type": "table"} for path in tables])
    return {
        "path": path_of(path),
        "digest": digest,
        "at": at,
        "name": run.name,
        "params": {_name(key): text(value) for key, value in run.params.items()},
        "metrics": final,
        "curves": points,
        "tags": {**{_name(key): text(value) for key, value in run.tags.items()}, **notes},
        "status": run.status,
        "began": None if run.began is None else int(1000 * run.began),
        "ended": None if run.ended is None else int(1000 * run.ended),
        "data": [_data(each) for each in run.data],
        "files": {**{name: _content(value) for name, value in run.files.items()}, **tables},
        "model": None if run.model is None else _model(run.model),
        "view": dict(run.view),
    }


def _curves(curves: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The points with their finite values, and for each name a text about the values that are not finite."""
    points, bad = [], dict[str, list[int]]()
    for point in curves:
        values = []
        for name, value in point.items():
            if name == "step" or isinstance(value, str):
                continue
            if value is None or not math.isfinite(value):
                bad.setdefault(_name(name), []).append(int(point["step"]))
            else:
                values.append((_name(name), float(value)))
        points.append({"step": int(point["step"]), "values": values})
    return points, {
        name: f"{len(steps)} point(s) of the curve, first at step {steps[0]}" for name, steps in bad.items()
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The content that `mlflow.log_table` would write. It is not used, because it appends: a table sent twice would be
    duplicated."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return _content(json.dumps({"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}))


def _content(value: str | bytes) -> dict[str, str]:
    return {"text": value} if isinstance(value, str) else {"base64": base64.b64encode(value).decode()}


def content(kept: Mapping[str, str]) -> bytes:
    """The bytes of a file in a message."""
    return kept["text"].encode() if "text" in kept else base64.b64decode(kept["base64"])


def _data(data: DataSet) -> dict[str, Any]:
    profile = {} if data.num_rows is None else {"num_rows": data.num_rows}
    return {
        "name": data.name[:500],
        "digest": data.digest[:36],
        "context": data.context,
        "source": json.dumps(data.source, default=str)[:60_000],
        "profile": json.dumps(profile),
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": re.sub(r"[/:%\"']", "-", model.name.replace(".", "·")),  # signs that MLflow refuses
        "params": {_name(key): text(value)[:250] for key, value in model.params.items()},
        "tags": {_name(key): text(value) for key, value in model.tags.items()},
        "files": {name: _content(value) for name, value in model.files.items()},
    }


def _name(name: str) -> str:
    return _NAME.sub("_", str(name))[:240]


def text(value: Any) -> str:
    """A value as text for MLflow. Numbers and booleans are written as in JSON; long text is shortened."""
    return shortened(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))


def shortened(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 16] + "... (cut short)"


def now() -> float:
    return time.time()
