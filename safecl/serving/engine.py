"""The Serve replica: one vLLM engine that answers each request with the weights that the request names.

It serves one weights key at a time (gate.py) and puts new weights into the running engine in place (swap.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safecl import underway
from safecl.base import PrerequisiteError, importing
from safecl.faults import kind_of
from safecl.identity import Ref
from safecl.serving.driverless import end_without
from safecl.serving.gate import Gate, GateBroken
from safecl.serving.messages import Refused, Sampling, Settings, Unavailable, WeightsRef
from safecl.serving.remembered import Remembered
from safecl.store import Store
from safecl.training.tokens import base_folder, weights_folder

_TOKENS_A_MESSAGE = 16  # partial answers only show that the engine is alive, so few messages are enough
_REMEMBERED = 1 << 13  # number of remembered answers; about 100 MB with the 20 likeliest tokens at each place


class Engine:
    """The Serve replica: one vLLM engine, its gate and its health."""

    def __init__(self, base: Ref | str, settings: Settings, store: Store | None = None) -> None:
        self._open, self._store = ExitStack(), store
        if settings.log_dir is not None:
            _send_output_to(Path(settings.log_dir), settings.name)
        elif store is not None:
            self._open.enter_context(underway.kept(store, _send_output_to(store.logs, settings.name)))
        if store is not None:
            end_without(store, settings.name)
        with importing():
            from vllm import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            from safecl.serving import swap
            from safecl.serving.worker import REPLICA

        os.environ[REPLICA] = str(os.getpid())
        # Keep the base's files on this node as long as the engine lives.
        self._base, _ = self._open.enter_context(self._folders(base, None))
        self._settings = settings
        self._booted, self._num_loaded = swap.stamp(self._base), 0
        self._checks: dict[str, asyncio.Task[None]] = {}  # checks of weights since the last swap, by key
        self._gate: Gate[WeightsRef] = Gate(self._swap, settings.turn_s, settings.linger_s)
        self._remembered: Remembered[tuple[Any, ...] | str] = Remembered(_REMEMBERED)
        self._last_sign = time.monotonic()  # last sign of life: a token, a finished swap, or the start of work
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments(str(self._base), settings)),
            usage_context=UsageContext.LLM_CLASS,  # as many tokens a step as offline; else only 1/4 to 1/2
        )

    async def generate(
        self, requests: list[tuple[list[int], int | None]], weights: WeightsRef, sampling: Sampling, rank: int = 0
    ) -> list[tuple[Any, ...] | str]:
        """Answer requests, given as (token ids, seed).

        Each result is (text, token ids, finish, weights key, likeliest tokens), or a text that says why the request cannot be
        answered now. `rank`: see gate.py.

        Raises:
            Refused: this engine can never serve a request or the weights.
            PrerequisiteError: a prompt and its answer are longer than the engine's `max_model_len`.
            Unavailable: the weights cannot be read now.
        """
        for token_ids, _ in requests:
            longest = len(token_ids) + sampling.max_tokens
            if not token_ids:
                raise Refused("a prompt of no tokens: expected at least one")
            if longest > self._settings.max_model_len:  # not Refused: the engine's setting is too small
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

        async def recall(token_ids: list[int], seed: int | None) -> tuple[Any, ...] | str:
            question = weights.key, sampling, array("I", token_ids).tobytes()
            return await self._remembered.get(question, partial(answer, token_ids, seed), _is_answer)

        found = recall if sampling.remembered and sampling.temperature == 0 else answer
        return await asyncio.gather(*(found(*request) for request in requests))

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
        """Check weights before they are loaded, once for all waiting requests, because reading headers takes milliseconds."""
        if weights.key == self._gate.key:
            return
        from safecl.serving import swap

        if weights.key not in self._checks:

            def check() -> None:
                with self._folders(weights.base, weights.adapter) as folders:
                    swap.check(self._base, *folders)

            self._checks[weights.key] = asyncio.create_task(asyncio.to_thread(check))
        try:
            await asyncio.shield(self._checks[weights.key])
        except Exception as error:  # reading may raise OSError, ValueError or safetensors' own errors
            self._checks.pop(weights.key, None)  # check again next time: the files may be repaired
            failed = kind_of(error) == "infrastructure" and not isinstance(error, FileNotFoundError)
            raise (Unavailable if failed else Refused)(f"weights {weights.key!r} cannot be served: {error}") from error

    async def _swap(self, key: str, weights: WeightsRef) -> None:
        """Load other weights. Runs only while nothing is in flight. If it raises, the gate admits nothing any more."""
        self._last_sign = time.monotonic()
        self._checks.clear()
        await self._llm.pause_generation(mode="wait", clear_cache=True)
        folders = self._folders(weights.base, weights.adapter)
        base, adapter = await asyncio.to_thread(folders.__enter__)
        try:
            names = str(base), None if adapter is None else str(adapter)
            loaded = await self._llm.collective_rpc("safecl_swap", args=(*names, self._booted))
        finally:
            folders.__exit__(None, None, None)
        self._num_loaded += loaded[0]
        await self._llm.update_weight_version(key)
        await self._llm.resume_generation()
        self._last_sign = time.monotonic()

    @contextmanager
    def _folders(self, base: Ref | str, adapter: Ref | str | None) -> Iterator[tuple[Path, Path | None]]:
        """Folders of base and adapter on this node. They exist at least as long as the block runs."""
        stages = [each for each in (base, adapter) if isinstance(each, Ref)]
        if stages and self._store is None:
            raise Refused(f"stages {[stage.key[:12] for stage in stages]}: this engine was given no store")
        with ExitStack() as held:
            found = (
                {}
                if self._store is None
                else dict(zip(stages, held.enter_context(self._store.using(stages)), strict=True))
            )
            yield (
                base_folder(found[base]) if isinstance(base, Ref) else Path(base),
                weights_folder(found[adapter])
                if isinstance(adapter, Ref)
                else None
                if adapter is None
                else Path(adapter),
            )

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine is not healthy. Serve calls this and replaces the replica if it raises."""
        try:
            await self._llm.check_health()  # vLLM's own check sees only that the engine's process died
        except Exception as error:
            # Serve's controller unpickles what is raised here. For vLLM's own class it would import vLLM: 7 s of CPU.
            raise RuntimeError(f"engine {self._settings.name!r} died: {error!r}") from None
        if self._gate.broken is not None:
            raise RuntimeError(f"engine {self._settings.name!r}: swap failed: {self._gate.broken!r}")
        silent_s = time.monotonic() - self._last_sign
        if (self._gate.in_flight or self._gate.swapping) and silent_s > self._settings.stall_s:
            raise RuntimeError(f"engine {self._settings.name!r}: work in flight, but no token for {silent_s:.0f} s")

    async def status(self) -> dict[str, Any]:
        """The engine's state: `key` (weights held), `pid`, `in_flight`, `waiting`, `num_swaps`, `num_loaded` and `num_reused`.

        `num_loaded` counts parameters over all swaps. `num_reused` counts answers taken from memory.
        """
        gate = self._gate
        counts = {"in_flight": gate.in_flight, "waiting": gate.num_waiting, "num_swaps": gate.num_swaps}
        counts |= {"num_loaded": self._num_loaded, "num_reused": self._remembered.num_reused}
        return {"key": gate.key, "pid": os.getpid(), **counts}

    def __del__(self) -> None:
        if (llm := getattr(self, "_llm", None)) is not None:
            llm.shutdown()
            self._open.close()


def arguments(base_folder: str, settings: Settings) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    on_gpu, invariant = settings.use_gpu, settings.batch_invariant
    memory_gib = settings.memory_gib if on_gpu else settings.memory_gib or 1.0
    num_gpus = max(1, int(settings.num_gpus)) if on_gpu else 1
    made: dict[str, Any] = {
        "model": base_folder,
        "dtype": settings.dtype or _dtype(Path(base_folder)),  # "auto" would make bfloat16 of a float32 model
        "max_model_len": settings.max_model_len,
        # Batches of other shapes round differently. vLLM has batch-invariant kernels only on a GPU (see environment). On a
        # CPU one request at a time always has the same shapes.
        "max_num_seqs": 1 if invariant and not on_gpu else settings.max_num_seqs or (256 if on_gpu else 64),
        "stream_interval": _TOKENS_A_MESSAGE,
        "enable_prefix_caching": not invariant,
        # If None, vLLM takes what `gpu_memory_utilization` leaves after weights and activations.
        "kv_cache_memory_bytes": None if memory_gib is None else int(memory_gib * 2**30),
        # A prefix is shared in whole blocks. On CPU the default of 128 tokens is longer than the common prefix of a judge's
        # prompts. 32 is the smallest size that the CPU's attention supports.
        "block_size": None if on_gpu else 32,
        # Several GPUs of one node: child processes ("mp"), not Ray actors, which would reserve further GPUs from Ray.
        "distributed_executor_backend": "uni" if not on_gpu else "mp" if num_gpus > 1 else None,
        "tensor_parallel_size": num_gpus,
        "quantization": settings.quantization,
        "enforce_eager": not on_gpu,  # compiling on CPU costs minutes of boot
        "worker_extension_cls": "safecl.serving.worker.Swap",
        "generation_config": "vllm",  # do not use the model folder's sampling defaults
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    return {**made, "gpu_memory_utilization": settings.gpu_memory} if on_gpu else made


def _is_answer(found: tuple[Any, ...] | str) -> bool:
    return not isinstance(found, str)


def _likely(sampled: int, logprobs: Mapping[int, Any]) -> list[tuple[str, float]]:
    """Texts and log-probabilities (nats) of the tokens at one place, the sampled token first, then by rank."""
    ranked = sorted(logprobs, key=lambda id: (id != sampled, -logprobs[id].logprob))
    return [(logprobs[id].decoded_token or "", float(logprobs[id].logprob)) for id in ranked]


def _dtype(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _send_output_to(folder: Path, name: str) -> Path:
    """Send all output of this process and its children to a file instead of the driver's terminal. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = folder / f"engine-{name}.log"
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.close(opened)
    return file
