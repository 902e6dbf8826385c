"""KL: keep the distribution of each next token close to theta_safe's.

    L(theta) = CE(user) + weight * sum over the chosen rows of T^2 E_tokens KL(p_safe || p_theta)      (direction: forward)
                                                     or of T^2 E_tokens KL(p_theta || p_safe)          (direction: reverse)
    p = softmax(z / T)

    symbol              code
    chosen rows         config.on: the batch's user rows, as many memory rows, or both (one mean each, added)
    p_safe              softmax of the head on theta_safe's stored hidden states: no teacher runs during training
    T                   config.temperature; T^2 keeps the gradient's size when T changes
    m                   config.memory_size; memory rows are the draws of DER and replay

Source: no single paper. A KL penalty to the starting model as in RLHF (Ziegler et al. 2019, Eq. 2, direction
reverse), and distillation (Hinton et al. 2015 for T^2; Li and Hoiem 2016 on new-task rows, direction forward).

Forward asks theta to give probability to every token to which theta_safe gives it. Reverse asks theta to give none to
tokens to which theta_safe gives none. On poisoned user rows the distribution after each harmful token is kept close
to theta_safe's too. Unlike refusals in a memory, this does not teach the answer that would have been right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import MEMORY_SIZE, Contract, Method, Needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Kl(Method):
    """Cross-entropy on user rows plus the KL divergence to theta_safe."""

    class Config(Strict):
        # a larger value keeps theta closer to theta_safe, at the task's cost
        weight: Annotated[float, Field(ge=0)] = 1.0
        on: Literal["user", "memory", "both"] = "both"  # rows on which the KL divergence is computed
        direction: Literal["forward", "reverse"] = "forward"  # forward: KL(p_safe || p); reverse: KL(p || p_safe)
        temperature: Annotated[float, Field(gt=0)] = 1.0  # above 1: unlikely tokens count more
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows

    source = "Ziegler 2019, Eq. 2; Hinton 2015"
    equation = "CE(user) + weight * T^2 E KL(p_safe || p) on user and/or memory rows"
    cost = "2x; on user rows alone 1x and the head twice more"
    contract = Contract(
        params={"weight": 0.3},
        variants=({"on": "user"}, {"on": "memory"}),
        zero_at_start=("kl_user", "kl_memory"),
    )
    space = {"weight": {"low": 0.03, "high": 30.0, "log": True}, "memory_size": [50, 100, 250]}

    @classmethod
    def search_space(cls, config: Config) -> dict[str, Json]:
        return cls.space if config.on != "user" else {"weight": cls.space["weight"]}

    @property
    def draws(self) -> float:
        return float(self.config.weight > 0 and self.config.on != "user")

    def requires(self, needs: Needs) -> dict[str, Stage]:
        needed: dict[str, Stage] = {}
        if self.config.on != "memory":
            needed["teacher"] = needs.teacher("response")
        if self.config.on != "user":
            needed["memory"] = needs.memory(self.config.memory_size, "response")
        return needed

    def prepare(self, run: Run) -> None:
        if self.config.weight > 0 and self.config.on != "memory":
            self.states = run.teacher_states()

    def loss(self, run: Run, batch: Batch) -> Tensor:
        import torch

        config = self.config
        if config.weight == 0:  # no forward, no draw: this is SFT bit for bit
            return run.cross_entropy(batch)
        drawn = [] if config.on == "user" else [run.draw()]
        user_PD, *drawn_PD = run.forward(batch, *drawn)
        loss = run.cross_entropy(batch, user_PD)
        if config.on != "memory":
            safe_ND = torch.cat(self.states(batch.indices) or [user_PD[:0]]).to(user_PD)
            loss = loss + config.weight * self.divergence(run, "kl_user", batch, user_PD, safe_ND)
        for memory, memory_PD in zip(drawn, drawn_PD, strict=True):
            assert memory.states_ND is not None
            loss = loss + config.weight * self.divergence(run, "kl_memory", memory, memory_PD, memory.states_ND)
        return loss

    def divergence(
        self, run: Run, name: str, batch: Batch, hidden_PD: torch.Tensor, safe_ND: torch.Tensor
    ) -> torch.Tensor:
        """This micro-batch's part of the mean divergence over the batch's response tokens; logged as `name`."""
        from safecl.training import losses

        mask_P, _ = losses.targets(batch.labels_P)
        forward, temperature = self.config.direction == "forward", self.config.temperature
        total = losses.divergence_sum(hidden_PD[mask_P], safe_ND, run.head, forward_kl=forward, temperature=temperature)
        run.log(name, total.detach() / batch.num_targets)
        return total / batch.num_targets

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(weight=0.0)
