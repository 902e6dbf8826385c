"""What every room may import: strict configs, the two errors that a person can mend, and how names and paths that people
write are read. Imports nothing of safecl."""

import gc
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeAliasType

# Not a plain alias: pydantic needs a *named* recursive type, or it recurses without end while building the schema.
Json = TypeAliasType("Json", "bool | int | float | str | list[Json] | dict[str, Json] | None")


class Strict(BaseModel):
    """A frozen config that refuses unknown keys, so that a misspelt key is never a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def later(default: Any) -> Any:
    """The default of a setting that came after results were stored. At it the setting stays out of every dump, and so out of
    identity: what was finished before the setting existed is still found."""
    return Field(default, exclude_if=lambda value: value == default)


class ConfigError(Exception):
    """The sweep file, a command or a data file is wrong. Printed without a traceback; the command exits 2."""


class PrerequisiteError(Exception):
    """The machine lacks something (a model, data, disk, memory). One line with the remedy; the command exits 2."""


class Infrastructure(RuntimeError):
    """The machine failed, not what it was asked to do: a process was killed, memory or a disk was full, a node was lost."""


class Damaged(PrerequisiteError):
    """A finished stage's files are not what was written. `safecl run` makes it again."""


_Config = TypeVar("_Config", bound=Strict)


def strictly(kind: type[_Config], given: Mapping[str, Any]) -> _Config:
    """A config of what a person wrote. No value is made into another type: "12", true and 3.0 are no whole numbers.

    Raises:
        ValidationError: a value is of another type or out of its range.
        TypeError: a value is nothing that JSON can hold.
        ValueError: one holds itself.
    """
    return kind.model_validate_json(json.dumps(given), strict=True)


def json_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file, one a line. Lines end with a newline alone: JSON may hold what else ends one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def near(wrong: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` of the known name most like this one; nothing where none is like it."""
    from difflib import get_close_matches

    found = get_close_matches(wrong, list(known), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def expanded(path: str) -> str:
    """A path as a shell reads it: `~` and `$NAME` for what they stand for, `$$` for a `$`. Raises ValueError for a variable
    that is not set, and for an empty path."""
    if not path.strip():
        raise ValueError("is empty; expected a path")
    parts = [os.path.expandvars(part) for part in path.split("$$")]
    if unset := next(filter(None, (re.search(r"\$\{?([A-Za-z_]\w*)", part) for part in parts)), None):
        raise ValueError(f"the environment variable {unset[1]} is not set; a $ of the name itself is written $$")
    return os.path.expanduser("$".join(parts))


def literal(path: str) -> str:
    """What `expanded` makes this very path of."""
    return path.replace("$", "$$")


def sqlite_url(path: Path) -> str:
    """SQLAlchemy's URL of a database file, whatever its name: `?`, `#`, `%` and what else would be read otherwise there
    (Optuna: braces) is written as URLs do."""
    return "sqlite:///" + "".join(f"%{ord(c):02X}" if c in "%?#{}+" else c for c in str(path))


def sqlite_path(url: str) -> Path | None:
    """The file of `sqlite_url`; None for another kind of URL."""
    return Path(unquote(url.removeprefix("sqlite:///"))) if url.startswith("sqlite:///") else None


@contextmanager
def importing() -> Iterator[None]:
    """For imports of libraries in a process that lives on: nobody looks for garbage among what they make, neither
    meanwhile (a tenth to a fifth of their time) nor ever after (DeepSpeed's set-up does, for most of a second)."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
