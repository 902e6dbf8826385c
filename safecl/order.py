"""The order of ready stages where devices are short. Pure functions, used by a run's Broker and by `plan --cluster`.

From first to last:

1. The user's priority (`execution.turns`).
2. Stages that something else waits for, such as a trial whose result a search needs to suggest the next one.
3. Training that the end of the run waits for: the chain of stages that begins with it takes as long as it will be until
   all waiting training has begun.
4. Cells in turn: the first trial of each cell, then the second of each, so that the seeds of one cell do not delay
   another.
5. The stage at the start of the longest chain of waiting stages (the critical path). But the shortest chain of training, as
   long as the engines of a model could not do what is to come before the end if they got it only after the longest.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

NUM_RANKS = 3  # see Claim
T = TypeVar("T", bound=Hashable)
_Entry = tuple[Any, int, T]


class Claim(NamedTuple):
    """A trial's claim on devices. `rank`: 0 if something else waits for it, 1 for a row of a table, 2 for a result
    beside the table. `round`: number of trials of its cell that began before it, divided by the cell's share."""

    priority: int = 0
    rank: int = 0
    round: float = 0.0


UNNAMED = Claim()


class Turn(NamedTuple):
    """A stage's place in the order; the lowest is next. `chain`: minus the seconds of the longest chain of stages that
    begins with it. `number`: number of the request, so that of equal turns the earlier request is first."""

    priority: int  # minus the claim's
    rank: int
    round: float
    chain: float
    number: int

    @classmethod
    def of(cls, claim: Claim, chain: float, number: int) -> Turn:
        """The turn of a stage with this claim."""
        return cls(-claim.priority, claim.rank, claim.round, -chain, number)

    @property
    def level(self) -> int:
        """One number of priority and rank. A lower level always goes first."""
        return NUM_RANKS * self.priority + self.rank


def chains(seconds: Sequence[float], needs: Sequence[Sequence[int]]) -> list[float]:
    """For each piece of work: seconds from its beginning to the end of the longest chain of others that wait for it.
    `needs`: indices of the pieces that each one waits for, all smaller than its own index."""
    found = list(seconds)
    for place in range(len(found) - 1, -1, -1):
        chain = found[place]
        for other in needs[place]:
            if found[other] < seconds[other] + chain:
                found[other] = seconds[other] + chain
    return found


class Queue(Generic[T]):
    """Training that waits for a trainer, in the order of this module's rules."""

    def __init__(self) -> None:
        self._newest: dict[T, int] = {}  # an item's newest entries in the heaps; others are outdated, and are skipped
        self._num_put = 0
        self._longest: list[_Entry[T]] = []
        self._in_turn: list[_Entry[T]] = []
        self._shortest: list[_Entry[T]] = []

    def __iter__(self) -> Iterator[T]:
        return iter(self._newest)

    def put(self, item: T, turn: tuple[int, int, float, float, int], again: bool = False) -> None:
        """Add an item with its Turn, or give it another one. `again`: before those of an equal turn."""
        self._num_put += 1
        place = self._newest[item] = -self._num_put if again else self._num_put
        priority, rank, rounds, chain, number = turn
        heapq.heappush(self._longest, ((priority, rank, chain, number), place, item))
        heapq.heappush(self._in_turn, (turn, place, item))
        heapq.heappush(self._shortest, ((priority, rank, rounds, -chain, number), place, item))

    def remove(self, item: T) -> None:
        """Remove an item that was put."""
        del self._newest[item]

    def first(self, left_s: float, coming_s: float) -> T | None:
        """The item that is next.

        Args:
            left_s: seconds until all waiting training has begun.
            coming_s: seconds for which the engines of any one model will work on what training has yet to make.
        """
        if self._top(self._longest) is None:
            return None
        (_, _, chain, _), _, item = self._longest[0]
        if -chain >= left_s:
            return item
        return self._top(self._shortest if coming_s - chain > left_s else self._in_turn)

    def _top(self, heap: list[_Entry[T]]) -> T | None:
        while heap:
            _, place, item = heap[0]
            if self._newest.get(item) == place:
                return item
            heapq.heappop(heap)
        return None


class Line:
    """Limits work to `num` at once. The waiting caller with the lowest turn is next."""

    def __init__(self, num: int) -> None:
        self.num_free = num
        self._waiting: list[tuple[Turn, int, asyncio.Future[None]]] = []
        self._num_asked = 0

    async def enter(self, turn: Turn) -> None:
        """Wait for a free place, until this turn is the lowest of those waiting."""
        if self.num_free > 0:
            self.num_free -= 1
            return
        self._num_asked += 1
        free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (turn, self._num_asked, free))
        try:
            await free
        except asyncio.CancelledError:
            if free.done() and not free.cancelled():
                self.leave()  # called and cancelled in the same tick
            raise

    def leave(self) -> None:
        """Give the place to the lowest waiting turn, or free it."""
        while self._waiting:
            _, _, free = heapq.heappop(self._waiting)
            if not free.done():
                free.set_result(None)
                return
        self.num_free += 1
