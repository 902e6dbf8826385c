"""How long `plan --cluster` takes: the full grid, and 10,000 rows, on 1,000 spot GPUs that are taken away now and then.

    python benchmarks/simulate.py [--rounds 3]

Counted apart: opening the sweep (which checks it), its graph as arrays (stages, keys, estimates), the least that any schedule
takes, and one simulation. Seconds of CPU, the median of the rounds; `all` is their sum. Nothing is read from a hub.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from _bench import write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from safecl import clusterfile, methods, rehearse  # noqa: E402
from safecl.project import Project, load  # noqa: E402
from safecl.simulate import simulate  # noqa: E402
from safecl.workload import Bounds  # noqa: E402

PAPER = ROOT / "sweeps" / "paper" / "paper.yaml"
SPOT = ROOT / "deploy" / "spot_1000.yaml"
FIXED = ("execution.num_trials_at_once=100000", "execution.num_candidate_engines=64", "execution.num_judge_replicas=64")
T = TypeVar("T")


def grid(root: Path, num_rows: int | None) -> Project:
    """The paper's grid with every method, four poison ratios and five seeds; or so many rows of it, of one seed, by as many
    ratios as that takes."""
    names = methods.names()
    seeds, ratios = "[0, 1, 2, 3, 4]", [0.0, 0.1, 0.2, 0.3]
    if num_rows is not None:
        each = 9 * len(names)
        ratios = [round(i * 0.5 / (num_rows // each + 1), 5) for i in range(num_rows // each + 1)]
        seeds = "[0]"
    settings = [f"methods=[{', '.join(names)}]", "only=[]", f"seeds={seeds}", f"poison.ratios={ratios}"]
    return Project(load(PAPER, [*settings, *FIXED, f"execution.root={root}"]), planned=True)


def timed(make: Callable[[], T], into: dict[str, float], name: str) -> T:
    gc.collect()
    began = time.process_time()
    made = make()
    into[name] = time.process_time() - began
    return made


def once(root: Path, num_rows: int | None) -> tuple[dict[str, float], dict[str, Any]]:
    cluster, took = clusterfile.load(SPOT), dict[str, float]()
    project = timed(lambda: grid(root, num_rows), took, "open the sweep")
    made = timed(lambda: rehearse.rehearsal(project, cluster), took, "its graph as arrays")
    bounds = timed(lambda: Bounds(made.grid), took, "the least")
    made.grid.groups[0] = made.grid.groups[0]._replace(at_most=cluster.num_gpus)
    nodes = rehearse.nodes(cluster, True)
    found = timed(lambda: simulate(made.grid, nodes, 100_000, bounds=bounds), took, "one simulation")
    told = {
        "rows": len(made.grid.cells),
        "trials": made.num_trials,
        "stages": len(made.grid.seconds),
        "hours simulated": round(found.makespan_s / 3600, 2),
        "over the least": round(found.ratio, 3),
        "nodes taken away": found.num_preempted,
    }
    return took, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    gc.set_threshold(50_000, 10, 10)  # as cli.main
    rows = []
    for name, num_rows in (("the full grid", None), ("10,000 rows", 10_000)):
        with tempfile.TemporaryDirectory() as folder:
            rounds = [once(Path(folder), num_rows) for _ in range(chosen.rounds)]
        took = {part: statistics.median(each[part] for each, _ in rounds) for part in rounds[0][0]}
        rows.append({"grid": name, **rounds[0][1], **{f"{part}: CPU s": round(s, 2) for part, s in took.items()},
                     "all: CPU s": round(sum(took.values()), 2)})  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(write("simulate", {"1,000 spot GPUs": rows}))


if __name__ == "__main__":
    main()
