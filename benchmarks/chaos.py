"""Nothing is lost, whatever is killed: python benchmarks/chaos.py --folder FOLDER

A small real sweep (training, engines, search, tracking) runs again and again, each round in a new store, while random
processes of it are killed with -9, twelve soon one after the other and again twelve when it has recovered, the tracker stops
answering for a while, and the disk is full for a while. A round is over when the command has ended by itself; it is begun
again as a person would, by the same command.
After each round: the table is that of an undisturbed run, no finished stage was made again, and nothing is left of the
processes, leases, claims, half-written files, trials under way or runs under way.

Only processes that this program started are killed. It may be stopped and started: kills are counted over its runs, and the
figures are written once there are `--kills` of them. What is wrong ends it, with the store kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import _bench
import psutil
from _kept import Kept
from _outages import fill, is_full, mlflow_server, silence, small_disk

KINDS = {  # what is killed: how its command begins or what it holds, and how often it is chosen
    "driver": ("", 0.6),
    "raylet, with its object store": ("/raylet/raylet ", 0.4),
    "head's server (GCS)": ("/gcs/gcs_server ", 0.4),
    "training worker": ("ray::RayTrainWorker", 2.0),
    "training controller": ("ray::TrainController", 1.5),
    "Broker": ("ray::Broker", 1.0),
    "Serve replica": ("ray::ServeReplica", 1.5),
    "Serve controller": ("ray::ServeController", 1.0),
    "engine core": ("VLLM::EngineCore", 8.0),  # it is there half a minute after its replica, seldom within a burst
    "process of light stages": ("ray::Hand", 1.0),
    "trial": ("ray::ImplicitFunc", 1.0),
}
WORKING = {"training worker", "Serve replica", "engine core"}
NODE = "node"  # of a cluster of several: its raylet, and with it all that runs there
OF_THE_CLUSTER = {"raylet, with its object store", "head's server (GCS)", "Serve controller"}  # stay when a driver ends
BURST = 12  # so many kills come one soon after the other, unless --burst says another number
CALM = (
    0.1  # then none until a stage is finished, and for this share of an undisturbed run: else no round would ever end
)
WHILE_BOOTING_S = 8.0  # between kills of a burst while nothing is at work yet
FIRST_S = 20.0  # without a kill, after a round has begun or goes on
LIMIT_S = 3600.0  # of a round
ORPHAN_S = 45.0  # for so long may live what a driver that was killed has left: the next one ends it as it starts


def sweep(model: Path, root: str, tracker: str | None, address: str) -> dict[str, Any]:
    """Methods of every kind of stage, with a search, on a random model that trains in seconds."""
    training = {"batch_size": 4, "learning_rate": 0.02, "weight_decay": 0.0, "max_tokens": 400}
    rows = [{"task": "mini", "num_rows": 8}]
    prompts = {"attack": rows, "benign": rows, "utility_rows": 8}
    return {
        "name": "chaos",
        "models": [{"name": "tiny", "source": str(model), "dtype": "float32", "template": "chatml"}],
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "align": {"safety": [{"task": "mini", "num_rows": 60}], "epochs": 1, **training},
        "tasks": [{"task": "mini", "num_rows": 60, "epochs": 2, **training}],
        "poison": {"task": "mini", "ratios": [0.1]},
        "methods": [
            {"name": "sft"},
            {"name": "der", "config": {"memory_size": 8}, "search": {"weight": {"low": 0.1, "high": 9.0, "log": True}}},
            {"name": "ewc"},
            {"name": "magmax"},
        ],
        "seeds": [0],
        "evaluate": {
            "validation": prompts, "test": prompts, "max_new_tokens": 12, "max_prompt_tokens": 400,
            "judges": {"asr": "keywords", "over_refusal": "keywords"},
        },
        "search": {"trials": 3},
        "execution": {
            "root": root, "engine_max_tokens": 1024, "engine_memory_gib": 0.1, "num_judge_replicas": 0,
            "checkpoint_every_s": 1.0, "address": address, **({"tracking_uri": tracker} if tracker else {}),
        },
    }  # fmt: skip


class Sweep:
    """One store, and the command that fills it."""

    def __init__(self, folder: Path, cluster: Any = None, url: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lost: set[Path] = set()  # nodes that were killed
        self.cluster = cluster  # tests.cluster.Nodes, where the sweep joins one
        self.folder, self.kept = folder, Kept(url or str(folder / "root"))
        self.process: subprocess.Popen[str] | None = None
        self.began_full = False  # whether its disk was full when that was started
        self.seen: dict[
            int, tuple[float, str]
        ] = {}  # processes of the driver that runs: when they began, what they are
        self.orphans: list[
            tuple[float, dict[int, tuple[float, str]]]
        ] = []  # those of drivers that are gone, since when

    @property
    def address(self) -> str:
        return "local" if self.cluster is None else str(self.cluster.address)

    def start(self, model: Path, tracker: str | None) -> None:
        import yaml

        file = self.folder / "chaos.yaml"
        file.write_text(yaml.safe_dump(sweep(model, self.kept.root, tracker, self.address)))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self.began_full = is_full(self.folder)
        with (self.folder / "out.txt").open("w") as out, (self.folder / "err.txt").open("a") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "safecl.cli", "run", str(file), "--json"],
                stdout=out, stderr=err, text=True, env=environment, start_new_session=True,
            )  # fmt: skip

    def end(self) -> None:
        """Whatever is left of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Those that live, the driver first."""
        if self.process is None:
            return []
        found = []
        with suppress(psutil.Error):
            driver = psutil.Process(self.process.pid)
            found = [driver, *driver.children(recursive=True)]
        for folder, node in () if self.cluster is None else self.cluster.made.items():
            for info in () if folder in self.lost else node.all_processes.get("raylet", []):
                with suppress(psutil.Error):
                    raylet = psutil.Process(info.process.pid)
                    found += [raylet, *raylet.children(recursive=True)]
        for one in found:
            with suppress(psutil.Error):
                self.seen.setdefault(one.pid, (one.create_time(), " ".join(one.cmdline())[:80]))
        return found

    def orphaned(self) -> None:
        """The driver is gone: what it had is to end by itself."""
        self.orphans.append((time.monotonic(), self.seen))
        self.seen = {}

    def left(self, after_s: float) -> list[str]:
        """What lives though its driver is gone for so long."""
        found = []
        for since, processes in self.orphans:
            for pid, (began, what) in processes.items() if time.monotonic() - since >= after_s else ():
                with suppress(psutil.Error):
                    one = psutil.Process(pid)
                    there = one.create_time() == began and one.status() != psutil.STATUS_ZOMBIE
                    if there and (self.cluster is None or kind_of(one, 0) not in {None, *OF_THE_CLUSTER}):
                        found.append(f"{pid} {what}")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What the table it printed says: method, parameters, and every metric."""
        table = json.loads((self.folder / "out.txt").read_text())
        return [
            {
                "method": row["method"],
                "params": row["params"],
                "metrics": {name: metric["value"] for name, metric in sorted(row["metrics"].items())},
            }
            for row in table["rows"]
        ]


def kind_of(process: psutil.Process, driver: int) -> str | None:
    if process.pid == driver:
        return "driver"
    command = " ".join(process.cmdline())
    return next((kind for kind, (mark, _) in KINDS.items() if mark and mark in command), None)


class Round:
    """One sweep under fire."""

    def __init__(
        self, of: Sweep, dice: random.Random, every: tuple[float, float], most: int, calm_s: float, log: Any
    ) -> None:
        self.of, self.dice, self.every, self.most, self.calm_s, self.log = of, dice, every, most, calm_s, log
        self.known = of.kept.records(now=True)
        self.burst = 0  # kills of the present burst
        self.killed = self.due = time.monotonic()  # when the last one was, and when the next may be
        self.wrong: list[str] = []

    def look(self) -> None:
        """Finished stages stay as they are, and nobody makes them again."""
        left = [f"a process is left: {what}" for what in self.of.left(ORPHAN_S)]
        self.wrong += [said for said in left if said not in self.wrong]
        now = self.of.kept.records()
        for key, about in self.known.items():
            if now.get(key, about) != about:
                self.wrong.append(f"the record of {key[:12]} was written again")
            if key not in now:
                self.wrong.append(f"the record of {key[:12]} is gone")
        if now.keys() - self.known.keys() and self.burst >= self.most:
            self.burst, self.due = 0, time.monotonic() + self.calm_s
        old = {key[:24] for key, (_, written) in self.known.items() if time.time() - written > 5}
        for held in self.of.kept.claimed().values():
            if again := old & set(held):
                self.wrong.append(f"made again though finished: {sorted(again)}")
        self.known = now

    def kill_one(self) -> None:
        assert self.of.process is not None
        by_kind: dict[str, list[psutil.Process]] = {}
        for process in self.of.processes():
            with suppress(psutil.Error):
                if (kind := kind_of(process, self.of.process.pid)) is not None:
                    by_kind.setdefault(kind, []).append(process)
        nodes = (
            []
            if self.of.cluster is None
            else [node for node in list(self.of.cluster.made)[1:] if node not in self.of.lost]
        )
        for kind in OF_THE_CLUSTER if self.of.cluster is not None else ():
            by_kind.pop(kind, None)
        wait_s = WHILE_BOOTING_S if self.burst and "Broker" in by_kind else 240.0  # a burst begins when it is at work
        if not by_kind.keys() & WORKING and time.monotonic() - self.killed < wait_s:
            return
        names = sorted(by_kind) + ([NODE] if nodes else [])
        kind = self.dice.choices(names, [KINDS[name][1] if name in KINDS else 1.0 for name in names])[0]
        if kind == NODE:
            node = self.dice.choice(nodes)
            self.of.cluster.kill(node)
            self.of.lost.add(node)
            try:
                self.of.cluster.add(num_cpus=1)
            except Exception as error:  # Ray gives a node half a minute to start: a busy machine may need more
                self.log({"what": "no node in its place", "error": str(error)[:100]})
            self.killed = time.monotonic()
            self.burst += 1
            self.log({"what": "kill", "kind": kind, "pid": 0, "finished": len(self.known)})
            return
        victim = self.dice.choice(by_kind[kind])
        with suppress(psutil.Error):
            victim.send_signal(signal.SIGKILL)
            self.killed = time.monotonic()
            self.burst += 1
            self.log({"what": "kill", "kind": kind, "pid": victim.pid, "finished": len(self.known)})

    def run(self, model: Path, tracker: str | None, until: float, faults: list[Any]) -> bool:
        """To the end of the sweep; False if the time is over before."""
        began = time.monotonic()
        self.due = began + FIRST_S
        pending = list(faults)
        while True:
            self.of.start(model, tracker)
            assert self.of.process is not None
            while self.of.process.poll() is None:
                time.sleep(0.25)
                self.of.processes()
                self.look()
                now = time.monotonic()
                if now > until or now - began > LIMIT_S:
                    self.of.process.send_signal(signal.SIGTERM)
                    if (code := self.of.process.wait(60)) not in (143, 0):
                        self.wrong.append(f"exit code {code} after SIGTERM")
                    self.gone()
                    self.log({"what": "SIGTERM", "code": code})
                    if now - began > LIMIT_S:
                        self.wrong.append(f"not done in {LIMIT_S:.0f} s")
                    return False
                if now > self.due and self.burst < self.most:
                    if pending and len(self.known) > 10:
                        pending.pop(0)(self.log)
                    self.kill_one()
                    self.due = time.monotonic() + self.dice.uniform(*self.every)
            code = self.of.process.returncode
            self.of.orphaned()
            refused = code == 2 and self.of.began_full  # a run is not begun on a full disk
            self.log({"what": "refused" if refused else "end", "code": code, "finished": len(self.known)})
            if code == 0:
                self.gone()
                return True
            if code not in (-9, 1) and not refused:  # 1: rows that the machine failed. The same command tries again.
                self.wrong.append(f"exit code {code}")
            time.sleep(2 if refused else 0)

    def gone(self) -> None:
        """At the end of a round, what its drivers have left ends by itself."""
        self.of.orphaned()
        deadline = time.monotonic() + ORPHAN_S
        while self.of.left(0.0) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.wrong += [f"a process is left: {what}" for what in self.of.left(0.0)]

    def check(self, undisturbed: dict[str, Any], tracker: str | None) -> None:
        """What must hold at the end."""
        self.known = self.of.kept.records(now=True)
        now, before = self.of.kept.made(), undisturbed["made"]
        if other := sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name)):
            self.wrong.append(f"{len(other)} of {len(before)} files are not those of the undisturbed run: {other[:5]}")
        root, whole_s = self.of.kept.local, self.of.kept.store.remote is not None  # S3 tells times in whole seconds
        for log in (root / "logs").glob("*-*.log"):
            whole = next((key for key in self.known if key[:12] == log.stem.rpartition("-")[2]), None)
            for line in log.read_text(errors="replace").splitlines() if whole else ():
                if line.startswith("began "):
                    began = datetime.fromisoformat(line.split()[1]).timestamp()
                    if began - whole_s > self.known[str(whole)][1]:
                        self.wrong.append(f"{log.stem} was begun though it was finished")
        if self.of.rows() != undisturbed["rows"]:
            self.wrong.append("the table is not that of the undisturbed run")
        if left := self.of.kept.left():
            self.wrong.append(f"left behind: {left[:9]}")
        import mlflow
        import optuna

        storage = f"sqlite:///{root / 'study.db'}"
        for study in optuna.study.get_all_study_summaries(storage):
            trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
            states = Counter(t.state.name for t in trials if "safecl:ghost" not in t.user_attrs)
            if states != {"COMPLETE": 3}:
                self.wrong.append(f"trials: {dict(states)}")
        client = mlflow.MlflowClient(tracker or f"sqlite:///{root / 'mlflow.db'}")
        for experiment in client.search_experiments():
            runs = client.search_runs([experiment.experiment_id], max_results=1000)
            if unfinished := [run.info.run_name for run in runs if run.info.status != "FINISHED"]:
                self.wrong.append(f"MLflow runs not finished: {unfinished}")
            names = Counter(run.data.tags.get("safecl.trial") for run in runs if "safecl.trial" in run.data.tags)
            if doubled := [name for name, num in names.items() if num > 1]:
                self.wrong.append(f"MLflow runs twice: {doubled}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what is kept between runs of this program")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long; started again, it goes on")
    parser.add_argument("--every", type=float, nargs=2, default=(2.0, 6.0), help="seconds between kills of a burst")
    parser.add_argument("--burst", type=int, default=BURST, help="kills of a burst")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--server", action="store_true", help="track to an MLflow server, which stops for a while each round"
    )
    parser.add_argument(
        "--s3", action="store_true", help="rounds whose store is at an S3 server (moto), which stops for a while"
    )
    parser.add_argument(
        "--disk", action="store_true", help="rounds on a disk of 3 GiB, which is full for a while (needs root)"
    )
    parser.add_argument(
        "--nodes", type=int, default=0, help="join an emulated cluster of so many nodes, which die as well"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # told to end, it ends what it started
    from safecl.testing.world import tiny_model

    until = time.monotonic() + arguments.seconds
    folder: Path = arguments.folder.absolute()
    model = folder / "model"
    if not model.exists():
        shutil.copytree(tiny_model("llama"), model)
    calm, table, told = folder / "undisturbed", folder / "undisturbed.json", folder / "told.jsonl"
    if not table.exists():
        shutil.rmtree(calm, ignore_errors=True)
        of = Sweep(calm)
        began = time.monotonic()
        of.start(model, None)
        assert of.process is not None
        if of.process.wait(max(1.0, until - time.monotonic())) != 0:
            raise SystemExit(f"undisturbed, the sweep ended with {of.process.returncode}: see {calm}/err.txt")
        table.write_text(json.dumps({"seconds": time.monotonic() - began, "rows": of.rows(), "made": of.kept.made()}))
        shutil.rmtree(calm)
    undisturbed = json.loads(table.read_text())

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []

    def log(line: dict[str, Any]) -> None:
        line = {"at": round(time.time(), 1), "round": number, **line}
        print(line, flush=True)
        with told.open("a") as file:
            file.write(json.dumps(line) + "\n")

    while time.monotonic() < until - 60 and sum(line["what"] == "kill" for line in lines()) < arguments.kills:
        number = sum(line["what"] == "round" for line in lines())  # one that was not finished goes on
        met = {line["what"] for line in lines() if line["round"] == number}
        place = folder / f"round-{number}"
        with places(arguments, place, met) as (of, tracker, faults):
            dice, calm_s = random.Random(f"{arguments.seed}/{len(lines())}"), CALM * undisturbed["seconds"]
            one = Round(of, dice, tuple(arguments.every), arguments.burst, calm_s, log)
            log({"what": "begin", "finished": len(one.known)})
            if complete := one.run(model, tracker, until, faults):
                one.check(undisturbed, tracker)
            log({"what": "round" if complete else "pause", "finished": len(one.known), "wrong": one.wrong})
            if one.wrong:
                raise SystemExit(f"round {number}, see {place}: " + "; ".join(one.wrong))
        if complete:
            shutil.rmtree(place)
    name = "chaos" + ("_s3" if arguments.s3 else "") + (f"_{arguments.nodes}_nodes" if arguments.nodes else "")
    write(name, lines(), undisturbed, arguments.kills)


@contextmanager
def places(arguments: Any, place: Path, met: set[str]) -> Iterator[tuple[Sweep, str | None, list[Any]]]:
    """A round's store, its tracker, and the faults that both can still have (`met`: those it had)."""
    place.mkdir(parents=True, exist_ok=True)
    faults, tracker = [], None
    with ExitStack() as stack:
        at = place / "disk"
        if arguments.disk and stack.enter_context(small_disk(place / "disk.img", at, 3.0)) and "disk full" not in met:
            faults.append(fill(at, 10.0))
        if arguments.server:
            tracker, server = stack.enter_context(mlflow_server(place / "tracker"))
            if "tracker stopped" not in met:
                faults.append(silence(server, 20.0, "tracker stopped"))
        url = None
        if arguments.s3:
            from tests.servers import s3

            shutil.rmtree(place / "cache", ignore_errors=True)  # what that server had is gone with it
            os.environ["SAFECL_CACHE"] = str(place / "cache")
            served = stack.enter_context(s3())
            url = f"{served.url}/{place.name}"
            faults.append(silence(served.process, 20.0, "store stopped"))
        cluster = None
        if arguments.nodes:
            from tests.cluster import nodes

            parts = [{"num_cpus": 2}, *({"num_cpus": 1} for _ in range(arguments.nodes - 1))]
            cluster = stack.enter_context(nodes(place / f"nodes-{os.getpid()}", *parts))
        of = Sweep(at, cluster, url)
        stack.callback(of.end)
        yield of, tracker, faults


def write(name: str, lines: list[dict[str, Any]], undisturbed: dict[str, Any], wanted: int) -> None:
    kills = Counter(line["kind"] for line in lines if line["what"] == "kill")
    rounds = [line for line in lines if line["what"] == "round"]
    ended = {line["round"] for line in rounds}
    print(f"{kills.total()} kills: {dict(kills)}; {len(rounds)} rounds complete")
    if kills.total() < wanted:
        return
    wrong = [said for line in lines for said in line.get("wrong", ())]
    left = [said for said in wrong if said.startswith(("left behind", "a process is left"))]
    ends = Counter(line["code"] for line in lines if line["what"] == "end")
    spent = sum(
        b["at"] - a["at"]
        for a, b in pairwise(lines)
        if a["round"] == b["round"] and a["round"] in ended and a["what"] != "pause"
    )
    most: dict[int, int] = {}  # stages of each round
    last = {line["round"]: line["what"] for line in lines}
    is_told = set(last.values()) <= {"round", "pause"}  # else this program was ended before it said what was wrong
    for line in lines:
        most[line["round"]] = max(most.get(line["round"], 0), line.get("finished", 0))
    numbers = {
        "killed with -9": [{"what": kind, "times": kills[kind]} for kind in (*KINDS, NODE) if kills[kind]],
        "beside that": [
            {"what": what, "times": sum(line["what"] == what for line in lines)}
            for what in ("disk full", "tracker stopped", "store stopped", "SIGTERM", "refused")
        ],
        "what came of it": {
            "rounds that ended": len(rounds),
            "kills in them": sum(line["what"] == "kill" and line["round"] in ended for line in lines),
            "stages finished": sum(most.values()),
            "results lost or changed, finished stages made again": len(wrong) - len(left) if is_told else None,
            "things left behind": len(left) if is_told else None,
            "ended with exit code 1 (the same command went on)": ends[1],
            "ended with exit code 2 (a person would have had to look)": ends[2],
            "seconds undisturbed": round(undisturbed["seconds"]),
            "seconds a round under fire": round(spent / len(rounds)) if rounds else None,
        },
    }
    print(_bench.write(name, numbers))


if __name__ == "__main__":
    main()
