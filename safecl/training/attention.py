"""Causal attention within each row of a micro-batch whose rows lie end to end, for every model that takes its attention
from transformers' registry.

    softmax(cap(Q K^T * scaling) + mask) V,     cap(s) = softcap * tanh(s / softcap) where the model has a soft cap

Rows are split off and attended one after the other: no row pays for another's length, and no mask of all tokens against all
is made. On a GPU PyTorch's flash attention takes rows laid end to end; what it does not do (soft caps, float32) is computed
of all rows at once, each padded to the longest: there a call costs more than some padding, and rows' bounds stay on the
device (graphs.py). Sliding windows and soft caps are the model's
own (transformers' `sdpa` attention drops a soft cap).

Shapes: H query heads, K key and value heads of G queries each, B rows, T tokens of a row, P tokens of all rows, D size of a
head.
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
from safecl.training import fused

NAME = "safecl_rows"
# PyTorch's CPU kernel for bfloat16 is slower than the one for float32 up to about this length (backward: 6 times at 48).
FLOAT32_UP_TO = 512

# What models hand to their attention beside the arguments of `rows_attention`, and what of it may be passed by: rows' bounds
# said again, lengths, caches, positions (they are in the queries and keys already). All else would change the answer.
HARMLESS = frozenset({
    "cu_seq_lens_k", "max_length_k", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "cache_position", "use_cache", "past_key_values", "deterministic", "logits_to_keep", "return_dict",
})  # fmt: skip


class NotHere(PrerequisiteError):
    """Rows of this model cannot be attended to end to end: its own attention is to be used, on padded rows."""


_asked: ContextVar[list[int | None] | None] = ContextVar("asked", default=None)
_padded: ContextVar[list[int] | None] = ContextVar("padded", default=None)
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


@contextmanager
def padded() -> Iterator[list[int]]:
    """How long rows of a forward are made meanwhile by each attention that pads them."""
    found: list[int] = []
    token = _padded.set(found)
    try:
        yield found
    finally:
        _padded.reset(token)


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
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: [1, H, P, D] and two of [1, K, P, D] to [1, P, H, D].

    `cu_seq_lens_q` holds the rows' bounds (0, end of the first row, ...), on a GPU's memory for a GPU, and `max_length_q` is
    no less than the longest's tokens. Without bounds every batch row is one whole row.
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
    if query.is_cuda and cu_seq_lens_q is None and len(query) == 1:  # as a row among others is computed
        cu_seq_lens_q = torch.tensor([0, query.shape[2]], dtype=torch.int32, device=query.device)
    if query.is_cuda and cu_seq_lens_q is not None:
        longest = max_length_q or int(cu_seq_lens_q.diff().max())
        if softcap is None and _has_flash(query, value):
            return _flash(query, key, value, cu_seq_lens_q, longest, scaling, sliding_window), None
        if (made := _padded.get()) is not None:
            made.append(longest)
        return padded_rows(query, key, value, cu_seq_lens_q, longest, scaling, sliding_window, softcap), None
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and max(lengths) <= FLOAT32_UP_TO:
        query, key, value = query.float(), key.float(), value.float()
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
    ends: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    num_heads, num_keys = query_1HPD.shape[1], key_1KPD.shape[1]
    own: dict[str, Any] = {}
    if num_heads > num_keys and "enable_gqa" in signature(_varlen_attn()).parameters:
        own["enable_gqa"] = True
    elif num_heads > num_keys:
        key_1KPD, value_1KPD = (part.repeat_interleave(num_heads // num_keys, 1) for part in (key_1KPD, value_1KPD))
    query_PHD, key_PHD, value_PHD = (whole.squeeze(0).transpose(0, 1) for whole in (query_1HPD, key_1KPD, value_1KPD))
    left = -1 if window is None else window - 1  # a window of transformers counts the token itself
    found_PHD: Tensor = _varlen_attn()(
        query_PHD.contiguous(), key_PHD.contiguous(), value_PHD.contiguous(), ends, ends, longest, longest,
        scale=scaling, window_size=(left, 0), **own,
    )  # fmt: skip
    return found_PHD[None]


def padded_rows(
    query_1HPD: Tensor,
    key_1KPD: Tensor,
    value_1KPD: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """[1, P, H, D], without a look at `bounds` from the host."""
    starts_B1 = bounds[:-1, None].long()
    places_T = torch.arange(longest, device=bounds.device)
    num_tokens = query_1HPD.shape[2]
    from_BT = (starts_B1 + places_T).clamp_(max=num_tokens - 1)  # past a row's end: any token's, which nobody reads
    tokens_P = torch.arange(num_tokens, device=bounds.device)
    row_P = torch.searchsorted(bounds[1:].long(), tokens_P, right=True)
    to_P = row_P * longest + tokens_P - starts_B1[:, 0][row_P]
    real_BT = places_T < bounds.diff()[:, None]
    if cap is not None:
        scale = query_1HPD.shape[3] ** -0.5 if scaling is None else scaling
        found: Tensor = _Capped.apply(
            query_1HPD, key_1KPD, value_1KPD, from_BT, to_P, real_BT, scale, window, cap
        )  # type: ignore[no-untyped-call]  # fmt: skip
        return found
    query, key, value = (
        torch.unflatten(whole.squeeze(0).index_select(1, from_BT.flatten()), 1, from_BT.shape).transpose(0, 1)
        for whole in (query_1HPD, key_1KPD, value_1KPD)
    )
    found_BHTD = _row(query, key, value, scaling, window, None)
    return found_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, to_P)[None]


class _Capped(torch.autograd.Function):
    """Attention under a soft cap of all rows at once; the weights are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, query_1HPD: Tensor, key_1KPD: Tensor, value_1KPD: Tensor, from_BT: Tensor, to_P: Tensor,
        real_BT: Tensor, scale: float, window: int | None, cap: float,
    ) -> Tensor:  # fmt: skip
        ctx.how = scale, window, cap
        num_keys = key_1KPD.shape[1]
        query = _by_row(query_1HPD.transpose(1, 2), from_BT, num_keys)
        key, value = (_by_row(whole.transpose(1, 2), from_BT, num_keys) for whole in (key_1KPD, value_1KPD))
        weights = _capped_weights(query @ key.transpose(2, 3), from_BT.shape[1], *ctx.how)
        ctx.save_for_backward(query, key, value, from_BT, to_P, real_BT)
        return _end_to_end(weights @ value, from_BT, to_P)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, from_BT, to_P, real_BT = ctx.saved_tensors
        grad = _by_row(outer[0], from_BT, key.shape[0], real_BT)
        scores, slope = query @ key.transpose(2, 3), grad @ value.transpose(2, 3)
        weights, slope = _capped_weights_back(scores, slope, from_BT.shape[1], *ctx.how)
        each = slope @ key, slope.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad
        found = (_end_to_end(one, from_BT, to_P).transpose(1, 2) for one in each)
        return *found, None, None, None, None, None, None


def _by_row(whole_1PHD: Tensor, from_BT: Tensor, num_keys: int, real_BT: Tensor | None = None) -> Tensor:
    """[K, B, G T, D]: the queries of one key head follow one another; where `real_BT` says so, else 0."""
    found_BTHD = torch.unflatten(whole_1PHD[0].index_select(0, from_BT.flatten()), 0, from_BT.shape)
    if real_BT is not None:
        found_BTHD = found_BTHD.mul_(real_BT[..., None, None])
    return torch.unflatten(found_BTHD, 2, (num_keys, -1)).permute(2, 0, 3, 1, 4).flatten(2, 3)


def _end_to_end(found: Tensor, from_BT: Tensor, to_P: Tensor) -> Tensor:
    """[K, B, G T, D] to [1, P, H, D]."""
    num_tokens = from_BT.shape[1]
    found = torch.unflatten(found, 2, (-1, num_tokens)).permute(1, 3, 0, 2, 4)
    return found.flatten(2, 3).flatten(0, 1).index_select(0, to_P)[None]


def _seen(num_tokens: int, window: int | None, device: torch.device) -> Tensor:
    seen_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return seen_TT if window is None or window >= num_tokens else seen_TT.triu(1 - window)


def _kernels(scores: Tensor) -> Any:
    kernels = fused.kernels_for(scores)
    return kernels if kernels and scores.shape[-1] <= kernels.LONGEST else None


def _capped_weights(scores: Tensor, num_tokens: int, scale: float, window: int | None, cap: float) -> Tensor:
    """softmax(cap tanh(scores scale / cap)) of [K, B, G T, T] over what is seen."""
    if kernels := _kernels(scores):
        found: Tensor = kernels.capped_weights(scores, scale, window, cap)
        return found
    bent = torch.unflatten((scores.float() * (scale / cap)).tanh_().mul_(cap), 2, (-1, num_tokens))
    bent.masked_fill_(~_seen(num_tokens, window, scores.device), float("-inf"))
    return bent.softmax(-1).to(scores.dtype).flatten(2, 3)


def _capped_weights_back(
    scores: Tensor, grad: Tensor, num_tokens: int, scale: float, window: int | None, cap: float
) -> tuple[Tensor, Tensor]:
    """(weights, gradient of the scores), by the gradient of the weights. May overwrite both."""
    if kernels := _kernels(scores):
        kernels.capped_weights_back(scores, grad, scale, window, cap)
        return scores, grad
    bend = (scores.float() * (scale / cap)).tanh_()
    weights = torch.unflatten(bend * cap, 2, (-1, num_tokens))
    weights = weights.masked_fill_(~_seen(num_tokens, window, scores.device), float("-inf")).softmax(-1).flatten(2, 3)
    along = (weights * grad).sum(-1, keepdim=True)
    slope = (grad - along).mul_(weights).mul_(bend.square_().neg_().add_(1)).mul_(scale)
    return weights.to(scores.dtype), slope.to(scores.dtype)


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
