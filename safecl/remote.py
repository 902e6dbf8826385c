"""Files at an fsspec URL, for the store: whole files are written and read, and one kind of file is created only once.

If the network or the server fails, every call is tried again for a while, because a storage that restarts must not end
a sweep.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from safecl.base import Json, PrerequisiteError, Unreachable

PATIENCE_S = 900.0  # seconds for which a server that does not answer is asked again
FIRST_PATIENCE_S = 20.0  # seconds, before the server has answered once: most often its name is wrong
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # protocol -> extra of safecl that installs its driver
_FLAT = {"s3", "gs", "abfs"}  # object stores: their names have slashes, but they have no folders to create
_DEFINITE = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_NETWORK = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3")
_HOPELESS = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")

T = TypeVar("T")


def is_url(root: str) -> bool:
    """Whether a root is an fsspec URL, not a folder."""
    return "://" in root and not root.startswith("file://")


class Remote:
    """The files below a URL. Names are relative to it, with slashes."""

    def __init__(self, url: str, patient: bool = False) -> None:
        """Open the URL; no file is read or written.

        Args:
            url: an fsspec URL.
            patient: the server has already answered another process, so wait longer for it.

        Raises:
            PrerequisiteError: the package with its driver is not installed, or there is no such protocol.
        """
        self.url = url.rstrip("/")
        self.patience_s = PATIENCE_S if patient else FIRST_PATIENCE_S
        self._fs, self._base = _driver(self.url)
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        self._is_flat = not _FLAT.isdisjoint(protocols)

    def exists(self, name: str) -> bool:
        """Whether a file exists."""
        return bool(self._try(lambda: self._fs.exists(self._path(name))))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        found: bytes = self._try(lambda: self._fs.cat_file(self._path(name)))
        return found

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Contents by name, read in parallel. Files that do not exist are left out."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        found = self._try(lambda: self._fs.cat(list(paths), on_error="omit"))
        return {paths[path]: content for path, content in found.items() if path in paths}

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        self._make_parent(name)
        self._try(lambda: self._fs.pipe_file(self._path(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists. Returns whether the file now has this content. If several callers create it at
        once, one succeeds. `content` must be unique to this caller."""
        self._make_parent(name)

        def once() -> bool:
            try:
                self._fs.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError):  # a driver without exclusive creation
                if self._fs.exists(self._path(name)):
                    return False
                self._fs.pipe_file(self._path(name), content)
            return True

        # If the answer of our own write was lost, the retry finds the file as if another caller had created it.
        return self._try(once) or self.read(name) == content

    def upload(self, folder: Path, names: Sequence[str], to: str) -> None:
        """Copy files of a folder to the same names below `to`."""
        if names:
            here = [str(folder / name) for name in names]
            there = [self._path(f"{to}/{name}") for name in names]
            self._try(lambda: self._fs.put(here, there))

    def download(self, at: str, names: Sequence[str], folder: Path) -> None:
        """Copy files below `at` into a folder. Raises FileNotFoundError if one does not exist."""
        for parent in {(folder / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        if names:
            there = [self._path(f"{at}/{name}") for name in names]
            here = [str(folder / name) for name in names]
            self._try(lambda: self._fs.get(there, here))

    def list(self, below: str) -> dict[str, tuple[float, int]]:
        """(time of writing, bytes) of all files below a name, by file name."""
        found: Mapping[str, Any] = self._try(lambda: self._fs.find(self._path(below), detail=True))
        cut = len(self._base.lstrip("/")) + 1
        return {path.lstrip("/")[cut:]: (_written(info), int(info.get("size") or 0)) for path, info in found.items()}

    def move(self, name: str, to: str) -> None:
        """Rename a file. Raises FileNotFoundError."""
        self._make_parent(to)
        self._try(lambda: self._fs.mv(self._path(name), self._path(to)))

    def remove(self, name: str) -> None:
        """Remove a file, or all files below a name. Does nothing if there is none."""
        with suppress(FileNotFoundError):
            self._try(lambda: self._fs.rm(self._path(name), recursive=True))

    def note(self, name: str, value: Json) -> None:
        """Write a value as a JSON file, or replace it."""
        self.write(name, json.dumps(value, indent=1).encode())

    def noted(self, name: str) -> Any:
        """The JSON value of a file; None if there is no such file."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def check(self, probe: str) -> None:
        """Write, read and remove a file. Raises PrerequisiteError with the reason if this fails."""
        try:
            self.write(f"tmp/{probe}", probe.encode())
            same = self.read(f"tmp/{probe}") == probe.encode()
            self.remove(f"tmp/{probe}")
        except Exception as error:
            if isinstance(error, PrerequisiteError):
                raise
            raise self._unusable(error) from None
        if not same:
            raise PrerequisiteError(f"execution.root {self.url!r}: what was written there reads otherwise")

    def _unusable(self, error: BaseException) -> PrerequisiteError:
        return PrerequisiteError(
            f"execution.root {self.url!r} cannot be used ({_said(error)}): expected a URL that this machine and every node may "
            "read and write; the driver reads its usual settings for keys, region and endpoint"
        )

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _make_parent(self, name: str) -> None:
        if not self._is_flat:
            self._try(lambda: self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True))

    def _try(self, call: Callable[[], T]) -> T:
        began, pause = time.monotonic(), 0.5
        while True:
            try:
                found = call()
            except _DEFINITE as error:
                was_known = self.patience_s == PATIENCE_S
                self.patience_s = PATIENCE_S  # the server has answered
                if "bucket does not exist" in str(error) or (isinstance(error, PermissionError) and not was_known):
                    raise self._unusable(error) from error
                raise
            except Exception as error:
                if not _is_network(error):
                    raise
                waited = time.monotonic() - began
                if waited > self.patience_s or type(error).__name__ in _HOPELESS:
                    raise Unreachable(f"{self.url} does not answer: {_said(error)}") from error
                time.sleep(pause)
                pause = min(2 * pause, 15.0)
            else:
                self.patience_s = PATIENCE_S
                return found


def _driver(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        fs, base = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        known = known_implementations.get(protocol, {})
        package = f"'safecl[{extra}]'" if extra else str(known.get("class", protocol)).partition(".")[0]
        raise PrerequisiteError(
            f"execution.root {url!r}: the driver of {protocol}:// is not installed here ({error}); every node needs it: "
            f"pip install {package}"
        ) from None
    except ValueError as error:
        raise PrerequisiteError(
            f"execution.root {url!r}: {error}; expected a folder or the URL of a storage that fsspec knows, such as "
            "s3://bucket/folder"
        ) from None
    return fs, str(base).rstrip("/")


def _is_network(error: Exception) -> bool:
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK


def _said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _written(info: Mapping[str, Any]) -> float:
    for name in ("LastModified", "updated", "mtime", "last_modified", "created"):
        found = info.get(name)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, str):
            return datetime.fromisoformat(found).timestamp()
        if isinstance(found, int | float):
            return float(found)
    return 0.0


def names_below(folder: Path) -> list[str]:
    """Names of all files of a folder and its subfolders, relative to it, sorted."""
    found = (Path(parent, name) for parent, _, files in os.walk(folder) for name in files)
    return sorted(str(path.relative_to(folder)) for path in found)
