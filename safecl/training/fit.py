"""What a finetune needs of memory, and how it is made to fit: gradient checkpointing, and fewer rows a forward.

Neither changes a result beyond floating-point rounding: losses are normalised over the global batch, and a forward that
is run again draws the same dropout.

    kept for the backward, bytes a token and adapted layer:   b (7 D + 4 I + 2 Q)  [+ 6 D + I with dropout]
    with checkpointing:                                       b D a layer, and one layer as above

b bytes of a number, D hidden, I width of the MLP, Q widths of queries, keys and values together.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from safecl.base import Json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from safecl.training.model import HiddenStates
    from safecl.training.tokens import Encoded

SHARE = 0.8  # of the free memory that an estimate may take: it is one
SLACK = 1.2  # what allocators and short-lived tensors add
OUT_OF_MEMORY = torch.OutOfMemoryError
NOTE = "micro_batch_size"  # file of a finetune's scratch folder: the rows a forward that did fit


class Fit(NamedTuple):
    """Rows a forward, whether layers are computed again in the backward, and the bytes that this is estimated at."""

    micro_batch_size: int
    checkpointing: bool
    num_bytes: float

    def leaves_room(self, free: float) -> bool:
        """Whether graphs fit too: they hold activations of their own, beside those of forwards without."""
        from safecl.training.graphs import SPARE

        return (1 + SPARE) * self.num_bytes <= SHARE * free


def activations(config: Any, lora: Mapping[str, Json], num_tokens: int, num_bytes: int, checkpointing: bool) -> float:
    """Bytes kept for the backward of a forward of `num_tokens` tokens. `config`: the model's; `num_bytes`: of a number."""
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    mlp = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or hidden // heads)
    queries = size * (heads + 2 * int(getattr(text, "num_key_value_heads", None) or heads))
    layer = num_bytes * (7 * hidden + 4 * mlp + 2 * queries) + (6 * hidden + mlp if lora["dropout"] else 0)
    last = lora.get("last_layers")
    adapted = min(layers, last) if isinstance(last, int) else layers
    kept = adapted * num_bytes * hidden + layer if checkpointing else adapted * layer
    return SLACK * num_tokens * kept


def choose(
    config: Any,
    lora: Mapping[str, Json],
    rows: Sequence[Encoded],
    drawn: Sequence[Encoded],
    execution: Mapping[str, Any],
    free: float,
    num_bytes: int,
) -> Fit:
    """The most rows a forward, up to `execution.micro_batch_size`, whose longest ones are estimated to fit into `SHARE` of
    `free` bytes; with checkpointing where `execution.gradient_checkpointing` says `on`, or says `auto` and it is needed.
    One row a forward is tried whatever its estimate. `drawn`: the longest memory rows that a forward may hold besides."""
    longest = sorted((len(row.ids) for row in rows), reverse=True)
    beside = sum(len(row.ids) for row in drawn)
    asked = execution["gradient_checkpointing"]
    ways = {"off": [False], "on": [True], "auto": [False, True]}[asked]
    size = min(int(execution["micro_batch_size"]), len(rows))
    while True:
        for checkpointing in ways:
            need = activations(config, lora, sum(longest[:size]) + beside, num_bytes, checkpointing)
            if need <= SHARE * free or (size == 1 and checkpointing == ways[-1]):
                return Fit(size, checkpointing, need)
        size = max(1, size // 2)


def free_memory(device: str, world_size: int = 1, num_at_once: int = 1) -> float:
    """Bytes that a rank may still take on `device`: as many as the rank with the least, so that all choose alike. On CPUs
    its ranks, and as many finetunes as run at once (no more than cores), are taken to share one machine's memory."""
    if device == "cpu":
        import psutil

        sharing = world_size * min(num_at_once, os.cpu_count() or 1)
        free = float(psutil.virtual_memory().available) / sharing
    else:
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = float(torch.cuda.mem_get_info(device)[0] + cached)
    return _least(free, world_size, device)


def _least(value: float, world_size: int, device: str) -> float:
    """Of all ranks' values."""
    if world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)


def checkpoint_layers(states: HiddenStates) -> None:
    """Keep a layer's input alone for the backward, and compute the layer again there, with the rows and so the dropout of
    its own forward: another forward may have come between."""

    @contextmanager
    def of(rows: list[tuple[int, int]], tokens: Any) -> Iterator[None]:
        now = list(states.rows), states.rows.tokens
        states.rows.set(rows, tokens)
        try:
            yield
        finally:
            states.rows.set(*now)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), of(list(states.rows), states.rows.tokens)

    # Nothing here draws from PyTorch's own generators; a graph (graphs.py) could not hold that their states are kept.
    on_gpu = next(states.parameters()).is_cuda
    states.base.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": contexts, "preserve_rng_state": not on_gpu}
    )


def halved(scratch: Path, micro_batch_size: int) -> int:
    """Note that half the rows a forward are to be tried, for this process and for those that take over from it."""
    smaller = max(1, micro_batch_size // 2)
    scratch.mkdir(parents=True, exist_ok=True)
    written = scratch / f"{NOTE}.tmp"
    written.write_text(str(smaller))
    os.replace(written, scratch / NOTE)
    return smaller


def noted(scratch: Path, execution: Mapping[str, Any], world_size: int = 1, device: str = "cpu") -> dict[str, Any]:
    """What of `execution` is to be otherwise after the device of any rank ran out of memory: fewer rows a forward, and with
    `auto` checkpointing, as the estimate was too low."""
    note = scratch / NOTE  # of this node: another rank's may have a folder of its own
    size = _least(float(note.read_text()) if note.exists() else math.inf, world_size, device)
    if size == math.inf:
        return {}
    asked = execution["gradient_checkpointing"]
    return {
        "micro_batch_size": min(int(execution["micro_batch_size"]), int(size)),
        "gradient_checkpointing": "on" if asked == "auto" else asked,
    }


def release(device: str) -> None:
    """Give what is no longer referred to back to the device."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
