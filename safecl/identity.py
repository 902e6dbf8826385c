"""Stages as pure data with an identity, and what a stage's run is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl.base import Json

if TYPE_CHECKING:
    from safecl.config import Execution


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode
_quote = json.encoder.encode_basestring_ascii
_PLAIN = frozenset({str, int, float, bool, type(None)})
_PLACE = "\0"  # stands for a key; canonical JSON never holds this character


def canonical(value: Json) -> str:
    """JSON text that is the same for equal values. Raises TypeError or ValueError for a value without a stable form."""
    if isinstance(value, dict) and SharedConfig in map(type, value.values()):
        return _of_parts(value)
    if not _is_plain(value):
        _refuse_unstable(value, "$")
    try:
        return _encode(value)
    except (TypeError, ValueError):
        _refuse_unstable(value, "$")  # raises with the place of the value
        raise


def _of_parts(config: dict[str, Json]) -> str:
    """Canonical text of a dict that holds shared configs, whose text is already known."""
    if not all(type(name) is str for name in config):
        _refuse_unstable(config, "$")
    return f"{{{','.join([f'{_quote(name)}:{_part(item)}' for name, item in sorted(config.items())])}}}"


def _part(value: Json) -> str:
    if isinstance(value, SharedConfig):
        return value.text
    if type(value) is str:
        return _quote(value)
    return str(value) if type(value) is int else canonical(value)


def _is_plain(value: Any) -> bool:
    """Whether all keys are strings and all containers are plain. The encoder would silently turn other keys into
    text."""
    kind = type(value)
    if kind is dict or kind is SharedConfig:
        for key, item in value.items():  # noqa: SIM110 (loops: this runs for every stage)
            if type(key) is not str or not (type(item) in _PLAIN or _is_plain(item)):
                return False
        return True
    if kind is list or kind is tuple:
        for item in value:  # noqa: SIM110
            if not (type(item) in _PLAIN or _is_plain(item)):
                return False
        return True
    return kind in _PLAIN


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


class SharedConfig(dict[str, Json]):
    """A config that many stages use as their config, or inside it. Its canonical text is computed once. It must not be
    changed."""

    @cached_property
    def text(self) -> str:
        """Its canonical JSON text."""
        return canonical(dict(self))


@dataclass(frozen=True)
class Stage:
    """A unit of cached work as pure data.

    `kind` is the name of the file in `stages/`. `config` is resolved JSON, defaults included. `inputs` are other stages
    by role. `version` covers the stage file and the classes it uses. `hints` say where content is on this machine; they
    are not part of the identity.
    """

    kind: str
    config: Mapping[str, Json]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    version: str = "1"
    hints: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """sha256 (hex, 64 digits) of the canonical JSON of kind, config, input keys and version."""
        text = self._text({name: stage.key for name, stage in self.inputs.items()})
        return hashlib.sha256(text.encode()).hexdigest()

    def _text(self, keys: Mapping[str, str]) -> str:
        """The canonical JSON of kind, config, input keys and version. Built by hand for speed."""
        config = self.config.text if isinstance(self.config, SharedConfig) else canonical(dict(self.config))
        inputs = ",".join([f'{_quote(name)}:"{keys[name]}"' for name in sorted(keys)])
        return (
            f'{{"config":{config},"inputs":{{{inputs}}},"kind":{_quote(self.kind)},"version":{_quote(self.version)}}}'
        )

    def given(self, inputs: Mapping[str, Stage]) -> Stage:
        """This stage with more inputs. For many stages that are alike but for these: most of the text of which their
        keys are hashes is made once."""
        names = tuple(inputs)
        if (known := self._given.get(names)) is None:
            keys = {name: stage.key for name, stage in self.inputs.items()} | dict.fromkeys(names, _PLACE)
            first, *after = self._text(keys).split(_PLACE)
            known = self._given[names] = first, list(zip(sorted(names), after, strict=True))
        text = known[0] + "".join([inputs[name].key + after for name, after in known[1]])
        made = Stage.__new__(Stage)
        made.__dict__.update(
            kind=self.kind, config=self.config, inputs={**self.inputs, **inputs}, version=self.version, hints=self.hints,
            key=hashlib.sha256(text.encode()).hexdigest(),
        )  # fmt: skip
        return made

    @cached_property
    def _given(self) -> dict[tuple[str, ...], tuple[str, list[tuple[str, str]]]]:
        """By the names of more inputs: the text of which the key is a hash, as its beginning and pairs of a name and the
        text after its key."""
        return {}

    @property
    def ref(self) -> Ref:
        """Its kind and key."""
        return Ref(self.kind, self.key)

    @classmethod
    def of(cls, record: Mapping[str, Any], inputs: Mapping[str, Stage]) -> Stage:
        """A finished stage from its record, with the record's key. `inputs`: the input stages that are needed."""
        stage = cls(record["kind"], record["config"], inputs, record["version"])
        stage.__dict__["key"] = record["key"]
        return stage

    def walk(self) -> list[Stage]:
        """This stage and all stages below it, inputs first, each once."""
        return below([self])


class Ref(NamedTuple):
    """A stage by its kind and key alone. This is sent to another machine, which has its own files."""

    kind: str
    key: str


def below(tops: Iterable[Stage], leave_out: Callable[[Stage], bool] | None = None) -> list[Stage]:
    """These stages and all stages below them, inputs first, each once. Stages for which `leave_out` is true are left
    out, and so are stages that only they need."""
    found: dict[str, Stage] = {}
    left_out: set[str] = set()

    def visit(stages: Iterable[Stage]) -> None:
        for stage in stages:
            key = stage.key
            if key in found or key in left_out:
                continue
            if leave_out is not None and leave_out(stage):
                left_out.add(key)
                continue
            visit(stage.inputs.values())
            found[key] = stage

    visit(tops)
    return list(found.values())


class Place(NamedTuple):
    """The place of one process among those that work on one stage together."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


@dataclass
class Context:
    """The argument of a stage's `run(context) -> result`."""

    stage: Stage
    inputs: dict[str, Path]  # finished folder of each input stage, by the stage's input names
    out: Path  # empty folder; what is written here becomes the stage's folder
    scratch: Path  # folder for checkpoints, kept across attempts of this key
    execution: Execution
    # (done, total, metrics): reports progress; cheap, never raises. Returns whether a checkpoint is wanted now.
    report: Callable[[int, int, dict[str, float]], bool | None]
    engines: Any = None  # serving.client.Engines: how generate and judge stages reach a served model
    place: Place = field(default_factory=Place)  # of this process; several processes work on a finetune
    whole: bool = False  # other machines read the output, so it must hold no path of this machine
