"""What stages and engines say to each other. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from safecl.base import Strict
from safecl.identity import Ref

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class WeightsRef:
    """Weights to answer with: `base` plus `adapter` (None: the base itself). `key` stands for both and is what the engine
    goes by: equal keys must mean equal weights. Each is a stage, whose files the engine brings into its own node's cache,
    or a folder (HF, PEFT) that lies on the engine's machine."""

    key: str
    base: Ref | str
    adapter: Ref | str | None = None


class Request(NamedTuple):
    id: str
    token_ids: list[int]


class Sampling(Strict):
    """temperature 0 is greedy. Only `stop_token_ids` end an answer early: the model's own EOS must be among them. With a
    `seed` each request of a batch is sampled from a stream of its own (seed, request id), whatever engine takes it.
    `logprobs`: how many of the likeliest tokens to tell at each place of the answer. `of_prompt`: tell the log-probability
    of each token of the prompt but the first in place of that. `remembered`: the same prompt is likely to come again, and
    gets the answer that it got (greedy ones only)."""

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
    # Per token of the answer: the likeliest tokens' texts and log-probabilities, the sampled one first. If asked for. With
    # `of_prompt` per token of the prompt but the first.
    likely: Sequence[Sequence[tuple[str, float]]] = ()


class Refused(ValueError):
    """A request or weights that this engine can never serve: asking again would not help."""


class Unavailable(RuntimeError):
    """This replica cannot answer now (engine died, swap failed, wrong weights): ask again."""


class Settings(Strict):
    """One engine. No setting but `dtype`, which is the model's, may change an answer beyond floating-point rounding."""

    name: str
    dtype: str | None = None  # in which it computes and rounds merged weights; None: its files'
    max_model_len: int  # tokens: prompt + answer
    memory_gib: float | None = None  # KV cache (of each GPU); None: what `gpu_memory` leaves, without a GPU 1 GiB
    gpu_memory: float = 0.9  # part of a GPU's memory, for all that the engine holds there
    max_num_seqs: int | None = None  # requests decoded together; None: 256 on a GPU, 64 on a CPU
    num_threads: int = 1
    use_gpu: bool = False
    num_gpus: float = 1.0  # several: the model is spread over them (tensor parallel); below 1: a part of one
    quantization: str | None = None  # of weights that are not so in the files; the model's, since it changes answers
    batch_invariant: bool = False  # an answer's bits do not depend on what else is decoded with it; slower
    turn_s: float = 60.0  # how long one key may keep the engine while another waits
    linger_s: float = 0.2  # how long the engine must have been idle before another key gets it within a turn
    stall_s: float = 120.0  # work in flight and no token for so long: unhealthy
    log_dir: str | None = None  # of the engine's own output; None: its store's, or without one Ray's worker logs
