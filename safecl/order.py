"""Whose turn it is: the order of what is ready, where devices are short. Pure; a run's Broker and `plan --cluster` share it.

What a user wants first is first (`execution.turns`). Then what something else waits for, as a search for the trial that it
chooses the next one by. Then what the end waits for: a chain of stages that alone takes as long as all the training that was
asked for before it. Then cells take turns, each its first trial before any its second, so that the seeds of one do not hold up
another's. Then the stage that the longest chain of others waits for: the critical path.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

NUM_RANKS = 3  # see Claim
AT_ONCE = -1.0  # the round of what the end waits for: before any other


class Claim(NamedTuple):
    """What a trial says of itself. `rank`: 0 what something else waits for, 1 a row of a table, 2 what is told beside it;
    `round`: how many trials of its cell were begun before it, over the cell's share."""

    priority: int = 0
    rank: int = 0
    round: float = 0.0


UNNAMED = Claim()


class Turn(NamedTuple):
    """The lowest is next. `chain`: minus the seconds of the longest chain of stages that begins with it; `number`: of the
    call, so that of equals who asked first is first."""

    priority: int  # minus the claim's
    rank: int
    round: float
    chain: float
    number: int

    @classmethod
    def of(cls, claim: Claim, chain: float, number: int, left_s: float = math.inf) -> Turn:
        """`left_s`: until all training that was asked for before it is done, on as many trainers as there may be."""
        return cls(-claim.priority, claim.rank, AT_ONCE if chain >= left_s else claim.round, -chain, number)

    @property
    def level(self) -> int:
        """What goes first whatever else there is: of user's priority and rank one number, the lowest first."""
        return NUM_RANKS * self.priority + self.rank


def chains(seconds: Sequence[float], needs: Sequence[Sequence[int]]) -> list[float]:
    """For each piece of work the seconds from its beginning to the end of the longest chain of others that wait for it.
    `needs`: the places of those it waits for itself, all of them before it."""
    found = list(seconds)
    for place in range(len(found) - 1, -1, -1):
        chain = found[place]
        for other in needs[place]:
            if found[other] < seconds[other] + chain:
                found[other] = seconds[other] + chain
    return found


class Line:
    """So many at once; of those who wait the lowest turn is next."""

    def __init__(self, num: int) -> None:
        self.num_free = num
        self._waiting: list[tuple[Turn, int, asyncio.Future[None]]] = []
        self._num_asked = 0

    async def enter(self, turn: Turn) -> None:
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
        while self._waiting:
            _, _, free = heapq.heappop(self._waiting)
            if not free.done():
                free.set_result(None)
                return
        self.num_free += 1
