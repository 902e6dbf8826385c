"""What a sweep of chaos.py keeps, as seen from outside: in a folder, or at the URL of a server that may not answer."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from safecl.store import Store

REPEATABLE = (".safetensors", "curves.jsonl", "rows.jsonl", "outcomes.jsonl")  # made bit for bit by a repetition
CLAIMS, FRESH_S = "claims-", 2.0
UNDER_WAY = (
    "notes/lease-",
    "notes/claims-",
    "scratch/",
    "uploads/",
    "damaged/",
    "tmp/",
    "spool/",
    "tune/",
    "logs/train/",
)


class Kept:
    """One store. `SAFECL_CACHE` is set where it lies at a URL."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._store: Store | None = None
        self._thread = ThreadPoolExecutor(1)
        self._listing: Future[dict[str, Any]] | None = None  # under way
        self._listed: dict[str, Any] = {}  # the last one
        self._claimed: dict[str, list[str]] = {}  # when it was made
        self._at = 0.0

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store(self.root, patient=True)
        return self._store

    @property
    def local(self) -> Path:
        """Folder with its logs and databases."""
        return self.store.local

    def records(self, now: bool = False) -> dict[str, Any]:
        """What changes when a record is written again, of each finished stage, by key. At a URL it is what was last heard,
        unless it must be `now`."""
        if self.store.remote is None:
            found = {}
            for path in (self.local / "store").glob("*/*/record.json"):
                with suppress(FileNotFoundError):
                    about = path.stat()
                    found[path.parent.name] = about.st_ino, about.st_mtime_ns / 1e9
            return found
        if now:
            self._listed = self._list()
            return self._listed
        if self._listing is not None and self._listing.done():
            self._listed, self._listing, self._at = self._listing.result(), None, time.monotonic()
        if self._listing is None and time.monotonic() - self._at > 1.0:
            self._listing = self._thread.submit(self._list)
        return self._listed

    def _list(self) -> dict[str, Any]:
        assert self.store.remote is not None
        notes = self.store.remote.list("notes")
        fresh = [name for name, (at, _) in notes.items() if CLAIMS in name and time.time() - at < FRESH_S]
        texts = self.store.remote.read_all(fresh)
        self._claimed = {name: json.loads(text)["held"] for name, text in texts.items()}
        names = self.store.remote.list("records")
        return {Path(name).stem: (size, written) for name, (written, size) in names.items()}

    def claimed(self) -> dict[str, list[str]]:
        """What drivers said lately that they make, by note. At a URL it is what was heard with the last records."""
        if self.store.remote is not None:
            return self._claimed
        found = {}
        for note in (self.local / "notes").glob(f"{CLAIMS}*.json"):
            with suppress(OSError, ValueError):
                if time.time() - note.stat().st_mtime < FRESH_S:
                    found[note.name] = json.loads(note.read_text())["held"]
        return found

    def made(self) -> dict[str, str]:
        """sha256 of what stages made that a repetition makes bit for bit, by `kind/key/file`: weights, training curves, rows,
        and what was found of every answer. Models are left out: only a store at a URL has copies of local ones."""
        found = {}
        for record, folder in self._records():
            if record["kind"] == "model":
                continue
            for name, digest in record["sha256"].items():
                if name == "outcomes.jsonl":  # in the order in which answers came
                    lines = sorted(self._read(f"{folder}/{name}").splitlines())
                    digest = hashlib.sha256(b"\n".join(lines)).hexdigest()
                if name.endswith(REPEATABLE):
                    found[f"{record['kind']}/{record['key'][:12]}/{name}"] = digest
        return found

    def _records(self) -> list[tuple[dict[str, Any], str]]:
        """Every record, and where its files are."""
        remote = self.store.remote
        if remote is None:
            paths = (self.local / "store").glob("*/*/record.json")
            return [(json.loads(path.read_text()), str(path.parent.relative_to(self.local))) for path in paths]
        found = [json.loads(text) for text in remote.read_all(remote.list("records")).values()]
        return [(one, f"files/{one['kind']}/{one['key']}/{one['upload']}") for one in found]

    def _read(self, name: str) -> bytes:
        return (self.local / name).read_bytes() if self.store.remote is None else self.store.remote.read(name)

    def left(self) -> list[str]:
        """What is there of work under way."""
        found = [str(path.relative_to(self.local)) for prefix in UNDER_WAY for path in self.local.glob(f"{prefix}*")]
        if self.store.remote is not None:
            found += [name for name in self.store.remote.list("") if name.startswith(UNDER_WAY)]
        return found
