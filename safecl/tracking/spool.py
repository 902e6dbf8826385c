"""Files of the tracker: messages that MLflow accepted (`<root>/tracked.jsonl`) and that wait on disk
(`<root>/spool/*.jsonl`)."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safecl.base import sqlite_path


class Sent:
    """Digest of the last message that this tracking URI accepted, by path of the run.

    If the file is lost, only time is lost, because the server recognises a message that is sent again. If the SQLite database
    does not exist, nothing counts as accepted.
    """

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

    def holds(self, path: Sequence[str], digest: str) -> bool:
        return self._digests.get("/".join(path)) == digest

    def note(self, path: Sequence[str], digest: str) -> None:
        name = "/".join(path)
        self._digests[name] = digest
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"uri": self._uri, "path": name, "digest": digest}) + "\n")


class Spool:
    """Messages that wait on disk, one message a line."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "spool"

    def __bool__(self) -> bool:
        return any(self.folder.glob("*.jsonl"))

    def add(self, messages: Sequence[dict[str, Any]], suffix: str = "jsonl") -> None:
        """Write messages to one new file, completely or not at all. Raises OSError if the file cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(message, allow_nan=False) + "\n" for message in messages)
        partial = self.folder / f"{uuid.uuid4().hex}.partial"
        partial.write_text(lines, encoding="utf-8")
        partial.rename(self.folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.{suffix}")

    @contextmanager
    def waiting(self) -> Iterator[list[Path]]:
        """Files of messages, oldest first. If two drivers share a root, one waits until the other's block ends."""
        if not self.folder.is_dir():
            yield []
            return
        with one_at_a_time(self.folder / ".sending"):
            yield sorted(self.folder.glob("*.jsonl"))


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
