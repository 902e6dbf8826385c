"""Causal attention within each row of a micro-batch whose rows lie end to end. It serves every model that takes its
attention function from transformers' registry.

    softmax(cap(Q K^T * scaling) + mask) V,     cap(s) = softcap * tanh(s / softcap) if the model has a soft cap

On a CPU the rows are split and attended one after another. So no row pays for another row's length, and no mask of
all tokens against all tokens is made. On a GPU PyTorch's flash attention takes rows that lie end to end. It does not
support soft caps and float32. Those cases are computed for all rows at once, each padded to the longest: on a GPU one
call per row would cost more than the padding, and this way the rows' bounds stay on the device (graphs.py). Sliding
windows and soft caps are applied as the model defines them (transformers' `sdpa` attention drops a soft cap).

Shapes: H query heads, K key and value heads of G queries each, B rows, T tokens of a row, P tokens of all rows, D
size of a head.
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
# Up to about this many tokens PyTorch's CPU kernel is slower in bfloat16 than in float32 (backward: 6 times at 48
# tokens).
FLOAT32_UP_TO = 512

# Arguments beyond those of `rows_attention` that models pass to their attention and that may be ignored: the rows'
# bounds a second time, lengths, caches, and positions (queries and keys hold them already). Any other argument would
# change the result.
HARMLESS = frozenset({
    "cu_seq_lens_k", "max_length_k", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "cache_position", "use_cache", "past_key_values", "deterministic", "logits_to_keep", "return_dict",
})  # fmt: skip


class NotHere(PrerequisiteError):
    """This model's attention cannot take rows that lie end to end. Use the model's own attention on padded rows."""


_asked: ContextVar[list[int | None] | None] = ContextVar("asked", default=None)
_padded: ContextVar[list[int] | None] = ContextVar("padded", default=None)
_packed: ContextVar[bool] = ContextVar("packed", default=False)


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rows_attention)


@contextmanager
def packed() -> Iterator[None]:
    """Context of a forward of rows that lie end to end. In it attention raises NotHere if it is not given the rows'
    bounds."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


@contextmanager
def windows() -> Iterator[list[int | None]]:
    """Context that yields a list of the sliding window passed to each attention call, in order."""
    found: list[int | None] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


@contextmanager
def padded() -> Iterator[list[int]]:
    """Context that yields a list with the padded row length, in tokens, of each attention call that pads."""
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
    """Attention of one layer: query [1, H, P, D], key and value [1, K, P, D]; returns [1, P, H, D] and None.

    `cu_seq_lens_q` holds the rows' bounds (0, end of the first row, ...), on the GPU for a model on a GPU.
    `max_length_q` is at least the number of tokens of the longest row. Without bounds every batch row is one whole
    row. The base's own attention dropout is not applied, because its masks would depend on how rows are batched.

    Raises:
        NotHere: the model does not pass the rows' bounds to its attention, or needs something that is not supported here:
            sinks, biases, chosen blocks, a mask of its own.
        PrerequisiteError: the model is not causal.
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
    if query.is_cuda and cu_seq_lens_q is None and len(query) == 1:  # same computation as for several rows
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
    """PyTorch's flash attention for rows that lie end to end, on GPUs. None if this version lacks it or its
    `window_size`."""
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
    left = -1 if window is None else window - 1  # transformers' window includes the token itself
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
    """Attention of all rows at once, padded to `longest` tokens: [1, P, H, D]. The host never reads `bounds`."""
    starts_B1 = bounds[:-1, None].long()
    places_T = torch.arange(longest, device=bounds.device)
    num_tokens = query_1HPD.shape[2]
    from_BT = (starts_B1 + places_T).clamp_(max=num_tokens - 1)  # past a row's end: any token; the result is not used
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
    """Attention with a soft cap, of all rows at once. The backward computes the weights again."""

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
    """[K, B, G T, D]: for each key head the queries of its G query heads, one after another. Elements are 0 where
    `real_BT` is False."""
    found_BTHD = torch.unflatten(whole_1PHD[0].index_select(0, from_BT.flatten()), 0, from_BT.shape)
    if real_BT is not None:
        found_BTHD = found_BTHD.mul_(real_BT[..., None, None])
    return torch.unflatten(found_BTHD, 2, (num_keys, -1)).permute(2, 0, 3, 1, 4).flatten(2, 3)


def _end_to_end(found: Tensor, from_BT: Tensor, to_P: Tensor) -> Tensor:
    """Inverse of `_by_row`: [K, B, G T, D] to [1, P, H, D]."""
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
    """softmax(cap tanh(scores scale / cap)) of scores [K, B, G T, T], over the tokens that each query may see."""
    if kernels := _kernels(scores):
        found: Tensor = kernels.capped_weights(scores, scale, window, cap)
        return found
    bent = torch.unflatten((scores.float() * (scale / cap)).tanh_().mul_(cap), 2, (-1, num_tokens))
    bent.masked_fill_(~_seen(num_tokens, window, scores.device), float("-inf"))
    return bent.softmax(-1).to(scores.dtype).flatten(2, 3)


def _capped_weights_back(
    scores: Tensor, grad: Tensor, num_tokens: int, scale: float, window: int | None, cap: float
) -> tuple[Tensor, Tensor]:
    """(weights, gradient of the scores), given the gradient `grad` of the weights. May overwrite both arguments."""
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
