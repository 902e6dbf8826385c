"""Constrained SFT: limit how far each answer token may move from theta_safe. The early tokens are limited most.

    L(theta) = - E over user tokens of (2 / beta_t) log sigmoid(beta_t (log p_theta(y_t | x, y_<t) - log p_safe(y_t | x, y_<t)))

    paper               code
    beta_t              config.first_beta at t = 1, config.early_beta at 2 <= t <= config.num_early, config.beta later
    pi_aligned          theta_safe; its log-probabilities come from the teacher stage's hidden states on the user rows
    w_t                 2 sigmoid(-beta_t D_t), D_t = log p_theta - log p_safe: the gradient is w_t times cross-entropy's,
                        logged as `token_weight` (1 at theta_safe, towards 0 as a token becomes likelier than it was there)

Source: Qi et al., Safety Alignment Should Be Made More Than Just a Few Tokens Deep (ICLR 2025, arXiv 2406.05946), Eq.
3 and section 4.1. The values .5, 2 and .1 of beta and the 5 early tokens are the paper's. As beta_t -> 0 the gradient
becomes SFT's. Here beta_t = 0 means that limit: cross-entropy without the constant.

Differences from the released code (Unispac/shallow-vs-deep-alignment, trainer.py): that code multiplies cross-entropy
by w_t with a floor of .001, and takes a mean over each answer, then over answers. Here w_t has no floor, and the mean
is over the global batch's tokens, as in every method of safecl. The first version of that code added 1 inside the
sigmoid for the early tokens and multiplied by 5. The paper does neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Strict
from safecl.methods import Contract, Method, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Constrained(Method):
    """SFT that stops learning a token once it is much likelier than under theta_safe."""

    class Config(Strict):
        beta: Annotated[float, Field(ge=0)] = 0.1  # of later tokens; a larger value keeps them closer to theta_safe
        first_beta: Annotated[float, Field(ge=0)] = 0.5  # of the first token, whose loss is large from the start
        early_beta: Annotated[float, Field(ge=0)] = 2.0  # of the second to the num_early-th
        num_early: Annotated[int, Field(ge=0)] = 5  # tokens at an answer's beginning that are limited more

    source = "Qi 2025 (arXiv 2406.05946), Eq. 3"
    equation = "-E (2/beta_t) log sigmoid(beta_t (log p(y_t) - log p_safe(y_t))) on user rows"
    cost = "1x and the head once more"
    contract = Contract(params={"beta": 0.2})
    space = {
        "beta": {"low": 0.01, "high": 1.0, "log": True},
        "first_beta": {"low": 0.05, "high": 5.0, "log": True},
        "early_beta": {"low": 0.1, "high": 20.0, "log": True},
    }

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"teacher": needs.teacher("response")}

    def prepare(self, run: Run) -> None:
        if self.config != self.neutral():
            self.states = run.teacher_states()

    def loss(self, run: Run, batch: Batch) -> Tensor:
        import torch
        from torch.nn.functional import logsigmoid

        from safecl.training import losses

        if self.config == self.neutral():  # this is SFT bit for bit
            return run.cross_entropy(batch)
        [hidden_PD] = run.forward(batch)
        mask_P, targets_N = losses.targets(batch.labels_P)
        safe_ND = torch.cat(self.states(batch.indices) or [hidden_PD[:0]]).to(hidden_PD)
        each_N = losses.cross_entropies(hidden_PD[mask_P], run.head, targets_N)
        apart_N = -each_N - losses.log_probabilities(safe_ND, run.head, targets_N)
        beta_N = self.betas([row.num_targets for row in batch.rows]).to(each_N)
        held_N = -2 / beta_N.clamp(min=1e-30) * logsigmoid(beta_N * apart_N)
        run.log("sft_loss", each_N.detach().sum() / batch.num_targets)
        run.log("token_weight", (2 * torch.sigmoid(-beta_N * apart_N.detach())).sum() / batch.num_targets)
        return torch.where(beta_N > 0, held_N, each_N).sum() / batch.num_targets

    def betas(self, lengths: list[int]) -> Tensor:
        """beta_t of each response token, [N]: answers with these numbers of tokens, one after another."""
        import torch

        config = self.config
        early = [config.first_beta, *[config.early_beta] * (config.num_early - 1)] if config.num_early else []
        return torch.tensor([beta for n in lengths for beta in [*early, *[config.beta] * n][:n]])

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(beta=0.0, first_beta=0.0, early_beta=0.0)
