"""SafeLoRA: project the fine-tuning update of a module onto the alignment's, where the two disagree.

    C = V V^T / |V|_F  (exact: V V^+),   V = theta_safe - theta_0;   U = theta_tuned - theta_safe = B A
    U <- C U   where cos(C U, U) <= tau;                             theta = theta_0 + V + U

    paper               code
    V, U                per module, as low-rank factors: V = B_s A_s, U = B_u A_u (of theta_tuned - theta_safe)
    C U                 B_s (A_s A_s^T)(B_s^T B_u) A_u / |V|_F: rank by rank, never O x O
    tau                 config.threshold, or the config.num_modules-th smallest cosine

Source: Hsu et al. 2024 (Safe LoRA), Eqs. 2-4; a baseline of arXiv 2512.10150, sections 5.4 and 5.5.

Same as the reference code (IBM/SafeLoRA, model.py): cosines rounded to 5 digits, `<=`. Different: there is one pass
(that code computes the cosines of `number` mode twice). Exactly `num_modules` modules are projected (that code's `<=`
takes ties too). A module whose V is zero is left alone.

C is no projector: its eigenvalues are sigma_i^2/|V|_F, so how much is kept depends on |V|. `projector: exact` is one.
A model that was aligned elsewhere needs `aligned_from`. V is then of whole weights, and the result dense. U is the
update from theta_safe, also with `adapter: continue`, which trains theta_safe's adapter further.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import Contract, Method

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.training.weights import Dense, LoRA, Weights


class Safelora(Method):
    """SFT, then a projection of the modules that moved away from the alignment."""

    class Config(Strict):
        mode: Literal["threshold", "number"] = "threshold"
        threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5  # tau: project modules with this cosine or a smaller one
        # in `number` mode: number of projected modules, smallest cosines first
        num_modules: Annotated[int, Field(ge=0)] = 10
        projector: Literal["frobenius", "exact"] = "frobenius"

    source = "Hsu 2024, Eqs. 2-4 (IBM/SafeLoRA)"
    equation = "theta_safe + (C U where cos(C U, U) <= threshold else U), C = V V^T / |V|"
    cost = "SFT's, shared"
    trains_as = "sft"
    contract = Contract(variants=({"mode": "number"}, {"projector": "exact"}))
    space = {"threshold": {"low": 0.3, "high": 0.9, "log": False}}

    @classmethod
    def search_space(cls, config: Config) -> dict[str, Json]:
        return cls.space if config.mode == "threshold" else {"num_modules": [5, 10, 20, 40]}

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        from safecl.training.weights import combine

        cosines: dict[str, float] = {}
        for name, aligned in safe.items():
            update = combine([(tuned[name], 1.0), (aligned, -1.0)])
            cosines[name] = round(cosine(project(update, aligned, self.config.projector), update), 5)
        order = sorted(cosines, key=lambda name: cosines[name])
        chosen = {name for name in order if cosines[name] <= self.config.threshold}
        if self.config.mode == "number":
            chosen = set(order[: self.config.num_modules])
        log["projected"] = len(chosen)
        log["modules"] = len(order)
        log["cosines"] = [cosines[name] for name in order]
        for name, aligned in safe.items():  # computed again: dense updates of all modules would not fit in memory
            update = combine([(tuned[name], 1.0), (aligned, -1.0)])
            kept = project(update, aligned, self.config.projector) if name in chosen else update
            yield name, combine([(aligned, 1.0), (kept, 1.0)])


def project(update: LoRA | Dense, aligned: LoRA | Dense, projector: str) -> LoRA | Dense:
    """C U for an update U and theta_safe's delta V = `aligned`. In factored form if both are low-rank; U itself if V
    is zero."""
    import torch

    from safecl.training.weights import Dense, LoRA

    if isinstance(update, Dense) or isinstance(aligned, Dense):  # aligned elsewhere: V is of whole weights
        change_OI, update_OI = aligned.delta(), update.delta()
        size = float(change_OI.norm())
        if size == 0:
            return update
        if projector == "frobenius":
            return Dense(change_OI @ (change_OI.T @ update_OI) / size)
        left_OR, size_R, _ = torch.linalg.svd(change_OI, full_matrices=False)
        basis_OR = left_OR[:, size_R > 1e-6 * size_R[0]]
        return Dense(basis_OR @ (basis_OR.T @ update_OI))
    up_OR, down_RI = aligned.scale * aligned.up_OR.float(), aligned.down_RI.float()
    inner_RR = down_RI @ down_RI.T
    norm = float(((up_OR.T @ up_OR) * inner_RR).sum().clamp(min=0).sqrt())
    if norm == 0:
        return update
    if projector == "frobenius":
        new_OR = up_OR @ (inner_RR @ (up_OR.T @ update.up_OR)) / norm
    else:  # onto the column space of V = up (R^T Q^T) with down^T = Q R
        columns_OR = up_OR @ torch.linalg.qr(down_RI.T).R.T
        left_OR, size_R, _ = torch.linalg.svd(columns_OR, full_matrices=False)
        basis_OR = left_OR[:, size_R > 1e-6 * size_R[0]]
        new_OR = basis_OR @ (basis_OR.T @ update.up_OR)
    return LoRA(update.down_RI, new_OR, update.scale)


def cosine(first: LoRA | Dense, second: LoRA | Dense) -> float:
    """Cosine of two deltas taken as vectors; 1 if one is zero. Two low-rank deltas must have the same `down_RI`."""
    from safecl.training.weights import Dense

    if isinstance(first, Dense) or isinstance(second, Dense):
        first_OI, second_OI = first.delta().double(), second.delta().double()
        size = float(first_OI.norm() * second_OI.norm())
        return float((first_OI * second_OI).sum()) / size if size > 0 else 1.0
    inner_RR = second.down_RI @ second.down_RI.T

    def product(a: Tensor, b: Tensor) -> float:
        return float(((a.T @ b).double() * inner_RR.double()).sum())

    size = (product(first.up_OR, first.up_OR) * product(second.up_OR, second.up_OR)) ** 0.5
    return product(first.up_OR, second.up_OR) / size if size > 0 else 1.0
