"""What the Broker adds to stages that do nothing: python benchmarks/orchestration.py

1,000 stages that sleep one second, 50 at once, through the Broker (each is published in the store) against as many bare Ray
tasks of the same cluster, in turn. The goal: within 5 % of the tasks. `--quick` runs 100 stages of 0.2 s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import types
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


KIND = "metrics"  # the kind of a light stage: with its limit, and in the process where these run
module = types.ModuleType("safecl.stages.metrics")
module.run = _sleep  # type: ignore[attr-defined]
module.Nothing = type(  # type: ignore[attr-defined]
    "Nothing", (Kind,), {"__module__": module.__name__, "runs": "thread", "unit": "", "fixed_s": 1.0}
)
sys.modules["safecl.stages.metrics"] = module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=50)
    arguments = parser.parse_args()
    num, seconds = (100, 0.2) if arguments.quick else (1000, 1.0)
    at_once = arguments.at_once
    import ray

    from safecl import execute
    from safecl.config import Execution
    from safecl.store import Store

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ray.init(address="local", num_cpus=at_once // 2, resources={"slot": at_once}, log_to_driver=False)
        sleep = ray.remote(num_cpus=0, resources={"slot": 1})(bare)

        def tasks() -> float:
            began = time.monotonic()
            ray.get([sleep.remote(seconds) for _ in range(num)])
            return time.monotonic() - began

        def stages() -> float:
            root = folder / str(time.time_ns())
            broker = execute.broker(Store(str(root)), Execution(root=str(root)), root / "logs")
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
        ray.shutdown()
    ideal = num * seconds / at_once
    print(f"{num} stages of {seconds} s, {at_once} at once: {ideal:g} s at least")
    for name, found in numbers.items():
        print(f"  {name:20}{found['median']:8.2f} s   {found['ratio']:.3f} of bare tasks")
    rows = {name: {"seconds": found["median"], "over bare tasks": found["ratio"]} for name, found in numbers.items()}
    print(f"written: {_bench.write('orchestration', {f'{num} stages of {seconds} s, {at_once} at once': rows})}")


if __name__ == "__main__":
    main()
