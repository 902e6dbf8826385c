"""Refresh: unlearn a little before each step, then relearn with refusals.

    J times:  theta <- theta + gamma F^-1 grad CE(user) + N(0, 2 gamma F^-1)
    then:     L(theta) = CE(user) + weight * CE(memory)

    paper               code
    J                   config.unlearn_steps
    gamma               config.gamma
    F                   the fisher stage, divided by its mean; F^-1 is 1 / (F + config.damping)
    B                   run.draw(): relearning is `replay`'s loss on the same draws

Source: Wang et al. 2024 (refresh learning), Eq. 9 and Algorithm 1; arXiv 2512.10150, section 3.

Choices: the noise of each element is capped at `max_noise` of its tensor's RMS (where F is near 0 it would be many times the
parameter); the share that was capped is logged. Noise comes from a stream of (seed, step), the same on every rank.

Differences from the released code (Continual learning's models/derpp.py), kept as `variant: released`: one ascent step whose
direction is rescaled to the tensor's own norm, theta <- theta + gamma (1 + .001 F)^-1 (|theta| d/|d| + .001 N(0, 1)), gamma 1e-5.
With gamma 0 both are `replay`. Refused with `adapter: stack`, for EWC's reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import MEMORY_SIZE, Method
from safecl.methods.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from safecl.plan import Graph
    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Refresh(Method):
    """Replay with an unlearning step before every step."""

    class Config(Strict):
        gamma: Annotated[float, Field(ge=0)] = 1e-8  # unlearning step; released: 1e-5
        unlearn_steps: Annotated[int, Field(ge=1)] = 1  # J
        variant: Literal["paper", "released"] = "paper"
        damping: Annotated[float, Field(gt=0)] = 0.01  # added to the mean-normalised Fisher before inverting
        max_noise: Annotated[float, Field(ge=0)] = 1e-3  # cap of the noise's sd, in RMS of its tensor; 0: no noise
        weight: Annotated[float, Field(ge=0)] = 1.0  # of the memory batch in relearning
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows
        num_rows: Annotated[int, Field(ge=1)] = 1000  # safety rows the Fisher is taken over, at most

    equation = "theta + gamma F^-1 grad CE(user) + noise, J times; then CE(user) + weight * CE(memory)"
    cost = "(J + 2)x"
    space = {
        "gamma": {"low": 1e-10, "high": 1e-6, "log": True},
        "unlearn_steps": [1, 2, 3],
        "damping": {"low": 1e-4, "high": 1.0, "log": True},
        "memory_size": [50, 100, 250],
    }

    @classmethod
    def search_space(cls, config: Config) -> dict[str, Json]:
        if config.variant == "paper":
            return cls.space
        return {"gamma": {"low": 1e-8, "high": 1e-4, "log": True}, "memory_size": cls.space["memory_size"]}

    def requires(self, graph: Graph) -> dict[str, Stage]:
        return {
            "memory": graph.memory(self.config.memory_size),
            "fisher": graph.fisher(self.config.num_rows, "empirical"),
        }

    def prepare(self, run: Run) -> None:
        self.fisher = run.fisher("mean")

    def before_step(self, run: Run, batch: Batch) -> None:
        if self.config.gamma == 0:
            return
        for j in range(self.config.unlearn_steps):
            for part, last in run.each_part(batch):
                run.engine.backward(run.cross_entropy(part), last)
            change_n, capped = self.change(run.theta(), run.gradient(), run.sizes(), run.generator("refresh.noise", j))
            run.set_theta(run.theta() + change_n)
            run.log_whole("noise_capped", capped)
            run.engine.clear_grads()

    def change(
        self, theta_n: Tensor, gradient_n: Tensor, sizes: Sequence[int], noise: Generator
    ) -> tuple[Tensor, Tensor]:
        """The unlearning step of parameters of these sizes, and the share of elements whose noise was capped."""
        import torch

        config = self.config
        drawn_n = torch.randn(theta_n.shape, generator=noise, device=noise.device)
        if config.variant == "released":
            scale_n = norms(theta_n, sizes) / (norms(gradient_n, sizes) + 1e-12)
            ascent_n = scale_n * gradient_n
            return config.gamma / (1 + 0.001 * self.fisher) * (ascent_n + 0.001 * drawn_n), theta_n.new_zeros(())
        inverse_n = 1 / (self.fisher + config.damping)
        wanted_n = (2 * config.gamma * inverse_n).sqrt()
        most_n = config.max_noise * norms(theta_n, sizes, mean=True)
        change_n = config.gamma * inverse_n * gradient_n + torch.minimum(wanted_n, most_n) * drawn_n
        return change_n, (wanted_n > most_n).float().mean()

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Relearning is replay's loss."""
        return Replay(self.config).loss(run, batch)

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(gamma=0.0, weight=0.0)


def norms(flat_n: Tensor, sizes: Sequence[int], mean: bool = False) -> Tensor:
    """The L2 norm (`mean`: the RMS) of the tensor that each element belongs to, [n]."""
    import torch

    found = torch.stack(torch._foreach_norm(list(torch.split(flat_n, list(sizes)))))
    lengths = torch.tensor(list(sizes), device=flat_n.device)
    return (found / lengths.sqrt() if mean else found).repeat_interleave(lengths, output_size=len(flat_n))
