"""The gate alone: asyncio, no engine."""

from __future__ import annotations

import asyncio
import time

import pytest

from safecl.serving.gate import Gate, GateBroken


def gate_with_log(turn_s: float, swap_s: float = 0.0, linger_s: float = 0.0) -> tuple[Gate[str], list[str]]:
    swaps: list[str] = []

    async def swap(key: str, target: str) -> None:
        assert gate.in_flight == 0, "a swap began with work in flight"
        await asyncio.sleep(swap_s)
        swaps.append(key)

    gate: Gate[str] = Gate(swap, turn_s, linger_s)
    return gate, swaps


def test_every_request_sees_its_own_key_for_as_long_as_it_runs() -> None:
    async def scenario() -> list[str]:
        gate, swaps = gate_with_log(turn_s=0.01, swap_s=0.001)

        async def ask(number: int) -> None:
            key = "abc"[number % 3]
            await asyncio.sleep((number * 7 % 11) * 0.002)
            async with gate.admit(key, key):
                for _ in range(3):
                    assert gate.key == key
                    await asyncio.sleep(0.001)

        await asyncio.gather(*(ask(number) for number in range(90)))
        assert gate.in_flight == gate.num_waiting == 0
        return swaps

    assert set(asyncio.run(scenario())) == set("abc")


def test_a_key_that_never_pauses_does_not_starve_another_one() -> None:
    async def scenario() -> tuple[float, int]:
        gate, swaps = gate_with_log(turn_s=0.1)
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                async with gate.admit("busy", ""):
                    await asyncio.sleep(0.003)

        # Two askers out of step: without turns the number in flight is never 0.
        busy = [asyncio.create_task(keep_asking())]
        await asyncio.sleep(0.0015)
        busy.append(asyncio.create_task(keep_asking()))
        await asyncio.sleep(0.02)
        began = time.monotonic()
        async with asyncio.timeout(5), gate.admit("other", ""):
            waited = time.monotonic() - began
        await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*busy)
        return waited, len(swaps)

    waited, num_swaps = asyncio.run(scenario())
    assert waited >= 0.09, "the busy key was not given its turn"
    assert num_swaps == 3, "busy, other, and busy again"


def test_a_batch_keeps_the_engine_while_its_turn_lasts() -> None:
    async def scenario() -> list[str]:
        gate, swaps = gate_with_log(turn_s=60, linger_s=0.05)

        async def batch(key: str) -> None:
            limit = asyncio.Semaphore(2)

            async def one(number: int) -> None:
                async with limit:
                    async with gate.admit(key, key):
                        await asyncio.sleep(0.001 + 0.0005 * (number % 3))
                    await asyncio.sleep(0.002)  # the answer travels to the client, then the next request to the engine

            await asyncio.gather(*(one(number) for number in range(20)))

        await asyncio.gather(batch("a"), batch("b"))
        return swaps

    assert asyncio.run(scenario()) == ["a", "b"]


@pytest.mark.parametrize("rank, expected", [(0, ["a", "b", "search"]), (1, ["a", "search", "b", "a"])])
def test_a_lower_rank_goes_first(rank: int, expected: list[str]) -> None:
    """Rows of a and b (`rank`) come before a search's request of rank 0; a has more on the way when it does."""

    async def scenario() -> list[str]:
        gate, swaps = gate_with_log(turn_s=60, linger_s=0.02)

        async def ask(key: str, rank: int, after_s: float) -> None:
            await asyncio.sleep(after_s)
            async with gate.admit(key, key, rank):
                await asyncio.sleep(0.03)

        rows = [ask("a", rank, 0), ask("b", rank, 0.005), ask("a", rank, 0.025)]
        async with asyncio.timeout(2):
            await asyncio.gather(*rows, ask("search", 0, 0.015))
        assert gate.in_flight == gate.num_waiting == 0
        return swaps

    assert asyncio.run(scenario()) == expected


def test_within_one_key_too_a_higher_rank_waits_until_nobody_ranks_before_it() -> None:
    async def scenario() -> list[str]:
        gate, _ = gate_with_log(turn_s=60)
        order: list[str] = []

        async def ask(name: str, key: str, rank: int, after_s: float) -> None:
            await asyncio.sleep(after_s)
            async with gate.admit(key, key, rank):
                order.append(name)
                await asyncio.sleep(0.02)

        async with asyncio.timeout(2):
            await asyncio.gather(
                ask("first", "guard", 1, 0),
                ask("search", "tuned", 0, 0.005),
                ask("row", "guard", 1, 0.01),
                ask("search's verdict", "guard", 0, 0.012),
            )
        return order

    assert asyncio.run(scenario()) == ["first", "search's verdict", "search", "row"]


def test_after_a_failed_swap_nobody_is_admitted_and_no_key_is_held() -> None:
    async def scenario() -> None:
        async def swap(key: str, target: str) -> None:
            if key == "bad":
                raise OSError("no such file")

        gate: Gate[str] = Gate(swap, 60)
        async with gate.admit("good", ""):
            waiting = [asyncio.create_task(gate.admit(key, "").__aenter__()) for key in ("bad", "bad", "third")]
            await asyncio.sleep(0.01)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, GateBroken) for result in results), results
        assert gate.key is None and isinstance(gate.broken, OSError)
        with pytest.raises(GateBroken, match="no such file"):
            async with gate.admit("good", ""):
                pass

    asyncio.run(scenario())


def test_a_cancelled_request_neither_stops_a_swap_nor_holds_the_gate() -> None:
    async def scenario() -> list[str]:
        gate, swaps = gate_with_log(turn_s=60, swap_s=0.02)

        async def ask(key: str) -> None:
            async with gate.admit(key, key):
                await asyncio.sleep(0)

        first = asyncio.create_task(ask("a"))
        await asyncio.sleep(0.005)  # the swap to a is under way
        first.cancel()
        async with asyncio.timeout(2):
            await ask("a")
            async with gate.admit("a", "a"):
                queued = asyncio.create_task(ask("b"))
                await asyncio.sleep(0)
                queued.cancel()
                await asyncio.gather(queued, return_exceptions=True)
                assert gate.num_waiting == 0
        await ask("c")
        assert gate.in_flight == 0
        return swaps

    assert asyncio.run(scenario()) == ["a", "c"]
