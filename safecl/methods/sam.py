"""SAM: sharpness-aware minimisation. Each step uses the gradient at the worst point nearby, so that minima are flat.

    e = rho g / |g|,  g = grad CE(rows) at theta;     theta <- AdamW step at theta by grad CE(rows) at theta + e

    paper               code
    rho                 config.rho, in the L2 norm of all trained factors
    w + e(w)            run.set_theta, from the step's beginning to its last backward

Source: Foret et al. 2021 (SAM, arXiv 2010.01412), Algorithm 1, p = 2. It is meant for the alignment (`align.method:
sam`): later training forgets less of what was learnt in a flat minimum (Mehta et al. 2023, arXiv 2112.09153). As a
method of stage two it is SFT on the user rows with flat minima. That is a control: it uses nothing of safety.

Same as the reference code: both gradients are of one batch, with the same dropout masks. Different: weight decay is
AdamW's, at theta.
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
    """SFT with the gradient at the worst point nearby."""

    class Config(Strict):
        rho: Annotated[float, Field(ge=0)] = 0.05  # distance of the point; larger: a flatter minimum, a worse fit

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
