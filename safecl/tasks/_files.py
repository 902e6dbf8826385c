"""Records of a data file in the format that its publisher chose, and their fields with types.

Read are JSON Lines, a JSON array, CSV, TSV and Parquet, each also with `.gz` or `.zst`, in UTF-8 or (with its byte order
mark) UTF-16, whatever the case of the name; and a folder of CSV files without a header. CSV and TSV hold text alone: an
empty cell is "", a number its digits; lines "# ..." before the header are remarks.

One rule for fields: what should be text and is something else (a list of messages, NaN, bytes, true, half a character) is
refused with file, record and field, never turned into text. Nothing where text is needed (null, blank) leaves the record
out, and that is counted (`Blank`, `_source.made`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safecl.base import ConfigError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = tuple(f"{kind}{packing}" for kind in FORMATS for packing in ("", ".gz", ".zst"))


class Blank(Exception):
    """A record has nothing in a field that it needs. The text is the field's name."""


class Record(dict[str, Any]):
    """The fields of one record. `number` counts from 1 (lines of JSON Lines; a CSV's header is its first), `where` names
    file and record for errors. All methods raise ConfigError with both for a field that is absent or holds another type."""

    __slots__ = ("number", "where")

    def __init__(self, fields: dict[str, Any], where: str, number: int) -> None:
        super().__init__(fields)
        self.where = where
        self.number = number

    def raw(self, name: str) -> str:
        """The field's text as it stands, which may be blank."""
        if name not in self:
            raise ConfigError(
                f"{self.where}: expected a field {name!r}, got only {', '.join(map(repr, self)) or 'none'}"
            )
        return self._as_text(name, self[name])

    def text(self, *names: str) -> str:
        """The first of these fields that is not blank, stripped. Alpaca's `input` follows its `instruction`, on a line of
        its own (`with_input`). Raises Blank where those that the record has are blank or null."""
        having = [name for name in names if name in self]
        if not having:
            got = ", ".join(map(repr, self)) or "none"
            raise ConfigError(f"{self.where}: expected a field {' or '.join(map(repr, names))}, got only {got}")
        for name in having:
            if found := self._stripped(name):
                return self.with_input(name, found)
        raise Blank(having[0])

    def with_input(self, name: str, text: str) -> str:
        """What field `name` asks for: of an `instruction` with its `input`, where that is not blank."""
        given = self._stripped("input") if name == "instruction" else ""
        return f"{text}\n{given}" if given else text

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        if not isinstance(self.get(name), list):
            raise self.problem(name, "a list of texts")
        return [self._as_text(name, item) for item in self[name]]

    def parts(self, name: str) -> list[Record]:
        """A list of objects, each a record."""
        parts = self.get(name)
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise self.problem(name, "a list of objects")
        return [Record(part, f"{self.where}, {name}[{i}]", self.number) for i, part in enumerate(parts)]

    def label(self, name: str) -> str:
        """A text or whole number as text, "" for null: a category, an id."""
        value = self.get(name, False)  # False: absent, said below
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return "" if value is None else self.raw(name).strip()

    def flag(self, name: str) -> bool:
        """A yes or no, as JSON or as the text of a CSV cell: true, false, 1 or 0."""
        known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
        value = self.get(name)
        found = known.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
        if found is None:
            raise self.problem(name, "true, false, 1 or 0")
        return found

    def problem(self, name: str, expected: str) -> ConfigError:
        """The error of a field that holds something else."""
        got = described(self[name]) if name in self else "no such field"
        return ConfigError(f"{self.where}: expected {expected} in {name!r}, got {got}")

    def _stripped(self, name: str) -> str:
        return "" if self.get(name) is None else self._as_text(name, self[name]).strip()

    def _as_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not (value.isascii() or encodes(value)):
            raise ConfigError(f"{self.where}: expected text in {name!r}, got {described(value)}")
        return value


def described(value: Any) -> str:
    """A value as an error shows it: its type in plain words, and how it begins."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"{value[:60]!r}" if encodes(value) else f"half a character (a surrogate) in {value[:60]!r}"
    kinds = {bool: "a yes or no", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    shown = repr(value)
    return f"{kinds.get(type(value), type(value).__name__)}: {shown[:60]}{'...' if len(shown) > 60 else ''}"


def find(folder: Path, name: str, headerless: bool = False) -> Path | None:
    """The file `name` of a folder in any format and case (`name` is as for JSON Lines: xstest.jsonl finds XSTest.csv.gz), or
    for a source of CSV files without a header the folder of them. None if there is none.

    Raises:
        ConfigError: there is more than one, or one that cannot be read: it is not passed over for another source.
    """
    stem = name.removesuffix(".gz").removesuffix(".jsonl").lower()
    alike = sorted(p for p in folder.iterdir() if p.name.lower() == stem or p.name.lower().startswith(f"{stem}."))
    known = {f"{stem}{suffix}" for suffix in SUFFIXES}
    found = [path for path in alike if path.is_file() and path.name.lower() in known]
    found += [path for path in alike if headerless and path.name.lower() == stem and tables(path)]
    if len(found) > 1:
        raise ConfigError(f"data files {', '.join(path.name for path in found)}: expected one of them; remove others")
    if alike and not found:
        folder_too = f" or a folder {stem} of CSV files" if headerless else ""
        raise ConfigError(
            f"data folder {folder}: {alike[0].name} cannot be read as {stem}; expected a file {stem} with one of "
            f"{', '.join(FORMATS)} (and .gz or .zst){folder_too}. Bring it into that form, or move it away"
        )
    return found[0] if found else None


def kind(path: Path) -> str:
    """How a file is read: the ending of its name less its packing."""
    suffix, _, packing = path.name.lower().rpartition(".")
    return f".{suffix.rpartition('.')[2]}" if packing in ("gz", "zst") else f".{packing}"


def read(path: Path, problems: list[str] | None = None) -> list[Record]:
    """All records in the file's order. Raises ConfigError with the place for what is not in its format; with `problems`,
    lines of JSON Lines that are none are added to it and passed over."""
    if path.is_dir():
        return headerless(tables(path))
    form = kind(path)
    try:
        raw = _unpacked(path, path.name.lower().rpartition(".")[2])
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path.name}: cannot be read ({error}); fetch it again") from None
    if form == ".parquet":
        return _parquet(path.name, raw)
    text = _decoded(path.name, raw)
    if form in (".csv", ".tsv"):
        return _table(path.name, text, "\t" if form == ".tsv" else ",")
    if form == ".json" or (form == ".jsonl" and text.lstrip()[:1] == "["):
        found = _array(path.name, text)
        if found is not None:
            return found
    # splitlines() would cut at characters that JSON may hold.
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = []
    for n, line in numbered:
        try:
            records.append(_record(path.name, _parsed(path.name, n, line), n, "line"))
        except ConfigError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return records


def headerless(paths: Iterable[Path]) -> list[Record]:
    """One prompt a line, files of one category each: {"prompt", "category": the file's name}. Empty lines are left out."""
    found = []
    for path in paths:
        for number, line in _lines(path.name, _decoded(path.name, path.read_bytes()), ","):
            if any(cell.strip() for cell in line[1:]):
                raise ConfigError(f"{path.name}, record {number}: expected one cell, got {len(line)}: quote the prompt")
            if line and line[0].strip():
                found.append(
                    Record({"prompt": line[0], "category": path.stem}, f"{path.name}, record {number}", number)
                )
    return found


def tables(folder: Path) -> list[Path]:
    """The CSV files of a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv") if folder.is_dir() else []


def encodes(text: str) -> bool:
    """Whether a text is made of whole characters: a tokenizer takes no half of a surrogate pair (a cut emoji)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unpacked(path: Path, packing: str) -> bytes:
    if packing == "gz":
        return gzip.decompress(path.read_bytes())
    if packing == "zst":
        from pyarrow import CompressedInputStream  # type: ignore[import-untyped]

        with path.open("rb") as stream:
            return bytes(CompressedInputStream(stream, "zstd").read())
    return path.read_bytes()


def _decoded(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text ({error}); save it as UTF-8") from None


def _array(name: str, text: str) -> list[Record] | None:
    """The objects of a JSON array; None for several JSON values after one another: lines under the name .json."""
    try:
        items = _json(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return None
        raise ConfigError(f"{name}: cannot be read as .json ({error}); fetch it again") from None
    if not isinstance(items, list):
        raise ConfigError(f"{name}: expected a list of objects, got {described(items)}")
    return [_record(name, item, number, "record") for number, item in enumerate(items, 1)]


def _parsed(name: str, number: int, line: str) -> Any:
    try:
        return _json(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}, line {number}: not JSON ({error}); fetch it again") from None


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _record(name: str, item: Any, number: int, unit: str) -> Record:
    if not isinstance(item, dict):
        raise ConfigError(f"{name}, {unit} {number}: expected an object, got {described(item)}")
    return Record(item, f"{name}, {unit} {number}", number)


def _lines(name: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a table with their numbers, which count from 1. Those without a cell are counted and left out."""
    csv.field_size_limit(sys.maxsize)  # else a cell over 128 KiB is an error, and tests of code are longer
    number = 0
    try:
        # strict: else a quote that is never closed takes all that follows into its cell
        for number, line in enumerate(csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True), 1):
            if line:
                yield number, line
    except csv.Error as error:
        raise ConfigError(f"{name}, record {number + 1}: cannot be read as a table ({error}); fetch it again") from None


def _table(name: str, text: str, delimiter: str) -> list[Record]:
    lines = _lines(name, text, delimiter)
    head = next((line for _, line in lines if not _is_remark(line)), [])
    if twice := next((cell for cell in head if head.count(cell) > 1), None):
        raise ConfigError(f"{name}: column {twice!r} stands twice in its header")
    found = []
    for number, line in lines:
        if len(line) != len(head):
            raise ConfigError(f"{name}, record {number}: expected {len(head)} fields as in its header, got {len(line)}")
        found.append(Record(dict(zip(head, line, strict=True)), f"{name}, record {number}", number))
    return found


def _is_remark(line: list[str]) -> bool:
    """ "# dataset_version=1.2,,," before a table's header."""
    return line[0].startswith("# ") and not any(line[1:])


def _parquet(name: str, raw: bytes) -> list[Record]:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        rows = read_table(BufferReader(raw)).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{name}: cannot be read as Parquet ({error}); fetch it again") from None
    return [Record(row, f"{name}, record {number}", number) for number, row in enumerate(rows, 1)]
