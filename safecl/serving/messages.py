"""Messages between stages and engines: weights, requests, sampling, completions, settings. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from safecl.base import Strict
from safecl.identity import Ref

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class WeightsRef:
    """The weights to answer with: `base` plus `adapter` (None: the base itself).

    The engine compares weights by `key` alone, so equal keys must mean equal weights. `base` and `adapter` are each a stage,
    whose files the engine copies into its node's cache, or a folder (HF, PEFT) on the engine's machine.
    """

    key: str
    base: Ref | str
    adapter: Ref | str | None = None


class Request(NamedTuple):
    id: str
    token_ids: list[int]


class Sampling(Strict):
    """How answers are sampled.

    `temperature` 0 is greedy. Only `stop_token_ids` end an answer early, so they must contain the model's own EOS. With a
    `seed`, each request has its own random stream (from seed and request id), the same on every engine. `logprobs` is the
    number of likeliest tokens to return at each place of the answer. `of_prompt`: return the log-probability of each prompt
    token but the first instead. `remembered`: keep the answer and return it if the same prompt comes again (only if greedy).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int = 0
    of_prompt: bool = False
    remembered: bool = False


class Completion(NamedTuple):
    id: str
    text: str  # special tokens left out
    token_ids: list[int]  # as sampled: a stop token that ended the answer is the last one
    finish: Finish
    weights_key: str
    # If asked for: for each token of the answer, texts and log-probabilities (nats) of the likeliest tokens, the sampled one
    # first. With `of_prompt`: for each token of the prompt but the first.
    likely: Sequence[Sequence[tuple[str, float]]] = ()


class Refused(ValueError):
    """This engine can never serve a request or its weights. Asking again does not help."""


class Unavailable(RuntimeError):
    """This replica cannot answer now (engine died, swap failed, wrong weights). Ask again."""


class Settings(Strict):
    """Settings of one engine.

    No setting may change an answer beyond floating-point rounding, except `dtype` and `quantization`, which belong to the
    model.
    """

    name: str
    dtype: str | None = None  # dtype of computing and of merged weights; None: that of the model's files
    max_model_len: int  # most tokens of prompt + answer
    memory_gib: float | None = None  # KV cache (on each GPU); None: what `gpu_memory` leaves, or 1 GiB without a GPU
    gpu_memory: float = 0.9  # share of a GPU's memory that the engine may use in all, in (0, 1]
    max_num_seqs: int | None = None  # requests decoded together; None: 256 on a GPU, 64 on a CPU
    num_threads: int = 1
    use_gpu: bool = False
    num_gpus: float = 1.0  # above 1 the model is split over them (tensor parallel); below 1 it is a share of one GPU
    quantization: str | None = None  # vLLM's method for weights that are not quantized in the files; changes answers
    batch_invariant: bool = False  # an answer's bits do not depend on which requests are decoded with it; slower
    turn_s: float = 60.0  # seconds that one key may keep the engine while another waits
    linger_s: float = 0.2  # seconds that the engine must be idle before another key gets it within a turn
    stall_s: float = 120.0  # unhealthy after this many seconds with work in flight and no token
    log_dir: str | None = None  # folder of the engine's output; None: the store's, or without one Ray's worker logs
