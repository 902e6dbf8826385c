"""Trainers on a real local Ray cluster: one worker process takes one finetune after the other, and its death, a refusal or
a stage that kills it costs nobody else anything. About 90 s."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from safecl import execute
from safecl.config import Execution
from safecl.faults import Journal, kind_of, plain_error
from safecl.order import Claim
from safecl.store import Stage, Store
from safecl.testing import world as contract
from tests.stages import beside
from tests.test_execute import rows


class Running:
    """A Broker with trainers of its own on the test's cluster, and what it is asked to train."""

    def __init__(self, folder: Path, model: Path, **where: Any) -> None:
        execution = {"engine": "torch", "checkpoint_every_s": 0.2, "max_failures": 1, "num_trials_at_once": 1, **where}
        self.store = Store(str(folder / "root"))
        self.logs = folder / "logs"
        self.broker = execute.broker(self.store, Execution(root=self.store.root, **execution), self.logs)
        self.model = Stage("model", {"source": {"local": 0}, "dtype": "float32"}, {}, hints={"path": str(model)})

    def finetune(self, seed: int, method: str = "sft", epochs: float = 1.5, **config: Any) -> Stage:
        settings = contract.config(method)
        settings["training"] |= {"epochs": epochs, "max_tokens": 1500}
        settings |= {"seed": seed, **config}
        return Stage("finetune", settings, {"model": self.model, "rows": rows(23)})

    def ensure(self, *stages: Stage) -> None:
        import ray

        ray.get(self.broker.ensure.remote(list(stages)), timeout=120)

    def pids(self) -> list[int]:
        """Processes of Ray Train's workers."""
        return [p.pid for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in _title(p)]

    def wait(self, stage: Stage, step: int) -> None:
        """Until it has trained that far."""
        import ray

        deadline = time.monotonic() + 180
        curves = self.store.scratch(stage) / "curves.jsonl"
        while not (curves.exists() and len(curves.read_text().splitlines()) >= step):
            assert time.monotonic() < deadline, ray.get(self.broker.snapshot.remote())
            time.sleep(0.02)


def _private(pid: int) -> int:
    """Bytes of memory that are this process's alone: pages of libraries come and go as the machine has room."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


def _settled(pid: int, enough: int = 0) -> int:
    """The least of `_private` within some seconds, or until it is less than `enough`: a finetune is told to be done before
    what it held is given back."""
    end, least = time.monotonic() + 3, _private(pid)
    while least >= enough and time.monotonic() < end:
        time.sleep(0.1)
        least = min(least, _private(pid))
    return least


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def running(
    cluster: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: pytest.FixtureRequest
) -> Iterator[Running]:
    """One Broker and its trainer for all tests of the same execution: a start of them is 20 s of CPU."""
    import ray

    made = Running(tmp_path_factory.mktemp("running"), tiny_model, **getattr(request, "param", {}))
    yield made
    ray.kill(made.broker)
    deadline = time.monotonic() + 30
    while made.pids():  # its trainers end with it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    _free()


def _free() -> None:
    """Give back the CPUs of trainers that were killed with their Broker: in a sweep the cluster ends with it, here the
    next test would wait for them for ever."""
    from ray import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for name, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def test_one_process_trains_one_after_the_other_and_a_refusal_does_not_end_it(running: Running, tmp_path: Path) -> None:
    import ray

    first = running.finetune(0)
    running.ensure(first)
    [pid] = running.pids()
    bad = running.finetune(1, dtype="float32", lora={**contract.config("sft")["lora"], "targets": ["nothing"]})
    with pytest.raises(Exception) as caught:
        running.ensure(bad)
    plain = plain_error(caught.value)
    assert "nothing" in str(plain)
    others = [running.finetune(seed) for seed in (2, 3)]
    running.ensure(*others)
    assert running.pids() == [pid]
    finished = {stage["key"] for stage in ray.get(running.broker.snapshot.remote())["finished"]}
    assert {stage.key for stage in (first, *others)} <= finished
    log = running.store.logs / f"finetune-{bad.key[:12]}.log"
    assert "nothing" in log.read_text()


def test_what_waits_for_a_trainer_is_taken_in_its_turn(running: Running) -> None:
    """By priority, then what a search waits for, then each cell's first trial, then by the longest chain."""
    import ray

    beside.put()

    def nap(name: str, seconds: float = 0.02, **inputs: Stage) -> Stage:
        return beside.Outside("nap", {"name": name, "seconds": seconds}, inputs)

    claims: list[tuple[Stage, Claim]] = [(nap("holds it up", 2.0), Claim(2))]
    # So much is asked for before the others that none of them is what the end waits for: that would go first.
    first = [f"before {number}" for number in range(8)]
    claims += [(nap(name), Claim(1, 1, number)) for number, name in enumerate(first)]
    for number in range(3):  # all seeds of a cell ask before anybody else
        claims.append((nap(f"many {number}"), Claim(-1, 1, number)))
    claims.append((nap("chain above", below=nap("chain 0")), Claim(-1, 1, 0)))
    claims.append((nap("searched"), Claim(-1, 0, 5)))
    claims.append((nap("first of all"), Claim(0, 1, 7)))
    # A stage that somebody waits for already goes forward with who has a lower turn.
    claims.append((nap("above many 2", below=nap("many 2")), Claim(-1, 0, 6)))
    num_before = len(ray.get(running.broker.snapshot.remote())["finished"])
    asked = []
    for stage, claim in claims:
        asked.append(running.broker.ensure.remote([stage], claim))
        ray.get(running.broker.pid.remote())  # calls that are on their way together may arrive in any order
    ray.get(asked, timeout=60)
    named = {s.key: str(s.config["name"]) for stage, _ in claims for s in stage.walk()}
    finished = [named[each["key"]] for each in ray.get(running.broker.snapshot.remote(num_before))["finished"]]
    # What lies above becomes ready as the trainer asks for more: it may be just too late, and is one later then.
    assert len(finished) == 17
    in_turn = ["holds it up", *first, "first of all", "searched", "many 2", "chain 0", "many 0", "many 1"]
    assert [name for name in finished if "above" not in name] == in_turn


def test_a_killed_worker_is_replaced_and_the_result_is_the_uninterrupted_one(
    running: Running, tmp_path: Path, tiny_model: Path
) -> None:
    stage = running.finetune(5, epochs=15.0)
    done = running.broker.ensure.remote([stage])
    running.wait(stage, 1)
    [pid] = running.pids()
    running.wait(stage, 20)  # of 69
    os.kill(pid, signal.SIGKILL)
    import ray

    ray.get(done, timeout=120)
    assert running.pids() != [pid]
    found = running.store.path(stage)
    alone = _alone(running, stage, tiny_model, tmp_path / "alone")
    assert contract.same_bits(_tensors(found / "adapter"), _tensors(alone / "adapter"))
    assert (found / "curves.jsonl").read_text() == (alone / "curves.jsonl").read_text()


def test_memory_returns_between_finetunes_and_those_that_wait_hold_no_process(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import build_model, build_tokenizer

    large = tmp_path / "large"
    build_tokenizer(large)
    build_model(large, vocab_size=100_000)
    size = (large / "model.safetensors").stat().st_size
    model = Stage("model", {"source": {"local": 1}, "dtype": "float32"}, {}, hints={"path": str(large)})
    monkeypatch.setattr(running, "model", model)
    running.ensure(running.finetune(0), running.finetune(1))
    [pid] = running.pids()
    before, processes = _settled(pid), _ray_processes()
    import ray

    done = running.broker.ensure.remote([running.finetune(seed) for seed in range(2, 7)])
    most = 0
    while not ray.wait([done], timeout=0.2)[0]:
        most = max(most, len(_ray_processes() - processes))
    ray.get(done)
    assert most == 0
    assert _settled(pid, before + size) < before + size  # five models, five optimizers and their batches


# Below: tests with a trainer of their own. Those above share one.


@pytest.mark.slow
@pytest.mark.parametrize("running", [{"checkpoint_every_s": 1e6}], indirect=True)
def test_a_finetune_that_kills_its_worker_too_often_fails_alone(running: Running) -> None:
    import ray

    stage, next_stage = running.finetune(6, epochs=400.0), running.finetune(7)
    done, next_done = running.broker.ensure.remote([stage]), running.broker.ensure.remote([next_stage])
    killed: set[float] = set()
    deadline = time.monotonic() + 300
    while len(killed) < 2:  # max_failures 1: the second is one too many
        assert time.monotonic() < deadline, ray.get(running.broker.snapshot.remote())
        live = [one for one in ray.get(running.broker.snapshot.remote())["running"] if one["key"] == stage.key]
        if live and live[0]["done"] and live[0]["start"] not in killed:  # this attempt is under way
            [pid] = running.pids()
            os.kill(pid, signal.SIGKILL)
            killed.add(live[0]["start"])
        time.sleep(0.05)
    with pytest.raises(Exception, match="lost its workers 2 times") as caught:
        ray.get(done, timeout=60)
    assert kind_of(plain_error(caught.value)) == "infrastructure"
    ray.get(next_done, timeout=120)
    assert running.store.has(next_stage) and not running.store.has(stage)


@pytest.mark.slow  # four starts of a trainer
@pytest.mark.parametrize("running", [{"max_failures": 0}], indirect=True)
def test_killed_controllers_and_a_killed_broker_cost_a_finetune_nothing_but_time(
    running: Running, tmp_path: Path, tiny_model: Path
) -> None:
    """As many controllers as there are CPUs: one that left what it had reserved would leave no place for the last. None of
    this counts as a failure, since the finetune gets on in between."""
    import ray

    stage = running.finetune(8, epochs=100.0)
    done = running.broker.ensure.remote([stage])
    cpus = int(ray.cluster_resources()["CPU"])
    for kill in range(cpus + 1):
        running.wait(stage, 40 * (kill + 1))
        if kill < cpus:
            [victim] = [p.pid for p in psutil.Process().children(recursive=True) if "TrainController" in _title(p)]
        else:
            victim = ray.get(running.broker.pid.remote())
        os.kill(victim, signal.SIGKILL)
    ray.get(done, timeout=240)
    causes = [line["cause"] for line in Journal(running.logs).lines(of_this_run=False)]
    assert causes.count("controller") == cpus and causes.count("broker") == 1
    alone = _alone(running, stage, tiny_model, tmp_path / "alone")
    assert contract.same_bits(_tensors(running.store.path(stage) / "adapter"), _tensors(alone / "adapter"))


@pytest.mark.parametrize("running", [{"num_workers": 2}], indirect=True)
def test_two_ranks_take_the_same_finetunes_and_other_stages_one_by_one(
    running: Running, tmp_path: Path, tiny_model: Path
) -> None:
    first, second = running.finetune(3), running.finetune(4)
    running.ensure(first)
    pids = set(running.pids())
    config: dict[str, Any] = {"method": "magmax", "params": {}, "dtype": "float32"}
    running.ensure(second, *(Stage("finalize", config, {"safe": first, "tuned": second}, str(i)) for i in range(3)))
    assert len(pids) == 2 and set(running.pids()) == pids
    for stage in (first, second):
        alone = _alone(running, stage, tiny_model, tmp_path / f"alone-{stage.key[:8]}")
        apart = {
            name: t - _tensors(alone / "adapter")[name]
            for name, t in _tensors(running.store.path(stage) / "adapter").items()
        }
        assert max(float(t.abs().max()) for t in apart.values()) < 1e-5
    assert json.loads((running.store.path(second) / "record.json").read_text())["result"]["steps"] == 7


@pytest.mark.slow  # longer than Ray Train's own patience of 60 s
def test_a_finetune_waits_for_as_long_as_others_hold_the_cpus(running: Running) -> None:
    import ray

    def hold() -> None:
        time.sleep(75)

    held = ray.remote(num_cpus=os.cpu_count())(hold).remote()
    started = time.monotonic()
    running.ensure(running.finetune(0))
    assert time.monotonic() - started > 60
    ray.get(held)


def _alone(running: Running, stage: Stage, model: Path, scratch: Path) -> Path:
    """The same finetune in this process: the folder of its result."""
    from safecl.stages import finetune

    inputs = {"model": model, "rows": running.store.path(stage.inputs["rows"])}
    finetune.train_rows(stage.config, inputs, scratch, contract.execution())
    return scratch / "result"


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(str(folder / "adapter_model.safetensors")))


def _ray_processes() -> set[int]:
    """What Ray runs for us: actors and tasks, the idle ones too."""
    return {p.pid for p in psutil.Process().children(recursive=True) if _title(p).startswith("ray::")}
