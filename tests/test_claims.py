"""Stages that several drivers of a store want: each is made once, whoever dies. The drivers are real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safecl import claims, lease
from safecl.claims import NOTE, Claims
from safecl.store import Stage, Store

DRIVER = """
import asyncio, sys, time
from safecl.claims import Claims
from safecl.store import Stage, Store
store = Store(sys.argv[1])

async def one(claims, number):
    stage = Stage("data", {"number": number})
    if not await claims.take(stage):
        print("found", number, flush=True)
        return
    print("makes", number, flush=True)
    await asyncio.sleep(float(sys.argv[3]))
    store.publish(stage, store.new_folder(), {}, 0.0)
    claims.leave(stage)

async def main():
    claims = Claims(store)
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(one(claims, number) for number in range(int(sys.argv[2]))))
    await asyncio.sleep(0.2)

asyncio.run(main())
"""


def driver(root: Path, num: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(root), str(num), str(seconds)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def go(started: subprocess.Popen[str]) -> None:
    assert started.stdin is not None
    started.stdin.write("go\n")
    started.stdin.flush()


def test_what_three_drivers_want_at_once_is_made_once(tmp_path: Path) -> None:
    num = 12
    started = [driver(tmp_path, num, 0.3) for _ in range(3)]
    for one in started:
        go(one)
    said = [line.split() for one in started for line in one.communicate(timeout=60)[0].splitlines()]
    for number in range(num):
        assert sorted(what for what, of in said if of == str(number)) == ["found", "found", "makes"], number
    assert not Store(str(tmp_path)).notes(NOTE)


def test_a_driver_that_was_killed_is_taken_over_from_at_once_and_one_that_lives_is_waited_for(tmp_path: Path) -> None:
    store, stage = Store(str(tmp_path)), Stage("data", {"number": 0})
    holder = driver(tmp_path, 1, 600)
    try:
        go(holder)
        assert holder.stdout is not None and holder.stdout.readline() == "makes 0\n"

        async def take() -> float:
            mine = Claims(store)
            waiting = asyncio.create_task(mine.take(stage))
            await asyncio.sleep(2 * claims.LOOK_S)
            assert not waiting.done() and mine.awaited == {stage.key[: claims.DIGITS]}
            os.kill(holder.pid, signal.SIGKILL)
            began = time.monotonic()
            assert await waiting and not mine.awaited
            mine.leave(stage)
            return time.monotonic() - began

        assert asyncio.run(take()) < 10 * claims.LOOK_S
    finally:
        holder.kill()
        holder.communicate()
    claims.forget_dead(store)
    assert not store.notes(NOTE)


@pytest.mark.parametrize("beats", [True, False])
def test_of_another_machine_the_leases_beat_says_whether_its_driver_lives(
    beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(claims, "LOOK_S", 0.05)
    store, stage, other = Store(str(tmp_path)), Stage("data", {}), "0123456789-17-1"
    store.note(NOTE + other, {"held": [stage.key[: claims.DIGITS]], "wanted": []})
    store.note(lease.NOTE + other, {"beat": 0})

    async def take() -> bool:
        waiting = asyncio.create_task(Claims(store).take(stage))
        for beat in range(20):
            await asyncio.sleep(0.1)
            if beats:
                store.note(lease.NOTE + other, {"beat": beat})
        taken = waiting.done()
        waiting.cancel()
        return taken

    assert asyncio.run(take()) is not beats


def test_claims_that_come_together_are_written_together_and_work_at_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://claims")
    written: list[Any] = []
    note = store.note
    monkeypatch.setattr(store, "note", lambda name, value: (written.append(value), note(name, value)))
    stages = [Stage("data", {"number": number}) for number in range(200)]

    async def take() -> None:
        mine = Claims(store)
        assert all(await asyncio.gather(*(mine.take(stage) for stage in stages)))
        await asyncio.sleep(0.1)
        assert len(store.noted(NOTE + store.owner)["held"]) == len(stages)
        for stage in stages:
            mine.leave(stage)
        await asyncio.sleep(4 * claims.TELL_S)

    asyncio.run(take())
    assert len(written) <= 4 and store.noted(NOTE + store.owner) is None
