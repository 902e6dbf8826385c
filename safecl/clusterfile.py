"""Read the description of a cluster for `plan --cluster`: a small YAML file of node types, or a Ray cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError, model_validator

from safecl.base import ConfigError, Strict, strictly
from safecl.sweepfile import explained, read_yaml

Positive = Annotated[float, Field(gt=0)]
NotBelow = Annotated[float, Field(ge=0)]

SPOT_PER_H = 0.02  # preemptions an hour assumed for a spot node of a Ray cluster file, which does not state them


class NodeType(Strict):
    """`count` equal nodes.

    The speed of one GPU (of one CPU thread, on nodes without GPUs) is given in one of two ways. `tflops` is what it reaches
    in the matrix products of a finetune, in TFLOP/s (about half of a data sheet's number). `speed` is a multiple of the
    device that made the records of this store. `price_per_h` is of one node. `boot_s` is in seconds.
    """

    name: str
    count: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Annotated[int, Field(ge=1)] = 8
    gpu_memory_gib: Positive | None = None
    tflops: Positive | None = None
    speed: Positive = 1.0
    price_per_h: NotBelow = 0.0
    preemptions_per_h: NotBelow = 0.0  # how often a spot node is taken away, on average
    boot_s: NotBelow = 180.0  # seconds until a new node has taken its place


class Cluster(Strict):
    """A cluster of nodes. `storage_gib_per_s`: GiB/s at which a node reads files that other nodes wrote."""

    name: str = ""
    nodes: Annotated[tuple[NodeType, ...], Field(min_length=1)]
    storage_gib_per_s: Positive = 1.0
    storage_price_per_gib_month: NotBelow = 0.0

    @model_validator(mode="after")
    def _all_speeds_are_told_in_one_way(self) -> Cluster:
        if len({node.tflops is None for node in self.nodes}) > 1:
            raise ValueError("nodes: give all of them `tflops`, or none")
        return self

    @property
    def num_gpus(self) -> int:
        """Number of GPUs on all nodes."""
        return sum(node.count * node.gpus for node in self.nodes)

    def units(self, use_gpu: bool) -> int:
        """Return the number of GPUs, or without `use_gpu` of CPUs, on all nodes."""
        return self.num_gpus if use_gpu else sum(node.count * node.cpus for node in self.nodes)


class Instance(NamedTuple):
    """A cloud's node type: GiB of one GPU's memory, TFLOP/s of one GPU in a finetune, and the on-demand list price of an hour."""

    gpu_memory_gib: float
    tflops: float
    price_per_h: float


# AWS, us-east-1, list prices of 2025, in US dollars: for the Ray cluster file that comes with safecl. Describe other node
# types in a file of node types.
INSTANCES = {
    "g5.xlarge": Instance(24, 35, 1.006),
    "g5.2xlarge": Instance(24, 35, 1.212),
    "g5.12xlarge": Instance(24, 35, 5.672),
    "g5.48xlarge": Instance(24, 35, 16.288),
    "g6.xlarge": Instance(24, 50, 0.805),
    "g6.2xlarge": Instance(24, 50, 0.978),
    "g6.12xlarge": Instance(24, 50, 4.602),
    "g6e.xlarge": Instance(48, 150, 1.861),
    "g6e.2xlarge": Instance(48, 150, 2.242),
    "g6e.12xlarge": Instance(48, 150, 10.493),
    "g6e.48xlarge": Instance(48, 150, 30.131),
    "p4d.24xlarge": Instance(40, 150, 21.958),
    "p4de.24xlarge": Instance(80, 150, 27.447),
    "p5.48xlarge": Instance(80, 400, 55.04),
}


def load(path: Path) -> Cluster:
    """Read a cluster from a file. Raises ConfigError, which lists every error."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with `nodes` (docs/cluster.md), or a Ray cluster file")
    try:
        return _of_ray(raw, path) if "available_node_types" in raw else strictly(Cluster, raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explained(error, raw, Cluster))) from None


def _of_ray(raw: dict[str, Any], path: Path) -> Cluster:
    """The largest cluster that a Ray cluster file allows: each worker type with GPUs at its largest number, in the order of
    the file, until `max_workers` is reached."""
    left = int(raw.get("max_workers", 2**31))
    nodes = []
    for name, kind in raw["available_node_types"].items():
        has, config = kind.get("resources", {}), kind.get("node_config", {})
        count = min(left, int(kind.get("max_workers", kind.get("min_workers", 0))))
        if name == raw.get("head_node_type") or not count or not has.get("GPU"):
            continue
        left -= count
        known = INSTANCES.get(str(config.get("InstanceType", "")))
        spot = "InstanceMarketOptions" in config
        nodes.append(
            NodeType(
                name=str(config.get("InstanceType", name)),
                count=count,
                gpus=int(has["GPU"]),
                cpus=int(has.get("CPU", 8)),
                gpu_memory_gib=known and known.gpu_memory_gib,
                tflops=known and known.tflops,
                price_per_h=known.price_per_h if known else 0.0,
                preemptions_per_h=SPOT_PER_H if spot else 0.0,
            )
        )
    if not nodes:
        raise ConfigError(f"{path}: none of available_node_types may bring a worker with GPUs (max_workers, resources)")
    return Cluster(name=str(raw.get("cluster_name", path.stem)), nodes=tuple(nodes))
