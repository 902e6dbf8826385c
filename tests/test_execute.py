"""The Broker on a real local Ray cluster: every stage once, failures to everyone who waits, kills leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safecl import cluster as ray_cluster
from safecl import execute, lease
from safecl.base import PrerequisiteError
from safecl.capacity import Capacity
from safecl.config import Execution
from safecl.devices import Group, Holder
from safecl.faults import Journal, plain_error
from safecl.order import Claim, Turn
from safecl.store import Stage, Store
from safecl.trainers import Trainer, Work
from tests.serving.test_endpoint import Server


def rows(num_rows: int, seed: int = 0) -> Stage:
    part = {"task": "mini", "split": "user", "num_rows": num_rows, "source": {"generated": _mini_version()}}
    return Stage("data", {"role": "user", "parts": [part], "poison": None, "guard": None, "seed": seed})  # type: ignore[dict-item]


def _mini_version() -> str:
    from safecl.tasks import load

    return load("mini").VERSION


def new_broker(cluster: Path, root: str) -> tuple[Any, Store]:
    store = Store(str(cluster / root))
    return execute.broker(store, Execution(root=store.root), cluster / "logs" / root), store


@pytest.fixture(scope="module")
def shared(cluster: Path) -> tuple[Any, Store]:
    """One for all tests that kill nothing: it and the process of its light stages take 2 s to start."""
    return new_broker(cluster, "shared")


def test_when_a_running_stage_ends_follows_its_own_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = (1000, 1060, 1065, 1070, 1080, 1090, 1100, 1110, 1130)  # the first minute is spent waiting
    clock = iter(times)
    monkeypatch.setattr(execute, "time", SimpleNamespace(time=lambda: next(clock)))
    broker = execute.Broker(Store(str(tmp_path)), Execution(), "", 2)
    broker._begin("generate", "k")
    ends = []
    for done in (1, 3, 11, 41, 101, 0, 1, 21):  # before the 0 its worker died
        asyncio.run(broker.progress("k", done, 101, {}))
        ends.append(asyncio.run(broker.snapshot())["running"][0]["ends"])
    assert ends == [None, None, 1160, 1110, 1090, None, None, pytest.approx(1130 + 30 * 80 / 21)]


def test_what_has_failed_is_not_counted_as_training_to_come_when_it_is_asked_for_again(tmp_path: Path) -> None:
    """It stayed in the count for the rest of the run, so that the end seemed further away than it was."""
    broker = execute.Broker(Store(str(tmp_path)), Execution(), "", 2)
    model = Stage("model", {})
    trained = Stage("finetune", {}, {"model": model})
    answers = Stage("generate", {}, {"model": model, "weights": trained})
    broker.failed = {trained.key: ValueError("diverged"), answers.key: ValueError("diverged")}
    with pytest.raises(ValueError, match="diverged"):
        asyncio.run(broker.ensure([trained, answers]))
    assert broker._ahead() == (0, 0)
    assert not {trained.key, answers.key} & broker.turns.keys()


def test_what_trains_next_is_looked_for_only_where_a_rank_waits(tmp_path: Path) -> None:
    """Each look sums all training to come: with 250 trainers and 10,000 finetunes a call took 37 ms, and each event makes one."""
    pool = execute.Broker(Store(str(tmp_path)), Execution(), "", 2).trainers
    looks: list[None] = []

    async def give() -> None:
        loop = asyncio.get_running_loop()
        work = Work(Stage("finetune", {}), 1, Turn.of(Claim(), 1.0, 1), loop.create_future(), ready=False)
        pool.queue.put(work, work.turn)
        pool.ahead = lambda: (looks.append(None), (0.0, 0.0))[1]  # type: ignore[func-returns-value]
        for name in ("busy", "waits", "starts"):
            pool.trainers[name] = Trainer(name, Holder(name, "trainers", 1, state="up"))
        pool.trainers["waits"].waiting[0] = loop.create_future()
        pool.give()

    asyncio.run(give())
    assert len(looks) == 1


def test_units_that_another_driver_holds_are_not_counted_on(tmp_path: Path) -> None:
    """Two drivers of one cluster each count all of its units as their own."""
    chosen = Execution(address="auto", unit="bed", num_workers=3)
    broker = execute.Broker(Store(str(tmp_path)), chosen, "", 8, Capacity("bed", 4.0, 3.0, 2.0, 1))
    engine, trainers = Group("candidate-1", 2.0, 1, 0.0), Group("trainers", 3.0, 1, 0.0)

    async def rooms(*free: float) -> tuple[bool, bool]:
        broker.free = list(free)
        return broker._room(engine), broker._room(trainers)

    assert asyncio.run(rooms(2.0, 1.0)) == (True, True)
    assert asyncio.run(rooms(1.0, 1.0, 1.0)) == (False, True), "an engine needs its units on one node"
    assert asyncio.run(rooms(2.0)) == (True, False)
    assert asyncio.run(rooms()) == (False, False)
    broker.lender._have = 2.0
    assert asyncio.run(rooms()) == (True, True), "autoscaling may bring them"
    broker.lender._have = 4.0

    async def after_one_was_gone() -> tuple[bool, bool]:
        broker.lender._freed = asyncio.get_running_loop().time()
        return await rooms()

    assert asyncio.run(after_one_was_gone()) == (True, True), "Ray's view is older"


def test_units_of_a_trainer_that_is_lost_while_it_makes_way_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work goes back to the queue, so that it is idle and is told to stop, before it is known to be gone. That raised
    StopIteration, and its units stayed taken."""
    context = SimpleNamespace(current_actor=None, get_actor_id=lambda: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    lost, began = threading.Event(), list[Holder]()

    class Engines:
        def start(self, holder: Holder) -> None:
            began.append(holder)

        def stop(self, holder: Holder) -> None: ...
        def give(self) -> None: ...

    def fit(*_: object) -> None:
        lost.wait(10)
        raise RuntimeError("its controller died")

    monkeypatch.setattr("safecl.trainers.fit", fit)

    async def lose() -> None:
        broker = execute.Broker(
            Store(str(tmp_path)), Execution(turn_s=1.0), str(tmp_path), 1, Capacity("CPU", 1.0, 1.0, 1.0, 1)
        )
        pool, lender = broker.trainers, broker.lender
        lender.add("engines", Engines(), 1.0, 1)
        running = asyncio.create_task(pool.run(Stage("finetune", {})))
        while not pool.trainers:
            await asyncio.sleep(0.01)
        (trainer,) = pool.trainers.values()
        taken = asyncio.create_task(pool.take(trainer.name, 0, "ranks"))
        await taken
        lender.ask("engines", 1, 0, 0)
        while not trainer.holder.closed:
            await asyncio.sleep(0.01)
        lost.set()
        while not began:
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(asyncio.wait_for(lose(), 10))


def test_workers_run_at_the_drivers_niceness(cluster: Path) -> None:
    import ray

    assert ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote(), timeout=60) == os.nice(0)


def test_an_endpoint_judges_without_an_engine_and_its_address_is_in_no_record(shared: tuple[Any, Store]) -> None:
    import ray

    broker, store = shared
    config = {"judge": "written", "config": {"labels": {"unsafe": True, "safe": False}, "template": "{request} {response}"},
              "remote": {"model": "guard", "version": None, "tokenizer": None, "chat": True}}  # fmt: skip
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        judged = Stage("judge", config, {"rows": rows(5)}, hints={"url": url, "at_once": "2"})  # type: ignore[arg-type]
        ray.get(broker.ensure.remote([judged]), timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    verdicts = [json.loads(line) for line in store.file(judged, "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == len(server.bodies) == 5 and {verdict["label"] for verdict in verdicts} <= {True, False}
    assert store.record(judged)["result"]["answered_by"] == ["m"]
    assert "127.0.0.1" not in json.dumps(store.record(judged))


def test_two_who_need_one_stage_run_it_once_and_a_third_finds_it(shared: tuple[Any, Store]) -> None:
    import ray

    broker, store = shared
    few, more = rows(5, seed=1), rows(6, seed=1)
    num = len(ray.get(broker.snapshot.remote())["finished"])
    ray.get([broker.ensure.remote([few]), broker.ensure.remote([few, more])], timeout=60)
    ray.get(broker.ensure.remote([few]), timeout=60)
    finished = [stage["key"] for stage in ray.get(broker.snapshot.remote(num))["finished"]]
    assert sorted(finished) == sorted([few.key, more.key])
    [second] = ray.get(broker.snapshot.remote(num + 1))["finished"]  # who has seen the first is not told again
    assert second["key"] == finished[1]
    assert len((store.path(few) / "rows.jsonl").read_text().splitlines()) == 5
    for found in ray.get(broker.snapshot.remote())["times"]:  # who did it, where and when
        assert found["asked"] <= found["ready"] <= found["start"] <= found["end"]
        assert found["node"] == ray.get_runtime_context().get_node_id()[:8] and found["pid"] != os.getpid()


def test_a_failed_stage_reaches_everyone_above_it_at_once_and_is_not_cached(shared: tuple[Any, Store]) -> None:
    import ray

    from safecl.base import ConfigError

    broker, store = shared
    bad = rows(10**6)  # mini has fewer: the stage raises a ConfigError
    above = Stage("data", {**bad.config, "seed": 1}, {"exclude_test": bad})
    for waiting in (bad, above):
        with pytest.raises(Exception) as caught:
            ray.get(broker.ensure.remote([waiting]), timeout=60)
        plain = plain_error(caught.value)
        assert isinstance(plain, ConfigError) and "1000000" in str(plain)
    assert not store.has(bad) and not list((store.local / "tmp").glob("*"))
    ray.get(broker.ensure.remote([rows(7)]), timeout=60)  # what does not need it goes on
    log = next(store.logs.glob(f"data-{bad.key[:12]}*"))
    assert "ConfigError" in log.read_text()


def test_who_stops_waiting_does_not_stop_the_stage_for_the_others(shared: tuple[Any, Store]) -> None:
    import ray

    broker, store = shared
    first = broker.ensure.remote([rows(8)])
    second = broker.ensure.remote([rows(8)])
    ray.cancel(first)
    ray.get(second, timeout=60)
    assert store.has(rows(8))


def test_a_broker_that_is_killed_is_replaced_and_who_waits_never_hears_of_it(cluster: Path) -> None:
    import ray

    broker, store = new_broker(cluster, "death")
    ray.get(broker.ensure.remote([rows(5)]), timeout=60)
    before = ray.get(broker.pid.remote())
    waiting = broker.ensure.remote([rows(5), rows(6), rows(7)])
    os.kill(before, signal.SIGKILL)
    ray.get([waiting, broker.ensure.remote([rows(8)])], timeout=60)
    assert ray.get(broker.pid.remote()) != before and all(map(store.has, map(rows, (6, 7, 8))))
    told = Journal(cluster / "logs" / "death").lines(of_this_run=False)
    assert [line["cause"] for line in told if line["cause"] == "broker"] == ["broker"]
    assert rows(5).key not in {stage["key"] for stage in ray.get(broker.snapshot.remote())["finished"]}


def test_two_brokers_of_one_store_make_a_stage_once(cluster: Path) -> None:
    """As two drivers of sweeps that share stages have."""
    import ray

    first = new_broker(cluster, "both")[0]
    other = Store(str(cluster / "both"), owner=f"{lease.machine()}-{os.getppid()}-{lease._began(os.getppid())}")
    second = execute.broker(other, Execution(root=other.root), cluster / "logs" / "other")
    wanted = [rows(number) for number in range(20, 32)]
    ray.get([broker.ensure.remote(wanted) for broker in (first, second)], timeout=120)
    made = [ray.get(broker.snapshot.remote())["finished"] for broker in (first, second)]
    assert sorted(stage["key"] for each in made for stage in each) == sorted(stage.key for stage in wanted)
    assert not list((cluster / "both" / "notes").glob("claims-*"))


@pytest.mark.parametrize(("how", "seed"), [("truncated", 2), ("altered", 3)])
def test_an_input_that_is_damaged_is_made_again_by_the_run_and_never_used(
    how: str, seed: int, shared: tuple[Any, Store]
) -> None:
    import ray

    broker, store = shared
    below = rows(9, seed)
    before = set((store.local / "damaged").glob("*"))
    above = Stage("data", {**rows(5).config, "seed": 1}, {"exclude_test": below})
    ray.get(broker.ensure.remote([below]), timeout=60)
    file = store.path(below) / "rows.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-40] if how == "truncated" else whole.replace("user", "resu"))
    ray.get(broker.ensure.remote([above]), timeout=60)
    assert file.read_text() == whole and store.has(above)
    [aside] = {*(store.local / "damaged").iterdir()} - before
    assert (aside / "rows.jsonl").read_text() != whole


def test_light_stages_share_one_process_which_is_replaced_when_it_dies(cluster: Path) -> None:
    import psutil
    import ray

    def hands() -> set[int]:
        found = psutil.Process().children(recursive=True)
        return {p.pid for p in found if p.status() != "zombie" and "ray::Hand" in " ".join(p.cmdline())}

    before = hands()
    broker, store = new_broker(cluster, "hand")
    ray.get(broker.ensure.remote([rows(number) for number in range(10, 16)]), timeout=60)
    [pid] = hands() - before
    os.kill(pid, signal.SIGKILL)
    ray.get(broker.ensure.remote([rows(16)]), timeout=60)
    assert store.has(rows(16)) and pid not in hands()


def test_a_plugin_is_known_to_the_process_that_runs_its_stage_and_a_changed_one_after_it(
    shared: tuple[Any, Store], tmp_path: Path
) -> None:
    """By its text: the file is gone when the stage runs."""
    import ray

    from safecl import registry, tasks

    broker, store = shared
    for answer in ("first", "second"):
        file = tmp_path / "mine.py"
        file.write_text(
            "from safecl.tasks import Row, Task\n\n\nclass Mine(Task):\n    SPLITS = ('user',)\n\n"
            f"    def rows(self, split, num_rows, seed):\n        return [Row('0', 'ask', {answer!r})]\n"
        )
        registry.use([str(file)])
        version = f"1+{tasks.load('mine').VERSION}"
        config = {
            **rows(1).config,
            "parts": [
                {"task": "mine", "split": "user", "num_rows": 1, "source": {"generated": tasks.load("mine").VERSION}}
            ],
        }
        stage = Stage("data", config, version=version, hints=registry.hints(version))  # type: ignore[arg-type]
        registry.use([])
        file.unlink()
        ray.get(broker.ensure.remote([stage]), timeout=60)
        assert f'"response": "{answer}"' in (store.path(stage) / "rows.jsonl").read_text()


def test_what_a_killed_actor_had_reserved_is_free_again(shared: tuple[Any, Store]) -> None:
    """Ray keeps it for as long as the driver lives. A trainer's controller reserves its workers' resources so."""
    import ray
    from ray.util.placement_group import placement_group

    from safecl import reclaim

    broker, _ = shared
    ray.get(broker.ensure.remote([rows(7)]), timeout=60)

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self) -> int:
            ray.get(placement_group([{"CPU": 1}]).ready())
            return os.getpid()

    def free() -> float:
        return ray.available_resources().get("CPU", 0.0)

    def wait_until(what: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not what():
            assert time.monotonic() < until
            time.sleep(0.05)

    before, controller = free(), Controller.remote()
    pid = ray.get(controller.reserve.remote())
    wait_until(lambda: free() == before - 1)
    assert reclaim.free() == 0, "its actor lives"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: free() == before)


def test_no_garbage_is_looked_for_while_ray_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.60 ends the process if another thread frees an ObjectRef meanwhile, which the search's garbage holds."""
    import ray

    seen = list[bool]()
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append(gc.isenabled()))
    ray_cluster.stop(Execution(), "")
    assert seen == [False] and gc.isenabled()


def test_a_cluster_that_is_too_small_is_named_before_anything_is_held(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_start_local", lambda resources: None)  # the test's own is there
    with pytest.raises(PrerequisiteError, match=r"a run needs 10000 CPUs at once \(execution.num_workers 10000"):
        ray_cluster.start(Execution(root=str(tmp_path), num_workers=10000), tmp_path)


def test_what_a_search_waits_for_goes_first_though_a_row_asked_for_it_before(tmp_path: Path) -> None:
    """The guard's held-out answers (rank 2) want theta_safe's answers, which a search (rank 0) measures its bounds from."""
    seen: list[tuple[str, int]] = []
    below = rows(20)
    above = Stage("generate", {}, {"rows": below})

    async def scenario() -> None:
        may_go = asyncio.Event()

        class Told(execute.Broker):
            async def _run(self, stage: Stage, heavy: bool) -> float:
                await may_go.wait()
                seen.append((stage.kind, self.turns[stage.key].rank))
                return 0.0

        none = Capacity("GPU", 0, 1, 1, 1)  # no trainer is started
        broker = Told(Store(str(tmp_path)), Execution(root=str(tmp_path)), "", 2, none)
        works = [
            Work(stage, 1, Turn.of(Claim(rank=2), 1.0, 1), asyncio.get_running_loop().create_future())
            for stage in (rows(21), below)
        ]
        for work in works:  # as if it waited for a trainer
            broker.trainers.queue.put(work, work.turn)
        asked = [asyncio.create_task(broker.ensure([above], Claim(rank=2)))]
        await asyncio.sleep(0.01)
        asked.append(asyncio.create_task(broker.ensure([above], Claim(rank=0))))
        await asyncio.sleep(0.01)
        assert broker.trainers.queue.first(0.0, 0.0) is works[1]
        may_go.set()
        await asyncio.gather(*asked)
        assert not broker.turns and not broker.running

    asyncio.run(scenario())
    assert seen == [("data", 0), ("generate", 0)]


def test_a_stage_of_a_new_kind_is_run_where_its_file_says(shared: tuple[Any, Store]) -> None:
    import ray

    from tests.stages import beside

    broker, store = shared
    echo = beside.Outside("echo", {"text": "a b"})
    ray.get(broker.ensure.remote([echo]), timeout=60)
    assert (store.path(echo) / "said.txt").read_text() == "a b"


def test_what_the_platform_has_told_ray_is_read(cluster: Path) -> None:
    import ray
    from ray.core.generated.autoscaler_pb2 import ClusterConfig
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    from safecl.capacity import find, lacking

    joined = Execution(address="auto", use_gpu=True, num_workers=4)
    there = ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE
    key = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY
    assert "4 GPUs at once (execution.num_workers 4" in lacking(joined)
    assert "the cluster has 0, nothing says that autoscaling may bring more" in lacking(joined)
    assert lacking(joined.model_copy(update={"may_bring": 4})) == ""
    assert "may bring 3 by autoscaling (execution.may_bring)" in lacking(joined.model_copy(update={"may_bring": 3}))
    config = ClusterConfig()
    for each, count in ((1, 8), (4, 2), (8, 0)):
        group = config.node_group_configs.add(max_count=count)
        group.resources["GPU"] = each
    _internal_kv_put(key, config.SerializeToString(), namespace=there)
    try:
        assert find(joined, "GPU") == (0, 0, 16, 4, "the cluster")
        assert lacking(joined) == ""
        large = lacking(joined.model_copy(update={"engine_units": 8.0}))
        assert "an engine needs 8 GPUs on one node" in large and "4 on one" in large
        config.node_group_configs[0].max_count = -1
        _internal_kv_put(key, config.SerializeToString(), namespace=there)
        assert find(joined, "GPU").may == float("inf")
    finally:
        _internal_kv_del(key, namespace=there)
