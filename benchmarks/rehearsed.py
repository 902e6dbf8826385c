"""How well `plan --cluster` foretells a run: stages that sleep, on one to four emulated nodes of a trainer each.

    python benchmarks/rehearsed.py [--nodes 1 2 3 4]

A grid of 18 rows: one stage that all wait for (4 s), then for each row a stage on a trainer (3 to 8 s) and a light one (1 s).
It is simulated with the seconds that it sleeps, and run by a real Broker, real trainers (Ray Train) and a real store; the time
counts from when the trainers are up, since here all nodes start theirs on the same few cores. No engine takes part.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import _bench

from safecl.order import Claim
from safecl.stages import Kind
from safecl.store import Context, Stage

HEAVY, LIGHT_KIND = (
    "memory",
    "metrics",
)  # in place of which kinds these sleep: on a trainer, and in the process of light ones
ROWS = [3.0 + 5.0 * number / 17 for number in range(18)]
FIRST_S, LAST_S = 4.0, 1.0
UP_S = 300.0  # in which all trainers are up


class Sleeps(Stage):
    """A stage that sleeps `config["seconds"]`. Importing this file, as unpickling one does, provides its kinds."""


def _sleep(context: Context) -> dict[str, Any]:
    config: Any = context.stage.config
    if meet := config.get("meet"):  # every trainer has one of these, and waits for the others'
        folder = Path(meet)
        (folder / context.stage.key).touch()
        deadline = time.monotonic() + UP_S
        while len(list(folder.iterdir())) < config["num"] and time.monotonic() < deadline:
            time.sleep(0.1)
    time.sleep(float(config["seconds"]))
    return {}


for _kind, _runs in ((HEAVY, "trainer"), (LIGHT_KIND, "thread")):
    _module = types.ModuleType(f"safecl.stages.{_kind}")
    _module.run = _sleep  # type: ignore[attr-defined]
    _module.Own = type(  # type: ignore[attr-defined]
        "Own", (Kind,), {"__module__": _module.__name__, "runs": _runs, "unit": "", "fixed_s": 1.0}
    )
    sys.modules[_module.__name__] = _module


def simulated(num_nodes: int) -> float:
    from safecl.simulate import simulate
    from safecl.workload import LIGHT, TRAINERS, Cell, Grid, Group, Node

    grid = Grid([Group("trainers", "training", 1.0, num_nodes, 0.0), Group("light", "light", 0.0, 64, 0.0)])
    first = grid.add(TRAINERS, FIRST_S, ())
    for seconds in ROWS:
        row = grid.add(TRAINERS, seconds, (first,))
        last = grid.add(LIGHT, LAST_S, (row,))
        grid.cells.append(Cell([[(last,)]]))
    return simulate(grid, [Node("node", 1)] * num_nodes, len(ROWS)).makespan_s


def real(folder: Path, num_nodes: int) -> float:
    import ray
    from rehearsed import Sleeps as stage  # under the name by which other processes import it

    from safecl import execute
    from safecl.config import Execution
    from safecl.store import Store
    from tests.cluster import nodes

    meet = folder / f"meet-{num_nodes}"
    meet.mkdir()
    each: list[dict[str, Any]] = [{"num_cpus": 2, "resources": {"slot": 1}} for _ in range(num_nodes)]
    with nodes(folder / f"cluster-{num_nodes}", *each) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        chosen = Execution(
            root=str(folder / f"root-{num_nodes}"), address=cluster.address, unit="slot", num_trials_at_once=num_nodes
        )
        store = Store(chosen.root)
        broker = execute.broker(store, chosen, store.logs, lambda stage: float(stage.config["seconds"]))
        up = [
            stage(HEAVY, {"seconds": 0.0, "number": number, "meet": str(meet), "num": num_nodes})
            for number in range(num_nodes)
        ]
        light = stage(LIGHT_KIND, {"seconds": 0.0, "number": -1})  # starts their process
        ray.get(broker.ensure.remote([*up, light]))
        first = stage(HEAVY, {"seconds": FIRST_S, "number": -1})
        rows = [
            stage(LIGHT_KIND, {"seconds": LAST_S, "number": number},
                  {"row": stage(HEAVY, {"seconds": seconds, "number": 100 + number}, {"first": first})})
            for number, seconds in enumerate(ROWS)
        ]  # fmt: skip
        began = time.monotonic()
        ray.get([broker.ensure.remote([row], Claim(rank=1)) for row in rows])
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3, 4])
    file = _bench.RESULTS / "rehearsed.json"
    title = f"{2 * len(ROWS) + 1} sleeping stages"
    known = json.loads(file.read_text())["numbers"][title] if file.exists() else []
    rows = {row["nodes"]: row for row in known}  # those of other numbers of nodes stay
    for num in parser.parse_args().nodes:
        with tempfile.TemporaryDirectory() as folder:
            foretold, took = simulated(num), real(Path(folder), num)
        rows[num] = {"nodes": num, "simulated s": round(foretold, 2), "real s": round(took, 2),
                     "simulated / real": round(foretold / took, 3)}  # fmt: skip
        print(rows[num], flush=True)
        _bench.write("rehearsed", {title: [rows[num] for num in sorted(rows)]})


if __name__ == "__main__":
    main()
