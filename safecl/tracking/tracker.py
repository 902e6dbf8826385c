"""Tracker: sends runs to MLflow from one daemon thread.

Only the driver writes, from finished records, one message for each run. A run is found by its tags (`safecl.sweep`,
`safecl.cell`, `safecl.trial`) and updated. A message that was sent before is recognised by its digest and skipped, so sending
twice has the same effect as sending once. Therefore crashes do no harm. The tracker never raises into a sweep. It writes
messages that cannot be sent to `<root>/spool/*.jsonl`, and sends them at the next start or as soon as the server answers again.
Sent messages are noted in `<root>/tracked.jsonl`, so a rerun without news never imports mlflow.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import json_lines, sqlite_url
from safecl.tracking import messages
from safecl.tracking.messages import Message, Run
from safecl.tracking.server import Server
from safecl.tracking.spool import Sent, Spool

_RETRY_S = 30.0  # seconds to wait after the server failed
_LOG = logging.getLogger("safecl.tracking")


class _Put(NamedTuple):
    """A run that was passed to the tracker. `make` reads the store, which would delay the driver too much."""

    number: int
    path: list[str]
    digest: str
    at: float
    make: Callable[[], Run]

    def message(self) -> Message:
        return messages.message(self.path, self.digest, self.at, self.make())


class Tracker:
    """Sends runs to MLflow from one daemon thread. No method raises; `problem` and `num_spooled` show its state.

    `uri` is an MLflow tracking URI, or None for SQLite at `root/mlflow.db`. The database is created in the thread by the first
    message that was not sent before, which takes about 5 s. Artifacts and the spool are under `root`.
    """

    def __init__(self, uri: str | None, root: Path) -> None:
        self.root = Path(root).absolute()
        self.uri = uri or sqlite_url(self.root / "mlflow.db")
        self.problem: str | None = None  # the last failure in one line; None once everything went through
        self.num_spooled = 0  # runs that this object left waiting on disk
        self._refused: str | None = None
        self._queue: queue.SimpleQueue[_Put | None] = queue.SimpleQueue()
        self._unsent: dict[int, _Put] = {}  # put and not yet sent or spooled, by number
        self._last: dict[str, str] = {}  # digest of what was put last, by path
        self._count = 0
        self._lock = threading.Lock()
        self._closed = False
        self._sent, self._spool = Sent(self.uri, self.root), Spool(self.root)
        self._thread = threading.Thread(target=self._work, name="safecl-tracking", daemon=True)
        self._thread.start()

    def put(self, path: Sequence[str], made_of: Any, make: Callable[[], Run], now: bool = False) -> None:
        """Send the run that `make` returns. `path` names its sweep, cell and trial.

        Returns at once: `make` is called in another thread, or with `now` in this one. It is called only if `made_of` (plain
        values that decide its result) differs from what was sent last.
        """
        try:
            named, digest = messages.path_of(path), messages.digest_of([list(path), made_of])
            if self._is_last(named, digest):
                return
            if now:
                made = make()
                make = lambda: made  # noqa: E731
        except Exception as error:  # a tracking error must not end a sweep of hours
            self._lost("/".join(map(str, path)), error)
            return
        self._last["/".join(named)] = digest
        with self._lock:
            self._count += 1
            put = _Put(self._count, named, digest, messages.now(), make)
            if not self._closed:
                self._unsent[put.number] = put
                self._queue.put(put)
                return
        self._keep([put])

    def knows(self, path: Sequence[str], made_of: Any) -> bool:
        """Whether `made_of` is what was put last for this run, by this tracker or by an earlier one that sent it."""
        return self._is_last(messages.path_of(path), messages.digest_of([list(path), made_of]))

    def _is_last(self, path: list[str], digest: str) -> bool:
        last = self._last.get("/".join(path))
        return self._sent.holds(path, digest) if last is None else last == digest

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send for at most `timeout_s` seconds; then write unsent messages to the spool. True if everything was sent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join(timeout_s)
        with self._lock:
            left, self._unsent = list(self._unsent.values()), {}
        if left:
            self.problem = self.problem or f"{self.uri} did not take everything within {timeout_s:g} s"
            self._keep(left)
        return not left and self.num_spooled == 0 and self.problem is None

    def _keep(self, puts: Sequence[_Put]) -> None:
        """Write unsent runs to disk."""
        made = []
        for put in puts:
            try:
                made.append(put.message())
            except Exception as error:
                self._lost("/".join(put.path), error)
        self._write(made)

    def _lost(self, name: str, error: Exception) -> None:
        self.problem = self._refused = f"{name} was not tracked: {_line(error)}"
        _LOG.warning(self.problem)

    def _write(self, made: Sequence[Message], suffix: str = "jsonl") -> None:
        if not made:
            return
        try:
            self._spool.add(made, suffix)
            self.num_spooled += len(made) if suffix == "jsonl" else 0
        except Exception as error:
            self.problem = f"{len(made)} run(s) could be neither sent nor spooled: {_line(error)}"
            _LOG.warning(self.problem)

    # From here on: the thread.

    def _work(self) -> None:
        server: Server | None = None
        rest_until = 0.0
        waiting = bool(self._spool)  # of an earlier run to begin with
        while True:
            put = self._next(rest_until if waiting else None)
            to_try = waiting and time.monotonic() >= rest_until
            if put is None and self._closed and self._queue.empty() and not to_try:
                break
            if put is not None and time.monotonic() < rest_until:
                self._give_up(put)
                continue
            try:
                server = server or Server(self.uri, self.root)
                if waiting:  # first, because of two messages on one run the later one is valid
                    self._send_spool(server)
                    waiting, self.problem = False, self._refused
                if put is not None:
                    self._send_put(server, put)
            except Exception as error:
                problem = f"{self.uri}: {_line(error)}"
                if problem != self.problem:  # once, not at every attempt
                    _LOG.warning("tracking waits on disk: %s", problem)
                self.problem = problem
                server, rest_until, waiting = None, time.monotonic() + _RETRY_S, True
                if put is not None:
                    self._give_up(put)

    def _send_put(self, server: Server, put: _Put) -> None:
        try:
            message = put.message()
        except Exception as error:
            self._lost("/".join(put.path), error)
        else:
            self._send(server, message)
        self._done(put)

    def _send(self, server: Server, message: Message) -> None:
        """Send one message. Raises if the server is away. A message that the server refuses is written to disk for a person to
        read."""
        try:
            server.send(message)
            self._sent.note(message["path"], message["digest"])
        except Exception as error:
            server.ping()
            self.problem = self._refused = f"{self.uri} refused {'/'.join(message['path'])}: {_line(error)}"
            _LOG.warning(self.problem)
            self._write([message], "refused")

    def _next(self, retry_at: float | None) -> _Put | None:
        """The next run. None at the end, or when it is time to try the spool again."""
        if self._closed and self._queue.empty():
            return None  # an earlier call may already have taken the end mark
        if retry_at is None:
            return self._queue.get()
        try:
            return self._queue.get(timeout=min(max(0.0, retry_at - time.monotonic()), _RETRY_S))
        except queue.Empty:
            return None

    def _done(self, put: _Put) -> bool:
        """Remove the run from the unsent ones. False if `close` has spooled it meanwhile."""
        with self._lock:
            return self._unsent.pop(put.number, None) is not None

    def _give_up(self, put: _Put) -> None:
        if self._done(put):
            self._keep([put])

    def _send_spool(self, server: Server) -> None:
        """Send the messages that wait on disk, oldest first. Raises if the server is away."""
        with self._spool.waiting() as files:
            for path in files:
                found = json_lines(path)
                for message in found:
                    self._send(server, message)
                path.unlink()
                self.num_spooled = max(0, self.num_spooled - len(found))


def _line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"
