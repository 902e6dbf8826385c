"""Interpolation of theta_safe and the tuned model after fine-tuning.

    linear              theta_0 + (1 - a) S + a T                          a = config.share of the tuned model
    slerp               theta_0 + sin((1-a) w)/sin(w) S + sin(a w)/sin(w) T,   w the angle between S and T
    task_arithmetic     theta_0 + (1 - a) S + a U
    ties                theta_0 + merge of trimmed (1-a) S and a T where signs agree with the larger sum
    dare                theta_0 + (1 - a) drop(S) + a drop(T), drop: keep each entry with probability density, / density

    paper               code
    theta_0, S, T, U    base; theta_safe - theta_0; tuned - theta_0; tuned - theta_safe = T - S
    lambda              config.share; config.safe_share (task_arithmetic's own weight of S; null: 1 - a)

Source: Farn et al. 2024 (arXiv 2412.19512); SLERP after Shoemake 1985, TIES after Yadav et al. 2023, DARE after Yu et
al. 2024.

With `align: none` linear is theta_safe + a U and needs no base. The other kinds need the model's `aligned_from`.

Every kind works on changes from the base, module by module. Linear and task arithmetic stay low-rank and exact: the
factors are laid side by side. (Averaging A and B themselves would give another, wrong result.) SLERP's angle is
between S and T. Between whole weights every pair is almost parallel, so SLERP would equal linear. TIES as in
mergekit: keep the `density` largest entries of each, take the sign of the weighted sum, and average the entries of
that sign over the weights that took part. DARE divides by density, as its paper does. (mergekit 0.1.5 rescales so
that the L1 norm stays, which is the same in expectation.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import Contract, Method

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.training.weights import Dense, LoRA, Weights


class Interpolate(Method):
    """SFT, then a point between theta_safe and the tuned model."""

    class Config(Strict):
        kind: Literal["linear", "slerp", "task_arithmetic", "ties", "dare"] = "linear"
        share: Annotated[float, Field(ge=0, le=1)] = 0.5  # a: 0 is theta_safe, 1 the tuned model (linear)
        safe_share: Annotated[float, Field(ge=0)] | None = None  # task_arithmetic's weight of S; null: 1 - share
        density: Annotated[float, Field(gt=0, le=1)] = 0.5  # ties and dare: fraction of entries that are kept
        seed: Annotated[int, Field(ge=0)] = 0  # seed of dare's masks

    source = "arXiv 2412.19512; SLERP, TIES, DARE (mergekit)"
    equation = "theta_0 + (1 - share) S + share T  (or slerp, task_arithmetic, ties, dare)"
    cost = "SFT's, shared"
    trains_as = "sft"
    contract = Contract(
        variants=({"kind": "slerp"}, {"kind": "ties"}, {"kind": "dare"}, {"kind": "task_arithmetic", "safe_share": 1.0})
    )
    space = {"share": {"low": 0.1, "high": 0.9, "log": False}}

    @classmethod
    def search_space(cls, config: Config) -> dict[str, Json]:
        more: dict[str, Json] = {}
        if config.kind in ("ties", "dare"):
            more = {"density": {"low": 0.1, "high": 1.0, "log": False}}
        elif config.safe_share is not None:
            more = {"safe_share": {"low": 0.1, "high": 1.5, "log": False}}
        return {**cls.space, **more}

    @property
    def needs_base(self) -> bool:
        return bool(self.config.kind != "linear")  # linear is theta_safe + a U, for any theta_safe

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        from safecl.training.weights import Dense, combine

        config, a = self.config, self.config.share
        for name, aligned in safe.items():
            if config.kind == "linear":
                yield name, combine([(aligned, 1 - a), (tuned[name], a)])
            elif config.kind == "task_arithmetic":
                kept = 1 - a if config.safe_share is None else config.safe_share
                yield name, combine([(aligned, kept - a), (tuned[name], a)])
            else:
                first_OI, second_OI = aligned.delta(), tuned[name].delta()
                if config.kind == "slerp":
                    yield name, Dense(slerp(first_OI, second_OI, a))
                elif config.kind == "ties":
                    yield name, Dense(ties([first_OI, second_OI], [1 - a, a], config.density))
                else:
                    dropped = [
                        drop(delta_OI, config.density, f"{config.seed}/{name}/{i}")
                        for i, delta_OI in enumerate((first_OI, second_OI))
                    ]
                    yield name, Dense((1 - a) * dropped[0] + a * dropped[1])


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` of the arc from `first` to `second`, both taken as vectors. Linear if they are almost
    parallel (|cosine| above .9995) or one is zero."""
    import torch

    size = first.norm() * second.norm()
    cosine = float((first * second).sum() / size.clamp(min=1e-30))
    if abs(cosine) > 0.9995 or not size:
        return torch.lerp(first, second, share)
    angle = torch.arccos(torch.tensor(cosine))
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)


def ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES merge of `deltas`: trim, take the sign of the weighted sum, mean over the entries of that sign."""
    import torch

    trimmed = []
    for delta in deltas:
        num_kept = max(1, int(density * delta.numel()))
        kept = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
        kept[delta.abs().flatten().topk(num_kept).indices] = True
        trimmed.append(torch.where(kept.view_as(delta), delta, torch.zeros_like(delta)))
    weighted = torch.stack([weight * delta for weight, delta in zip(weights, trimmed, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == sign
    shares = torch.tensor(weights).to(weighted).view(-1, *[1] * deltas[0].dim()) * agrees
    total = shares.sum(0)
    merged = (weighted * agrees).sum(0)
    return torch.where(total.abs() < 1e-8, merged, merged / total.clamp(min=1e-8))


def drop(delta: Tensor, density: float, stream: str) -> Tensor:
    """`delta` under DARE's random mask (from the random stream `stream`), divided by `density` so that the mean
    stays."""
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "big"))
    mask = torch.rand(delta.shape, generator=generator).to(delta) < density
    return torch.where(mask, delta / density, torch.zeros_like(delta))
