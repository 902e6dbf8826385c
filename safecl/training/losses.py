"""Losses from hidden states. Logits exist only for one chunk at a time, of response tokens or of the vocabulary.

Shapes: P tokens of a micro-batch (its rows end to end), D hidden, V vocabulary, N response tokens among them.
Position t has a target if labels[t + 1] is one: the last prompt token predicts the answer's first token, and the end
token's own state predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safecl.base import PrerequisiteError
from safecl.training import fused

if TYPE_CHECKING:
    from safecl.training.batches import Batch

CHUNK_ELEMENTS = 2**24  # logits held at once; 64 MiB in float32
IN_CACHE = 2**19  # logits of a part of the vocabulary on a CPU: each pass over more of them is a pass over memory
TOKENS_IN_CACHE = 512  # tokens that go through the vocabulary together on a CPU
ON_GPU = 4  # times as many: with a vocabulary of 256,000 it would be 65 tokens, too few for a GPU's matrix products


@dataclass(frozen=True)
class Head:
    """The frozen output layer: z = cap * tanh((W h + b) / cap). Most models have no bias and no cap."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None

    @property
    def num_vocab(self) -> int:
        """Size of the vocabulary."""
        return int(self.weight_VD.shape[0])

    @property
    def linear(self) -> bool:
        """Whether z = W h, without bias and cap, as the Gram form needs it."""
        return self.bias_V is None and self.soft_cap is None

    @property
    def rows_at_once(self) -> int:
        """Number of tokens whose logits are held at once."""
        return max(1, CHUNK_ELEMENTS * (ON_GPU if self.weight_VD.is_cuda else 1) // self.num_vocab)

    def parts(self, num_tokens: int) -> Iterator[tuple[int, Head]]:
        """The head of one part of the vocabulary after the other, each with its first entry's number."""
        most = CHUNK_ELEMENTS * ON_GPU if self.weight_VD.is_cuda else min(CHUNK_ELEMENTS, IN_CACHE)
        # A part's logits and weights fit; of few tokens a quarter is logits, since each part has a dozen small operations.
        step = max(1, most // max(1, min(num_tokens + self.weight_VD.shape[1], 4 * num_tokens)))
        for start in range(0, self.num_vocab, step):
            bias_v = None if self.bias_V is None else self.bias_V[start : start + step]
            yield start, Head(self.weight_VD[start : start + step], bias_v, self.soft_cap)

    def in_float32(self) -> Head:
        """This head in float32. Takes 4 V D more bytes if it was not float32 (2.1 GB for Llama-3-8B)."""
        return Head(self.weight_VD.float(), None if self.bias_V is None else self.bias_V.float(), self.soft_cap)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in the head's dtype, computed as the model does."""
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.soft_cap is not None:
            logits_NV = logits_NV.div_(self.soft_cap).tanh_()
            # tanh needs its result again for a gradient
            logits_NV = logits_NV * self.soft_cap if logits_NV.requires_grad else logits_NV.mul_(self.soft_cap)
        return logits_NV


def head_of(model: Any, copy: bool = False) -> Head:
    """The output layer of a causal language model (Hugging Face). `copy`: with its own memory (ZeRO 3 shards the
    model's)."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias = getattr(layer, "bias", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if copy else tensor.detach()

    return Head(own(layer.weight), None if bias is None else own(bias), None if cap is None else float(cap))


def check_head(head: Head, hidden_ND: Tensor, logits_NV: Tensor) -> None:
    """Raise PrerequisiteError if head(hidden) differs from the logits that the model itself computed from these
    hidden states."""
    ours = head.logits(hidden_ND).float()
    off = float((ours - logits_NV.float()).abs().max())
    size = float(logits_NV.float().abs().max())
    if not off <= 1e-2 * max(size, 1e-6):
        raise PrerequisiteError(
            "the model's logits are not its output layer applied to the last hidden state: largest difference "
            f"{off:.3g}, largest logit {size:.3g}; this architecture changes them in a way that safecl does not know"
        )


def targets(labels_P: Tensor) -> tuple[Tensor, Tensor]:
    """(mask [P] of the positions that predict a target, targets [N] in order). A row's first label is no target, so
    no position predicts a token of the next row."""
    following_P = torch.full_like(labels_P, -100)
    following_P[:-1] = labels_P[1:]
    mask_P = following_P != -100
    return mask_P, following_P[mask_P]


def positions(batch: Batch, rule: str) -> Tensor:
    """Mask [P] of the positions that a rule names: `response` (those that predict a response token), `last` (the one
    that predicts the last response token), `all` (every token). A batch without rows has no position."""
    mask_P, _ = targets(batch.labels_P)
    if rule == "response" or not batch.rows:
        return mask_P
    if rule == "all":
        return torch.ones_like(mask_P)
    ends = torch.tensor(batch.lengths).cumsum(0)
    last_P = torch.zeros_like(mask_P)
    last_P[ends - 2] = True  # rows end with a response token
    return last_P


def num_positions(num_prompt: int, num_tokens: int, rule: str) -> int:
    """Number of positions of a row by a rule of `positions`."""
    return {"all": num_tokens, "last": 1, "response": num_tokens - num_prompt}[rule]


class _CrossEntropies(torch.autograd.Function):
    """Cross-entropy of each response token, in nats. The head is frozen, so the forward pass also makes the gradient
    of the hidden states, part by part of the vocabulary, and keeps no logits. With e = exp(z - max z), s = sum e and
    u = z / cap (0 without a soft cap) the gradient is (e (1 - u^2) W) / s - (1 - u[target]^2) W[target]. The target's
    own entry is left out of the first and its share of s subtracted from the second term: else, of a token that is
    almost certain, both would be large and, in bfloat16, their difference mostly rounding. max z is that of the parts
    so far: sums are scaled when it grows. Sums within a part are PyTorch's pairwise ones; the sum of log_softmax is
    off by 1e-5."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
        if kernels := fused.kernels_for(hidden_ND):
            losses_N, grad_ND = _by_kernels(hidden_ND, head, targets_N, kernels)
        else:
            # On a CPU for some tokens at a time: each part adds to the gradients of all of them, which fit the cache too.
            some = max(1, len(hidden_ND)) if hidden_ND.is_cuda else TOKENS_IN_CACHE
            pairs = zip(torch.split(hidden_ND, some), torch.split(targets_N, some), strict=True)
            found = [_by_parts(hidden_nD, head, targets_n, hidden_ND.requires_grad) for hidden_nD, targets_n in pairs]
            losses_N = torch.cat([losses_n for losses_n, _ in found])
            grad_ND = torch.cat([grad_nD for _, grad_nD in found]) if hidden_ND.requires_grad else None
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * outer[0][:, None]).to(grad_ND.dtype), None, None


def _by_kernels(hidden_ND: Tensor, head: Head, targets_N: Tensor, kernels: Any) -> tuple[Tensor, Tensor | None]:
    """Cross-entropies [N] and their gradient, if it is needed: one pass over the logits of some tokens for the losses,
    and one for the gradient, which overwrites them."""
    losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    grad_ND = torch.empty_like(hidden_ND) if hidden_ND.requires_grad else None
    step = head.rows_at_once
    for start in range(0, len(hidden_ND), step):
        here = slice(start, start + step)
        raw_NV = torch.nn.functional.linear(hidden_ND[here], head.weight_VD, head.bias_V)
        losses_N[here] = kernels.cross_entropy(raw_NV, targets_N[here], head.soft_cap, grad_ND is not None)
        if grad_ND is not None:
            grad_ND[here] = raw_NV @ head.weight_VD
    return losses_N, grad_ND


def _by_parts(hidden_ND: Tensor, head: Head, targets_N: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N] and their gradient [N, D], which is 0 unless it is needed."""
    num, cap = len(hidden_ND), head.soft_cap
    picked_N1 = torch.zeros(num, 1, dtype=torch.float32, device=hidden_ND.device)
    others_N1, most_N1 = torch.zeros_like(picked_N1, dtype=torch.float64), torch.full_like(picked_N1, -torch.inf)
    pull_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device)
    for start, part in head.parts(num):
        logits_Nv = part.logits(hidden_ND).float()
        place_N1 = targets_N[:, None] - start
        is_here_N1 = (place_N1 >= 0) & (place_N1 < part.num_vocab)
        place_N1 = place_N1.clamp_(0, part.num_vocab - 1)
        picked_N1 += logits_Nv.gather(1, place_N1) * is_here_N1
        squares_Nv = logits_Nv.square() if cap is not None and needs_grad else None
        before_N1, most_N1 = most_N1, torch.maximum(most_N1, logits_Nv.amax(1, keepdim=True))
        scale_N1 = (before_N1 - most_N1).exp_()
        e_Nv = logits_Nv.sub_(most_N1).exp_()
        e_Nv.scatter_(1, place_N1, e_Nv.gather(1, place_N1) * ~is_here_N1)
        others_N1.mul_(scale_N1).add_(e_Nv.sum(1, keepdim=True))
        if needs_grad:
            if squares_Nv is not None and cap is not None:
                e_Nv.addcmul_(e_Nv, squares_Nv, value=-1 / cap**2)
            pull_ND.mul_(scale_N1).add_(e_Nv.to(part.weight_VD.dtype) @ part.weight_VD)
    sum_N1 = others_N1 + (picked_N1 - most_N1).double().exp_()
    losses_N = (sum_N1.log() + most_N1 - picked_N1)[:, 0].float()
    if not needs_grad:
        return losses_N, pull_ND
    of_target_N1 = (others_N1 / sum_N1).float() * (1.0 if cap is None else 1 - (picked_N1 / cap).square())
    return losses_N, pull_ND.div_(sum_N1.float()).sub_(head.weight_VD[targets_N] * of_target_N1).to(hidden_ND.dtype)


def cross_entropies(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """-log p(target) of each response token, in nats, float32 [N]. Gradients go to the hidden states."""
    found: Tensor = _CrossEntropies.apply(hidden_ND, head, targets_N)  # type: ignore[no-untyped-call]
    return found


def cross_entropy_sum(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """Sum over N response tokens of -log p(target), in nats, float32 scalar."""
    return cross_entropies(hidden_ND, head, targets_N).sum()


class _Divergence(torch.autograd.Function):
    """Sum over tokens of the KL divergence of `divergence_sum`, with logits for one chunk of tokens at a time. The
    forward pass also makes the gradient of `hidden_ND`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, states_ND: Tensor, head: Head, forward_kl: bool, temperature: float
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if hidden_ND.requires_grad else None
        step = head.rows_at_once
        for start in range(0, len(hidden_ND), step):
            logits_NV = head.logits(hidden_ND[start : start + step]).float()
            other_NV = head.logits(states_ND[start : start + step].to(hidden_ND.dtype)).float()
            slope_NV = 1.0 if head.soft_cap is None else 1 - (logits_NV / head.soft_cap) ** 2
            mine_NV = (logits_NV / temperature).log_softmax(1)
            safe_NV = (other_NV / temperature).log_softmax(1)
            if forward_kl:
                each_N1 = (safe_NV.exp() * (safe_NV - mine_NV)).sum(1, keepdim=True)
                by_NV = mine_NV.exp() - safe_NV.exp()
            else:
                chance_NV = mine_NV.exp()
                each_N1 = (chance_NV * (mine_NV - safe_NV)).sum(1, keepdim=True)
                by_NV = chance_NV * (mine_NV - safe_NV - each_N1)
            total += temperature**2 * each_N1.sum()
            if grad_ND is not None:
                grad_ND[start : start + step] = (temperature * by_NV * slope_NV).to(
                    head.weight_VD.dtype
                ) @ head.weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * outer[0]).to(grad_ND.dtype), None, None, None, None


def divergence_sum(
    hidden_ND: Tensor, states_ND: Tensor, head: Head, *, forward_kl: bool = True, temperature: float = 1.0
) -> Tensor:
    """Sum over N tokens of T^2 KL(p_safe || p) (`forward_kl`) or T^2 KL(p || p_safe), in nats, float32 scalar.

    p and p_safe are softmax(z / T) of the head's logits at `hidden_ND` and at theta_safe's `states_ND`. The factor
    T^2 keeps the gradient's size when T changes (Hinton et al. 2015). Gradients go only to `hidden_ND`.
    """
    total: Tensor = _Divergence.apply(hidden_ND, states_ND, head, forward_kl, temperature)  # type: ignore[no-untyped-call]
    return total


def log_probabilities(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """log p of each target, in nats, float32 [N], without gradients. Logits are computed in the head's dtype."""
    step = head.rows_at_once
    parts = []
    with torch.no_grad():
        for hidden_nD, targets_n in zip(torch.split(hidden_ND, step), torch.split(targets_N, step), strict=True):
            logits_nV = head.logits(hidden_nD.to(head.weight_VD.dtype)).float()
            parts.append(-torch.nn.functional.cross_entropy(logits_nV, targets_n, reduction="none"))
    return torch.cat(parts)


def centred_gram(head: Head) -> tuple[Tensor, Tensor]:
    """(G, w), both float32: w [D] is the mean row of W, and G [D, D] = sum over rows of (W_v - w)(W_v - w)^T. So |W
    dh|^2 = dh^T G dh + V (w . dh)^2. Computing G as W^T W - V w w^T instead would lose up to a tenth of it in float32
    if the mean is large."""
    num_vocab, width = head.weight_VD.shape
    mean_D = head.weight_VD.mean(0, dtype=torch.float32)
    gram_DD = torch.zeros(width, width, dtype=torch.float32, device=head.weight_VD.device)
    step = max(1, CHUNK_ELEMENTS // width)
    with torch.no_grad():
        for start in range(0, num_vocab, step):
            rows_VD = head.weight_VD[start : start + step].float() - mean_D
            gram_DD.addmm_(rows_VD.T, rows_VD)
    return gram_DD, mean_D


class _ExactDistance(torch.autograd.Function):
    """Sum over tokens of |f(x) - z|^2 / V through the whole head, with logits for a part of the vocabulary at a time.
    The forward pass also makes the gradient. Returns (raw, centred); `centre` says which of the two has a gradient.

    Differences are summed less a number near their mean, so that no small number is the difference of large ones: the
    first part's mean, or with `centre`, whose gradient needs the mean itself, that of a first pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, states_ND: Tensor, head: Head, centre: bool) -> tuple[Tensor, Tensor]:
        num, both_2ND = len(hidden_ND), torch.cat([hidden_ND, states_ND.to(hidden_ND.dtype)])
        shape, device = (num, 1), hidden_ND.device
        sum_N1, squares_N1 = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        grad_ND = torch.zeros(hidden_ND.shape, device=device) if hidden_ND.requires_grad else None
        about_N1: Tensor | None = None
        if centre:
            for _, part in head.parts(len(both_2ND)):
                logits_Nv, safe_Nv = torch.split(part.logits(both_2ND).float(), [num, num])
                sum_N1 += (logits_Nv - safe_Nv).sum(1, keepdim=True)
            about_N1 = (sum_N1 / head.num_vocab).float()
            sum_N1.zero_()
        for _, part in head.parts(len(both_2ND)):
            logits_Nv, safe_Nv = torch.split(part.logits(both_2ND).float(), [num, num])
            apart_Nv = torch.sub(logits_Nv, safe_Nv, out=safe_Nv)
            about_N1 = apart_Nv.mean(1, keepdim=True) if about_N1 is None else about_N1
            shifted_Nv = apart_Nv - about_N1
            sum_N1 += shifted_Nv.sum(1, keepdim=True)
            squares_N1 += torch.linalg.vecdot(shifted_Nv, shifted_Nv)[:, None]
            if grad_ND is not None:
                by_Nv = shifted_Nv if centre else apart_Nv
                if head.soft_cap is not None:
                    by_Nv.addcmul_(by_Nv, logits_Nv.square_(), value=-1 / head.soft_cap**2)
                grad_ND += by_Nv.to(part.weight_VD.dtype) @ part.weight_VD
        mean_N1 = sum_N1 / head.num_vocab
        centred_N1 = squares_N1 / head.num_vocab - mean_N1.square()
        centred = centred_N1.sum().float()
        raw = centred if about_N1 is None else (centred_N1 + (about_N1 + mean_N1).square()).sum().float()
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND.mul_(2 / head.num_vocab).to(hidden_ND.dtype))
        ctx.place = int(centre)
        ctx.mark_non_differentiable(raw if centre else centred)
        return raw, centred

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * outer[ctx.place]).to(grad_ND.dtype), None, None, None


class LogitDistance:
    """Squared distance of a student's logits to stored ones, from hidden states [N, D] of both.

        raw = sum |f(x) - z|^2 / V          centred = sum |(f(x) - mean f(x)) - (z - mean z)|^2 / V

    Softmax ignores the mean of the logits, so a part of the raw distance changes no probability. With a plainly
    linear head the distances are the quadratic forms dh^T G dh (centred) and dh^T G dh + V (w . dh)^2 (raw) of
    `centred_gram`, divided by V, without any logits. A head with a bias or a soft cap computes logits in chunks.
    `centre`: train on the centred distance.
    """

    def __init__(self, head: Head, centre: bool = False) -> None:
        self.head, self.centre = head, centre
        if head.linear:
            self.gram_DD, self.mean_D = centred_gram(head)

    def __call__(self, hidden_ND: Tensor, states_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(raw, centred), float32 scalars. Only the one that is trained on has a gradient."""
        if not self.head.linear:
            raw, centred = _ExactDistance.apply(hidden_ND, states_ND, self.head, self.centre)  # type: ignore[no-untyped-call]
            return raw, centred
        with torch.autocast(hidden_ND.device.type, enabled=False):
            difference_ND = hidden_ND.float() - states_ND.float()
            centred = ((difference_ND @ self.gram_DD) * difference_ND).sum() / self.head.num_vocab
            raw = centred + (difference_ND @ self.mean_D).square().sum()
            return (raw.detach(), centred) if self.centre else (raw, centred.detach())
