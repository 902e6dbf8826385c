"""Records of a data file in the format that its publisher chose: JSON Lines (also gzipped), JSON, CSV, TSV, Parquet, or a
folder of CSV files without a header. CSV and TSV hold text alone: an empty cell is "", a number its digits."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safecl.base import PrerequisiteError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")


def find(folder: Path, name: str, headerless: bool = False) -> Path | None:
    """The file `name` of a folder in any format (`name` is as for JSON Lines: xstest.jsonl finds xstest.csv), or for a
    source of CSV files without a header the folder of them. None if there is none.

    Raises:
        PrerequisiteError: there is more than one.
    """
    stem = name.removesuffix(".gz").removesuffix(".jsonl")
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
    found += [folder / stem] if headerless and any((folder / stem).glob("*.csv")) else []
    if len(found) > 1:
        raise PrerequisiteError(
            f"data files {', '.join(path.name for path in found)}: expected one of them; remove others"
        )
    return found[0] if found else None


def read(path: Path) -> list[Record]:
    """All records in the file's order. Raises PrerequisiteError with the place for what is not in its format."""
    if path.is_dir():
        return headerless(sorted(path.glob("*.csv")))
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        if path.suffix in (".csv", ".tsv"):
            return _table(
                path, list(csv.reader(io.StringIO(text, ""), delimiter="\t" if path.suffix == ".tsv" else ","))
            )
        if path.suffix == ".json":
            return _objects(path, json.loads(text), "record")
        # splitlines() would cut at characters that JSON may hold.
        return _objects(path, [_parsed(path, n, line) for n, line in enumerate(text.split("\n"), 1)], "line")
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error, json.JSONDecodeError) as error:
        raise PrerequisiteError(f"{path.name}: cannot be read as {path.suffix} ({error}); fetch it again") from None


def headerless(paths: Sequence[Path]) -> list[Record]:
    """One prompt a line, files of one category each: {"prompt", "category": the file's name}. Empty lines are left out."""
    found: list[Record] = []
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = [line for line in csv.reader(stream) if line and line[0].strip()]
        found += [{"prompt": line[0], "category": path.stem} for line in lines]
    return found


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        raise PrerequisiteError(f"{path.name}, line {number}: not JSON ({error}); fetch it again") from None


def _objects(path: Path, items: Any, what: str) -> list[Record]:
    """The objects of a list, None (an empty line) left out."""
    if not isinstance(items, list):
        raise PrerequisiteError(f"{path.name}: expected a list of objects, got {type(items).__name__}")
    for number, item in enumerate(items, 1):
        if item is not None and not isinstance(item, dict):
            raise PrerequisiteError(f"{path.name}, {what} {number}: expected an object, got {type(item).__name__}")
    return [item for item in items if item is not None]


def _table(path: Path, lines: list[list[str]]) -> list[Record]:
    head = lines[0] if lines else []
    for number, line in enumerate(lines[1:], 2):
        if line and len(line) != len(head):
            raise PrerequisiteError(
                f"{path.name}, record {number}: expected {len(head)} fields as in its header, got {len(line)}"
            )
    return [dict(zip(head, line, strict=True)) for line in lines[1:] if line]


def _parquet(path: Path) -> list[Record]:
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        found: list[Record] = read_table(path).to_pylist()
    except ArrowException as error:
        raise PrerequisiteError(f"{path.name}: cannot be read as Parquet ({error}); fetch it again") from None
    return found
