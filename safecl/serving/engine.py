"""vLLM engines behind Ray Serve, and the client that stages use. The only file that imports vllm and ray.serve.

One deployment class serves candidates and judges alike: it answers every request with the weights that the request
names, one weights key at a time (gate.py), and puts new weights into the live engine in place (swap.py). What comes
back carries the key that sampled it; an answer of any other key is discarded and asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.base import PrerequisiteError
from safecl.faults import kind_of
from safecl.serving.gate import Gate, GateBroken
from safecl.serving.messages import Completion, Refused, Request, Sampling, Settings, Unavailable, WeightsRef

_STATUS_EVERY_S = 2.0  # how often a waiting client looks whether its engine can still come up
_REQUESTS_A_CALL = 32
_TOKENS_A_MESSAGE = 16  # nobody reads along: an answer's pieces only tell that the engine lives
# Building or reading a Serve config registers a module with the pickler and takes that back: two threads would undo
# each other's and raise. The first deployment starts Serve, which must not happen twice at once either.
_SERVE = threading.Lock()


class Engine:
    """The Serve replica: one vLLM engine, its gate and its health."""

    def __init__(self, base_folder: str, settings: Settings) -> None:
        if settings.log_dir is not None:
            _send_output_to(Path(settings.log_dir), settings.name)
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from safecl.serving import swap

        self._base, self._settings = base_folder, settings
        self._booted, self._num_loaded = swap.stamp(Path(base_folder)), 0
        self._checks: dict[str, asyncio.Task[None]] = {}  # of weights, by key, since the last swap
        self._gate: Gate[WeightsRef] = Gate(self._swap, settings.turn_s, settings.linger_s)
        self._last_sign = time.monotonic()  # of life: a token, a finished swap, or work beginning
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=base_folder,
                dtype=settings.dtype or _dtype(Path(base_folder)),  # "auto" would make bfloat16 of a float32 model
                max_model_len=settings.max_model_len,
                # Sums of other shapes round otherwise. vLLM has kernels against that on a GPU only (see environment); on a
                # CPU a request alone, from its first token on, always has its own shapes.
                max_num_seqs=1 if settings.batch_invariant and not settings.use_gpu else settings.max_num_seqs,
                stream_interval=_TOKENS_A_MESSAGE,
                enable_prefix_caching=not settings.batch_invariant,
                kv_cache_memory_bytes=int(settings.memory_gib * 2**30),
                # A prefix is shared in whole blocks. On CPU the default of 128 tokens is longer than what the prompts of
                # a judge have in common; 32 is the least that its attention takes.
                block_size=None if settings.use_gpu else 32,
                distributed_executor_backend=None if settings.use_gpu else "uni",
                enforce_eager=not settings.use_gpu,  # compiling on CPU costs minutes of boot
                worker_extension_cls="safecl.serving.swap.Swap",
                generation_config="vllm",  # the model folder's sampling defaults must not leak in
                use_tqdm_on_load=False,
                disable_log_stats=True,
            ),
            usage_context=UsageContext.LLM_CLASS,  # tokens a step as offline; else a quarter to a half of them
        )

    async def generate(
        self, requests: list[tuple[list[int], int | None]], weights: WeightsRef, sampling: Sampling, rank: int = 0
    ) -> list[tuple[Any, ...] | str]:
        """Per (token ids, seed): (text, token ids, finish, weights key, likeliest), or why not now. `rank`: see gate.py.

        Raises:
            Refused: what this engine can never serve.
            PrerequisiteError: a prompt and its answer are longer than it was set up for.
            Unavailable: the weights could not be read now.
        """
        for token_ids, _ in requests:
            longest = len(token_ids) + sampling.max_tokens
            if not token_ids:
                raise Refused("a prompt of no tokens: expected at least one")
            if longest > self._settings.max_model_len:  # how the engine was set up, not what was asked for
                raise PrerequisiteError(
                    f"prompt of {len(token_ids)} tokens + max_tokens {sampling.max_tokens}: expected at most "
                    f"{self._settings.max_model_len} in all (max_model_len of engine {self._settings.name!r}): raise "
                    "execution.engine_max_tokens"
                )
        await self._check_weights(weights)

        async def answer(token_ids: list[int], seed: int | None) -> tuple[Any, ...] | str:
            try:
                async with self._gate.admit(weights.key, weights, rank):
                    return await self._sample(token_ids, seed, weights.key, sampling)
            except (GateBroken, Unavailable) as error:
                return f"{type(error).__name__}: {error}"

        return await asyncio.gather(*(answer(*request) for request in requests))

    async def _sample(self, token_ids: list[int], seed: int | None, key: str, sampling: Sampling) -> tuple[Any, ...]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            seed=seed,
            logprobs=sampling.logprobs or None,
            prompt_logprobs=0 if sampling.of_prompt else None,
            output_kind=RequestOutputKind.DELTA,
        )
        if self._gate.in_flight == 1:
            self._last_sign = time.monotonic()
        text, sampled, last = [], [], None
        likely: list[list[tuple[str, float]]] = []
        try:
            prompt = TokensPrompt(prompt_token_ids=token_ids)
            async for output in self._llm.generate(prompt, params, request_id=uuid.uuid4().hex):
                self._last_sign = time.monotonic()
                last = output.outputs[0]
                text.append(last.text)
                sampled.extend(last.token_ids)
                if sampling.of_prompt:
                    likely.extend(map(_likely, token_ids[1:], (output.prompt_logprobs or ())[1:]))
                else:
                    likely.extend(map(_likely, last.token_ids, last.logprobs or ()))
        except (EngineDeadError, EngineGenerateError) as error:
            raise Unavailable(f"engine {self._settings.name!r} died: {error!r}") from error
        if last is None or last.finish_reason not in ("stop", "length"):
            raise Unavailable(f"answer ended with {getattr(last, 'finish_reason', None)!r}, expected stop or length")
        versions = {span.version for span in last.weight_versions or []}
        if versions != {key}:
            raise Unavailable(f"answer was sampled by weights {sorted(versions)}, expected {key!r} only: discarded")
        return "".join(text), sampled, last.finish_reason, key, likely

    async def _check_weights(self, weights: WeightsRef) -> None:
        """Once for all requests that wait for the same weights: reading headers takes milliseconds."""
        if weights.key == self._gate.key:
            return
        from safecl.serving import swap

        if weights.key not in self._checks:
            folders = Path(self._base), Path(weights.base), None if weights.adapter is None else Path(weights.adapter)
            self._checks[weights.key] = asyncio.create_task(asyncio.to_thread(swap.check, *folders))
        try:
            await asyncio.shield(self._checks[weights.key])
        except Exception as error:  # whatever reading them raises, of OSError, ValueError, safetensors' own
            self._checks.pop(weights.key, None)  # they may be put right
            failed = kind_of(error) == "infrastructure" and not isinstance(error, FileNotFoundError)
            raise (Unavailable if failed else Refused)(f"weights {weights.key!r} cannot be served: {error}") from error

    async def _swap(self, key: str, weights: WeightsRef) -> None:
        """Runs with nothing in flight; the gate breaks if it raises."""
        self._last_sign = time.monotonic()
        self._checks.clear()
        await self._llm.pause_generation(mode="wait", clear_cache=True)
        loaded = await self._llm.collective_rpc("safecl_swap", args=(weights.base, weights.adapter, self._booted))
        self._num_loaded += loaded[0]
        await self._llm.update_weight_version(key)
        await self._llm.resume_generation()
        self._last_sign = time.monotonic()

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        await self._llm.check_health()  # vLLM's own: only a flag that the engine's process died
        if self._gate.broken is not None:
            raise RuntimeError(f"engine {self._settings.name!r}: swap failed: {self._gate.broken!r}")
        silent_s = time.monotonic() - self._last_sign
        if (self._gate.in_flight or self._gate.swapping) and silent_s > self._settings.stall_s:
            raise RuntimeError(f"engine {self._settings.name!r}: work in flight, but no token for {silent_s:.0f} s")

    async def status(self) -> dict[str, Any]:
        """What it is doing: weights key, counts (`num_loaded`: parameters, over all swaps), and its process id."""
        gate = self._gate
        counts = {"in_flight": gate.in_flight, "waiting": gate.num_waiting, "num_swaps": gate.num_swaps}
        return {"key": gate.key, "pid": os.getpid(), "num_loaded": self._num_loaded, **counts}

    def __del__(self) -> None:
        if (llm := getattr(self, "_llm", None)) is not None:
            llm.shutdown()


def deploy(
    settings: Settings, base_folder: str, *, num_replicas: int = 1, num_cpus: float | None = None, wait: bool = True
) -> None:
    """Serve `base_folder`'s model as application `settings.name` on the Ray cluster that this process is connected to.

    `num_cpus`: what a replica reserves of Ray's logical CPUs (default `settings.num_threads`). `wait=False` returns at
    once, so that the boot overlaps with other work; see `ready`. Nothing listens for HTTP: engines are reached through
    handles.
    """
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.schema import LoggingConfig

    resources: dict[str, Any] = {
        "num_cpus": float(settings.num_threads) if num_cpus is None else num_cpus,
        "runtime_env": {"env_vars": environment(settings)},
    }
    if settings.use_gpu:
        resources["num_gpus"] = 1
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    _hush()
    with _SERVE:
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(
            Engine,
            name="engine",
            num_replicas=num_replicas,
            max_ongoing_requests=4096,  # the engine's own queue does the batching
            ray_actor_options=resources,
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=3.0,  # a replica that is replaced has nothing worth waiting for
            graceful_shutdown_wait_loop_s=0.2,
            logging_config=quiet,
        )
        target = RunTarget(
            deployment.bind(base_folder, settings), name=settings.name, route_prefix=None, logging_config=quiet
        )
        serve.run_many([target], wait_for_applications_running=wait, wait_for_ingress_deployment_creation=wait)


def ready(name: str, timeout_s: float = 600.0) -> None:
    """Block until every replica of `name` serves. Raises PrerequisiteError if it cannot come up, or not in time."""
    deadline = time.monotonic() + timeout_s
    while (state := _state(name))[0] != "RUNNING":
        if time.monotonic() > deadline:
            raise PrerequisiteError(f"engine {name!r} was not ready within {timeout_s:.0f} s; state: {state}")
        time.sleep(0.5)


def shutdown(name: str) -> None:
    """Take `name` down and free what it holds."""
    from ray import serve

    serve.delete(name)


@dataclass(frozen=True)
class Engines:
    """How a stage reaches served models, from any process of the cluster. Small and picklable.

    `groups`: a name that stands for several applications ({"candidate": ("candidate-0", "candidate-1")}); a batch goes
    as a whole to the one that holds its key already, else to the least busy. `rank`: whose requests go first where several
    keys wait for an engine, the lowest; there others may take longer than any `timeout_s`, so only for 0 it counts.
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
        limit_s = math.inf if self.rank else timeout_s
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

        _hush()
        app = apps[0] if len(apps) == 1 else await _pick(apps, self.weights.key)
        try:
            handle = serve.get_app_handle(app)
        except RayServeException:
            _state(app)  # says what is wrong
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
        state = _state(app)  # raises if the application can never come up
        if silent_s > self.timeout_s:
            raise PrerequisiteError(
                f"engine {app!r}: no completion for {silent_s:.0f} s, {len(self.done)} of {len(self.requests)} done; "
                f"state: {state}; last error: {self.last_error}"
            )


def _likely(sampled: int, logprobs: Mapping[int, Any]) -> list[tuple[str, float]]:
    """Texts and log-probabilities of one place, the sampled token first, then by rank."""
    ranked = sorted(logprobs, key=lambda id: (id != sampled, -logprobs[id].logprob))
    return [(logprobs[id].decoded_token or "", float(logprobs[id].logprob)) for id in ranked]


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


def _state(name: str) -> tuple[str, str]:
    """(status, message) of an application. Raises PrerequisiteError if it is not there or can never come up."""
    from ray import serve

    with _SERVE:
        application = serve.status().applications.get(name)
    if application is None:
        raise PrerequisiteError(f"engine {name!r} is not deployed on this cluster; deploy it before asking for answers")
    if application.status == "DEPLOY_FAILED":
        raise PrerequisiteError(f"engine {name!r} failed to start: {_message(application)}")
    return str(application.status.value), _message(application)


def _message(application: Any) -> str:
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return " ".join(text for text in texts if text)[-2000:]


def environment(settings: Settings) -> dict[str, str]:
    """Environment of the replica; its engine processes inherit it."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # engine and worker talk on this node only
        "VLLM_LOGGING_LEVEL": "INFO" if settings.log_dir else "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.use_gpu and settings.batch_invariant:
        env["VLLM_BATCH_INVARIANT"] = "1"
    if not settings.use_gpu:
        env |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPU: lets the engine's process compute itself ("uni")
            "OMP_NUM_THREADS": str(settings.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads of two engines would fight over one core
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep: training shares these cores
            "GOMP_SPINCOUNT": "0",
            "KMP_BLOCKTIME": "0",
            "TORCHDYNAMO_DISABLE": "1",  # for two helpers of the sampler vLLM would call a C++ compiler, for 20 s
            # Freed tensors up to 512 MiB leave their memory to the next: fresh pages are a third of a 7B model's swap.
            "MALLOC_MMAP_THRESHOLD_": str(2**29),
            "MALLOC_TRIM_THRESHOLD_": str(2**29),
        }
    return env


def _dtype(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _send_output_to(folder: Path, name: str) -> None:
    """Everything that this process and its children print goes to a file instead of the driver's terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    opened = os.open(folder / f"engine-{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.close(opened)


def _hush() -> None:
    """Serve logs to the calling process's terminal; what matters comes back as an exception."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def shutdown_all() -> None:
    """Take all of Serve down on the cluster that this process is connected to."""
    from ray import serve

    serve.shutdown()
