"""SAM: sharpness-aware minimisation. Take each step by the gradient at the worst point nearby, so that minima are flat.

    e = rho g / |g|,  g = grad CE(rows) at theta;     theta <- AdamW step at theta by grad CE(rows) at theta + e

    paper               code
    rho                 config.rho, in the L2 norm of all trained factors
    w + e(w)            run.set_theta, from the step's beginning to its last backward

Source: Foret et al. 2021 (SAM, arXiv 2010.01412), Algorithm 1, p = 2. Meant for the alignment (`align.method: sam`): what
lies in a flat minimum is forgotten less by later training (Mehta et al. 2023, arXiv 2112.09153). As a method of stage two it
is SFT on the user rows with flat minima, a control that holds nothing of safety.

Same as the reference code: both gradients are of one batch, dropout masks included. Different: weight decay is AdamW's, at
theta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Strict
from safecl.methods import Contract, Method

if TYPE_CHECKING:
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Sam(Method):
    """SFT by gradients of the worst point nearby."""

    class Config(Strict):
        rho: Annotated[float, Field(ge=0)] = 0.05  # how far the point is; a flatter minimum, at the cost of the fit

    source = "Foret 2021, Algorithm 1"
    equation = "CE(rows) at theta + rho g/|g|, g = grad CE(rows)"
    cost = "2x"
    contract = Contract(params={"rho": 0.01})
    space = {"rho": {"low": 0.01, "high": 1.0, "log": True}}

    @property
    def passes(self) -> float:
        return 2.0 if self.config.rho > 0 else 1.0

    def before_step(self, run: Run, batch: Batch) -> None:
        if self.config.rho == 0:
            return
        for part, last in run.each_part(batch):
            run.engine.backward(run.cross_entropy(part), last)
        self.before = run.theta().clone()
        gradient_n = run.gradient()
        run.set_theta(self.before + self.config.rho / gradient_n.norm().clamp(min=1e-12) * gradient_n)
        run.engine.clear_grads()

    def after_backward(self, run: Run, batch: Batch) -> None:
        if self.config.rho > 0:
            run.set_theta(self.before)

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(rho=0.0)
