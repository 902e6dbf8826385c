"""What every module may import: strict configs, the errors that a user can mend, and functions that read names and
paths. Imports nothing of safecl."""

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
    """A frozen config that refuses unknown keys, so that a misspelt key is an error and not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def later(default: Any) -> Any:
    """Declare a setting that was added after results had been stored, with its default.

    At its default the setting is left out of every dump, and so out of a stage's identity. Results that were finished before
    the setting existed are therefore still found.
    """
    return Field(default, exclude_if=lambda value: value == default)


class ConfigError(Exception):
    """The sweep file, a command or a data file is wrong. Printed without a traceback; the command exits 2."""


class PrerequisiteError(Exception):
    """The machine lacks something (a model, data, disk, memory). One line with the remedy; the command exits 2."""


class Infrastructure(RuntimeError):
    """The machine failed, not the stage: a process was killed, memory or a disk was full, or a node was lost."""


class Unreachable(Infrastructure):
    """A storage does not answer."""


class Damaged(PrerequisiteError):
    """A finished stage's files differ from what was written. `safecl run` makes the stage again."""


_Config = TypeVar("_Config", bound=Strict)


def strictly(kind: type[_Config], given: Mapping[str, Any]) -> _Config:
    """Return a config from values that a user wrote. No value is converted: "12", true and 3.0 are not whole numbers.

    Raises:
        ValidationError: a value has the wrong type or is out of its range.
        TypeError: a value cannot be written as JSON.
        ValueError: a value contains itself.
    """
    return kind.model_validate_json(json.dumps(given), strict=True)


def json_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file, one a line.

    Only a newline ends a line. JSON texts may contain the other characters at which `str.splitlines` splits (as U+2028).
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def near(wrong: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` with the known name that is most similar, or "" if none is similar."""
    from difflib import get_close_matches

    found = get_close_matches(wrong, list(known), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def expanded(path: str) -> str:
    """Return a path with `~` and `$NAME` replaced as a shell does, and `$$` replaced by `$`.

    Raises:
        ValueError: the path is empty, or a variable is not set.
    """
    if not path.strip():
        raise ValueError("is empty; expected a path")
    parts = [os.path.expandvars(part) for part in path.split("$$")]
    if unset := next(filter(None, (re.search(r"\$\{?([A-Za-z_]\w*)", part) for part in parts)), None):
        raise ValueError(f"the environment variable {unset[1]} is not set; a $ of the name itself is written $$")
    return os.path.expanduser("$".join(parts))


def literal(path: str) -> str:
    """Return the text that `expanded` turns into exactly this path: each `$` is doubled. (A leading `~` is not escaped.)"""
    return path.replace("$", "$$")


def sqlite_url(path: Path) -> str:
    """Return SQLAlchemy's URL of a database file.

    Characters of the file's name that have a meaning in a URL (`%`, `?`, `#`, `+`) or for Optuna (braces) are
    percent-encoded.
    """
    return "sqlite:///" + "".join(f"%{ord(c):02X}" if c in "%?#{}+" else c for c in str(path))


def sqlite_path(url: str) -> Path | None:
    """Return the file that a URL of `sqlite_url` names; None for another kind of URL."""
    return Path(unquote(url.removeprefix("sqlite:///"))) if url.startswith("sqlite:///") else None


@contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector away from the objects that imports inside the block make, in a process that lives on.

    It does not run during the imports, which saves a tenth to a fifth of their time. These objects are also frozen, so that
    no later collection looks at them: DeepSpeed's set-up collects garbage, which otherwise takes most of a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
