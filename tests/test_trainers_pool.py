"""The pool of trainers on its own event loop: Ray Train is replaced by threads that wait, workers by plain calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from safecl import trainers
from safecl.base import ConfigError, Infrastructure
from safecl.capacity import Capacity
from safecl.config import Execution
from safecl.devices import Devices, Holder
from safecl.faults import kind_of
from safecl.lender import Lender
from safecl.order import UNNAMED, Claim, Turn
from safecl.store import Stage, Store
from safecl.trainers import Trainers


class Other:
    """Somebody else who uses units."""

    started = 0

    def start(self, holder: Holder) -> None:
        self.started += 1

    def stop(self, holder: Holder) -> None: ...
    def give(self) -> None: ...


class Pool(Trainers):
    """Trainers whose runs last until `end` says how they ended."""

    def __init__(self, num_units: int, idle_s: float = 300.0, **execution: Any) -> None:
        self.given_out: list[str] = []
        chosen = Execution(**{"num_trials_at_once": 8, "max_failures": 1, **execution})
        held = Capacity("GPU", num_units, chosen.num_workers, 1.0, chosen.num_trials_at_once)
        lender = Lender(Devices(num_units, turn_s=0.05, linger_s=0.01))
        super().__init__(
            Store("unused"),
            chosen,
            "",
            lender,
            held,
            lambda stage: self.given_out.append(stage.kind),
            lambda: (1e9, 0.0),
            lambda *_: None,
            lambda name: None,
        )
        lender.add("trainers", self, held.trainer, held.num_trainers, idle_s)
        self.ends: dict[str, tuple[threading.Event, list[Exception]]] = {}

    def hold(self, name: str, *_: Any) -> None:
        event, errors = self.ends.setdefault(name, (threading.Event(), []))
        event.wait(10)
        if errors:
            raise errors[0]

    def end(self, name: str, error: Exception | None = None) -> None:
        event, errors = self.ends.setdefault(name, (threading.Event(), []))
        errors += [error] if error else []
        event.set()


def play(scene: Callable[[Pool], Awaitable[None]], pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    monkeypatch.setattr(trainers, "fit", pool.hold)

    async def run() -> None:
        try:
            await asyncio.wait_for(scene(pool), 10)
        finally:
            for name in [f"{name}" for name in pool.ends]:
                pool.end(name)

    asyncio.run(run())


def stage(kind: str, number: int = 0) -> Stage:
    return Stage(kind, {"number": number})


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_a_finetune_goes_to_all_ranks_at_once_and_other_stages_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(3)
        [name] = pool.trainers
        memory, finetune = (
            asyncio.create_task(pool.run(stage("memory"))),
            asyncio.create_task(pool.run(stage("finetune"))),
        )
        await settle()
        ranks = [asyncio.create_task(pool.take(name, rank, "w0")) for rank in (0, 1)]
        await settle()
        assert ranks[0].result() == (stage("memory"), 1) and not ranks[1].done()  # the finetune needs both
        await pool.done(name, 0, stage("memory").key, None)
        ranks[0] = asyncio.create_task(pool.take(name, 0, "w0"))
        await settle()
        assert [rank.result() for rank in ranks] == [(stage("finetune"), 2)] * 2
        await pool.done(name, 0, stage("finetune").key, None)
        await asyncio.gather(memory, finetune)
        assert pool.given_out == ["memory", "finetune"]

    play(scene, Pool(2, num_workers=2), monkeypatch)


def test_of_those_that_wait_who_was_asked_for_first_is_next_also_after_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(3)
        [name] = pool.trainers
        turns = [(number, Turn.of(Claim(rank=int(number == 3)), 0.0, number)) for number in (2, 3, 1)]
        tasks = [asyncio.create_task(pool.run(stage("memory", number), turn)) for number, turn in turns]
        await settle()
        assert await pool.take(name, 0, "old") == (stage("memory", 1), 1)
        for number in (1, 2, 3):  # by ranks that were started anew
            assert await pool.take(name, 0, "new") == (stage("memory", number), 1)
            await pool.done(name, 0, stage("memory", number).key, None)
        await asyncio.gather(*tasks)

    play(scene, Pool(1), monkeypatch)


def test_of_what_becomes_ready_together_the_lowest_turn_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(2)
        [name] = pool.trainers
        idle = asyncio.create_task(pool.take(name, 0, "w0"))
        await settle()
        turns = [(number, Turn.of(UNNAMED, 0.0, number)) for number in (2, 1)]
        tasks = [asyncio.create_task(pool.run(stage("memory", number), turn)) for number, turn in turns]
        for number in (1, 2):
            assert await idle == (stage("memory", number), 1)
            await pool.done(name, 0, stage("memory", number).key, None)
            idle = asyncio.create_task(pool.take(name, 0, "w0"))
        await asyncio.gather(*tasks)

    play(scene, Pool(1), monkeypatch)


def test_a_refusal_fails_the_stage_alone_and_another_error_of_a_finetune_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(3)
        [name] = pool.trainers
        tasks = [
            asyncio.create_task(pool.run(one)) for one in (stage("finetune"), stage("finetune", 1), stage("memory"))
        ]
        errors = [ConfigError("no"), OSError("lost"), OSError("lost"), ValueError("wrong")]
        for number, error in enumerate(errors):
            given = await pool.take(name, 0, "w0")
            assert (
                given is not None
                and given[0] == (stage("finetune"), *[stage("finetune", 1)] * 2, stage("memory"))[number]
            )
            await pool.done(name, 0, given[0].key, error)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[0] is errors[0] and found[2] is errors[3]
        assert isinstance(found[1], RuntimeError) and "lost its workers 2 times" in str(found[1])

    play(scene, Pool(1), monkeypatch)


def test_what_a_finetune_raises_every_time_is_its_own_fault_and_not_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        task = asyncio.create_task(pool.run(stage("finetune")))
        for _ in range(2):
            assert await pool.take(name, 0, "w0") == (stage("finetune"), 1)
            await pool.done(name, 0, stage("finetune").key, ValueError("a shape"))
        with pytest.raises(ValueError, match="a shape"):
            await task

    play(scene, Pool(1), monkeypatch)


def test_what_a_dead_worker_did_is_given_to_the_next_one_and_a_trainer_that_cannot_start_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(pool: Pool) -> None:
        task = asyncio.create_task(pool.run(stage("memory")))
        pool.expect(1)
        [name] = pool.trainers
        await settle()
        assert await pool.take(name, 0, "w0") == (stage("memory"), 1)
        assert await pool.take(name, 0, "w1") == (stage("memory"), 1)  # Ray Train replaced the process
        pool.end(name, OSError("died again"))
        with pytest.raises(RuntimeError, match="lost its workers 2 times"):
            await task
        task = asyncio.create_task(pool.run(stage("memory", 1)))
        for _ in range(2):
            await settle()
            [name] = pool.trainers
            pool.end(name, OSError("no torch"))
        with pytest.raises(RuntimeError, match="no torch"):
            await task
        await settle()
        assert not pool.trainers  # nothing is queued: none is started again

    play(scene, Pool(1), monkeypatch)


def test_when_one_rank_dies_what_waits_in_the_other_is_not_given_to_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        task = asyncio.create_task(pool.run(stage("memory")))
        await settle()
        assert await pool.take(name, 0, "old") == (stage("memory"), 1)
        idle = asyncio.create_task(pool.take(name, 1, "old"))
        await settle()
        fresh = [asyncio.create_task(pool.take(name, rank, "new")) for rank in (0, 1)]
        await settle()
        assert idle.cancelled() and fresh[0].result() == (stage("memory"), 1) and not fresh[1].done()
        await pool.done(name, 0, stage("memory").key, None)
        await task

    play(scene, Pool(2, num_workers=2), monkeypatch)


def test_as_many_trainers_as_fit_and_there_is_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(9)  # their inputs are being made: one trainer is started ahead, the next when it is up
        assert len(pool.trainers) == 1
        [name] = pool.trainers
        waiting = [asyncio.create_task(pool.take(name, 0, "w"))]
        await settle()
        assert len(pool.trainers) == 2
        tasks = [asyncio.create_task(pool.run(stage("memory", i))) for i in range(9)]
        await settle()
        assert len(pool.trainers) == 3  # what fits
        other = Other()
        pool.lender.add("judge", other, 1.0, 1)  # an engine needs a unit, and all have had their turn
        pool.lender.ask("judge", 1, 0, 0)
        await asyncio.sleep(0.06)
        for _ in range(9):
            given = waiting[0].result()
            if given is None:
                break
            await pool.done(name, 0, given[0].key, None)
            waiting[0] = asyncio.create_task(pool.take(name, 0, "w"))
            await settle()
        assert waiting[0].result() is None and len(pool.trainers) == 2 and not other.started
        pool.end(name)  # Ray has the unit back
        await settle()
        assert other.started == 1 and len(pool.trainers) == 2
        for task in tasks:
            task.cancel()

    play(scene, Pool(3), monkeypatch)


def test_a_trainer_without_work_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        pool.expect(-1)
        assert await pool.take(name, 0, "w0") is None
        assert not pool.trainers and await pool.take(name, 0, "w0") is None

    play(scene, Pool(1, idle_s=0.05), monkeypatch)


def test_ranks_of_two_attempts_never_share_a_finetune(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of an attempt waits, the attempt dies, and of the next one rank 1 comes first."""

    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        task = asyncio.create_task(pool.run(stage("finetune")))
        await settle()
        stale = asyncio.create_task(pool.take(name, 0, "old"))
        await settle()
        first = asyncio.create_task(pool.take(name, 1, "new"))
        await settle()
        assert stale.cancelled() and not first.done()
        second = asyncio.create_task(pool.take(name, 0, "new"))
        await settle()
        assert first.result() == second.result() == (stage("finetune"), 2)
        await pool.done(name, 0, stage("finetune").key, None)
        await task

    play(scene, Pool(2, num_workers=2), monkeypatch)


def test_what_gets_on_between_two_losses_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is taken back now and then: `max_failures` counts losses without a checkpoint in between."""

    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        long = stage("finetune")
        waiting = asyncio.create_task(pool.run(long))
        await settle()
        for number in range(6):
            assert await pool.take(name, 0, f"workers {number}") == (long, 1)
            pool.safe(long.key, 10 * (number + 1))
        assert await pool.take(name, 0, "workers 6") == (long, 1)
        pool.safe(long.key, 60)  # no further than before
        lost = asyncio.create_task(pool.take(name, 0, "workers 7"))
        with pytest.raises(Infrastructure, match="lost its workers 2 times"):
            await waiting
        lost.cancel()

    play(scene, Pool(1), monkeypatch)


def test_memory_may_be_too_small_as_often_as_rows_a_forward_can_be_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        waiting = asyncio.create_task(pool.run(stage("finetune")))
        tries = 0
        while not waiting.done():
            given = asyncio.create_task(pool.take(name, 0, "w0"))
            await settle()
            if given.done():
                tries += 1
                await pool.done(name, 0, stage("finetune").key, Infrastructure("OutOfMemoryError: CUDA out of memory"))
            else:
                given.cancel()
        # 8, 4, 2 and 1 rows, and that once more (max_failures 1)
        assert tries == 1 + 1 + 4 and kind_of(waiting.exception() or ValueError()) == "infrastructure"

    play(scene, Pool(1, micro_batch_size=8), monkeypatch)


def test_a_full_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "PAUSE_S", 0.05)

    async def scene(pool: Pool) -> None:
        pool.expect(1)
        [name] = pool.trainers
        waiting = asyncio.create_task(pool.run(stage("memory")))
        for _ in range(9):
            assert await pool.take(name, 0, "w0") == (stage("memory"), 1)
            await pool.done(name, 0, stage("memory").key, OSError(28, "No space left on device"))
        assert await pool.take(name, 0, "w0") == (stage("memory"), 1)
        await pool.done(name, 0, stage("memory").key, None)
        await waiting

    play(scene, Pool(1), monkeypatch)
