"""Reads a sweep file as people write it: YAML, `--set path=value` and `--limit`. Reports all errors at once.

The YAML follows the core schema of 1.2, whatever the parser. Only `true` and `false` are booleans (`yes`, `on` and
`off` are strings). A number is written as in JSON (`010`, `1:30`, `0x10` and `1_000` are strings, and never become
numbers). `1e-4` is a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from safecl import registry
from safecl.base import ConfigError, Strict, expanded, literal, near, strictly
from safecl.config import Sweep

# For a plain scalar: (tag, pattern, first characters). Anything else is text.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


def load(path: Path, settings: Sequence[str], limit: int | None = None) -> Sweep:
    """Read a sweep file, apply `--set path=value` and `--limit`, and validate it. The plugins it names become known to
    this process.

    Raises:
        ConfigError: all errors, one line each.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with `name`, `models`, ..., got {_kind(raw)}")
    return from_raw(raw, settings, limit, path)


def raw_of(path: Path, settings: Sequence[str]) -> dict[str, Any]:
    """The content of a valid sweep file, with `--set` applied. Paths in it stay as they were written."""
    raw: dict[str, Any] = read_yaml(path)
    for setting in settings:
        _set(raw, setting)
    return raw


def from_raw(raw: dict[str, Any], settings: Sequence[str], limit: int | None, path: Path) -> Sweep:
    """`load`, from the content of a file. `raw` is modified. `path` is the file's; plugins are relative to its
    folder."""
    for setting in settings:
        _set(raw, setting)
    _place_data(raw, path.parent)
    if raw.get("lora", {}) in (None, "none", "full"):
        raise ConfigError(
            "lora: full fine-tuning is not there: methods, memories and the engines' change of weights work on LoRA factors, and "
            "each trial would store a whole model. The nearest is a high rank, for example lora: {rank: 256, alpha: 256}"
        )
    try:
        _place_models(raw, path.parent)
        if limit is not None:
            _limit(raw, limit)
        sweep = strictly(Sweep, raw)
        plugins = tuple(str((path.parent / plugin).absolute()) for plugin in sweep.plugins)
        registry.use(plugins)
        sweep = sweep.model_copy(update={"plugins": plugins})
        if sweep.published is not None:  # beside the sweep file, wherever the command is run
            file = str(path.absolute().parent / sweep.published.file)
            sweep = sweep.model_copy(update={"published": sweep.published.model_copy(update={"file": file})})
        return sweep if limit is None else _with_small_memories(sweep, limit)
    except ValidationError as error:
        raise ConfigError("\n".join(explained(error, raw, Sweep))) from None
    except (TypeError, ValueError, RecursionError) as error:  # YAML can hold bytes, dates, cycles; JSON cannot
        raise ConfigError(f"{path}: expected plain values ({error})") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises ConfigError if it cannot be read, or is no valid YAML."""
    return _parsed(str(path), _text(path))


def explained(error: ValidationError, given: Any, schema: type[Strict]) -> list[str]:
    """pydantic's errors about `given`, one line each: the place, what is wrong, and the present value.

    For a value that may be of several kinds pydantic reports the errors of each kind. They become one line, or only the
    errors of the kind that was meant.
    """
    found: list[Any] = error.errors()
    # pydantic also reports too_short when every item is invalid. Show the item errors instead.
    found = [item for item in found if not (item["type"] == "too_short" and item.get("input"))] or found
    places: dict[tuple[Any, ...], list[Any]] = {}
    for item in found:
        places.setdefault(_place_in(given, item), []).append(item)
    told = []
    for place, items in places.items():
        kinds = [item for item in items if len(item["loc"]) == len(place) + 1 and item["type"] != "value_error"]
        within = [item for item in items if item not in kinds]
        if kinds and not within:
            choices = [item["msg"].removeprefix("Input should be ") for item in kinds]
            names = ", ".join(str(item.get("ctx", {}).get("expected", "")) for item in kinds)
            merged = {
                "type": "literal_error",
                "msg": f"Input should be {' or '.join(choices)}",
                "ctx": {"expected": names},
            }
            within = [{**kinds[0], **merged, "loc": place}]
        told += [_explained({**item, "loc": _own_place(given, item)}, schema) for item in within]
    return list(dict.fromkeys(told))


def _place_in(given: Any, item: Any) -> tuple[Any, ...]:
    """The place of an error, without the names that pydantic adds for the kinds of a value."""
    at, place = given, item["loc"]
    for i, part in enumerate(place):
        is_there = part in at if isinstance(at, dict) else isinstance(at, list) and part in range(len(at))
        if is_there:
            at = at[part]
        elif item["type"] != "missing" or i < len(place) - 1:
            return tuple(place[:i])
    return tuple(place)


def _own_place(given: Any, item: Any) -> tuple[Any, ...]:
    """The keys that a person wrote on the way to an error, without pydantic's names for kinds. A missing key is the
    last one."""
    at, place = given, []
    for part in item["loc"]:
        is_there = part in at if isinstance(at, dict) else isinstance(at, list) and part in range(len(at))
        if is_there:
            at = at[part]
            place.append(part)
    return (*place, item["loc"][-1]) if item["type"] == "missing" else tuple(place)


def _explained(item: Any, schema: type[Strict]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields(schema, item["loc"][:-1])
        return f"{where}: unknown key.{near(str(item['loc'][-1]), known)} Known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where}: is required and not given"
    if not where:  # an error of the whole file, which need not be shown again
        return str(item["msg"]).removeprefix("Value error, ")
    hint = ""
    if item["type"] == "literal_error" and isinstance(item.get("input"), str):
        hint = near(item["input"], str(item["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", "))
    return f"{where}: {item['msg'].removeprefix('Value error, ')} (got {item.get('input')!r}){hint}"


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = near(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise ConfigError(f"no sweep file {str(path)!r}.{hint}") from None
    except IsADirectoryError:
        inside = ", ".join(sorted(file.name for file in path.glob("*.yaml"))) or "no .yaml file"
        raise ConfigError(f"{str(path)!r} is a folder; expected a sweep file. It holds {inside}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(where: str, text: str) -> Any:
    import yaml

    try:
        loader = _loader()(text)
        found = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}{line}: is not valid YAML: {told}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # `!!bool x`
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if loader.twice:
        raise ConfigError("\n".join(f"{where}, {told}" for told in loader.twice))
    return found


@cache
def _loader() -> Any:
    """PyYAML's safe loader with the scalars of YAML 1.2. `twice` lists keys that occur twice in one mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.twice: list[str] = []

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if str(key.value) in lines:
                    first = lines[str(key.value)]
                    self.twice.append(
                        f"line {line}: {key.value!r} stands twice, first in line {first}: keep one of them"
                    )
                lines.setdefault(str(key.value), line)
            return node

    for tag, pattern, first in _SCALARS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))
    return Loader


def _place_data(raw: dict[str, Any], folder: Path) -> None:
    """Make the files of `data` absolute paths. A relative path is beside the sweep file, else in the data folder."""
    execution = raw.get("execution")
    data_dir = execution.get("data_dir") if isinstance(execution, dict) else None
    folders = [folder]
    with suppress(ValueError):  # its own check refuses it
        folders += [Path(expanded(data_dir))] if isinstance(data_dir, str) else []

    def placed(file: Any) -> Any:
        if isinstance(file, dict):
            return {part: placed(each) for part, each in file.items()}
        try:
            places = [(each / expanded(file)).absolute() for each in folders] if isinstance(file, str) else []
        except ValueError:
            places = []
        if not places:
            return file  # its own check refuses it
        return literal(str(next((place for place in places if os.path.exists(place)), places[0])))

    entries = raw.get("data")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "file" in entry:
            entry["file"] = placed(entry["file"])


def _place_models(given: Any, folder: Path) -> None:
    """Make folders of models and tokenizers absolute paths, because workers have another working folder. A relative
    path is beside the sweep file, else in the folder where the command is run."""
    for key, value in given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ():
        if key in ("source", "tokenizer") and isinstance(value, str):
            with suppress(ValueError):  # its own check refuses it
                place = next((each for each in (folder, Path()) if (each / expanded(value)).is_dir()), None)
                given[key] = value if place is None else literal(str((place / expanded(value)).absolute()))
        else:
            _place_models(value, folder)


def _set(raw: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {setting!r}: expected path=value, for example execution.num_workers=2")
    *parents, last = path.split(".")
    at: Any = raw
    for part in parents:
        at = at[_place(at, part, setting)] if isinstance(at, list) else _below(at, part)
        if not isinstance(at, dict | list):
            raise ConfigError(f"--set {setting!r}: {part!r} is {_kind(at)}: {at!r}, which has no keys")
    at[_place(at, last, setting) if isinstance(at, list) else last] = _parsed(f"--set {setting!r}", text)


def _below(at: dict[str, Any], part: str) -> Any:
    if at.get(part) is None:
        at[part] = {}
    return at[part]


def _place(at: list[Any], part: str, setting: str) -> int:
    if not part.isdecimal() or int(part) >= len(at):
        expected = f"0 to {len(at) - 1}" if at else "none, it is empty"
        raise ConfigError(f"--set {setting!r}: {part!r} is no place in a list of {len(at)}; expected {expected}")
    return int(part)


def _limit(raw: Any, limit: int) -> None:
    """At most `limit` rows of every set, for a quick look. Other rows are another recipe, so no results are
    confused."""
    if isinstance(raw, list):
        for item in raw:
            _limit(item, limit)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if key in ("num_harmful", "num_benign") and isinstance(value, int):
                raw[key] = min(value, max(1, limit // 2))
            elif key == "utility_rows" and isinstance(value, dict):
                raw[key] = {split: min(num, limit) if isinstance(num, int) else num for split, num in value.items()}
            elif key not in ("num_rows", "utility_rows"):
                _limit(value, limit)
            elif value is None or isinstance(value, int):  # else its own check refuses it
                raw[key] = limit if value is None else min(value, limit)
        if "task" in raw and not raw.keys() & {"ratios", "num_harmful", "num_benign"}:
            raw.setdefault("num_rows", limit)


def _smaller_memories(sweep: Sweep, limit: int) -> dict[str, dict[Any, int]]:
    """By method: each memory size that the file writes, with a smaller number of rows. Different sizes stay different
    as far as there is room, so that rows that differ only in memory size stay apart."""
    from safecl import methods
    from safecl.grid import share_of

    written: dict[str, dict[Any, float]] = {}
    for method in sweep.methods:
        with suppress(ConfigError):
            kind = methods.load(method.name)
            key, fields = kind.memory_key, kind.Config.model_fields
            default = fields[key].default if key in fields else None
            for size in method.grid.get(key, (method.config.get(key, default),)):
                share = share_of(size)
                if share is not None or (isinstance(size, int) and size > 0):
                    written.setdefault(method.name, {})[size] = float(size) if share is None else share * limit
    smaller: dict[str, dict[Any, int]] = {}
    for name, sizes in written.items():
        last, smaller[name] = limit // 4 + 1, {}
        for size in sorted(sizes, key=sizes.__getitem__, reverse=True):
            smaller[name][size] = last = max(1, min(round(sizes[size]), last - 1))
    return smaller


def _with_small_memories(sweep: Sweep, limit: int) -> Sweep:
    """Memories of at most a fourth of `limit`, searched sizes too. With so few safety rows not all of them are
    refusals."""
    from safecl import methods
    from safecl.grid import space_of

    most = max(1, limit // 4)
    smaller = _smaller_memories(sweep, limit)

    def fixed(name: str, size: Any) -> Any:
        return smaller.get(name, {}).get(size, size) if isinstance(size, int | str) else size

    def bounded(form: Any) -> Any:
        if isinstance(form, list):
            return list(dict.fromkeys(map(bounded, form)))
        if isinstance(form, dict):
            return form | {end: bounded(form[end]) for end in form.keys() & {"low", "high"}}
        return min(form, most) if isinstance(form, int) else form  # else its own check refuses it

    small = []
    for method in sweep.methods:
        with suppress(ConfigError, ValidationError):  # check.py reports the error
            kind = methods.load(method.name)
            fields, key = kind.Config.model_fields, kind.memory_key
            if key in method.grid:
                some = tuple(dict.fromkeys(map(partial(fixed, method.name), method.grid[key])))
                method = method.model_copy(update={"grid": {**method.grid, key: some}})
            elif key in fields:
                size = method.config.get(key, fields[key].default)
                space = dict(space_of(method) or {})
                form = space[key] = bounded(space.get(key, []))
                ends = {form.get("low"), form.get("high")} if isinstance(form, dict) else form
                if isinstance(ends, list | set) and len(ends) < 2:
                    del space[key]  # there is nothing left to choose
                config = {**method.config, key: bounded(size) if key in space else fixed(method.name, size)}
                method = method.model_copy(update={"config": config, "search": space or None})
        small.append(method)
    return sweep.model_copy(update={"methods": tuple(small)})


def _fields(schema: type[Strict], location: tuple[Any, ...]) -> list[str]:
    """Names of the config's fields at a place below `schema`."""

    def find(annotation: Any) -> type[Strict] | None:
        if isinstance(annotation, type) and issubclass(annotation, Strict):
            return annotation
        return next((found for part in get_args(annotation) if (found := find(part))), None)

    at = schema
    for part in location:
        if isinstance(part, str) and part in at.model_fields:
            at = find(at.model_fields[part].annotation) or at
    return sorted(at.model_fields)


def _kind(value: Any) -> str:
    kinds = {
        type(None): "nothing",
        str: "text",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), type(value).__name__)
