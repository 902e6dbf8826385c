"""MLflow: sweep -> cell -> trial. The only file that imports mlflow, and it does so in its own thread.

Only the driver writes, from finished records, one message per run. A run is found again by its tags (`safecl.sweep`,
`safecl.cell`, `safecl.trial`) and updated; a message that was sent before is recognised by its digest and skipped, so
sending twice is the same as sending once. That is what lets the tracker be careless about crashes: it never raises into
a run, writes what could not be sent to `<root>/spool/*.jsonl`, and sends it at the next start or as soon as the server
answers again. What was sent is noted in `<root>/tracked.jsonl`: a rerun that has nothing new never imports mlflow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safecl.base import json_lines, sqlite_path, sqlite_url

EXPERIMENT = "safecl"
LEVELS = ("sweep", "cell", "trial")
OPEN = "tracked.open"
_METRICS, _PAIRS = 1000, 100  # MLflow's limits on one log_batch
_TEXT = 5000  # characters of a tag that every backend takes
_RETRY_S = 30.0  # rest after the server failed
_NAME = re.compile(r"[^A-Za-z0-9_\-. :/]")
_QUOTES = re.compile(r"['\"`\\%]")  # a name is looked up in MLflow's filter language, which cannot escape them
_LOG = logging.getLogger("safecl.tracking")

Message = dict[str, Any]


class Tracker:
    """Writes runs from one daemon thread. No method raises; `problem` and `num_spooled` say how it stands.

    `uri`: an MLflow tracking URI, or None for SQLite at `root/mlflow.db` (created on first use, about 5 s, in the
    thread, by the first message that was not sent before). Artifacts and the spool live under `root`.
    """

    def __init__(self, uri: str | None, root: Path) -> None:
        self.root = Path(root).absolute()
        self.uri = uri or sqlite_url(self.root / "mlflow.db")
        self.problem: str | None = None  # the last failure in one line; None once everything went through
        self.num_spooled = 0  # runs that this object left waiting on disk
        self._refused: str | None = None
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._unsent: dict[int, Message] = {}  # put and not yet sent or spooled, by message number
        self._count = 0
        self._lock = threading.Lock()
        self._closed = False
        self._sent = _Sent(self.uri, self.root)
        self._thread = threading.Thread(target=self._work, name="safecl-tracking", daemon=True)
        self._thread.start()

    def trial(
        self,
        sweep: str,
        cell: str,
        trial: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        curves: Sequence[Mapping[str, float]] = (),
        tags: Mapping[str, Any] | None = None,
        stages: Mapping[str, str] | None = None,
        failed: bool = False,
    ) -> None:
        """One trial, with its sweep and cell above it. Returns at once.

        `curves`: points `{"step": int, name: float, ...}`; `stages`: stage key by role, kept as tags
        `safecl.stage.<role>`. A metric that is None, NaN or infinite is not a number to plot: it becomes a tag
        `safecl.not_finite.<name>`, and so do such points of a curve, with their count.
        """
        named = {f"safecl.stage.{role}": key for role, key in (stages or {}).items()}
        self._put((sweep, cell, trial), params, metrics, curves, {**(tags or {}), **named}, failed)

    def cell(self, sweep: str, cell: str, params: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        """What is known of a whole cell: the selected parameters, its metrics over seeds. Returns at once."""
        self._put((sweep, cell), params, metrics, (), {}, False)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Flush for at most `timeout_s`; what is still unsent then goes to the spool. True if everything was sent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join(timeout_s)
        with self._lock:
            left, self._unsent = list(self._unsent.values()), {}
        if left:
            self.problem = self.problem or f"{self.uri} did not take everything within {timeout_s:g} s"
            self._spool(left)
        return not left and self.num_spooled == 0 and self.problem is None

    def _put(
        self,
        path: tuple[str, ...],
        params: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        curves: Sequence[Mapping[str, float]],
        tags: Mapping[str, Any],
        failed: bool,
    ) -> None:
        try:
            message = _message(path, params, metrics, curves, tags, failed)
        except Exception as error:  # a value that json cannot hold must not end a run of hours
            self.problem = f"{'/'.join(map(str, path))} was not tracked: {error!r}"
            _LOG.warning(self.problem)
            return
        if self._sent.holds(message):
            return
        with self._lock:
            if not self._closed:
                self._count += 1
                self._unsent[self._count] = message
                self._queue.put({**message, "number": self._count})
                return
        self._spool([message])

    # From here on: the thread, except `_spool`, which `close` calls as well.

    def _work(self) -> None:
        sender: _Sender | None = None
        rest_until = 0.0
        waiting = any((self.root / "spool").glob("*.jsonl"))  # there is a spool, of an earlier run to begin with
        while True:
            message = self._next(rest_until if waiting else None)
            to_try = waiting and time.monotonic() >= rest_until
            if message is None and self._closed and self._queue.empty() and not to_try:
                break
            if message is not None and time.monotonic() < rest_until:
                self._give_up(message)
                continue
            try:
                sender = sender or _Sender(self.uri, self.root)
                if message is not None:
                    self._send(sender, message)
                if waiting:
                    self._send_spool(sender)
                    waiting, self.problem = False, self._refused
            except Exception as error:
                problem = f"{self.uri}: {_line(error)}"
                if problem != self.problem:  # once, not at every attempt
                    _LOG.warning("tracking waits on disk: %s", problem)
                self.problem = problem
                sender, rest_until, waiting = None, time.monotonic() + _RETRY_S, True
                if message is not None:
                    self._give_up(message)
        with suppress(Exception):
            if sender is None and (self.root / OPEN).exists():  # of a driver that was killed, and had sent all it had
                sender = _Sender(self.uri, self.root)
            if sender is not None:
                sender.close_parents()

    def _send(self, sender: _Sender, message: Message) -> None:
        """Raises if the server is away. A message that it is there to refuse goes to disk, to be read by a person."""
        try:
            sender.send(message)
            self._sent.note(message)
        except Exception as error:
            sender.ping()
            self.problem = self._refused = f"{self.uri} refused {'/'.join(message['path'])}: {_line(error)}"
            _LOG.warning(self.problem)
            self._spool([message], "refused")
        self._done(message)

    def _next(self, retry_at: float | None) -> Message | None:
        """The next message; None at the end, or when it is time to try the spool again."""
        if retry_at is None:
            return self._queue.get()
        try:
            return self._queue.get(timeout=min(max(0.0, retry_at - time.monotonic()), _RETRY_S))
        except queue.Empty:
            return None

    def _done(self, message: Message) -> bool:
        """Take the message off the books; False if `close` has spooled it meanwhile."""
        with self._lock:
            return self._unsent.pop(message["number"], None) is not None

    def _give_up(self, message: Message) -> None:
        if self._done(message):
            self._spool([message])

    def _spool(self, messages: list[Message], suffix: str = "jsonl") -> None:
        if not messages:
            return
        try:
            folder = self.root / "spool"
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps({**m, "number": 0}, allow_nan=False) + "\n" for m in messages)
            partial = folder / f"{uuid.uuid4().hex}.partial"
            partial.write_text(lines, encoding="utf-8")
            partial.rename(folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.{suffix}")
            self.num_spooled += len(messages) if suffix == "jsonl" else 0
        except Exception as error:
            self.problem = f"{len(messages)} run(s) could be neither sent nor spooled: {_line(error)}"
            _LOG.warning(self.problem)

    def _send_spool(self, sender: _Sender) -> None:
        """Send what waits on disk, oldest first; raises if the server is away. Two drivers may share a root."""
        folder = self.root / "spool"
        if not folder.is_dir():
            return
        with _one_at_a_time(folder / ".sending"):
            for path in sorted(folder.glob("*.jsonl")):
                messages = json_lines(path)
                for message in messages:
                    self._send(sender, message)
                path.unlink()
                self.num_spooled = max(0, self.num_spooled - len(messages))


class _Sent:
    """What this URI took, by path: the digest of the last message. Losing it costs time, nothing else: what is sent again
    is recognised by the server. A database that is gone has taken nothing."""

    def __init__(self, uri: str, root: Path) -> None:
        self._uri, self._path = uri, root / "tracked.jsonl"
        self._digests: dict[str, str] = {}
        database = sqlite_path(uri)
        if database is not None and not database.exists():
            return
        with suppress(OSError, ValueError, KeyError):
            for line in self._path.read_text(encoding="utf-8").splitlines():
                noted = json.loads(line)
                if noted["uri"] == uri:
                    self._digests[noted["path"]] = noted["digest"]

    def holds(self, message: Message) -> bool:
        return self._digests.get(self._name(message)) == _digest(message)

    def note(self, message: Message) -> None:
        name, digest = self._name(message), _digest(message)
        self._digests[name] = digest
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"uri": self._uri, "path": name, "digest": digest}) + "\n")

    @staticmethod
    def _name(message: Message) -> str:
        return "/".join(message["path"])


def _digest(message: Message) -> str:
    content = {key: value for key, value in message.items() if key != "number"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Sender:
    """The MLflow client. Building one imports mlflow, creates the database and the experiment, or raises."""

    def __init__(self, uri: str, root: Path) -> None:
        # Before the import: mlflow reads these once. No report home, and a dead server is a matter of seconds.
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
            "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where a server is used; the table goes there
            "GIT_PYTHON_REFRESH": "quiet",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        root.mkdir(parents=True, exist_ok=True)
        self._runs: dict[tuple[str, ...], str] = {}
        self._open = (
            root / OPEN
        )  # ids of runs above others, a line each: they are closed at the end, by whoever comes to it
        self._parents: set[str] = set(self._open.read_text().split()) if self._open.exists() else set()
        with _one_at_a_time(root / ".creating"):  # concurrent first use of an SQLite database fails
            self._client: Any = MlflowClient(tracking_uri=uri)
            misread = Path(uri.removeprefix("sqlite:///")).parent
            if (database := sqlite_path(uri)) is not None and misread != database.parent:
                with suppress(OSError):
                    misread.rmdir()  # mlflow makes the folder that an encoded name spells
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                local = not uri.startswith(("http", "databricks", "uc"))
                location = (root / "artifacts").as_uri() if local else None  # else the server knows better
                self._experiment = self._client.create_experiment(EXPERIMENT, artifact_location=location)
            else:
                self._experiment = experiment.experiment_id
                if experiment.lifecycle_stage == "deleted":
                    self._client.restore_experiment(self._experiment)

    def ping(self) -> None:
        self._client.get_experiment(self._experiment)

    def send(self, message: Message) -> None:
        """Create or update the run that the message names, and those above it."""
        path = tuple(message["path"])
        parent = None
        for depth in range(1, len(path)):
            parent = self._run(path[:depth], parent)
            self._keep_open(parent)
        run_id = self._run(path, parent)
        if len(path) < len(LEVELS):
            self._keep_open(run_id)
        run = self._client.get_run(run_id)
        content = json.dumps([message[k] for k in ("params", "metrics", "curves", "tags")], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        status = "FAILED" if message["failed"] else "FINISHED"
        if run.data.tags.get("safecl.digest") != digest:
            self._write(run, message, digest)
        if len(path) == len(LEVELS) and run.info.status != status:
            self._client.set_terminated(run_id, status)

    def _keep_open(self, run_id: str) -> None:
        if run_id not in self._parents:
            self._parents.add(run_id)
            with suppress(OSError), self._open.open("a") as file:
                file.write(f"{run_id}\n")

    def close_parents(self) -> None:
        for run_id in self._parents:
            with suppress(Exception):  # of another tracker, or deleted
                self._client.set_terminated(run_id, "FINISHED")
        self._open.unlink(missing_ok=True)

    def _run(self, path: tuple[str, ...], parent: str | None) -> str:
        if path in self._runs:
            return self._runs[path]
        tags = {f"safecl.{level}": name for level, name in zip(LEVELS, path, strict=False)}
        tags["safecl.level"] = LEVELS[len(path) - 1]
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_runs([self._experiment], wanted, max_results=1, order_by=["start_time ASC"])
        if found:
            run_id = found[0].info.run_id
        else:
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            run_id = self._client.create_run(self._experiment, tags=tags, run_name=path[-1]).info.run_id
        self._runs[path] = str(run_id)
        return self._runs[path]

    def _write(self, run: Any, message: Message, digest: str) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id, start = run.info.run_id, run.info.start_time
        tags = dict(message["tags"])
        params = {}
        for key, value in message["params"].items():
            if run.data.params.get(key, value) == value:
                params[key] = value
            else:  # MLflow's params cannot change; say so rather than show the old one alone
                tags[f"safecl.changed.{key}"] = value
        # Curve points take their time from their step, so that sending a curve again adds no second line: the
        # database knows equal points. Final metrics take the clock: the last one written is what the run shows.
        now = int(time.time() * 1000)
        metrics = [
            Metric(k, v, start + int(p["step"]), int(p["step"])) for p in message["curves"] for k, v in p["values"]
        ]
        metrics += [Metric(k, v, now, 0) for k, v in message["metrics"].items()]
        pairs = [RunTag(k, v) for k, v in tags.items()]
        for chunk in _chunks(metrics, _METRICS):
            self._client.log_batch(run_id, metrics=chunk)
        for chunk in _chunks([Param(k, v) for k, v in params.items()], _PAIRS):
            self._client.log_batch(run_id, params=chunk)
        for chunk in _chunks(pairs, _PAIRS):
            self._client.log_batch(run_id, tags=chunk)
        # Last: a run without the digest is written again.
        self._client.log_batch(run_id, tags=[RunTag("safecl.digest", digest)])


def _message(
    path: tuple[str, ...],
    params: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    curves: Sequence[Mapping[str, float]],
    tags: Mapping[str, Any],
    failed: bool,
) -> Message:
    """Plain finite JSON, with names and lengths that MLflow takes."""
    notes: dict[str, str] = {}
    final = {}
    for name, value in metrics.items():
        if value is None or not math.isfinite(value):
            notes[f"safecl.not_finite.{_name(name)}"] = str(value)
        else:
            final[_name(name)] = float(value)
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
    for name, steps in bad.items():
        notes[f"safecl.not_finite.{name}"] = f"{len(steps)} point(s) of the curve, first at step {steps[0]}"
    return {
        "path": [_QUOTES.sub("_", str(part)) for part in path],
        "params": {_name(k): _text(v) for k, v in params.items()},
        "metrics": final,
        "curves": points,
        "tags": {**{_name(k): _text(v) for k, v in tags.items()}, **notes},
        "failed": failed,
    }


def _name(name: str) -> str:
    return _NAME.sub("_", str(name))[:240]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _TEXT else text[: _TEXT - 16] + "... (cut short)"


def _line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
