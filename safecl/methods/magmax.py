"""MagMax: for each weight keep the change of larger magnitude, either theta_safe's or the tuned model's.

    theta = theta_0 + lambda * (T where |T| >= |S| else S),    S = theta_safe - theta_0, T = theta_tuned - theta_0

    paper               code
    lambda              config.scale
    tau_1, tau_2        S and T, dense, one module at a time

Source: Marczak et al. 2024 (MagMax), Eq. 1; arXiv 2512.10150, section 4.1.3.

With `align: none` S is the model minus its base, which `aligned_from` names.

Same as the reference code (magmax, merge with max_abs): elementwise, and ties go to the later model. MagMax is
defined on dense weight changes. Choosing among LoRA factors would be another method. The result has full rank, so it
is saved dense. Fine-tuning starts from theta_safe, so T = S + a small update, and MagMax takes T for most weights
(the share is logged).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import Method

if TYPE_CHECKING:
    from safecl.training.weights import Dense, LoRA, Weights


class Magmax(Method):
    """SFT, then the larger change of each weight."""

    class Config(Strict):
        scale: Annotated[float, Field(ge=0)] = 1.0  # lambda: 0 is the base; the reference's best is .5 over many tasks

    source = "Marczak 2024, Eq. 1"
    equation = "theta_0 + scale * (T where |T| >= |S| else S)"
    cost = "SFT's, shared"
    trains_as = "sft"
    space = {"scale": {"low": 0.3, "high": 1.2, "log": False}}

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        import torch

        from safecl.training.weights import Dense

        taken = total = 0
        for name, aligned in safe.items():
            first_OI, second_OI = aligned.delta(), tuned[name].delta()
            later_OI = second_OI.abs() >= first_OI.abs()
            taken, total = taken + int(later_OI.sum()), total + later_OI.numel()
            log["share_of_tuned"] = taken / total
            yield name, Dense(self.config.scale * torch.where(later_OI, second_OI, first_OI))
