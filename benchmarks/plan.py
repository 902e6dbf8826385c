"""What the driver costs: commands that only read, `plan` of 1,000 and 10,000 trials, and a tick of the progress display.

    python benchmarks/plan.py [--rounds 3] [--trials 10000]

Commands are processes of their own: CPU time (theirs and their children's), wall time and peak memory, in turn with an
alternative that does the least that such a command could do. A tick is measured at 1,000 open trials against deriving
their stages anew, which is what a tick once did. Sweeps and stores are made up in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from _bench import interleaved, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from safecl import methods  # noqa: E402
from safecl.eta import EVERY_S, Eta  # noqa: E402
from safecl.grid import cells  # noqa: E402
from safecl.project import Project, load  # noqa: E402
from tests.made_up import finish  # noqa: E402

QUICKSTART = ROOT / "sweeps" / "quickstart.yaml"
METHODS = ("sft", "replay", "safeinstr", "der", "agem", "lwf", "ewc", "lisa", "magmax", "interpolate")
SEEDS = 10
HOLD: dict[str, dict[str, float]] = {}  # of the last process of each name: cpu_s, wall_s, peak_mib


def sweep_file(folder: Path, num_trials: int) -> Path:
    """A sweep of `num_trials` trials: ten methods, ten seeds, as many poison ratios as it takes."""
    raw: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
    fixed = {"ewc": {"num_rows": 100}, "lisa": {"cycles": 3}}
    ratios = num_trials // (len(METHODS) * SEEDS)
    memory = {name: {"memory_size": 20} for name in METHODS if "memory_size" in methods.load(name).Config.model_fields}
    raw["methods"] = [{"name": name, "config": memory.get(name, {}) | fixed.get(name, {})} for name in METHODS]
    raw["seeds"] = list(range(SEEDS))
    raw["poison"]["ratios"] = [round(i / (2 * ratios), 6) for i in range(ratios)]
    raw["execution"]["root"] = str(folder / f"root-{num_trials}")
    file = folder / f"{num_trials}.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def process(name: str, arguments: Sequence[str]) -> float:
    """CPU seconds of a process and its children; wall time and peak memory go to HOLD."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments], env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{name}: exit code {child.returncode}")
    cpu_s = usage.ru_utime + usage.ru_stime
    HOLD.setdefault(name, {})
    for key, value in (("cpu_s", cpu_s), ("wall_s", time.perf_counter() - began), ("peak_mib", usage.ru_maxrss / 1024)):
        HOLD[name][key] = min(HOLD[name].get(key, value), value) if key != "peak_mib" else value
    return cpu_s


def commands(folder: Path, rounds: int, num_trials: int) -> list[dict[str, Any]]:
    file = folder / "finished.yaml"
    raw = yaml.safe_load(QUICKSTART.read_text())
    for method in raw["methods"]:
        method.pop("search", None)
    raw["evaluate"]["judges"] = {
        "asr": "keywords"
    }  # the made-up store holds no verdicts that a guard's quality is read from
    raw["execution"]["root"] = str(folder / "finished")
    file.write_text(yaml.safe_dump(raw))
    finish(Project(load(file, [])))
    safecl = ("-m", "safecl.cli")
    process("first rerun", [*safecl, "run", str(file)])  # it tells MLflow what the made-up store holds
    few, many = (sweep_file(folder, num) for num in (num_trials // 10, num_trials))
    for each in (few, many):  # measures this machine's speed once, as the first run does
        Project(load(each, [])).store.local.mkdir(parents=True, exist_ok=True)
        Project(load(each, [])).forecast(keep=True)
    pairs = {
        "safecl --help": ([*safecl, "--help"], "import typer"),
        "safecl status": ([*safecl, "status", str(file)], "import typer, rich.table, pydantic, yaml"),
        "safecl run (all finished)": ([*safecl, "run", str(file)], "import mlflow"),
        f"safecl plan, {num_trials // 10:,} trials": ([*safecl, "plan", str(few), "--json"], "import torch"),
    }
    rows = []
    for name, (arguments, least) in pairs.items():
        alternative = f"python -c '{least}'"
        found = interleaved(
            {
                alternative: lambda name=alternative, least=least: process(name, ["-c", least]),
                name: lambda name=name, arguments=arguments: process(name, arguments),
            },
            rounds,
        )
        rows.append(row(name, found[name]["median"], alternative, found[name]["ratio"]))
    name, before = f"safecl plan, {num_trials:,} trials", f"safecl plan, {num_trials // 10:,} trials"
    found = interleaved(
        {
            before: lambda: process(before, [*safecl, "plan", str(few), "--json"]),
            name: lambda: process(name, [*safecl, "plan", str(many), "--json"]),
        },
        rounds,
    )
    rows.append(row(name, found[name]["median"], f"10 x {before}", found[name]["ratio"] / 10))
    return rows


def row(name: str, cpu_s: float, against: str, ratio: float) -> dict[str, Any]:
    held = HOLD[name]
    return {
        "command": name, "CPU s": round(cpu_s, 2), "wall s (best)": round(held["wall_s"], 2),
        "peak MiB": round(held["peak_mib"]), "against": against, "ratio": round(ratio, 2),
    }  # fmt: skip


def tick(folder: Path, rounds: int, num_open: int = 1000) -> dict[str, Any]:
    """CPU of a progress tick, where nothing was finished since the last and where something was."""
    project = Project(load(sweep_file(folder, num_open), []))
    schedule = project.schedule()
    eta = Eta(project.store, project.forecast(), 2, project.guard_stages())
    order = list({s.key: s for job in schedule.open_jobs() for s in job.evidence.metrics.walk()}.values())
    snapshot: dict[str, Any] = {"running": [], "finished": [], "failed": {}}
    at = 0.0

    def timed(changed: bool) -> float:
        nonlocal at
        stage = order[len(snapshot["finished"])]
        if changed:
            at += EVERY_S
            snapshot["finished"].append({"kind": stage.kind, "key": stage.key, "seconds": 1.0})
        snapshot["running"] = [{"kind": s.kind, "key": s.key, "start": at, "ends": None} for s in order[-3:]]
        began = time.process_time()
        state = eta.state(schedule, snapshot, at)
        assert state["eta_s"] > 0
        return time.process_time() - began

    def anew() -> float:
        began = time.process_time()
        for cell in cells(project.sweep, project.folder):
            for seed in project.sweep.seeds:
                assert cell.job({}, seed, "final").evidence.metrics.key
        return time.process_time() - began

    timed(False)
    quiet = [timed(False) for _ in range(20)]
    found = interleaved({"anew": anew, "tick": lambda: timed(True)}, max(3, rounds))
    return {
        "open trials": len(schedule.open_jobs()),
        "tick, nothing new: CPU ms": round(1000 * median(quiet), 2),
        f"tick, a stage was finished (at most every {EVERY_S:g} s): CPU ms": round(1000 * found["tick"]["median"], 1),
        "against": "deriving the stages of these trials anew",
        "its CPU ms": round(1000 * found["anew"]["median"]),
        "ratio": round(found["tick"]["ratio"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=10_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        numbers = {
            "commands": commands(Path(name), chosen.rounds, chosen.trials),
            "tick": tick(Path(name), chosen.rounds),
        }
    for line in numbers["commands"]:
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    print(numbers["tick"])
    print(write("plan", numbers))


if __name__ == "__main__":
    main()
