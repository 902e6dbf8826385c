"""Find and read the rows of a data set (a file in the sweep's data folder, else the hub), identify them and draw samples."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safecl.base import ConfigError, Json, PrerequisiteError, near
from safecl.tasks import Row, Source, Task, _files, load, names
from safecl.tasks._files import Record
from safecl.tasks._overlap import normalise

UNKNOWN = "unknown"  # stands for an unknown commit or file content in a plan

_sums: dict[tuple[str, int, int], str] = {}  # (path, size, mtime) -> sha256: a file is read once per process
_commits: dict[tuple[str, str], str] = {}  # (hub id, revision) -> commit
_unknown: dict[tuple[str, str], str] = {}  # (hub id, revision) -> why the hub did not give the commit


def records(source: Source, folder: Path | None, problems: list[str] | None = None) -> list[Record]:
    """All records of a source, in its own order.

    The types of fields are checked when a field is read (`Record`). `problems`: see `_files.read`.

    Raises:
        PrerequisiteError: neither the file nor the hub can be read.
        ConfigError: the file is not in the format that its name says.
    """
    found = local_file(source, folder)
    return _files.read(found, problems) if found is not None else _read_hub(source)


def made(task: Task, source: Source, make: Callable[[int, Record], Row | None]) -> list[Row]:
    """Make rows with `make(index, record)` from all records of a source. `index` counts from 0.

    `make` returns None for a record that the task does not use. Records for which it raises `Blank` (a needed field is blank)
    are left out and counted in `task.left_out`.

    Raises:
        ConfigError: a field is absent or has another type, or there is no record without a blank field.
    """
    found: list[Row] = []
    blank: dict[str, int] = defaultdict(int)
    read = records(source, task.folder)
    for index, record in enumerate(read):
        try:
            row = make(index, record)
        except _files.Blank as field:
            blank[str(field)] += 1
        else:
            found += [] if row is None else [row]
    name = read[0].where.rpartition(",")[0] if read else source.file
    if not read or sum(blank.values()) == len(read):
        why = "it holds no record" if not read else f"{' and '.join(map(repr, blank))} is blank in every record"
        raise ConfigError(f"{name}: expected records to read, but {why}")
    task.left_out.update({f"{name}: {field}": num for field, num in blank.items()})
    return found


def local_file(source: Source, folder: Path | None) -> Path | None:
    """The source's file in the data folder, in any format. None if there is no such file (the hub is then used).

    Raises:
        ConfigError: the file has no known format, or a file with a similar name is there. The hub is then not used instead.
        PrerequisiteError: the data folder does not exist.
    """
    if source.path:
        path = Path(source.path)
        if not os.path.isfile(path):  # false also of names that no file can have
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            what = "is a folder" if os.path.isdir(path) else f"there is none.{near(path.name, beside)}"
            raise ConfigError(f"data file {source.path!r}: {what}")
        if not path.name.lower().endswith(_files.SUFFIXES):
            raise ConfigError(
                f"data file {source.path!r}: expected one of {', '.join(_files.FORMATS)} (and .gz or .zst)"
            )
        return path
    if folder is None:
        return None
    if not folder.is_dir():
        raise PrerequisiteError(f"execution.data_dir: {folder} is not a folder; name the folder of the data files")
    found = _files.find(folder, source.file, source.headerless)
    if found is None and (alike := _near(source, folder)):
        stem = source.file.partition(".")[0]
        raise ConfigError(
            f"data folder {folder}: expected {source.file} (or {_others(source)}), got {alike[0]}: is it that one? Rename "
            f"it to {stem}{''.join(Path(alike[0]).suffixes)}, or move it away for the hub's"
        )
    return found


def _near(source: Source, folder: Path) -> list[str]:
    """Names in the folder that are similar to the source's file and are not those of another source. For gsm8k_train these
    are, for example, gsm8k.jsonl and gsm8k-train (1).csv."""

    def letters(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.partition(".")[0].lower())

    wanted, all_tasks = letters(source.file), (load(name) for name in names())
    known = {letters(other.file) for task in all_tasks for sources in task.SOURCES.values() for other in sources}
    near = [(path.name, letters(path.name)) for path in sorted(folder.iterdir())]
    return [
        name for name, its in near
        if len(its) > 3 and (its == wanted or (its not in known and (its.startswith(wanted) or wanted.startswith(its))))
    ]  # fmt: skip


def identity(task_class: type[Task], split: str, folder: Path | None, planned: bool = False) -> Json:
    """Identify the sources of a split's rows, for a data stage's config. It holds no path.

    For a generated suite it is `{"generated": VERSION}`. Else it is a list with one entry for each source:

    - `{"file", "sha256"}` for a local file,
    - `{"kind", "sha256"}` for a file that a sweep file names,
    - `{"files": {name: sha256}}` for a folder of CSV files,
    - `{"hub", "config", "revision", "split"}` for a hub data set. `revision` is a commit. A branch or tag is resolved, which
      asks the hub.

    `planned`: for a plan only. A commit that the hub does not give, or the content of a missing file, is then "unknown". A
    stage with such an identity is never run.

    Raises:
        ConfigError: the task has no such split.
        PrerequisiteError: a local file cannot be found and the hub cannot be asked.
    """
    if split not in task_class.SPLITS:
        raise ConfigError(_no_split(task_class, split))
    sources = task_class.SOURCES.get(split, ())
    if not sources:
        return {"generated": task_class.VERSION}
    if task_class.NAME:  # the sweep file says where its rows are
        folder = None
    return [_identity_of(source, folder, planned) for source in sources]


def is_here(source: Json) -> bool:
    """Whether all sources of an `identity` are local, so that their rows can be read without the hub."""
    each_source = source if isinstance(source, list) else [source]
    return not any(isinstance(each, dict) and ("hub" in each or each.get("sha256") == UNKNOWN) for each in each_source)


def choose(task: Task, split: str, rows: Iterable[Row], num_rows: int | None, seed: int) -> list[Row]:
    """Draw `num_rows` of the rows (None: all). A sample is a prefix of every larger sample.

    Splits named test, validation or heldout are ordered by a hash of the prompt, so that the sample does not depend on the
    seed. Other splits are shuffled with `seed`.

    Raises:
        ConfigError: the split holds fewer rows than asked for.
    """
    found = list(rows)
    if split.endswith(("test", "validation", "heldout")):
        found.sort(key=lambda row: (digest(split, row.prompt), row.id))
    else:
        random.Random(f"{split}/{seed}").shuffle(found)
    return take(task, split, found, num_rows)


def take(task: Task, split: str, rows: list[Row], num_rows: int | None) -> list[Row]:
    """The first `num_rows` rows (None: all). Raises ConfigError if there are fewer."""
    if num_rows is not None and num_rows > len(rows):
        name = _name(type(task))
        raise ConfigError(f"task {name!r}, split {split!r}: holds {len(rows)} rows, {num_rows} were asked for")
    return rows if num_rows is None else rows[:num_rows]


def check_split(task: Task, split: str) -> None:
    """Raise ConfigError unless the task has this split."""
    if split not in task.SPLITS:
        raise ConfigError(_no_split(type(task), split))


def digest(salt: str, prompt: str) -> str:
    """sha256 (hex) of the salt and the normalised prompt. It is the same on every machine."""
    return hashlib.sha256(f"{salt}\n{normalise(prompt)}".encode()).hexdigest()


def lowest(salt: str, prompts: Iterable[str], num: int) -> set[str]:
    """The `num` distinct prompts with the lowest `digest`, normalised. Equal prompts count as one."""
    ordered = sorted({normalise(p): digest(salt, p) for p in prompts}.items(), key=lambda item: item[1])
    return {normal for normal, _ in ordered[:num]}


def apart(salt: str, rows: Sequence[Row], share: int | float) -> tuple[list[Row], list[Row]]:
    """Split rows into (chosen, others) by prompt. Chosen are the rows of the prompts with the lowest `digest`.

    `share` is a number of distinct prompts (int) or a share of them in [0, 1] (float). Equal prompts stay together.
    """
    prompts = {normalise(row.prompt) for row in rows}
    num = share if isinstance(share, int) else round(share * len(prompts))
    chosen = lowest(salt, prompts, num)
    in_order = [(row, normalise(row.prompt) in chosen) for row in rows]
    return [row for row, its in in_order if its], [row for row, its in in_order if not its]


def first_of_each(rows: Iterable[Row]) -> list[Row]:
    """The first row of each normalised prompt, in order."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(normalise(row.prompt), row)
    return list(seen.values())


def groups(num: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of the graph with nodes 0..num-1 and edges `pairs`. Each is sorted; they are ordered by first
    member."""
    parent = list(range(num))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        parent[root(i)] = root(j)
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(num):
        members[root(i)].append(i)
    return sorted(members.values())


def split_by_hash(
    items: Sequence[Any], salt: str, share: float, key: Callable[[Any], str]
) -> tuple[list[Any], list[Any]]:
    """Split items into (held out, rest). Held out is the `share` (in [0, 1]) of items with the lowest `digest(salt,
    key(item))`."""
    ordered = sorted(items, key=lambda item: digest(salt, key(item)))
    num = round(share * len(ordered))
    return ordered[:num], ordered[num:]


def _name(task_class: type[Task]) -> str:
    return task_class.NAME or task_class.__module__.rsplit(".", 1)[-1]


def _no_split(task_class: type[Task], split: str) -> str:
    return f"task {_name(task_class)!r} has no split {split!r}. It has: {', '.join(task_class.SPLITS)}"


def sha256(path: Path) -> str:
    """sha256 (hex) of a file's content. Cached for this process as long as path, size and modification time are the same."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _sums:
        with path.open("rb") as stream:
            _sums[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _sums[key]


def _identity_of(source: Source, folder: Path | None, planned: bool) -> Json:
    path = local_file(source, folder)
    if path is not None and path.is_dir():
        return {"files": {file.name: sha256(file) for file in _files.tables(path)}}
    if path is not None and source.path:  # of the name only the format matters
        return {"kind": _files.kind(path), "sha256": sha256(path)}
    if path is not None:
        return {"file": path.name, "sha256": sha256(path)}
    if not source.hub:
        if planned:
            return {"file": source.file, "sha256": UNKNOWN}
        raise PrerequisiteError(_missing(source, "it is not on the hub"))
    try:
        commit = _commit(source)
    except PrerequisiteError:
        if not planned:
            raise
        commit = UNKNOWN
    return {"hub": source.hub, "config": source.config, "revision": commit, "split": source.split}


def _read_hub(source: Source) -> list[Record]:
    if not source.hub:
        raise PrerequisiteError(_missing(source, "it is not on the hub"))
    commit = _commit(source)
    try:
        if source.headerless:
            from huggingface_hub import snapshot_download

            kept = snapshot_download(source.hub, repo_type="dataset", revision=commit, allow_patterns=["*.csv"])
            return _files.headerless(_files.tables(Path(kept)))
        from datasets import load_dataset

        found = load_dataset(source.hub, source.config, split=source.split, revision=commit, **dict(source.options))
        return [Record(dict(item), f"{source.hub} ({source.split}), record {n}", n) for n, item in enumerate(found, 1)]
    except ConfigError:
        raise
    except Exception as error:
        # The hub client has no common base for its errors (gated, offline, unknown, changed layout).
        raise PrerequisiteError(_missing(source, _one_line(error))) from None


def _commit(source: Source) -> str:
    """The source's commit. A branch or tag is resolved by asking the hub, once a process."""
    revision = source.revision or "main"
    if len(revision) == 40:
        return revision
    key = (source.hub, revision)
    if key not in _commits and key not in _unknown:
        try:
            from huggingface_hub import HfApi

            _commits[key] = str(HfApi().dataset_info(source.hub, revision=revision, timeout=20).sha)
        except Exception as error:
            _unknown[key] = _one_line(error)
    if key in _unknown:
        raise PrerequisiteError(_missing(source, _unknown[key]))
    return _commits[key]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _others(source: Source) -> str:
    stem = source.file.removesuffix(".jsonl")
    return f"its CSV files as a folder {stem}" if source.headerless else ", ".join(_files.FORMATS[1:])


def _missing(source: Source, why: str) -> str:
    """An error message of one line: what is missing, where to get it, how to name a local copy."""
    if source.hub:
        page = f"https://huggingface.co/datasets/{source.hub}"
        where = f"accept its licence at {page} and log in to the hub" if source.gated else f"it is at {page}"
    else:
        where = f"get it from {source.page}" if source.page else "see the documentation of the task"
    local = (
        f"put {source.file} (or {_others(source)}) into a folder named by execution.data_dir (or `--set "
        "execution.data_dir=FOLDER`)."
        if source.file
        else "give its rows as a `file`"
    )
    return f"data set {source.hub or source.file} cannot be read ({why}): {where}, or {local}"
