"""How many units trainers and engines hold, how many a cluster has or may get by autoscaling, and whether these suffice.

A unit is one of the scarce resource: a GPU, one of a cluster's CPUs, or a GiB of this machine's memory.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safecl.config import Execution

GIB_PER_TRIAL, GIB_PER_ENGINE, GIB_PER_WORKER = 0.4, 4.0, 2.5  # memory, measured at 135M parameters
GIB = "GiB"


class Capacity(NamedTuple):
    """How many units there are, and how many trainers and engines hold.

    Attributes:
        unit: Ray's name of the scarce resource, or `GIB` for GiB of memory on this machine.
        num_units: how many units there are.
        trainer, engine: how many units one trainer, or one engine, holds.
        num_trainers: how many trainers there may be at once.
    """

    unit: str
    num_units: float
    trainer: float
    engine: float
    num_trainers: int

    def needed(self) -> float:
        """Return the smallest number of units with which a run can finish: one trainer or one engine, which take turns."""
        return max(self.trainer, self.engine)


def unit(execution: Execution) -> str:
    """Return the scarce resource: Ray's name of it, or `GIB` on one machine's CPUs."""
    if execution.address == "local" and not execution.use_gpu and execution.unit is None:
        return GIB
    return execution.unit or ("GPU" if execution.use_gpu else "CPU")


def reserved(execution: Execution, num: float) -> dict[str, float]:
    """Return `num` units as a request to Ray. On one machine's CPUs nothing is requested: memory is counted by safecl."""
    scarce = unit(execution)
    return {} if scarce == GIB else {scarce: num}


def capacity(execution: Execution, have: Mapping[str, float], free_gib: float) -> Capacity:
    """Return what trainers and engines may hold.

    Args:
        have: Ray's resources by name, those that autoscaling may bring included.
        free_gib: GiB of free memory on this machine; read only where memory is the scarce resource.
    """
    scarce = unit(execution)
    if scarce == GIB:
        trainer, engine = execution.num_workers * GIB_PER_WORKER, GIB_PER_ENGINE
        num_trainers = min(int(have.get("CPU", 1)) // execution.num_workers, execution.num_trials_at_once)
        memory = free_gib - execution.num_trials_at_once * GIB_PER_TRIAL
        return Capacity(scarce, max(memory, trainer, engine), trainer, engine, max(1, num_trainers))
    size = execution.num_workers * execution.worker_units
    return Capacity(scarce, have.get(scarce, 0.0), size, execution.engine_units, execution.num_trials_at_once)


def free_gib() -> float:
    """Return how many GiB of this machine's memory programs may still take."""
    import psutil

    return float(psutil.virtual_memory().available) / 2**30


def free_units(resource: str) -> list[float]:
    """Return how many units of a resource each node of the joined Ray cluster has free, by Ray's view of a moment ago."""
    from ray._private.state import available_resources_per_node

    return [float(free.get(resource, 0.0)) for free in available_resources_per_node().values()]


class Found(NamedTuple):
    """How much a cluster has of one resource.

    Attributes:
        have: units on all nodes now.
        largest: units on the largest node now.
        may, may_node: `have` and `largest` with what autoscaling may bring.
        said: the source of `may`, in words; empty if no source says what autoscaling may bring.
    """

    have: float
    largest: float
    may: float
    may_node: float
    said: str


def find(execution: Execution, resource: str) -> Found:
    """Ask the Ray cluster that this process is connected to how much it has of a resource."""
    import ray

    nodes = [float(node["Resources"].get(resource, 0.0)) for node in ray.nodes() if node["Alive"]]
    have, largest = sum(nodes), max(nodes, default=0.0)
    if execution.address == "local":
        return Found(have, largest, have, largest, "")
    if execution.may_bring is not None:
        more = float(execution.may_bring)
        return Found(have, largest, have + more, max(largest, more), "execution.may_bring")
    for kinds, said in ((_reported(resource), "the cluster"), (_written(resource), "the autoscaler's config")):
        if kinds:
            total = sum(each * count for each, count in kinds)
            return Found(have, largest, max(have, total), max(largest, *(each for each, _ in kinds)), said)
    return Found(have, largest, have, largest, "")


def _reported(resource: str) -> list[tuple[float, float]]:
    """(units of one node, largest number of nodes) for each type of node, if the platform has told Ray; else empty."""
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = [] if config is None else config.node_group_configs
    found = [(float(group.resources.get(resource, 0)), float(group.max_count)) for group in groups]
    return [(each, math.inf if count < 0 else count) for each, count in found if each > 0 and count != 0]


def _written(resource: str) -> list[tuple[float, float]]:
    """As `_reported`, from the file with which this machine's autoscaler was started (`ray up` writes it on the head)."""
    import yaml

    for path in _config_files():
        try:
            config: Any = yaml.safe_load(path.read_text())
            return node_types(config, resource)
        except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
            continue
    return []


def node_types(config: Mapping[str, Any], resource: str) -> list[tuple[float, float]]:
    """Return (units of one node, largest number of nodes) for each type of node in a config of Ray's cluster launcher."""
    most = float(config.get("max_workers", 2))
    found = []
    for name, kind in config.get("available_node_types", {}).items():
        each = float((kind.get("resources") or {}).get(resource, 0))
        count = 1.0 if name == config.get("head_node_type") else min(most, float(kind.get("max_workers", most)))
        if each > 0 and count > 0:
            found.append((each, count))
    return found


def _config_files() -> list[Path]:
    import psutil

    found = [Path.home() / "ray_bootstrap_config.yaml"]
    for process in psutil.process_iter(["cmdline"]):
        for word in process.info["cmdline"] or ():
            if word.startswith("--autoscaling-config="):
                found.append(Path(shlex.split(word.partition("=")[2] or "''")[0]).expanduser())
    return [path for path in dict.fromkeys(found) if path.is_file()]


def lacking(execution: Execution, need: int | None = None) -> str:
    """Return what this cluster lacks, in words, if autoscaling can never bring it; else "".

    Args:
        need: how many units must be there at once. None: enough for one trainer or one engine, since these take turns.
    """
    held = capacity(execution, {}, 0.0)
    scarce = unit(execution)
    if scarce == GIB:  # on one machine's CPUs a rank takes a CPU, and an engine none
        scarce, trainer, engine = "CPU", float(execution.num_workers), 0.0
    else:
        trainer, engine = held.trainer, held.engine
    found = find(execution, scarce)
    least = max(trainer, engine) if need is None else float(need)
    why = f"execution.num_workers {execution.num_workers}, and an engine takes {engine:g}: they take turns"
    if need is not None:
        why = "asked for"
    more = f"it may bring {found.may - found.have:g} by autoscaling ({found.said})"
    if not found.said:
        more = "nothing says that autoscaling may bring more (if it does: execution.may_bring)"
    has = f"the cluster has {found.have:g}, {more}"
    if found.may < least:
        needs = f"a run needs {least:g} {scarce}s at once ({why})"
        return f"{needs}, {has}: lower that, or join a larger cluster with execution.address"
    if need is None and found.may_node < engine:
        return (
            f"an engine needs {engine:g} {scarce}s on one node (execution.engine_units), the largest node has {found.largest:g}, "
            f"and {more}, {found.may_node:g} on one: lower that, or join a cluster of larger nodes"
        )
    return ""
