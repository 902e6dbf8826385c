"""What was answered before is not computed again. Pure asyncio: knows nothing of vLLM.

Trials of one cell give many answers alike, word for word: refusals most of all. A judge is then asked the very same
question, and half of its work was to answer it again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


@dataclass
class _Asked(Generic[Answer]):
    task: asyncio.Task[Answer]
    num_waiting: int = 0


class Remembered(Generic[Answer]):
    """The last `most` answers, by question. A question that is being answered is waited for, not asked again."""

    def __init__(self, most: int) -> None:
        self.num_reused = 0
        self._most = most
        self._known: OrderedDict[Hashable, Answer] = OrderedDict()
        self._asked: dict[Hashable, _Asked[Answer]] = {}

    async def get(
        self, question: Hashable, answer: Callable[[], Awaitable[Answer]], is_one: Callable[[Answer], bool]
    ) -> Answer:
        """What was answered, or else what `answer` comes to, which is kept if `is_one` says so. What it raises, all who wait
        for it get; it is cancelled when nobody waits any more."""
        if question in self._known:
            self.num_reused += 1
            self._known.move_to_end(question)
            return self._known[question]
        asked = self._asked.get(question)
        if asked is None:
            asked = self._asked[question] = _Asked(asyncio.ensure_future(answer()))
        else:
            self.num_reused += 1
        asked.num_waiting += 1
        try:
            found = await asyncio.shield(asked.task)
        finally:
            asked.num_waiting -= 1
            if not asked.num_waiting:
                asked.task.cancel()
                del self._asked[question]
        if is_one(found):
            self._known[question] = found
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        return found
