"""Cache of answers, so that the same question is computed once. Pure asyncio, independent of vLLM.

Trials of one cell often give identical answers, above all refusals. A judge is then asked exactly the same question again.
Without this cache, such questions were half of a judge's work.
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
    """The `most` answers used last, by question. If a question is already being answered, that answer is awaited."""

    def __init__(self, most: int) -> None:
        self.num_reused = 0
        self._most = most
        self._known: OrderedDict[Hashable, Answer] = OrderedDict()
        self._asked: dict[Hashable, _Asked[Answer]] = {}

    async def get(
        self, question: Hashable, answer: Callable[[], Awaitable[Answer]], is_one: Callable[[Answer], bool]
    ) -> Answer:
        """The kept answer to a question, or else the result of `answer()`, which is kept if `is_one` accepts it.

        If `answer()` raises, all callers that wait for this question get the exception. If all of them are cancelled, it is
        cancelled too.
        """
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
