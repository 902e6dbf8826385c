"""Causal attention within each row of a micro-batch whose rows lie end to end, for every model that takes its attention
from transformers' registry.

    softmax(cap(Q K^T * scaling) + mask) V,     cap(s) = softcap * tanh(s / softcap) where the model has a soft cap

Rows are split off and attended one after the other (on a GPU by PyTorch's flash attention for rows laid end to end): no
row pays for another's length, and no mask of all tokens against all is made. Sliding windows and soft caps are the model's
own (transformers' `sdpa` attention drops a soft cap).

Shapes: H query heads, K key and value heads, T tokens of a row, P tokens of all rows, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from safecl.base import PrerequisiteError

NAME = "safecl_rows"
# PyTorch's CPU kernel for bfloat16 is slower than the one for float32 up to about this length (backward: 6 times at 48).
FLOAT32_UP_TO = 512

# What models hand to their attention beside the arguments of `rows_attention`, and what of it may be passed by: rows' bounds
# said again, lengths, caches, positions (they are in the queries and keys already). All else would change the answer.
HARMLESS = frozenset({
    "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "cache_position", "use_cache", "past_key_values", "deterministic", "logits_to_keep", "return_dict",
})  # fmt: skip


class NotHere(PrerequisiteError):
    """Rows of this model cannot be attended to end to end: its own attention is to be used, on padded rows."""


_asked: ContextVar[list[int | None] | None] = ContextVar("asked", default=None)
_packed: ContextVar[bool] = ContextVar("packed", default=False)


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rows_attention)


@contextmanager
def packed() -> Iterator[None]:
    """While a forward of packed rows runs: attention refuses to run without the rows' bounds."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


@contextmanager
def windows() -> Iterator[list[int | None]]:
    """The sliding window that each attention of a forward is handed meanwhile, in order."""
    found: list[int | None] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: [1, H, P, D] and two of [1, K, P, D] to [1, P, H, D].

    `cu_seq_lens_q` holds the rows' bounds (0, end of the first row, ...). Without it every batch row is one whole row.
    The base's own attention dropout is left out: its masks would depend on how rows are batched.

    Raises:
        NotHere: the model does not hand the rows' bounds to its attention, or asks it for something else than is done here:
            sinks, biases, chosen blocks, a mask of its own.
        PrerequisiteError: its tokens are to see what comes after them.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise PrerequisiteError(
            f"{type(module).__name__} lets tokens see what comes after them: expected a causal language model"
        )
    others["attention_mask"] = attention_mask
    asked = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if asked:
        raise NotHere(f"{type(module).__name__} asks its attention for {', '.join(asked)}, which is not done here")
    if cu_seq_lens_q is None and _packed.get():
        raise NotHere(
            f"{type(module).__name__} does not hand row bounds (cu_seq_lens_q) to its attention: rows would see each other"
        )
    if (seen := _asked.get()) is not None:
        seen.append(sliding_window)
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and max(lengths) <= FLOAT32_UP_TO:
        query, key, value = query.float(), key.float(), value.float()
    if len(lengths) > 1 and softcap is None and _has_flash(query, value):
        return _flash(query, key, value, bounds, max(lengths), scaling, sliding_window), None
    each = zip(*(torch.split(whole, lengths, 2) for whole in (query, key, value)), strict=True)
    found = torch.cat([_row(q, k, v, scaling, sliding_window, softcap) for q, k, v in each], 2)
    return found.to(dtype).transpose(1, 2).contiguous(), None


def _has_flash(query: Tensor, value: Tensor) -> bool:
    if not query.is_cuda or query.dtype == torch.float32 or not query.shape[-1] == value.shape[-1] <= 256:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and _varlen_attn() is not None


@cache
def _varlen_attn() -> Any:
    """PyTorch's flash attention over rows laid end to end, for GPUs; None where this version has it not, or otherwise."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in signature(varlen_attn).parameters else None


def _flash(
    query_1HPD: Tensor,
    key_1KPD: Tensor,
    value_1KPD: Tensor,
    bounds: list[int],
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    ends = torch.tensor(bounds, dtype=torch.int32, device=query_1HPD.device)
    groups = query_1HPD.shape[1] // key_1KPD.shape[1]
    query_PHD, key_PHD, value_PHD = (
        (whole if whole.shape[1] == query_1HPD.shape[1] else whole.repeat_interleave(groups, 1))[0].transpose(0, 1)
        for whole in (query_1HPD, key_1KPD, value_1KPD)
    )
    left = -1 if window is None else window - 1  # a window of transformers counts the token itself
    found_PHD: Tensor = _varlen_attn()(
        query_PHD.contiguous(), key_PHD.contiguous(), value_PHD.contiguous(), ends, ends, longest, longest,
        scale=scaling, window_size=(left, 0),
    )  # fmt: skip
    return found_PHD[None]


def _row(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    scaling: float | None,
    window: int | None,
    cap: float | None,
) -> Tensor:
    num_tokens = query_BHTD.shape[2]
    windowed = window is not None and num_tokens > window
    if cap is None and not windowed:
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHTD, key_BKTD, value_BKTD, is_causal=True, scale=scaling, enable_gqa=True
        )
    seen_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query_BHTD.device).tril()
    if windowed:
        assert window is not None
        seen_TT = seen_TT.triu(1 - window)
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key_BKTD, value_BKTD))
    if cap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHTD, key, value, attn_mask=seen_TT, scale=scaling
        )
    scale = query_BHTD.shape[3] ** -0.5 if scaling is None else scaling
    scores_BHTT = torch.tanh(query_BHTD @ key.transpose(2, 3) * (scale / cap)) * cap
    weights_BHTT = scores_BHTT.masked_fill(~seen_TT, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights_BHTT.to(value.dtype) @ value
