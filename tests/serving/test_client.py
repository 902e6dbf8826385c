"""The client's side of an engine, with a replica that is only a function."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from safecl.serving import client
from safecl.serving.messages import Completion, Request, Sampling, WeightsRef

WEIGHTS = WeightsRef("wanted", "/base")
Asked = list[tuple[list[int], int | None]]


def ask(
    replica: Callable[[Asked], list[Any]], num: int, sampling: Sampling, done: list[Completion]
) -> dict[str, Completion]:
    """What a batch of `num` requests in one call comes to."""

    class Response:
        def __init__(self, asked: Asked) -> None:
            self.asked = asked

        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return replica(self.asked)

    handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda asked, weights, sampling, rank: Response(asked)))
    requests = [Request(f"row-{number}", [number]) for number in range(num)]
    batch = client._Batch("engine", WEIGHTS, requests, sampling, None, done.append, 60.0)
    asyncio.run(batch._complete(handle, requests))
    return batch.done


def test_only_what_was_not_answered_is_asked_again_and_each_answer_counts_once() -> None:
    calls: list[list[int]] = []

    def replica(asked: Asked) -> list[Any]:
        calls.append([token_ids[0] for token_ids, _ in asked])
        answers: list[Any] = [(f"text {ids[0]}", [7], "stop", "wanted", []) for ids, _ in asked]
        if len(calls) == 1:
            answers[1] = "Unavailable: the engine died"
            answers[3] = ("of other weights", [7], "stop", "other", [])
        return answers

    seen: list[Completion] = []
    done = ask(replica, 5, Sampling(max_tokens=1), seen)
    assert calls == [[0, 1, 2, 3, 4], [1, 3]]
    assert {id: completion.text for id, completion in done.items()} == {f"row-{n}": f"text {n}" for n in range(5)}
    assert [completion.id for completion in seen] == ["row-0", "row-2", "row-4", "row-1", "row-3"]


def test_each_request_of_a_call_has_a_seed_of_its_own_that_company_does_not_change() -> None:
    seeds: dict[int, list[int | None]] = {}
    for num in (2, 4):

        def replica(asked: Asked, num: int = num) -> list[Any]:
            seeds[num] = [seed for _, seed in asked]
            return [("", [7], "stop", "wanted", []) for _ in asked]

        ask(replica, num, Sampling(max_tokens=1, temperature=1.0, seed=3), [])
    assert len(set(seeds[4])) == 4 and seeds[2] == seeds[4][:2]
    assert all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds[4])
