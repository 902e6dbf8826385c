"""SafeMERGE: merge a module with theta_safe's where the fine-tuning left the alignment's subspace.

    C = V V^T / |V|_F,  V = S = theta_safe - theta_0;   T = theta_tuned - theta_0, U = T - S
    T <- (1 - a) S + a T    where cos(C U, U) < tau;    theta = theta_0 + T

    paper               code
    V, C, cos           safelora.py, per module, as low-rank factors
    tau                 config.threshold
    alpha, 1 - alpha    config.share of the tuned model, the rest of theta_safe

Source: Djuhera et al., SafeMERGE (ICLR 2025 workshop, arXiv 2503.17239) and its released code (aladinD/SafeMERGE,
utils.py), which we read: threshold .35, weights .8 and .2, cosines rounded to 5 digits, `<`.

With `align: none` V is the model minus its base, which `aligned_from` names.

Differences: the safe model of the paper is a second adapter, tuned on safety rows on top of an aligned model. Here
theta_safe is both the aligned and the safe model, so a merged module keeps the share `a` of its own update. The
released code averages LoRA factors (PEFT's `linear`), which adds unwanted cross terms. Here deltas are merged,
exactly. A module whose V is zero is left alone, because there is no alignment to compare with (in the released code
its cosine is then 0, and it is merged).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import Method
from safecl.methods.safelora import cosine, project

if TYPE_CHECKING:
    from safecl.training.weights import Dense, LoRA, Weights


class Safemerge(Method):
    """SFT, then a merge with theta_safe of the modules that moved away from the alignment."""

    class Config(Strict):
        threshold: Annotated[float, Field(ge=-1, le=1)] = 0.35  # tau: a module is merged if its cosine is below
        share: Annotated[float, Field(ge=0, le=1)] = 0.8  # a: weight of the tuned model in a merged module
        projector: Literal["frobenius", "exact"] = "frobenius"

    source = "Djuhera 2025 (arXiv 2503.17239) and its code"
    equation = "(1 - share) S + share T where cos(C U, U) < threshold, else T;  C = V V^T / |V|"
    cost = "SFT's, shared"
    trains_as = "sft"
    space = {
        "threshold": {"low": 0.1, "high": 0.9, "log": False},
        "share": {"low": 0.0, "high": 0.9, "log": False},
    }

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        from safecl.training.weights import combine

        merged, cosines = 0, []
        for name, aligned in safe.items():
            update = combine([(tuned[name], 1.0), (aligned, -1.0)])
            cosines.append(round(cosine(project(update, aligned, self.config.projector), update), 5))
            if cosines[-1] < self.config.threshold:
                merged += 1
                yield name, combine([(aligned, 1 - self.config.share), (tuned[name], self.config.share)])
            else:
                yield name, tuned[name]
            log.update(merged=merged, modules=len(cosines), cosines=[*sorted(cosines)])

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(threshold=-1.0)
