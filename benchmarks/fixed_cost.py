"""What a finetune costs beside its steps, and an engine beside its answers: python benchmarks/fixed_cost.py

Starts safecl's own local cluster on a tiny random model, runs finetunes through the Broker one after the other (the first
is cold), by PyTorch alone and by DeepSpeed, then a long one, then waiting Tune trials, then boots an engine twice, and
prints where time, CPU and memory go. PSS: resident memory, a page that n processes share counted as 1/n. About three minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import _boot
import psutil
import yaml

sys.path.insert(0, os.getcwd())  # the tests' tiny model

os.environ.setdefault("DS_ACCELERATOR", "cpu")
CONTROL = ("gcs_server", "raylet", "dashboard", "agent", "monitor", "controller", "cleaner", "stateactor", "env")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-warm", type=int, default=4, help="finetunes after the first")
    parser.add_argument("--idle-s", type=float, default=15.0, help="how long idle processes are watched")
    parser.add_argument("--name", default="fixed_cost", help="of the file in results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(Path(folder), arguments.num_warm, arguments.idle_s)
    print(f"written: {_bench.write(arguments.name, numbers)}")


def measure(folder: Path, num_warm: int, idle_s: float) -> dict[str, Any]:
    import ray

    from safecl import cluster, execute
    from safecl.config import Execution
    from safecl.store import Store

    model, rows = inputs(folder)
    execution = Execution(root=str(folder / "root"), engine="torch")
    store = Store(str(folder / "root"))
    began, cpu = time.time(), cpu_s()
    cluster.start(execution, folder / "logs")
    broker = execute.broker(store, execution, folder / "logs")
    ray.get(broker.ensure.remote([model, rows]))
    numbers: dict[str, Any] = {"cluster and data": {"wall_s": time.time() - began, "cpu_s": cpu_s() - cpu}}
    before = processes()
    numbers["finetunes"] = first_steps("torch", broker, store, model, rows, num_warm)
    deep = execution.model_copy(update={"root": str(folder / "deep"), "engine": "deepspeed"})
    other = execute.broker(Store(deep.root), deep, folder / "logs")
    ray.get(other.ensure.remote([model, rows]))
    numbers["finetunes"] += first_steps("deepspeed", other, Store(deep.root), model, rows, num_warm)
    ray.kill(other)
    while sum("TrainWorker" in name for name, _ in processes().values()) > 1:
        time.sleep(0.1)

    # A finetune under way: what runs beside its worker.
    long = broker.ensure.remote([finetune(model, rows, 99, epochs=60.0 * idle_s / 15)])
    time.sleep(3)
    numbers["processes of a running finetune"] = shown = {
        name: round(pss) for pid, (name, pss) in processes().items() if pid not in before
    }
    print(f"processes of a running finetune: {len(shown)}, MiB PSS {sum(shown.values())}: {shown}")
    numbers["control plane, running"] = share(min(idle_s, 10.0))
    ray.get(long)
    numbers["control plane, idle"] = share(idle_s)
    numbers["waiting trial"] = waiting_trials(folder, model)
    numbers["an engine's boot"] = booted = list(_boot.boots(folder, folder / "model", adapters(folder), cpu_s))
    for name in booted[0]:
        print(
            f"  {name:28}" + "".join(f"{one[name]:>9.9}" if name == "boot" else f"{one[name]:9.2f}" for one in booted)
        )
    cluster.stop(execution, "")
    return numbers


def inputs(folder: Path) -> tuple[Any, Any]:
    """A model stage and a rows stage."""
    from safecl import tasks
    from safecl.stages import data
    from safecl.stages import model as models
    from safecl.store import Stage
    from tests.conftest import build_model, build_tokenizer

    (folder / "model").mkdir()
    build_tokenizer(folder / "model")
    build_model(folder / "model")
    part = {"task": "mini", "split": "user", "num_rows": 40, "source": {"generated": tasks.load("mini").VERSION}}
    config: Any = {"role": "user", "parts": [part], "poison": None, "guard": None, "seed": 0}
    source: Any = {"source": {"local": "tiny"}, "dtype": "float32"}
    model = Stage("model", source, {}, models.VERSION, {"path": str(folder / "model")})
    return model, Stage("data", config, {}, data.VERSION)


def adapters(folder: Path) -> list[Path]:
    from tests.serving.adapters import make_adapter

    return [make_adapter(folder / "model", folder / f"adapter-{seed}", seed) for seed in (0, 1)]


def first_steps(engine: str, broker: Any, store: Any, model: Any, rows: Any, num_warm: int) -> list[dict[str, Any]]:
    """One cold finetune and so many warm ones: each by part."""
    found = [first_step(broker, store, finetune(model, rows, seed)) for seed in range(1 + num_warm)]
    print(f"{engine}, ready to first step, s".ljust(36) + f"{'cold':>8}{'warm':>8}   (median of {num_warm})")
    for name in found[0]:
        print(f"  {name:34}{found[0][name]:8.2f}{median(one[name] for one in found[1:]):8.2f}")
    return [{"engine": engine, "start": "warm" if number else "cold", **one} for number, one in enumerate(found)]


def finetune(model: Any, rows: Any, seed: int, epochs: float = 2.0) -> Any:
    from safecl.stages import finetune as stage
    from safecl.store import Stage
    from safecl.testing import world as contract

    config = contract.config("sft")
    config["training"] |= {"epochs": epochs, "max_tokens": 1500}
    return Stage("finetune", {**config, "seed": seed}, {"model": model, "rows": rows}, stage.VERSION)


def first_step(broker: Any, store: Any, stage: Any) -> dict[str, float]:
    """Seconds, and CPU seconds of all processes, from a finetune that could run to its first step, and by part."""
    import ray

    known, ready, cpu = set(processes()), time.time(), cpu_s()
    curves = store.local / "scratch" / stage.key / "curves.jsonl"
    done = broker.ensure.remote([stage])
    while not (curves.exists() and curves.stat().st_size):
        if ray.wait([done], timeout=0.01)[0]:
            ray.get(done)
            break
    wall, cpu = time.time() - ready, cpu_s() - cpu
    born = [psutil.Process(pid).create_time() - ready for pid in set(processes()) - known if psutil.pid_exists(pid)]
    ray.get(done)
    result = store.record(stage)["result"]
    starts, step = max([0.0, *born]), result["train_s"] / result["steps"]
    return {
        "process starts": starts,
        "imports, hand-over": max(0.0, wall - starts - result["setup_s"] - step),
        "load, encode, set up": result["setup_s"],
        "first step": step,
        "wall": wall,
        "cpu of all processes": cpu,
        "processes started": len(set(processes()) - known),
        # A curve as short as these is written at its end.
        "first step to published": max(0.0, time.time() - ready - wall - result["train_s"]),
    }


def share(seconds: float) -> dict[str, float]:
    """CPU seconds per wall second of every process of the control plane."""
    before, began = cpu_by_process(), time.monotonic()
    time.sleep(seconds)
    wall = time.monotonic() - began
    found: dict[str, float] = defaultdict(float)
    for pid, (name, cpu) in cpu_by_process().items():
        if any(word in name.lower() for word in CONTROL) or name.startswith(("ray::Broker", "ray::Hand")):
            found[name] += (cpu - before.get(pid, (name, cpu))[1]) / wall
    print(f"control plane, CPU seconds a second: {sum(found.values()):.3f}")
    for name, used in sorted(found.items(), key=lambda item: -item[1]):
        print(f"  {name:40}{used:8.4f}")
    return dict(found)


def waiting_trials(folder: Path, model: Any) -> dict[str, Any]:
    """Tune trials whose stages never come: processes and PSS of each."""
    import ray

    from safecl import project, tune, upkeep
    from tests.test_end_to_end import sweep

    class Waits:
        def __init__(self) -> None:
            import asyncio

            self.over = asyncio.Event()

        async def ensure(self, stages: Any, claim: Any) -> None:
            await self.over.wait()
            raise RuntimeError("nobody makes these stages")

        async def release(self) -> None:
            self.over.set()

    config = sweep(Path(model.hints["path"]), folder / "waiting", "http://127.0.0.1:9/v1")
    config["execution"] |= {"num_trials_at_once": 3}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    opened = project.Project(project.load(folder / "sweep.yaml", []))
    upkeep.check_writable(opened.store, needed_gib=0.1)
    schedule = opened.schedule()
    before = {
        pid for pid, (name, _) in processes().items() if not name.startswith("ray::IDLE")
    }  # these are taken first
    broker = ray.remote(num_cpus=0)(Waits).remote()
    search_s = time.time()
    thread = threading.Thread(target=tune.run, args=(schedule, broker, folder / "tune", 3), daemon=True)
    thread.start()

    def new() -> dict[int, tuple[str, float]]:
        others = ("ray::IDLE", "ray::Waits")
        return {
            pid: (name, pss)
            for pid, (name, pss) in processes().items()
            if pid not in before and name.startswith("ray::") and not name.startswith(others)
        }

    while len(new()) < 3 and time.time() - search_s < 40:
        time.sleep(0.5)
    time.sleep(3)
    trials, names = [round(pss) for _, pss in new().values()], sorted({name for name, _ in new().values()})
    ray.get(broker.release.remote())
    thread.join(60)
    print(f"waiting trials: {len(trials)} processes of 3 trials, MiB PSS each {trials}")
    return {"processes a trial": len(trials) / 3, "pss_mib": trials, "names": names}


# -- processes ---------------------------------------------------------------------------------------------------------

_seen: dict[int, float] = {}  # CPU seconds of processes, the ended ones included


def _tree() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


def _name(process: psutil.Process) -> str:
    command = process.cmdline()
    if command and command[0].startswith("ray"):
        return command[0].split(".")[-1] if command[0].startswith("ray::_") else command[0]
    scripts = [Path(part).name for part in command if part.endswith(".py")]
    return scripts[0] if scripts else Path(command[0]).name if command else str(process.pid)


def processes() -> dict[int, tuple[str, float]]:
    """pid -> (name, PSS in MiB) of what this process started."""
    found = {}
    for process in _tree():
        try:
            found[process.pid] = (_name(process), process.memory_full_info().pss / 2**20)
        except psutil.Error:
            continue
    return found


def cpu_by_process() -> dict[int, tuple[str, float]]:
    found = {}
    for process in _tree():
        try:
            times = process.cpu_times()
            found[process.pid] = (_name(process), times.user + times.system)
        except psutil.Error:
            continue
    return found


def cpu_s() -> float:
    """CPU seconds so far of this process and all that it started and that was seen."""
    for process in [psutil.Process(), *_tree()]:
        try:
            times = process.cpu_times()
            _seen[process.pid] = times.user + times.system
        except psutil.Error:
            continue
    return sum(_seen.values())


if __name__ == "__main__":
    main()
