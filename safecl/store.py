"""The content-addressed store of finished stages: a folder, or an fsspec URL with a cache on each node.

A stage's key is its identity (identity.py).

<root>/store/<kind>/<key>/            files of the stage, and
<root>/store/<kind>/<key>/record.json written last: a stage without it does not exist
<root>/scratch/<key>/<owner>/         checkpoints of a running stage, kept across attempts
<root>/logs/<kind>-<key>.log          output of a stage
<root>/tmp/<owner>.<number>/          a stage that is being written
<root>/damaged/<kind>-<key>.<number>/ stages whose files differ from what was written
<root>/notes/<name>.json              facts of the machines that ran, not of any stage

At a URL, files and records are stored apart. One short listing then tells which stages are finished, and two processes
that publish at once never mix their files:

<url>/files/<kind>/<key>/<upload>/    files of the stage, and
<url>/records/<kind>/<key>.json       created last and only once; names the upload that counts
<url>/uploads/<upload>.json           an upload in progress; used to remove what dead owners left
<url>/scratch, logs, damaged, notes   as above

The cache <cache>/<hash of the url>/ has the layout of a root that is a folder. <cache> is SAFECL_CACHE of the node, by
default ~/.cache/safecl. cache.py keeps it within execution.cache_gib.

A process compares a stage with its record (records.py) when it first reads it. A stage that is cut short or changed is
never used: the error names it, and a run makes it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safecl import lease, records
from safecl.base import Damaged, Json
from safecl.cache import Cache
from safecl.identity import Context as Context
from safecl.identity import Place as Place
from safecl.identity import Ref
from safecl.identity import SharedConfig as SharedConfig
from safecl.identity import Stage as Stage
from safecl.identity import below as below
from safecl.identity import canonical as canonical
from safecl.remote import Remote, is_url, names_below


class Store:
    """Finished stages under a root: a local folder, or an fsspec URL with a local folder as this node's cache.

    Publishing is atomic, and the first process to publish a key wins. A stage is written into a temporary folder,
    `record.json` last, and then renamed to its key. At a URL the record is created once, after the files. A crash
    leaves no stage under a key.
    """

    def __init__(
        self, root: str, owner: str | None = None, cache_gib: float | None = None, patient: bool = False
    ) -> None:
        """Open the store; the folder need not exist.

        Args:
            root: a folder, or an fsspec URL.
            owner: name under which scratch folders are kept, by default this process's (see lease.me).
            cache_gib: see cache.py.
            patient: see remote.py.

        Raises:
            PrerequisiteError: the driver of a URL is not installed.
        """
        self.root, self.owner, self.cache_gib = root, owner or lease.me(), cache_gib
        self.remote: Remote | None = None
        if is_url(root):
            self.remote = Remote(root, patient)
            folder = Path(os.environ.get("SAFECL_CACHE") or "~/.cache/safecl").expanduser().absolute()
            self.local = folder / hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        else:
            self.local = Path(root.removeprefix("file://")).absolute()
        self.cache = Cache(self.local, cache_gib)
        self._stages = str(self.local / "store")
        self._sound: set[str] = set()  # keys of stages that this process has compared with their record
        self._known: set[str] = set()  # keys of stages that are finished at the URL

    @property
    def short(self) -> str:
        """Eight digits that identify this owner, for the names of what it starts on a cluster."""
        return lease.short_of(self.owner)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is the same store with the same owner. On another node it uses that node's cache."""
        return Store, (str(self.local) if self.remote is None else self.root, self.owner, self.cache_gib, True)

    @property
    def logs(self) -> Path:
        """Folder of the stages' output on this node."""
        return self.local / "logs"

    def _folder(self, stage: Stage | Ref) -> Path:
        return self.local / "store" / stage.kind / stage.key

    def has(self, stage: Stage | Ref) -> bool:
        """Whether the stage is finished (its record exists)."""
        if self.remote is None:
            return os.path.isfile(f"{self._stages}/{stage.kind}/{stage.key}/record.json")
        if stage.key not in self._known and self.remote.exists(record_name(stage)):
            self._known.add(stage.key)
        return stage.key in self._known

    def listed(self) -> Callable[[Stage | Ref], bool]:
        """Returns `has`, answered from one listing made now. Use it to ask for thousands of stages."""
        if self.remote is not None:
            self._known |= {Path(name).stem for name in self.remote.list("records")}
            return lambda stage: stage.key in self._known
        kinds = os.listdir(self._stages) if os.path.isdir(self._stages) else ()
        there = {key for kind in kinds for key in os.listdir(f"{self._stages}/{kind}")}
        return lambda stage: stage.key in there and self.has(stage)

    def path(self, stage: Stage | Ref) -> Path:
        """Returns the local folder of a finished stage. At a URL it is fetched first; it may be removed again later
        unless `using` holds it.

        Raises:
            KeyError: the stage is not finished.
            Damaged: its files are not what was written.
        """
        folder = self._local(stage)
        if stage.key not in self._sound:
            wrong = records.damage(folder)
            if wrong is not None and self.remote is not None:
                self._set_aside(folder)  # this machine's copy is damaged; the original may be whole
                wrong = records.damage(self._local(stage))
            if wrong is not None:
                raise _damaged(stage, wrong)
            self._sound.add(stage.key)
        return folder

    @contextmanager
    def using(self, stages: Iterable[Stage | Ref]) -> Iterator[list[Path]]:
        """Local folders of finished stages, which are kept while the block runs. Raises as `path` does."""
        held: list[int] = []
        try:
            paths = []
            for stage in stages:
                while True:
                    path = self.path(stage)
                    if self.remote is None:
                        break
                    held.append(self.cache.hold(_name(stage)))
                    if (path / "record.json").is_file():  # else another process removed it in between, to make room
                        break
                paths.append(path)
            yield paths
        finally:
            for each in held:
                self.cache.let_go(each)

    def file(self, stage: Stage | Ref, name: str) -> Path:
        """Path of one file of a finished stage, as in the folder that `path` gives. The other files are not checked."""
        path = self._local(stage) / name
        if stage.key not in self._sound and (wrong := records.damage(path.parent, name)) is not None:
            raise _damaged(stage, wrong)
        return path

    def _local(self, stage: Stage | Ref) -> Path:
        folder = self._folder(stage)
        if self.remote is None:
            if not (folder / "record.json").is_file():
                raise self._absent(stage)
            return folder
        self.cache.used(_name(stage))
        if not (folder / "record.json").is_file():
            with self.cache.alone(_name(stage)):
                if not (folder / "record.json").is_file():  # another process has fetched it meanwhile
                    self._sound.discard(stage.key)
                    self._fetch(stage, folder, self.remote)
        return folder

    def _absent(self, stage: Stage | Ref) -> KeyError:
        return KeyError(f"stage {stage.kind} {stage.key[:12]} is not in the store at {self.root}")

    def sound(self, stage: Stage) -> bool:
        """Whether the stage is finished and undamaged. A damaged stage is moved to `damaged/`, so that it is made
        again. Only runs may call this."""
        try:
            self.path(stage)
        except KeyError:
            return False
        except Damaged:
            found = self._folder(stage)
            if self.remote is not None:
                with suppress(FileNotFoundError):  # another process was first
                    there = json.loads(self.remote.read(record_name(stage)))
                    if not (found / "record.json").is_file() or there == records.load(found / "record.json"):
                        self.remote.move(record_name(stage), f"damaged/{_name(stage)}.{uuid.uuid4().hex[:8]}.json")
                self._known.discard(stage.key)
            self._set_aside(found)
            return False
        return True

    def _set_aside(self, folder: Path) -> None:
        target = self.local / "damaged" / f"{folder.parent.name}-{folder.name}.{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was first
            os.rename(folder, target)

    def record(self, stage: Stage | Ref) -> dict[str, Any]:
        """Returns the record of a finished stage: config, inputs, result, seconds, created, libraries, files. Raises as
        `path` does, but does not check the files."""
        path = self._folder(stage) / "record.json"
        if path.is_file() or self.remote is None:
            if not path.is_file():
                raise self._absent(stage)
            return records.load(path)
        try:
            return records.read(self.remote.read(record_name(stage)), stage.key, f"{self.root}/{record_name(stage)}")
        except FileNotFoundError:
            raise self._absent(stage) from None

    def scratch(self, stage: Stage) -> Path:
        """Folder for checkpoints of a running stage. It belongs to this owner alone. The folder of an owner that has
        ended is taken over, so checkpoints are kept across attempts. Removed when the stage is published. At a URL: see
        underway.py."""
        folder = self.local / "scratch" / stage.key / self.owner
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in sorted(folder.parent.iterdir(), key=_changed, reverse=True):
            if lease.is_name(left.name) and not self.is_alive(left.name):
                with suppress(OSError):  # another rank of this run, or another run, was first
                    os.rename(left, folder)
                    return folder
        folder.mkdir(exist_ok=True)
        return folder

    def is_alive(self, owner: str) -> bool:
        """Whether the process of this name is running. On this machine the process itself is checked, on another its
        lease."""
        here = lease.is_here(owner)
        return self.noted(lease.NOTE + owner) is not None if here is None else here

    def new_folder(self) -> Path:
        """An empty folder on the store's disk to write a stage into."""
        owner = self.owner if self.remote is None else lease.me()  # this node can see when this owner ends
        folder = self.local / "tmp" / f"{owner}.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        return folder

    def publish(self, stage: Stage, made: Path, result: dict[str, Json], seconds: float) -> Path:
        """Move the files in `made` to the stage's key and write its record. If the key exists already, the first stage
        stays.

        Args:
            made: a folder from `new_folder`; it is moved or removed.
            result: what the stage returned, kept in the record.
            seconds: wall time of the work.

        Returns:
            The local folder of the stage.
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
            "libraries": dict(records.libraries()),
            "files": {name: (made / name).stat().st_size for name in names_below(made)},
        }
        record |= records.sums(made, record["files"])
        upload = f"{self.owner}.{uuid.uuid4().hex}"
        if self.remote is not None:
            record["upload"] = upload
        record["digest"] = records.digest(record)
        text = json.dumps(record, indent=1, sort_keys=True)
        if self.remote is None:
            _write_synced(made / "record.json", text)
            self._take_in(made, self._folder(stage))
        elif self._send(stage, made, upload, text, self.remote):
            (made / "record.json").write_text(text)
            with self.cache.alone(_name(stage)):
                self._take_in(made, self._folder(stage))
                self.cache.put(_name(stage), sum(record["files"].values()))
            self.cache.make_room(0, self._drop)
        else:
            shutil.rmtree(made)
        self._leave_scratch(stage)
        return self._folder(stage) if self.remote is None else self.path(stage)

    @staticmethod
    def _take_in(made: Path, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "record.json").is_file():
                # This folder is no stage (its record was deleted). It is replaced by the finished one.
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(made, folder)
            else:
                shutil.rmtree(made)

    def _send(self, stage: Stage, made: Path, upload: str, record: str, remote: Remote) -> bool:
        """Whether this upload is the one that counts."""
        if remote.exists(record_name(stage)):
            return False
        remote.note(f"uploads/{upload}.json", {"kind": stage.kind, "key": stage.key})
        remote.upload(made, names_below(made), f"files/{stage.kind}/{stage.key}/{upload}")
        is_ours = remote.create(record_name(stage), record.encode())
        if not is_ours:
            remote.remove(f"files/{stage.kind}/{stage.key}/{upload}")
        remote.remove(f"uploads/{upload}.json")
        return is_ours

    def _fetch(self, stage: Stage | Ref, folder: Path, remote: Remote) -> None:
        """Fetch a stage from the URL. The caller holds the stage's lock."""
        for tries_left in (1, 0):
            try:
                text = remote.read(record_name(stage))
            except FileNotFoundError:
                self._known.discard(stage.key)
                raise self._absent(stage) from None
            record = records.read(text, stage.key, f"{self.root}/{record_name(stage)}")
            size = sum(record["files"].values())
            self.cache.make_room(size, self._drop)
            made = self.new_folder()
            try:
                target = made / stage.key
                target.mkdir()
                with suppress(FileNotFoundError):  # reported below
                    remote.download(f"files/{stage.kind}/{stage.key}/{record['upload']}", list(record["files"]), target)
                (target / "record.json").write_bytes(text)
                wrong = records.damage(target)
                if wrong is None:
                    records.stamp(target, record)
                    self._take_in(target, folder)
                    self.cache.put(_name(stage), size)
                    return
            finally:
                shutil.rmtree(made, ignore_errors=True)
            if not tries_left:
                raise _damaged(stage, wrong)

    def _drop(self, name: str) -> None:
        kind, _, key = name.partition(".")
        shutil.rmtree(self.local / "store" / kind / key, ignore_errors=True)

    def _leave_scratch(self, stage: Stage) -> None:
        parent = self.local / "scratch" / stage.key
        with suppress(OSError):
            for left in parent.iterdir():
                if left.name == self.owner or not self.is_alive(left.name):
                    shutil.rmtree(left, ignore_errors=True)
            parent.rmdir()  # unless another run is at work there
        if self.remote is not None:
            for owner in {name.split("/")[2] for name in self.remote.list(f"scratch/{stage.key}")}:
                if owner == self.owner or not self.is_alive(owner):
                    self.remote.remove(f"scratch/{stage.key}/{owner}")

    def find(self, prefix: str) -> list[dict[str, Any]]:
        """Records whose key starts with `prefix` (as the commands print it)."""
        if self.remote is None:
            return [records.load(path) for path in sorted(self.local.glob(f"store/*/{prefix}*/record.json"))]
        names = [name for name in self.remote.list("records") if Path(name).name.startswith(prefix)]
        found = self.remote.read_all(names)
        return [records.read(found[name], Path(name).stem, f"{self.root}/{name}") for name in sorted(found)]

    def by_key(self, key: str) -> dict[str, Any] | None:
        """The record of this full key, of any kind; None if there is none."""
        for kind in os.listdir(self._stages) if os.path.isdir(self._stages) else ():
            path = Path(self._stages, kind, key, "record.json")
            if path.is_file():
                return records.load(path)
        return next(iter(self.find(key)), None) if self.remote is not None else None

    def folder(self, record: dict[str, Any]) -> Path:
        """Local folder of a stage whose record `find` returned."""
        ref = Ref(str(record["kind"]), str(record["key"]))
        return self._folder(ref) if self.remote is None else self.path(ref)

    def records(self, kind: str, at_most: int = 100) -> list[dict[str, Any]]:
        """The newest records of one kind, at most `at_most`, oldest first. Used to estimate costs from past work."""
        found = []
        if self.remote is not None:
            listed = self.remote.list(f"records/{kind}")
            texts = self.remote.read_all(sorted(listed, key=lambda name: listed[name])[-at_most:])
            for name, text in texts.items():
                with suppress(Damaged):
                    found.append(records.read(text, Path(name).stem, name))
            return sorted(found, key=lambda record: str(record["created"]))
        try:
            with os.scandir(f"{self._stages}/{kind}") as entries:
                folders = sorted((entry.stat().st_mtime, entry.path) for entry in entries)[-at_most:]
        except FileNotFoundError:
            return []
        for _, folder in folders:
            with suppress(FileNotFoundError, Damaged):
                found.append(records.load(Path(folder, "record.json")))
        return sorted(found, key=lambda record: str(record["created"]))

    def note(self, name: str, value: Json) -> None:
        """Store a fact beside the stages, for readers that cannot see its origin. A later value replaces it."""
        if self.remote is not None:
            self.remote.note(f"notes/{name}.json", value)
            return
        path = self.local / "notes" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = self.new_folder()  # what a killed process or a full disk leaves is found and removed
        try:
            (folder / path.name).write_text(json.dumps(value, indent=1))
            os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def noted(self, name: str) -> Any:
        """The latest value that `note` stored under this name; None if there is none."""
        if self.remote is not None:
            return self.remote.noted(f"notes/{name}.json")
        try:
            return json.loads((self.local / "notes" / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def notes(self, prefix: str) -> dict[str, Any]:
        """The latest values that `note` stored, by name, for all names that begin with `prefix`."""
        if self.remote is not None:
            paths = [name for name in self.remote.list("notes") if Path(name).name.startswith(prefix)]
            return {Path(name).stem: json.loads(text) for name, text in sorted(self.remote.read_all(paths).items())}
        paths = sorted(map(str, (self.local / "notes").glob(f"{prefix}*.json")))
        found = {Path(path).stem: self.noted(Path(path).stem) for path in paths}
        return {name: value for name, value in found.items() if value is not None}

    def forget(self, name: str) -> None:
        """Remove a note if it exists."""
        if self.remote is not None:
            self.remote.remove(f"notes/{name}.json")
        else:
            (self.local / "notes" / f"{name}.json").unlink(missing_ok=True)


def record_name(stage: Stage | Ref) -> str:
    """Name of a stage's record at a URL."""
    return f"records/{stage.kind}/{stage.key}.json"


def _name(stage: Stage | Ref) -> str:
    """Name of a stage in the cache."""
    return f"{stage.kind}.{stage.key}"


def _damaged(stage: Stage | Ref, wrong: str | None) -> Damaged:
    return Damaged(f"stage {stage.kind} {stage.key[:12]} is damaged: {wrong}; `safecl run` makes it again")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another rank of this run, or another run, was first
        return 0.0


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
