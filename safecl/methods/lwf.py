"""LwF: learning without forgetting. Keep the hidden states on the user's own rows close to theta_safe's.

    L(theta) = CE(user) + beta * E over user tokens of |h_theta(x) - h_theta_safe(x)|^2 / D

    paper               code
    beta                config.weight
    h                   the last hidden state, after the final norm
    h_theta_safe(x)     a cached stage over the user rows, computed once for all epochs and trials
    x                   user rows, with the poisoned ones; on those the teacher refuses, and so LwF fails at high p

Source: arXiv 2512.10150, section 4.1.1 (after Li and Hoiem 2016, who distil softened logits in place of hidden
states).

With `align: none` h_theta_safe is the model itself without its adapter.

Choices where the paper is silent: the mean is over positions and over D. `positions: response` are the positions that
predict a response token, `all` every token, `last` the one that predicts the end.

Differences from reference codes: mammoth and avalanche distil logits at T = 2. The nearest method in git-disl
compares every MLP's output and drops large terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Strict
from safecl.methods import Contract, Method, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Lwf(Method):
    """Cross-entropy on user rows plus the squared distance of their hidden states to theta_safe's."""

    class Config(Strict):
        weight: Annotated[float, Field(ge=0)] = 1.0  # beta
        positions: Literal["response", "all", "last"] = "response"

    source = "arXiv 2512.10150, section 4.1.1 (hidden states, not logits)"
    equation = "CE(user) + weight * E_user |h(x) - h_safe(x)|^2 / D"
    contract = Contract(zero_at_start=("lwf",))
    space = {"weight": {"low": 1e-2, "high": 1e2, "log": True}}

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"teacher": needs.teacher(self.config.positions)}

    def prepare(self, run: Run) -> None:
        if self.config.weight > 0:
            self.states = run.teacher_states()

    def loss(self, run: Run, batch: Batch) -> Tensor:
        import torch

        from safecl.training import losses

        if self.config.weight == 0:
            return run.cross_entropy(batch)
        rule = self.config.positions
        [hidden_PD] = run.forward(batch)
        mine_ND = hidden_PD[losses.positions(batch, rule)].float()
        safe_ND = torch.cat(self.states(batch.indices) or [mine_ND[:0]]).to(mine_ND)
        distance = (mine_ND - safe_ND).square().mean(1).sum() / run.num_positions(rule)
        run.log("lwf", distance.detach())
        weighted: Tensor = self.config.weight * distance
        return run.cross_entropy(batch, hidden_PD) + weighted

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(weight=0.0)
