"""Read the records of a data file in the format that its publisher chose, and check the types of their fields.

Formats: JSON Lines, a JSON array, CSV, TSV and Parquet, each also with `.gz` or `.zst`, and a folder of CSV files without a
header. Text is UTF-8, or UTF-16 with a byte order mark. Upper and lower case in the file name do not matter. CSV and TSV
hold only text: an empty cell is "", and a number is its digits. Lines "# ..." before the header are comments.

Two rules for fields. If a field should be text and is something else (a list of messages, NaN, bytes, true, half a
surrogate pair), it is an error that names file, record and field. It is never converted to text. If a needed text is
missing (null, blank), the record is left out and counted (`Blank`, `_source.made`).
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
    """A field that the task needs is blank or null in a record. The exception's text is the field's name."""


class Record(dict[str, Any]):
    """The fields of one record.

    `number` counts from 1. In JSON Lines it is the line; in CSV and TSV the header is number 1. `where` names file and record
    for error messages. All methods raise ConfigError with `where` for a field that is absent or has another type.
    """

    __slots__ = ("number", "where")

    def __init__(self, fields: dict[str, Any], where: str, number: int) -> None:
        super().__init__(fields)
        self.where = where
        self.number = number

    def raw(self, name: str) -> str:
        """The field's text, unchanged. It may be blank."""
        if name not in self:
            raise ConfigError(
                f"{self.where}: expected a field {name!r}, got only {', '.join(map(repr, self)) or 'none'}"
            )
        return self._as_text(name, self[name])

    def text(self, *names: str) -> str:
        """The text of the first of these fields that is not blank, stripped.

        The `input` of Alpaca records is appended to their `instruction` on a new line (`with_input`). Raises Blank if all
        of these fields that the record has are blank or null.
        """
        having = [name for name in names if name in self]
        if not having:
            got = ", ".join(map(repr, self)) or "none"
            raise ConfigError(f"{self.where}: expected a field {' or '.join(map(repr, names))}, got only {got}")
        for name in having:
            if found := self._stripped(name):
                return self.with_input(name, found)
        raise Blank(having[0])

    def with_input(self, name: str, text: str) -> str:
        """`text`, the value of field `name`. If `name` is "instruction" and `input` is not blank, `input` follows on a new
        line."""
        given = self._stripped("input") if name == "instruction" else ""
        return f"{text}\n{given}" if given else text

    def texts(self, name: str) -> list[str]:
        """The field's value as a list of texts."""
        if not isinstance(self.get(name), list):
            raise self.problem(name, "a list of texts")
        return [self._as_text(name, item) for item in self[name]]

    def parts(self, name: str) -> list[Record]:
        """The field's value, a list of objects, as records."""
        parts = self.get(name)
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise self.problem(name, "a list of objects")
        return [Record(part, f"{self.where}, {name}[{i}]", self.number) for i, part in enumerate(parts)]

    def label(self, name: str) -> str:
        """A label such as a category or an id: text (stripped) or a whole number, as text. "" for null."""
        value = self.get(name, False)  # False stands for an absent field; `raw` raises the error
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return "" if value is None else self.raw(name).strip()

    def flag(self, name: str) -> bool:
        """A boolean, as JSON or as the text of a CSV cell: true, false, 1 or 0."""
        known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
        value = self.get(name)
        found = known.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
        if found is None:
            raise self.problem(name, "true, false, 1 or 0")
        return found

    def problem(self, name: str, expected: str) -> ConfigError:
        """The error for a field whose value is not what was `expected`."""
        got = described(self[name]) if name in self else "no such field"
        return ConfigError(f"{self.where}: expected {expected} in {name!r}, got {got}")

    def _stripped(self, name: str) -> str:
        return "" if self.get(name) is None else self._as_text(name, self[name]).strip()

    def _as_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not (value.isascii() or encodes(value)):
            raise ConfigError(f"{self.where}: expected text in {name!r}, got {described(value)}")
        return value


def described(value: Any) -> str:
    """A value as an error message shows it: its type in plain words and its first 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"{value[:60]!r}" if encodes(value) else f"half a character (a surrogate) in {value[:60]!r}"
    kinds = {bool: "a yes or no", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    shown = repr(value)
    return f"{kinds.get(type(value), type(value).__name__)}: {shown[:60]}{'...' if len(shown) > 60 else ''}"


def find(folder: Path, name: str, headerless: bool = False) -> Path | None:
    """Find the file `name` in a folder, in any format and in upper or lower case. None if there is none.

    `name` has the ending of JSON Lines: xstest.jsonl finds XSTest.csv.gz. With `headerless` a subfolder of CSV files without
    a header is found too.

    Raises:
        ConfigError: there is more than one such file, or one in a format that cannot be read. No other source is then used
            in its place.
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
    """The format of a file: the ending of its name without .gz or .zst, such as ".csv"."""
    suffix, _, packing = path.name.lower().rpartition(".")
    return f".{suffix.rpartition('.')[2]}" if packing in ("gz", "zst") else f".{packing}"


def read(path: Path, problems: list[str] | None = None) -> list[Record]:
    """All records of a file (or of a folder of CSV files without a header), in its order.

    Raises ConfigError with the place of what is not in the file's format. If `problems` is given, errors of single lines of
    JSON Lines are added to it instead, and those lines are skipped.
    """
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
    """Read CSV files without a header, with one prompt a line and one category a file.

    A record is {"prompt", "category": the file's name without its ending}. Empty lines are left out.
    """
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
    """The CSV files of a folder, sorted. Empty if it is not a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv") if folder.is_dir() else []


def encodes(text: str) -> bool:
    """Whether a text can be encoded as UTF-8. It cannot if it holds half a surrogate pair (a cut emoji), which no tokenizer
    accepts."""
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
    """The objects of a JSON array. None if the text holds several JSON values: it is JSON Lines in a file named .json."""
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
    """The records of a table with their numbers, which count from 1. Records without a cell are counted but left out."""
    csv.field_size_limit(sys.maxsize)  # else a cell over 128 KiB is an error, and tests of code are longer
    number = 0
    try:
        # strict: else a cell whose quotation mark is never closed would hold the rest of the file
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
