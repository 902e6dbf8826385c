"""Where rows of a real data set are read (a file of the sweep's data folder, else the hub) and how they are drawn."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.tasks import Row, Source, Task
from safecl.tasks._overlap import normalise

Record = dict[str, Any]
_sums: dict[tuple[str, int, int], str] = {}  # (path, size, mtime) -> sha256: a file is read once per process
_commits: dict[tuple[str, str], str] = {}  # (hub id, revision) -> commit


def records(source: Source, folder: Path | None) -> list[Record]:
    """All records of a source, in its own order. Values are what the file or the hub holds, not checked here.

    Raises:
        PrerequisiteError: neither the file nor the hub can be read.
    """
    found = local_file(source, folder)
    return _read_jsonl(found) if found is not None else _read_hub(source)


def local_file(source: Source, folder: Path | None) -> Path | None:
    """The source's file in the data folder, or None where there is none (the hub is asked then)."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise PrerequisiteError(f"execution.data_dir: {folder} is not a folder; name the folder of the data files")
    path = folder / source.file
    return path if path.is_file() else None


def identity(task_class: type[Task], split: str, folder: Path | None) -> Json:
    """What the rows of a split come from, without any path: goes into a data stage's config.

    A generated suite is `{"generated": VERSION}`; else a list with one entry per source, `{"file", "sha256"}` for a
    local file and `{"hub", "config", "revision", "split"}` for a hub data set (`revision` is a commit: a branch name is
    resolved, which asks the hub).

    Raises:
        ConfigError: the task has no such split.
        PrerequisiteError: a local file cannot be found and the hub cannot be asked.
    """
    if split not in task_class.SPLITS:
        raise ConfigError(_no_split(task_class, split))
    sources = task_class.SOURCES.get(split, ())
    if not sources:
        return {"generated": task_class.VERSION}
    return [_identity_of(source, folder) for source in sources]


def choose(task: Task, split: str, rows: Iterable[Row], num_rows: int | None, seed: int) -> list[Row]:
    """`num_rows` of the rows (None: all). Splits named test, validation or heldout are ordered by a hash of the prompt,
    so that a smaller sample is always the same one; others by `seed`. Either way a prefix of any larger sample.

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
    """The first `num_rows` rows (None: all), or a ConfigError if there are fewer."""
    if num_rows is not None and num_rows > len(rows):
        name = _name(type(task))
        raise ConfigError(f"task {name!r}, split {split!r}: holds {len(rows)} rows, {num_rows} were asked for")
    return rows if num_rows is None else rows[:num_rows]


def check_split(task: Task, split: str) -> None:
    """A ConfigError unless the task has this split."""
    if split not in task.SPLITS:
        raise ConfigError(_no_split(type(task), split))


def digest(salt: str, prompt: str) -> str:
    """sha256 (hex) of salt and normalised prompt: equal prompts get equal digests, in any language or machine."""
    return hashlib.sha256(f"{salt}\n{normalise(prompt)}".encode()).hexdigest()


def lowest(salt: str, prompts: Iterable[str], num: int) -> set[str]:
    """The normal forms of `num` distinct prompts, those of the lowest `digest`. Equal prompts count as one."""
    ordered = sorted({normalise(p): digest(salt, p) for p in prompts}.items(), key=lambda item: item[1])
    return {normal for normal, _ in ordered[:num]}


def first_of_each(rows: Iterable[Row]) -> list[Row]:
    """Rows less those whose normalised prompt an earlier row has."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(normalise(row.prompt), row)
    return list(seen.values())


def groups(num: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of 0..num-1 under `pairs`, each sorted, ordered by first member."""
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


def text(record: Record, *names: str) -> str:
    """The first of these fields that the record has, stripped. Raises PrerequisiteError if it has none of them."""
    for name in names:
        if record.get(name) is not None:
            return str(record[name]).strip()
    raise PrerequisiteError(f"data file: expected a field {' or '.join(names)}, got only {sorted(record)}")


def split_by_hash(
    items: Sequence[Any], salt: str, share: float, key: Callable[[Any], str]
) -> tuple[list[Any], list[Any]]:
    """(held out, rest): whole items (each a group) in the order of `digest(salt, key(item))`, the first `share`."""
    ordered = sorted(items, key=lambda item: digest(salt, key(item)))
    num = round(share * len(ordered))
    return ordered[:num], ordered[num:]


def _name(task_class: type[Task]) -> str:
    return task_class.__module__.rsplit(".", 1)[-1]


def _no_split(task_class: type[Task], split: str) -> str:
    return f"task {_name(task_class)!r} has no split {split!r}. It has: {', '.join(task_class.SPLITS)}"


def sha256(path: Path) -> str:
    """sha256 (hex) of a file's content; cached while its path, size and time of change stay what they were."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _sums:
        with path.open("rb") as stream:
            _sums[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _sums[key]


def _identity_of(source: Source, folder: Path | None) -> Json:
    path = local_file(source, folder)
    if path is not None:
        return {"file": source.file, "sha256": sha256(path)}
    if not source.hub:
        raise PrerequisiteError(_missing(source, "it is not on the hub"))
    return {"hub": source.hub, "config": source.config, "revision": _commit(source), "split": source.split}


def _read_jsonl(path: Path) -> list[Record]:
    found: list[Record] = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise PrerequisiteError(f"{path.name}, line {number}: not JSON ({error}); fetch it again") from None
            if not isinstance(record, dict):
                raise PrerequisiteError(f"{path.name}, line {number}: expected an object, got {type(record).__name__}")
            found.append(record)
    return found


def _read_hub(source: Source) -> list[Record]:
    if not source.hub:
        raise PrerequisiteError(_missing(source, "it is not on the hub"))
    commit = _commit(source)
    try:
        from datasets import load_dataset

        found = load_dataset(source.hub, source.config, split=source.split, revision=commit, **dict(source.options))
        return [dict(record) for record in found]
    except Exception as error:
        # The hub client has no common base for its errors (gated, offline, unknown, changed layout).
        raise PrerequisiteError(_missing(source, _one_line(error))) from None


def _commit(source: Source) -> str:
    """The source's commit; a branch or tag is resolved by asking the hub, once per process."""
    revision = source.revision or "main"
    if len(revision) == 40:
        return revision
    key = (source.hub, revision)
    if key not in _commits:
        try:
            from huggingface_hub import HfApi

            _commits[key] = str(HfApi().dataset_info(source.hub, revision=revision, timeout=20).sha)
        except Exception as error:
            raise PrerequisiteError(_missing(source, _one_line(error))) from None
    return _commits[key]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _missing(source: Source, why: str) -> str:
    """One line: what is missing, where to get it, how to point at a local copy."""
    if source.hub:
        page = f"https://huggingface.co/datasets/{source.hub}"
        where = f"accept its licence at {page} and log in to the hub" if source.gated else f"it is at {page}"
    else:
        where = f"get it from {source.page}" if source.page else "see the documentation of the task"
    return (
        f"data set {source.hub or source.file} cannot be read ({why}): {where}, or put {source.file} (JSON Lines) into "
        f"a folder named by execution.data_dir (or `--set execution.data_dir=FOLDER`)."
    )


def hub_csv_files(source: Source) -> list[tuple[str, list[list[str]]]]:
    """(name, lines) of every CSV file without a header in a hub data set, by name; empty lines are left out."""
    import csv

    commit = _commit(source)
    try:
        from huggingface_hub import HfApi, hf_hub_download

        names = HfApi().list_repo_files(source.hub, repo_type="dataset", revision=commit)
        found = []
        for name in sorted(name for name in names if name.endswith(".csv")):
            path = hf_hub_download(source.hub, name, repo_type="dataset", revision=commit)
            with open(path, newline="", encoding="utf-8") as stream:
                found.append((name, [line for line in csv.reader(stream) if line and line[0].strip()]))
        return found
    except Exception as error:
        raise PrerequisiteError(_missing(source, _one_line(error))) from None
