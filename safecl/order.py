"""The order of ready stages where devices are short. Pure functions, used by a run's Broker and by `plan --cluster`.

From first to last:

1. The user's priority (`execution.turns`).
2. Stages that something else waits for, such as a trial whose result a search needs to suggest the next one.
3. Stages that the end of the run waits for: a chain of stages that alone takes as long as all training asked for
   before it.
4. Cells in turn: the first trial of each cell, then the second of each, so that the seeds of one cell do not delay
   another.
5. The stage at the start of the longest chain of waiting stages (the critical path).
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

NUM_RANKS = 3  # see Claim
AT_ONCE = -1.0  # round of stages that the end of the run waits for: before any other round


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
    def of(cls, claim: Claim, chain: float, number: int, left_s: float = math.inf) -> Turn:
        """The turn of a stage. `left_s`: seconds until all training asked for before it is done, with the maximum
        number of trainers."""
        return cls(-claim.priority, claim.rank, AT_ONCE if chain >= left_s else claim.round, -chain, number)

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
