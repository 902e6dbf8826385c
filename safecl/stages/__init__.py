"""Stages: one file a kind. Each holds `run`, a `VERSION`, and a class that says all that is known of the kind.

What runs stages, how long they take and what a person calls
them is read from there alone, so a new kind is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from safecl.estimate import Estimator
    from safecl.sizes import Length
    from safecl.store import Stage


class Kind:
    """What a kind of stage says of itself. `runs`, `unit` and `fixed_s` must be set; the rest has a default.

    Raises TypeError, when its file is imported, for a kind that leaves one out.
    """

    # Where it runs. trainer: it computes, and has a CPU (GPU) of a warm process to itself. thread: it takes next to no CPU,
    # mostly waiting for an engine; many at once, in one process. process: a process of its own that ends with it and no
    # CPU, for what is done once and takes memory.
    runs: ClassVar[Literal["trainer", "thread", "process"]]
    unit: ClassVar[str]  # what its progress counts, as in "steps"; empty where it reports none
    fixed_s: ClassVar[float]  # seconds that it takes however small it is
    at_driver: ClassVar[bool] = False  # it reads files of the driver's machine: it runs on that node
    all_ranks: ClassVar[bool] = False  # on a trainer: all its ranks share the stage, else one does it
    # Whether a failure of its own may be another rank's, so that it is run anew, from its checkpoint.
    runs_anew: ClassVar[bool] = False
    engine: ClassVar[Literal["candidate", "judge"] | None] = None  # whose answers it waits for, if it has a `model`
    apart_by: ClassVar[str] = ""  # estimates are corrected apart for each value of this config key
    holds_weights: ClassVar[bool] = False  # whether what it writes can be exported
    reads: ClassVar[tuple[str, ...]] = ("rows", "model")  # inputs that `seconds` reads, by name before any dot

    def __init_subclass__(cls) -> None:
        missing = [name for name in ("runs", "unit", "fixed_s") if not hasattr(cls, name)]
        if missing:
            raise TypeError(f"stage kind {cls.__name__}: expected it to declare {', '.join(missing)} (see stages.Kind)")

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        """What it takes beside `fixed_s` by its size, on this machine."""
        return 0.0

    @staticmethod
    def memory_gib(stage: Stage) -> float:
        """Memory that a process of its own takes for it, where that is much: a cluster's node must have it."""
        return 0.0

    @staticmethod
    def states_gib(stage: Stage, of: Estimator) -> float:
        """Hidden states that it writes, in GiB."""
        return 0.0

    @staticmethod
    def weights_gib(stage: Stage, of: Estimator) -> float:
        """Weights that it writes, in GiB."""
        return 0.0

    @staticmethod
    def length(stage: Stage, of: Estimator) -> Length | None:
        """Rows that it gives, for the estimates of what reads them; None: it gives none."""
        return None

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        """What a person calls it. `models`: names by the key of a model stage."""
        seed = f", seed {stage.config['seed']}" if "seed" in stage.config else ""
        return f"{stage.kind}{seed}"


@cache
def names() -> tuple[str, ...]:
    """Names of all kinds, sorted, without importing any."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


@cache
def load(kind: str) -> type[Kind]:
    """What is known of a kind. Raises LookupError if there is no such file, TypeError if it declares nothing."""
    if kind not in names():
        raise LookupError(f"unknown stage kind {kind!r}: expected one of {', '.join(names())}")
    name = f"{__name__}.{kind}"
    declared = (found for found in vars(importlib.import_module(name)).values() if isinstance(found, type))
    own = [found for found in declared if issubclass(found, Kind) and found.__module__ == name]
    if len(own) != 1:
        raise TypeError(
            f"stages/{kind}.py declares {len(own)} kinds: expected one class of stages.Kind, which says all of it"
        )
    return own[0]


def needs_trainer(stage: Stage) -> bool:
    """Whether it computes; one whose kind does not may say so itself (`hints`: it runs programs)."""
    return load(stage.kind).runs == "trainer" or "num_cpus" in stage.hints


def stays(stage: Stage) -> bool:
    """Whether it must run on the driver's node, whose files it reads: what other stages read lies in the store."""
    return load(stage.kind).at_driver or "tokenizer" in stage.hints


def engine_of(stage: Stage) -> Literal["candidate", "judge"] | None:
    """The role of the engine that it waits for; None without one."""
    return load(stage.kind).engine if "model" in stage.inputs else None
