"""How a stage asks served models: batches in, one completion a request out, whatever engines die meanwhile.

What comes back carries the key that sampled it; an answer of any other key is discarded and asked for again.
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

_STATUS_EVERY_S = 2.0  # how often a waiting client looks whether its engine can still come up
_REQUESTS_A_CALL = 32


@dataclass(frozen=True)
class Engines:
    """How a stage reaches served models, from any process of the cluster. Small and picklable.

    `groups`: a name that stands for several applications ({"candidate": ("candidate-0", "candidate-1")}); a batch goes
    as a whole to the one that holds its key already, else to the least busy. `rank`: whose requests go first where several
    keys wait for an engine, the lowest. Higher ones may wait for long, so `timeout_s` counts for 0 alone.
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
        """One completion per request, by id, in request order; `on_done` sees each as it comes, from this thread. Blocks;
        call it from a plain thread or Ray task.

        Survives the death of engines: what was lost is asked for again. `timeout_s`: longest time without any completed
        request. Raises PrerequisiteError when that passes or the engine cannot come up, ValueError for doubled ids or
        requests and weights that the engine refuses.
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
        """`Engine.status` of one replica of application `name`."""
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
    done: dict[str, Completion] = field(default_factory=dict)  # by id: an answer counts once, however often asked for
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
        # Many at a call: Serve takes 3 ms of CPU for each, and what starts together shares the engine's steps to the end.
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
    """Requests under way; cancelled at the replica too if the caller stops waiting."""
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
    """The replica's refusal as such, not as Ray's wrapper of it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Refused | PrerequisiteError) else error
