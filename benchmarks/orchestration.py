"""What the Broker adds to stages that do nothing: python benchmarks/orchestration.py

1,000 stages that sleep one second, 50 at once, through the Broker (each is published in the store) against as many bare Ray
tasks of the same cluster, in turn. The goal: within 5 % of the tasks. `--quick` runs 100 stages of 0.2 s; `--nodes 4`: on a
cluster of four raylets of this machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _bench

from safecl.stages import Kind
from safecl.store import Context, Stage


class Nothing(Stage):
    """A stage that sleeps `config["seconds"]`. Importing this file, as unpickling one does, provides its kind."""


def bare(seconds: float) -> None:
    time.sleep(seconds)


def _sleep(context: Context) -> dict[str, Any]:
    time.sleep(float(str(context.stage.config["seconds"])))
    return {}


# Of Ray: niceness as in a run (cluster.py).
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
KIND = "metrics"  # the kind of a light stage: with its limit, and in the process where these run
module = types.ModuleType("safecl.stages.metrics")
module.run = _sleep  # type: ignore[attr-defined]
module.Nothing = type(  # type: ignore[attr-defined]
    "Nothing", (Kind,), {"__module__": module.__name__, "runs": "thread", "unit": "", "fixed_s": 1.0}
)
sys.modules["safecl.stages.metrics"] = module


@contextmanager
def cluster(folder: Path, num_nodes: int, at_once: int) -> Iterator[str]:
    """Ray with so many slots, a CPU for every two of them, on this machine as one node or as several; what
    `execution.address` is to it."""
    import ray

    os.environ.update(ENVIRONMENT)
    if num_nodes == 1:
        ray.init(address="local", num_cpus=at_once // 2, resources={"slot": at_once}, log_to_driver=False)
        try:
            yield "local"
        finally:
            ray.shutdown()
        return
    from tests.cluster import nodes  # raylets with folders of their own

    slots = [at_once // num_nodes + (number < at_once % num_nodes) for number in range(num_nodes)]
    each: list[dict[str, Any]] = [{"num_cpus": -(-num // 2), "resources": {"slot": num}} for num in slots]
    with nodes(folder / "cluster", *each) as found:
        ray.init(address=found.address, log_to_driver=False)
        yield found.address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=1)
    arguments = parser.parse_args()
    num, seconds = (100, 0.2) if arguments.quick else (1000, 1.0)
    at_once, num_nodes = arguments.at_once, arguments.nodes
    import ray

    from safecl import execute
    from safecl.config import Execution
    from safecl.store import Store

    with tempfile.TemporaryDirectory() as name, cluster(Path(name), num_nodes, at_once) as address:
        folder = Path(name)
        sleep = ray.remote(num_cpus=0, resources={"slot": 1})(bare)

        def tasks() -> float:
            began = time.monotonic()
            ray.get([sleep.remote(seconds) for _ in range(num)])
            return time.monotonic() - began

        def stages() -> float:
            root = folder / str(time.time_ns())
            broker = execute.broker(Store(str(root)), Execution(root=str(root), address=address), root / "logs")
            ray.get(
                broker.ensure.remote([stage(KIND, {"seconds": 0.0, "number": -1})])
            )  # starts its process, as for tasks
            began = time.monotonic()
            ray.get(broker.ensure.remote([stage(KIND, {"seconds": seconds, "number": i}) for i in range(num)]))
            took = time.monotonic() - began
            assert len(list((root / "store" / KIND).glob("*/record.json"))) == num + 1
            ray.kill(broker)
            return took

        from orchestration import Nothing as stage  # under the name by which other processes import it

        tasks()  # starts the processes that the tasks then reuse
        numbers = _bench.interleaved({"bare Ray tasks": tasks, "through the Broker": stages}, arguments.repeats)
    ideal = num * seconds / at_once
    where = f"{at_once} at once" + (f", on {num_nodes} emulated nodes" if num_nodes > 1 else "")
    print(f"{num} stages of {seconds} s, {where}: {ideal:g} s at least")
    for name, found in numbers.items():
        print(f"  {name:20}{found['median']:8.2f} s   {found['ratio']:.3f} of bare tasks")
    rows = {name: {"seconds": found["median"], "over bare tasks": found["ratio"]} for name, found in numbers.items()}
    file = "orchestration" + (f"_{num_nodes}_nodes" if num_nodes > 1 else "")
    print(f"written: {_bench.write(file, {f'{num} stages of {seconds} s, {where}': rows})}")


if __name__ == "__main__":
    main()
