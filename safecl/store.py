"""Identity of a stage, and the content-addressed store of what stages made.

    <root>/store/<kind>/<key>/            files of the stage, and
    <root>/store/<kind>/<key>/record.json written last: a stage without it does not exist
    <root>/scratch/<key>/                 checkpoints of a stage that is under way, kept across attempts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.base import Json

if TYPE_CHECKING:
    from safecl.config import Execution


def canonical(value: Json) -> str:
    """JSON text that is equal for equal values. Raises TypeError or ValueError for a value without a stable form."""
    _refuse_unstable(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _refuse_unstable(value: object, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{where}: {value} has no stable form; expected a finite number")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unstable(item, f"{where}[{index}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}; expected a string")
            _refuse_unstable(item, f"{where}.{key}")
        return
    raise TypeError(f"{where}: {type(value).__name__} has no stable form; expected plain JSON")


@dataclass(frozen=True)
class Stage:
    """A unit of cached work as pure data. `kind` names the file in `stages/`; `config` is resolved JSON, defaults
    included; `inputs` are other stages by role; `version` covers the stage file and the classes it uses."""

    kind: str
    config: Mapping[str, Json]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    version: str = "1"

    @cached_property
    def key(self) -> str:
        """sha256 (hex, 64 digits) of the canonical JSON of kind, config, input keys and version."""
        identity: Json = {
            "kind": self.kind,
            "config": dict(self.config),
            "inputs": {name: stage.key for name, stage in self.inputs.items()},
            "version": self.version,
        }
        return hashlib.sha256(canonical(identity).encode()).hexdigest()

    def walk(self) -> Iterator[Stage]:
        """This stage and everything below it, inputs first, each once."""
        seen: set[str] = set()

        def visit(stage: Stage) -> Iterator[Stage]:
            if stage.key in seen:
                return
            seen.add(stage.key)
            for below in stage.inputs.values():
                yield from visit(below)
            yield stage

        yield from visit(self)


@dataclass
class Context:
    """What a stage's `run(context) -> result` is given."""

    stage: Stage
    inputs: dict[str, Path]  # finished folder of each input stage, by the stage's input names
    out: Path  # empty folder: what is written here becomes the stage's folder
    scratch: Path  # kept across attempts of this key: checkpoints
    execution: Execution
    report: Callable[[int, int, dict[str, float]], None]  # (done, total, metrics): progress, cheap, never raises
    engines: Any = None  # serving.engine.Engines: how generate and judge stages reach a served model
