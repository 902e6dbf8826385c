"""How a finetune fits in memory: an estimate, gradient checkpointing, and fewer rows per forward.

Both settings change a result only by floating-point rounding. Losses are normalised over the global batch, and a
layer that is computed again draws the same dropout.

    kept for the backward, bytes per token and adapted layer: b (7 D + 4 I + 2 Q)  [+ 6 D + I with dropout]
    with checkpointing:                                       b D per layer, and one layer as above

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
from safecl.training import below

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from safecl.training.model import HiddenStates
    from safecl.training.tokens import Encoded

SHARE = 0.8  # of the free memory that may be planned, because the need is only an estimate
SLACK = 1.2  # factor for allocators and short-lived tensors
OUT_OF_MEMORY = torch.OutOfMemoryError
NOTE = "micro_batch_size"  # file of a finetune's scratch folder: the rows per forward to try next


class Fit(NamedTuple):
    """Rows per forward, whether layers are computed again in the backward, and the estimated bytes that this needs."""

    micro_batch_size: int
    checkpointing: bool
    num_bytes: float

    def leaves_room(self, free: float) -> bool:
        """Whether CUDA graphs fit too. They hold their own activations, beside those of forwards without graphs."""
        from safecl.training.graphs import SPARE

        return (1 + SPARE) * self.num_bytes <= SHARE * free


def activations(config: Any, lora: Mapping[str, Json], num_tokens: int, num_bytes: int, checkpointing: bool) -> float:
    """Estimated bytes kept for the backward of a forward of `num_tokens` tokens. `config` is the model's config, and
    `num_bytes` the size of one number."""
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
    """Choose rows per forward and gradient checkpointing.

    Returns the most rows, up to `execution.micro_batch_size` and halved until they fit, whose longest ones are
    estimated to need at most `SHARE` of `free` bytes. Checkpointing is on if `execution.gradient_checkpointing` is
    `on`, or if it is `auto` and the rows do not fit without. One row per forward is accepted whatever its estimate.
    `drawn`: the longest memory rows that a forward may hold as well.
    """
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
    """Bytes that a rank may still use on `device`: the least over all ranks, so that all ranks choose the same. On a
    CPU its ranks, and the finetunes that run at once (at most one per core), are assumed to share one machine's
    memory."""
    if device == "cpu":
        import psutil

        sharing = world_size * min(num_at_once, os.cpu_count() or 1)
        free = float(psutil.virtual_memory().available) / sharing
    else:
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = float(torch.cuda.mem_get_info(device)[0] + cached)
    return _least(free, world_size, device)


def _least(value: float, world_size: int, device: str) -> float:
    """The least of all ranks' values."""
    if world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)


def checkpoint_layers(states: HiddenStates) -> None:
    """Keep only a layer's input for the backward, and compute the layer again there. The second computation gets the
    rows, and so the dropout, of its own forward, since another forward may have run in between."""

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

    # No layer draws from PyTorch's own generators. Saving their states could not be captured in a CUDA graph
    # (graphs.py).
    on_gpu = next(states.parameters()).is_cuda
    states.base.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": contexts, "preserve_rng_state": not on_gpu}
    )


def halved(scratch: Path, micro_batch_size: int) -> int:
    """Write down that half the rows per forward are to be tried next, for this process and for those that continue
    its work. Returns that number."""
    smaller = max(1, micro_batch_size // 2)
    scratch.mkdir(parents=True, exist_ok=True)
    written = scratch / f"{NOTE}.tmp"
    written.write_text(str(smaller))
    os.replace(written, scratch / NOTE)
    return smaller


def noted(scratch: Path, execution: Mapping[str, Any], world_size: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Changes to `execution` after a rank's device ran out of memory: fewer rows per forward, and checkpointing on if
    it was `auto`, because the estimate was too low. Empty if no device did."""
    note = scratch / NOTE  # on this node only; a rank on another node has its own folder
    size = _least(float(note.read_text()) if note.exists() else math.inf, world_size, device)
    if size == math.inf:
        return {}
    asked = execution["gradient_checkpointing"]
    return {
        "micro_batch_size": min(int(execution["micro_batch_size"]), int(size)),
        "gradient_checkpointing": "on" if asked == "auto" else asked,
    }


def release(device: str) -> None:
    """Free unused memory of the process and the device, and known states of lower layers, which are computed again."""
    below.forget()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
