"""Trainers: long-lived Ray Train runs whose workers run one heavy stage after the other.

A worker needs about 15 s of CPU to start (torch, transformers, peft, Ray Train). Many finetunes take less. So each
trainer is one Ray Train run of `num_workers` ranks, which ask for work until there has been none for a while:

    Broker -- Trainers.run(stage) --> queue --> take <-- worker (rank 0 .. num_workers - 1), in a loop
                                                done <-- its outcome

A stage whose kind says `all_ranks` (a finetune) is given to all ranks of a trainer at once. Any other stage needs one
rank, and ranks take such stages one by one. When a worker dies, Ray Train starts its ranks again and the stage is given
out again; a finetune continues from its checkpoint. A stage that lost its worker `max_failures` times without a newer
checkpoint in between fails, and no other stage does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.base import ConfigError, Damaged, Infrastructure, PrerequisiteError, importing
from safecl.capacity import Capacity, reserved
from safecl.config import Execution
from safecl.devices import Holder
from safecl.faults import MEMORY, PATIENCE_S, PATIENT, PAUSE_S, Journal, cause_of, kind_of
from safecl.lender import Lender
from safecl.order import UNNAMED, Queue, Turn
from safecl.stages import load
from safecl.store import Place, Stage, Store
from safecl.work import free_heap, run_stage

READY_S = 0.02
GROUP = "trainers"
# Seconds until a trainer's workers must be placed. Else it is given up, and the stages that wait for it get an error.
START_S = 600
# Errors that every rank would raise again, so the stage is not tried again.
REFUSALS = (ConfigError, PrerequisiteError, FloatingPointError)


@dataclass(eq=False)
class Work:
    """A heavy stage that is queued or running."""

    stage: Stage
    num_ranks: int
    turn: Turn
    done: asyncio.Future[None]
    ready: bool = False
    failures: list[Exception] = field(default_factory=list)  # one for each time it was lost since its newest checkpoint
    saved: int = 0  # steps in its newest checkpoint of this run
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())


@dataclass(eq=False)
class Trainer:
    """One Ray Train run as the Broker sees it."""

    name: str
    holder: Holder
    group: str = ""  # identifies its present ranks: the Ray actor id of their first one; empty before they have started
    waiting: dict[int, asyncio.Future[tuple[Stage, int] | None]] = field(default_factory=dict)  # ranks without work
    work: dict[int, Work] = field(default_factory=dict)  # rank -> its work


class Trainers:
    """The pool of trainers. It lives in the Broker, on its event loop. The lender (devices.py) decides how many
    trainers there are.

    `on_start` is called with each stage that is given out. `ahead` gives the seconds of all training that was asked for and
    has not begun, and `coming_s` of order.Queue.first. `begin` and `end` are called when a trainer's start begins, with
    (what, name), and when its workers have come or it is given up, with (name).
    """

    def __init__(
        self,
        store: Store,
        execution: Execution,
        logs: str,
        lender: Lender,
        capacity: Capacity,
        on_start: Callable[[Stage], None],
        ahead: Callable[[], tuple[float, float]],
        begin: Callable[[str, str], None],
        end: Callable[[str], None],
    ) -> None:
        self.store, self.execution, self.logs = store, execution, logs
        self.on_start, self.ahead, self._begin, self._end = on_start, ahead, begin, end
        self.journal = Journal(Path(logs))
        self.lender = lender
        self.num_trainers = capacity.num_trainers
        lender.add(GROUP, self, capacity.trainer, self.num_trainers)
        self.expected = 0  # heavy stages that wait for their inputs, are queued or running
        self.queue: Queue[Work] = Queue()
        self.trainers: dict[str, Trainer] = {}
        self.started = 0
        self.fits: set[asyncio.Task[None]] = set()

    def expect(self, num: int) -> None:
        """Announce `num` more (or fewer, if negative) heavy stages. Trainers then start while the stages' inputs are
        made."""
        self.expected += num
        self._tell()

    def hurry(self, stage: Stage, turn: Turn) -> None:
        """Give a queued stage another turn."""
        for work in [work for work in self.queue if work.stage.key == stage.key]:
            work.turn = turn
            self.queue.put(work, turn)
            self._tell()

    def safe(self, key: str, step: int) -> None:
        """Note that a running stage has written a checkpoint. Losing a machine now and then thus never fails a stage
        that makes progress."""
        for work in {id(w): w for trainer in self.trainers.values() for w in trainer.work.values()}.values():
            if work.stage.key == key and step > work.saved:
                work.saved, work.failures = step, []

    async def run(self, stage: Stage, turn: Turn | None = None) -> None:
        """Run a stage; returns when a trainer has published it. `order.Queue` says which of the waiting stages is next.
        Raises the stage's error, or Infrastructure if its workers died too often."""
        num_ranks = self.execution.num_workers if load(stage.kind).all_ranks else 1
        work = Work(stage, num_ranks, turn or Turn.of(UNNAMED, 0.0, 0), asyncio.get_running_loop().create_future())
        self.queue.put(work, work.turn)
        asyncio.get_running_loop().call_later(READY_S, self._is_ready, work)
        await work.done

    def _is_ready(self, work: Work) -> None:
        """Stages that become ready together (all wait for one model) are given out by turn, not in the order of their
        wake-up."""
        work.ready = True
        self._tell()

    async def take(self, name: str, rank: int, group: str) -> tuple[Stage, int] | None:
        """Called by a worker without work. Returns its next stage and the number of ranks that share it; None if the
        worker shall end. `group` is the same for all ranks that Ray Train started together."""
        trainer = self.trainers.get(name)
        if trainer is None:
            return None
        if trainer.group not in ("", group):  # Ray Train has started the ranks again; any of them may ask first
            self._lost(trainer, Infrastructure("its worker died"))
            if name not in self.trainers:  # its units went to other holders that waited for them
                return None
        trainer.group = group
        self._end(name)
        given: asyncio.Future[tuple[Stage, int] | None] = asyncio.get_running_loop().create_future()
        trainer.waiting[rank] = given
        self.lender.up(trainer.holder)
        self._tell()
        return await given

    async def done(self, name: str, rank: int, key: str, error: Exception | None) -> None:
        """Called by the rank that published a stage, or by one that failed."""
        trainer = self.trainers.get(name)
        work = trainer.work.get(rank) if trainer is not None else None
        if trainer is None or work is None or work.stage.key != key:
            return
        trainer.work = {r: other for r, other in trainer.work.items() if other is not work}
        self.lender.work(trainer.holder, -1)
        if error is None:
            work.done.set_result(None)
        elif isinstance(error, REFUSALS) or (kind_of(error) == "trial" and not load(work.stage.kind).runs_anew):
            work.done.set_exception(error)
        else:
            self._again(work, error)
        self._tell()

    def give(self) -> None:
        """Give queued stages, in order, to the waiting ranks."""
        for trainer in self.trainers.values():
            # Whether a rank waits is asked first: what is next takes a look at all that is to come.
            while trainer.holder.open and trainer.waiting and (work := self._next()) is not None and work.ready:
                if work.num_ranks > len(trainer.waiting):
                    break
                self.queue.remove(work)
                self.lender.work(trainer.holder, 1)
                self.on_start(work.stage)
                for rank in sorted(trainer.waiting)[: work.num_ranks]:
                    trainer.work[rank] = work
                    trainer.waiting.pop(rank).set_result((work.stage, work.num_ranks))

    def _next(self) -> Work | None:
        training_s, coming_s = self.ahead()
        return self.queue.first(training_s / max(1, len(self.trainers)), coming_s)

    def _tell(self) -> None:
        """Tell the lender how much work there is. It decides how many trainers there are and which ones work."""
        under_way = [work for trainer in self.trainers.values() for work in dict.fromkeys(trainer.work.values())]
        every = [*self.queue, *under_way]
        wanted = -(-sum(work.num_ranks for work in every) // self.execution.num_workers)
        # The trainers' queue is long from the start. The engines' queues come from the trainers' results.
        wanted = min(wanted, self.num_trainers)
        rank = min((work.turn.level for work in every), default=0)
        self.lender.ask(GROUP, wanted, rank, max(0, self.expected - len(every)))

    def start(self, holder: Holder) -> None:
        """Start a trainer that holds these units."""
        self.started += 1
        trainer = Trainer(f"trainer-{self.store.short}-{os.getpid()}-{self.started}", holder)
        self.trainers[trainer.name] = trainer
        task = asyncio.create_task(self._hold(trainer))
        self.fits.add(task)
        task.add_done_callback(self.fits.discard)

    def stop(self, holder: Holder) -> None:
        """End an idle trainer. Its ranks learn it when they ask for work."""
        # None is found if its workers were just lost: `_hold` is about to report that it is gone.
        for trainer in [trainer for trainer in self.trainers.values() if trainer.holder is holder]:
            self.trainers.pop(trainer.name)
            for given in trainer.waiting.values():
                given.set_result(None)
            trainer.waiting = {}

    async def _hold(self, trainer: Trainer) -> None:
        import ray

        self._begin("trainer", trainer.name)
        me = ray.get_runtime_context().current_actor
        loop = asyncio.get_running_loop()
        why: Exception | None = None
        with ThreadPoolExecutor(1) as thread:
            try:
                await loop.run_in_executor(thread, fit, trainer.name, self.store, self.execution, self.logs, me)
            except Exception as error:  # more restarts than allowed, or it never started
                why = Infrastructure(f"{type(error).__name__}: {error}")
        self.trainers.pop(trainer.name, None)
        self._end(trainer.name)
        try:
            never_came = why is not None and not trainer.group and self.lender.never_came(trainer.holder)
            if why and not trainer.group and not never_came and (work := self._next()) is not None:
                self.queue.remove(work)
                self._again(work, why)  # else a trainer that cannot start is restarted forever
            self._lost(trainer, why or Infrastructure("its trainer ended"))
        finally:  # units that are not given back would be missing until the run's end
            self.lender.gone(trainer.holder)
        self._tell()

    def _lost(self, trainer: Trainer, why: Exception) -> None:
        """The trainer's workers are gone: give their stages out again."""
        waiting, lost = trainer.waiting, dict.fromkeys(trainer.work.values())
        trainer.waiting, trainer.work = {}, {}
        for given in waiting.values():
            given.cancel()
        for work in lost:
            self.lender.work(trainer.holder, -1)
            self._again(work, why)
        self._tell()

    def _queue_again(self, work: Work) -> None:
        work.ready = True
        self.queue.put(work, work.turn, again=True)
        self._tell()

    def _again(self, work: Work, why: Exception) -> None:
        self.journal.add(cause_of(why), f"{work.stage.kind} {work.stage.key[:12]}", why)
        cause, loop = cause_of(why), asyncio.get_running_loop()
        if cause in PATIENT and loop.time() - work.began < PATIENCE_S:
            loop.call_later(PAUSE_S, self._queue_again, work)
            return
        work.failures.append(why)
        # Each time memory was too small, half the rows per forward pass are tried.
        halvings = self.execution.micro_batch_size.bit_length() if cause is MEMORY else 0
        if len(work.failures) <= self.execution.max_failures + halvings:
            self._queue_again(work)
        elif not work.done.done():
            if kind_of(why) == "trial":  # it raised this error each time
                work.done.set_exception(why)
                return
            lost = f"{work.stage.kind} {work.stage.key[:12]} lost its workers {len(work.failures)} times"
            last = f"{type(why).__name__}: {why}"
            work.done.set_exception(Infrastructure(f"{lost} (execution.max_failures {len(work.failures) - 1}): {last}"))


def fit(name: str, store: Store, execution: Execution, logs: str, broker: Any) -> None:
    """Hold one Ray Train run until its workers are told to end. Raises if they died too often."""
    settings = {
        # Workers only ask for work, so this is also the delay until a death is seen.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # The default of 60 s fails a run whose nodes the autoscaler is still starting.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a sweep file are relative to the folder where it is run
    }
    if execution.address == "local":  # this machine is not reclaimed: one process less to start
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    with importing():
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

    folder = Path(logs) / "train"
    trainer = _trainer_class()(
        worker,
        train_loop_config={"name": name, "store": store, "execution": execution, "broker": broker},
        torch_config=TorchConfig(backend="nccl" if execution.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=execution.num_workers,
            use_gpu=execution.use_gpu,
            resources_per_worker={"CPU": 1, **reserved(execution, execution.worker_units)},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=execution.max_failures, controller_failure_limit=2),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)


def tidy(logs: Path, live: Collection[str]) -> None:
    """Remove the files that Ray Train wrote for trainers, which are never read. Those of owners in `live` (Store.short)
    are kept."""
    for folder in (logs / "train").glob("trainer-*"):
        if folder.name.split("-")[1] not in live:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        (logs / "train").rmdir()


def _trainer_class() -> Any:
    from ray.train.torch import TorchTrainer

    # Each of these starts a process. One hands out Ray Data sets, which are not used. The other frees the placement
    # group of a controller that died, which reclaim.py does.
    left_out = {"DatasetsCallback", "PlacementGroupCleanerCallback"}

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [made for made in super()._create_default_callbacks() if type(made).__name__ not in left_out]

    return Trainer


def worker(loop: dict[str, Any]) -> None:
    """The loop of each rank of a trainer: take a stage, run it, report the outcome."""
    import ray
    import ray.train

    context = ray.train.get_context()
    rank, name, broker = context.get_world_rank(), loop["name"], loop["broker"]
    device = "cpu"
    if loop["execution"].use_gpu:
        import ray.train.torch

        device = str(ray.train.torch.get_device())
    with importing():
        _import_what_stages_need()
    group = [ray.get_runtime_context().get_actor_id()]
    if context.get_world_size() > 1:
        import torch

        torch.distributed.broadcast_object_list(group)
    while (given := ray.get(broker.take.remote(name, rank, group[0]))) is not None:
        stage, num_ranks = given
        place = Place(rank if num_ranks > 1 else 0, num_ranks, device)
        error: Exception | None = None
        try:
            run_stage(stage, loop["store"], loop["execution"], broker, place=place)
        except Exception as raised:
            error = _portable(raised)
        if error is not None or place.rank == 0:
            ray.get(broker.done.remote(name, rank, stage.key, error))
        if error is not None and not isinstance(error, REFUSALS) and (num_ranks > 1 or device != "cpu"):
            raise error  # other ranks may wait for this one, and a CUDA error makes the process unusable
        error = None  # its traceback keeps the stage's objects alive
        _free_memory(device)


def _import_what_stages_need() -> None:
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from safecl.serving import client  # noqa: F401
    from safecl.training import batches, engine, loop, losses, model, tokens, weights  # noqa: F401


def _portable(error: Exception) -> Exception:
    """The error itself if every process can rebuild it from its text, else a new error with its text. Some exceptions
    of libraries cannot be unpickled."""
    if kind_of(error) == "infrastructure":  # only this process can see that by the error's type
        return Infrastructure(f"{type(error).__name__}: {error}")
    if type(error) in (*REFUSALS, Damaged, RuntimeError, ValueError, KeyError, TypeError, AssertionError):
        return error
    for kind in REFUSALS:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def _free_memory(device: str) -> None:
    """Free the memory that a stage held, so that the next stage's estimate of free memory is right."""
    gc.collect()
    if device == "cpu":
        free_heap()
    else:
        import torch

        torch.cuda.empty_cache()
