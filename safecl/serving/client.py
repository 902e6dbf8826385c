"""Client of the served models: a stage sends a batch of requests and gets one completion for each, even if engines die.

Every answer carries the key of the weights that sampled it. An answer with another key is discarded and asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from safecl.base import PrerequisiteError
from safecl.serving import deploy
from safecl.serving.messages import Completion, Refused, Request, Sampling, Unavailable, WeightsRef

_STATUS_EVERY_S = 2.0  # seconds between checks of a waiting client whether its engine can still start
_REQUESTS_A_CALL = 32


@dataclass(frozen=True)
class Engines:
    """Access to the served models from any process of the cluster. Small and picklable.

    `groups` maps a name to several applications, such as {"candidate": ("candidate-0", "candidate-1")}. A whole batch goes to
    the application that already holds its weights key, else to the least busy one. `max_in_flight` is the most requests that
    are sent at once. `rank` decides the order if several keys wait for an engine: the lowest goes first. Requests of a higher
    rank may wait for long, so `timeout_s` applies only to rank 0.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    max_in_flight: int = 128
    rank: int = 0

    def generate(
        self,
        name: str,
        weights: WeightsRef,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
        timeout_s: float = 900.0,
        on_done: Callable[[Completion], None] | None = None,
    ) -> dict[str, Completion]:
        """Get one completion for each request. Returns them by id, in request order.

        It blocks, so call it from a plain thread or a Ray task. `on_done` is called with each completion as it arrives, in
        this thread; `on_progress` with (number done, number of requests). If an engine dies, lost requests are sent again.
        `timeout_s` is the longest time in seconds without any completed request.

        Raises:
            PrerequisiteError: the timeout passed, the engine cannot start, or a prompt is too long for it.
            ValueError: two requests have the same id, or the engine refuses a request or the weights.
        """
        if len({request.id for request in requests}) != len(requests):
            raise ValueError(f"engine {name!r}: request ids must be unique, got {len(requests)} with doubles")
        if not requests:
            return {}
        limit_s = math.inf if self.rank > 0 else timeout_s
        batch = _Batch(name, weights, requests, sampling, on_progress, on_done, limit_s, self.rank)
        done = asyncio.run(batch.run(tuple(self.groups.get(name, (name,))), self.max_in_flight))
        return {request.id: done[request.id] for request in requests}

    def status(self, name: str) -> dict[str, Any]:
        """The result of `Engine.status` from one replica of application `name`."""
        from ray import serve

        status: dict[str, Any] = serve.get_app_handle(name).status.remote().result(timeout_s=30)
        return status


@dataclass
class _Batch:
    name: str
    weights: WeightsRef
    requests: Sequence[Request]
    sampling: Sampling
    on_progress: Callable[[int, int], None] | None
    on_done: Callable[[Completion], None] | None
    timeout_s: float
    rank: int = 0
    done: dict[str, Completion] = field(default_factory=dict)  # by id; an answer counts once, even if asked for twice
    last_done: float = field(default_factory=time.monotonic)
    last_error: str = "none"

    async def run(self, apps: tuple[str, ...], max_in_flight: int) -> dict[str, Completion]:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        deploy.hush()
        app = apps[0] if len(apps) == 1 else await _pick(apps, self.weights.key)
        try:
            handle = serve.get_app_handle(app)
        except RayServeException:
            deploy.state(app)  # says what is wrong
            raise
        # Many requests in one call: Serve needs 3 ms of CPU a call, and requests that start together share all engine steps.
        num_calls = max(1, max_in_flight // _REQUESTS_A_CALL)
        size = min(_REQUESTS_A_CALL, math.ceil(len(self.requests) / num_calls))
        queue = (self.requests[start : start + size] for start in range(0, len(self.requests), size))

        async def work() -> None:
            for requests in queue:  # one iterator for all workers: each request is taken once
                await self._complete(handle, requests)

        tasks = [asyncio.create_task(work()) for _ in range(num_calls)]
        try:
            while tasks:
                finished, pending = await asyncio.wait(tasks, timeout=_STATUS_EVERY_S, return_when="FIRST_EXCEPTION")
                for task in finished:
                    task.result()
                tasks = list(pending)
                self._check_deadline(app)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.done

    async def _complete(self, handle: Any, requests: Sequence[Request]) -> None:
        while left := [request for request in requests if request.id not in self.done]:
            async with _asked(handle, left, self.weights, self.sampling, self.rank) as response:
                try:
                    answers = await response
                except Exception as error:
                    if not _transient(error):
                        raise _plain(error) from error
                    answers = [f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"] * len(left)
            for request, answer in zip(left, answers, strict=True):
                self._take(request, answer)
            if any(isinstance(answer, str) for answer in answers):
                await asyncio.sleep(0.5)

    def _take(self, request: Request, answer: tuple[Any, ...] | str) -> None:
        if isinstance(answer, str):
            self.last_error = answer
            return
        completion = Completion(request.id, *answer)
        if completion.weights_key != self.weights.key:
            self.last_error = f"answered by weights {completion.weights_key!r}"
            return
        self.done[request.id] = completion
        self.last_done = time.monotonic()
        if self.on_done is not None:
            self.on_done(completion)
        if self.on_progress is not None:
            self.on_progress(len(self.done), len(self.requests))

    def _check_deadline(self, app: str) -> None:
        silent_s = time.monotonic() - self.last_done
        if silent_s < _STATUS_EVERY_S or len(self.done) == len(self.requests):
            return
        state = deploy.state(app)  # raises if the application can never come up
        if silent_s > self.timeout_s:
            raise PrerequisiteError(
                f"engine {app!r}: no completion for {silent_s:.0f} s, {len(self.done)} of {len(self.requests)} done; "
                f"state: {state}; last error: {self.last_error}"
            )


def _seed(sampling: Sampling, request: Request) -> int | None:
    if sampling.seed is None:
        return None
    digest = hashlib.sha256(f"{sampling.seed}/{request.id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@asynccontextmanager
async def _asked(
    handle: Any, requests: Sequence[Request], weights: WeightsRef, sampling: Sampling, rank: int
) -> AsyncIterator[Any]:
    """Send requests to a replica for the length of the block. If the caller is cancelled, the replica's work is too."""
    asked = [(request.token_ids, _seed(sampling, request)) for request in requests]
    response = handle.generate.remote(asked, weights, sampling, rank)
    try:
        yield response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _pick(apps: Sequence[str], key: str) -> str:
    from ray import serve

    async def busyness(app: str) -> tuple[int, int]:
        try:
            response = serve.get_app_handle(app).status.remote()
            status = await asyncio.wait_for(response, timeout=5.0)
        except Exception:  # still booting, or dead: any other engine is better
            return 2, 0
        return int(status["key"] != key), status["in_flight"] + status["waiting"]

    ranks = await asyncio.gather(*(busyness(app) for app in apps))
    return min(zip(ranks, apps, strict=True))[1]


def _transient(error: Exception) -> bool:
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, Unavailable | BackPressureError | DeploymentUnavailableError):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)  # an actor, node or owner died


def _plain(error: Exception) -> Exception:
    """The replica's own exception (Refused, PrerequisiteError) without Ray's wrapper. Other errors are returned unchanged."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Refused | PrerequisiteError) else error
