"""Gate: admits the requests of one weights key at a time to an engine. Pure asyncio, independent of vLLM.

A request for the current key is admitted at once. If another key waits, the current key keeps the engine until one of two
things happens. Either none of its requests has been in flight for `linger_s` (a short pause is normal: answers of equal
length end together, and the next requests are still on the way). Or its turn of `turn_s` is over. Then its newer requests
wait too, and those in flight finish. Next, the key whose oldest request has waited longest is swapped in. So a key neither
starves the others nor is swapped out at every short pause.

Requests of a lower `rank` go first: a request waits while another key has a waiting request of a lower rank. The reason: the
rounds of a search follow one another, and an engine busy with a reference row would delay all of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


class GateBroken(RuntimeError):
    """A swap failed. The engine's weights are unknown, so no request is admitted any more."""


@dataclass
class _Queue(Generic[T]):
    target: T
    since: float
    futures: dict[asyncio.Future[None], int] = field(default_factory=dict)  # to their ranks

    @property
    def rank(self) -> int:
        return min(self.futures.values())


class Gate(Generic[T]):
    """Admits requests of one weights key at a time.

    `swap(key, target)` loads other weights; it is awaited only while nothing is in flight. `turn_s` is how long (seconds) the
    current key is still admitted while another key waits. `linger_s` is how long (seconds) the current key must have been
    idle before another key gets the engine within that time.
    """

    def __init__(self, swap: Callable[[str, T], Awaitable[None]], turn_s: float, linger_s: float = 0.2) -> None:
        self.key: str | None = None  # key of the engine's weights; None at the start, during a swap, after a failed one
        self.in_flight = 0
        self.num_swaps = 0
        self.broken: BaseException | None = None
        self._swap = swap
        self._turn_s = turn_s
        self._linger_s = linger_s
        self._idle_since = self._turn_began = time.monotonic()
        self._queues: dict[str, _Queue[T]] = {}
        self._swapping: asyncio.Task[None] | None = None

    @property
    def swapping(self) -> bool:
        return self._swapping is not None

    @property
    def num_waiting(self) -> int:
        return sum(len(queue.futures) for queue in self._queues.values())

    @asynccontextmanager
    async def admit(self, key: str, target: T, rank: int = 0) -> AsyncIterator[None]:
        """Hold the engine with the weights of `key` for the length of the block. Raises GateBroken once a swap has failed."""
        await self._enter(key, target, rank)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, key: str, target: T, rank: int) -> None:
        if self.broken is not None:
            raise GateBroken(f"swap failed earlier: {self.broken!r}")
        if key == self.key and self._swapping is None and not self._turn_over() and rank <= self._first_rank():
            self.in_flight += 1
            return
        queue = self._queues.setdefault(key, _Queue(target, time.monotonic()))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.futures[future] = rank
        self._advance()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._leave()  # admitted and cancelled in the same tick
            else:
                queue.futures.pop(future, None)
                if not queue.futures and self._queues.get(key) is queue:
                    del self._queues[key]
                self._advance()
            raise

    def _leave(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle_since = time.monotonic()
        self._advance()

    def _others(self) -> list[str]:
        return [key for key in self._queues if key != self.key]

    def _first_rank(self) -> float:
        """The lowest rank of all requests that wait for another key. Infinity if there are none."""
        return min((self._queues[key].rank for key in self._others()), default=math.inf)

    def _turn_over(self) -> bool:
        others = self._others()
        if not others:
            return False
        began = max(self._turn_began, min(self._queues[key].since for key in others))
        return time.monotonic() - began >= self._turn_s

    def _advance(self) -> None:
        """Admit the waiting requests of the current key if its turn is not over. Else start the next swap once nothing is in
        flight."""
        if self._swapping is not None or self.broken is not None:
            return
        if self.key is not None and self.key in self._queues and not self._turn_over():
            self._open(self.key)
        others = self._others()
        if others and self.in_flight == 0:
            linger_s = self._idle_since + self._linger_s - time.monotonic()
            if self.key is not None and linger_s > 0 and not self._turn_over():
                asyncio.get_running_loop().call_later(linger_s, self._advance)
                return
            key = min(others, key=lambda other: (self._queues[other].rank, self._queues[other].since))
            self._swapping = asyncio.get_running_loop().create_task(self._run_swap(key, self._queues[key].target))

    def _open(self, key: str) -> None:
        queue, first = self._queues.pop(key), self._first_rank()
        for future in [future for future, rank in queue.futures.items() if rank <= first]:
            del queue.futures[future]
            if not future.done():
                self.in_flight += 1
                future.set_result(None)
        if queue.futures:
            self._queues[key] = queue

    async def _run_swap(self, key: str, target: T) -> None:
        # Runs as its own task, because the request that caused the swap may be cancelled during it.
        self.key = None
        try:
            await self._swap(key, target)
        except BaseException as error:
            self.broken = error
            for queue in self._queues.values():
                for future in queue.futures:
                    if not future.done():
                        future.set_exception(GateBroken(f"swap to {key} failed: {error!r}"))
            self._queues.clear()
            if not isinstance(error, Exception):
                raise
        else:
            self.key, self.num_swaps = key, self.num_swaps + 1
            self._idle_since = self._turn_began = time.monotonic()
        finally:
            self._swapping = None
        if self.broken is None:
            if key in self._queues:
                self._open(key)
            self._advance()
