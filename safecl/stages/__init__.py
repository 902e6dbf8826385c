"""Kinds of stages, one file each. A file holds `run`, a `VERSION` and one subclass of `Kind` that describes the kind.

The scheduler, the time estimates and the names shown to a person read only that class. So a new kind is one new file.
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
    """Base class that describes a kind of stage. A subclass must set `runs`, `unit` and `fixed_s`.

    All other attributes and methods have a default. Raises TypeError when a subclass that leaves out one of the three is
    defined (when its file is imported).
    """

    # Where the stage runs. trainer: it computes, on one CPU (or GPU) of a warm process that it does not share. thread: it
    # uses almost no CPU and mostly waits for an engine; many such stages run at once in one process. process: a new
    # process that ends with the stage and reserves no CPU, for work that is done once and takes much memory.
    runs: ClassVar[Literal["trainer", "thread", "process"]]
    unit: ClassVar[str]  # the unit of its progress, such as "steps"; empty if it reports no progress
    fixed_s: ClassVar[float]  # seconds that the stage takes whatever its size
    at_driver: ClassVar[bool] = False  # it reads files of the driver's machine, so it must run on that node
    all_ranks: ClassVar[bool] = False  # on a trainer: all ranks work on the stage together; else one rank does
    # Whether its failure may be caused by another rank's failure. If so, the stage is run again from its checkpoint.
    runs_anew: ClassVar[bool] = False
    engine: ClassVar[Literal["candidate", "judge"] | None] = None  # role of the engine it waits for, given a `model`
    apart_by: ClassVar[str] = ""  # config key; time estimates are corrected separately for each of its values
    holds_weights: ClassVar[bool] = False  # whether the stage's output can be exported as a model
    reads: ClassVar[tuple[str, ...]] = ("rows", "model")  # inputs that `seconds` reads, by name before any dot

    def __init_subclass__(cls) -> None:
        missing = [name for name in ("runs", "unit", "fixed_s") if not hasattr(cls, name)]
        if missing:
            raise TypeError(f"stage kind {cls.__name__}: expected it to declare {', '.join(missing)} (see stages.Kind)")

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        """Estimated seconds on this machine that depend on the stage's size. `fixed_s` comes on top."""
        return 0.0

    @staticmethod
    def memory_gib(stage: Stage) -> float:
        """Memory of the stage's own process, in GiB. Only large amounts matter: a node of the cluster must have it."""
        return 0.0

    @staticmethod
    def states_gib(stage: Stage, of: Estimator) -> float:
        """Size of the hidden states that the stage writes, in GiB."""
        return 0.0

    @staticmethod
    def weights_gib(stage: Stage, of: Estimator) -> float:
        """Size of the weights that the stage writes, in GiB."""
        return 0.0

    @staticmethod
    def length(stage: Stage, of: Estimator) -> Length | None:
        """Number and length of the rows that the stage writes, for estimates of later stages. None if it writes no rows."""
        return None

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        """Name of the stage as shown to a person. `models` maps the key of a model stage to its name."""
        seed = f", seed {stage.config['seed']}" if "seed" in stage.config else ""
        return f"{stage.kind}{seed}"


@cache
def names() -> tuple[str, ...]:
    """Names of all kinds, sorted. Imports none of them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


@cache
def load(kind: str) -> type[Kind]:
    """The `Kind` subclass of a kind. Raises LookupError if the file does not exist, TypeError if it does not hold just one."""
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
    """Whether the stage needs a trainer. A stage of another kind needs one if its hints hold `num_cpus` (it runs programs)."""
    return load(stage.kind).runs == "trainer" or "num_cpus" in stage.hints


def stays(stage: Stage) -> bool:
    """Whether the stage must run on the driver's node because it reads files there. Other stages read only the store."""
    return load(stage.kind).at_driver or "tokenizer" in stage.hints


def engine_of(stage: Stage) -> Literal["candidate", "judge"] | None:
    """The role of the engine that the stage waits for. None if it waits for none."""
    return load(stage.kind).engine if "model" in stage.inputs else None
