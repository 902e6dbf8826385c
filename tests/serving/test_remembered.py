"""A question is answered once, however many ask it, and whoever of them leaves."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from safecl.serving import engine
from safecl.serving.remembered import Remembered


class Answering:
    """Answers when it is let; counts how often it was asked, and how often it was cancelled."""

    def __init__(self) -> None:
        self.asked = self.cancelled = 0
        self.let = asyncio.Event()

    async def __call__(self) -> str:
        self.asked += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"answer {self.asked}"


def is_one(found: str) -> bool:
    return found != "answer 1"


async def _under_way(remembered: Remembered[str], answering: Answering, num: int) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(remembered.get("q", answering, lambda found: True)) for _ in range(num)]
    await asyncio.sleep(0.01)
    return tasks


def test_all_who_ask_at_once_share_one_answer_and_later_ones_get_it_too() -> None:
    async def run() -> None:
        remembered, answering = Remembered[str](9), Answering()
        tasks = await _under_way(remembered, answering, 3)
        answering.let.set()
        assert await asyncio.gather(*tasks) == ["answer 1"] * 3
        assert await remembered.get("q", answering, lambda found: True) == "answer 1"
        assert (answering.asked, remembered.num_reused) == (1, 3)
        assert await remembered.get("other", answering, lambda found: True) == "answer 2"

    asyncio.run(run())


def test_what_is_no_answer_is_asked_for_again() -> None:
    async def run() -> None:
        remembered, answering = Remembered[str](9), Answering()
        answering.let.set()
        assert [await remembered.get("q", answering, is_one) for _ in range(3)] == ["answer 1", "answer 2", "answer 2"]

    asyncio.run(run())


def test_one_who_leaves_takes_nothing_from_the_others_and_the_last_one_ends_it() -> None:
    async def run() -> None:
        remembered, answering = Remembered[str](9), Answering()
        first, second = await _under_way(remembered, answering, 2)
        first.cancel()
        await asyncio.sleep(0.01)
        assert answering.cancelled == 0
        second.cancel()
        await asyncio.sleep(0.01)
        assert answering.cancelled == 1
        answering.let.set()
        assert await remembered.get("q", answering, lambda found: True) == "answer 2"

    asyncio.run(run())


def test_an_error_reaches_all_and_is_not_kept() -> None:
    async def fail() -> str:
        await asyncio.sleep(0.01)
        raise OSError("gone")

    async def fine() -> str:
        return "here"

    async def run() -> None:
        remembered = Remembered[str](9)
        both = await asyncio.gather(*(remembered.get("q", fail, bool) for _ in range(2)), return_exceptions=True)
        assert [type(one) for one in both] == [OSError, OSError]
        assert await remembered.get("q", fine, bool) == "here"

    asyncio.run(run())


@pytest.mark.parametrize(("used", "left"), [((0, 1, 2), (1, 2)), ((0, 1, 0, 2), (0, 2))])
def test_the_one_that_was_not_asked_for_the_longest_is_forgotten_first(
    used: tuple[int, ...], left: tuple[int, ...]
) -> None:
    async def run() -> None:
        remembered, asked = Remembered[int](2), []

        async def answer(number: int) -> int:
            asked.append(number)
            return number

        for number in used:
            await remembered.get(number, lambda number=number: answer(number), lambda found: True)  # type: ignore[misc]
        asked.clear()
        for number in left:
            await remembered.get(number, lambda number=number: answer(number), lambda found: True)  # type: ignore[misc]
        assert not asked

    asyncio.run(run())


def test_what_an_engine_remembers_takes_about_100_mb() -> None:
    """Verdicts of a guard: prompts of 400 tokens, answers of three with the 20 likeliest at each."""

    async def run(num: int) -> Remembered[object]:
        remembered = Remembered[object](num)
        for number in range(num):
            likely = [[(f"token {number} {rank}", float(number + rank)) for rank in range(21)] for _ in range(3)]
            found = (f"unsafe {number}", [number, 1, 2], "stop", "weights", likely)

            async def answer(found: object = found) -> object:
                return found

            await remembered.get((number, bytes(4 * 400 + number % 2)), answer, lambda _: True)
        return remembered

    num = 200
    tracemalloc.start()
    try:
        held = asyncio.run(run(num))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held is not None and taken / num * engine._REMEMBERED < 120e6
