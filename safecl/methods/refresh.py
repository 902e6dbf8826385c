"""Refresh: unlearn a little before each step, then relearn with refusals.

    released (default)  J times:  theta <- theta + gamma (1 + .001 F)^-1 (|theta| d / |d| + .001 N(0, 1)),  d = grad CE(user)
    paper               J times:  theta <- theta + gamma F^-1 grad CE(user) + N(0, 2 gamma F^-1)
    then, both          L(theta) = CE(user) + weight * CE(memory)

    paper               code
    J                   config.unlearn_steps
    gamma               config.gamma; released: a tensor moves by this fraction of its own norm, 1e-5 in the code
    F                   the fisher stage, divided by its mean; the paper's F^-1 is 1 / (F + config.damping)
    |theta|, |d|        norms of one tensor
    B                   run.draw(): relearning is `replay`'s loss on the same draws

Source: Wang et al. 2024 (arXiv 2403.13249, Algorithm 1) and its released code (CL-refresh-learning, models/derpp.py).
We read the code; the paper's text was not available to us. arXiv 2512.10150, section 4.1.2, has the paper's step and
no value of gamma.

Why the released step is the default: the paper's ascent is proportional to gamma and its noise to sqrt(gamma). In a
model of this size no gamma makes the ascent larger than the noise. At gamma 1e-8 the ascent moved SmolLM2's factors
by 8e-7 of their norm and a tiny model's by 1e-8, the noise by 1e-3. So Refresh was replay with noise. The released
step moves them by 1e-5, its noise by 2e-7. Both are logged every step as `unlearned` and `unlearn_noise`, relative to
the norm of theta.

Choices: in `paper` the standard deviation of an element's noise is at most `max_noise` times its tensor's RMS (where
F is near 0 it would be many times the parameter). Noise comes from a random stream of (seed, step), the same on every
rank. Unlearning comes before the step, as in both papers. The released code unlearns after the step, on the batch
just learned.

With gamma 0 both variants are `replay`. Refused with `adapter: stack` and `align: none`, for the same reason as EWC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import MEMORY_SIZE, Contract, Method, Needs
from safecl.methods.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Refresh(Method):
    """Replay with an unlearning step before every step."""

    class Config(Strict):
        # size of the unlearning step; released: as a fraction of each tensor's norm
        gamma: Annotated[float, Field(ge=0)] = 1e-5
        unlearn_steps: Annotated[int, Field(ge=1)] = 1  # J
        variant: Literal["released", "paper"] = "released"
        # paper: added to the Fisher (divided by its mean) before inverting
        damping: Annotated[float, Field(gt=0)] = 0.01
        # paper: largest standard deviation of the noise, in RMS of its tensor; 0: no noise
        max_noise: Annotated[float, Field(ge=0)] = 1e-3
        weight: Annotated[float, Field(ge=0)] = 1.0  # weight of the memory batch in relearning
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows
        num_rows: Annotated[int, Field(ge=1)] = 1000  # most safety rows for the Fisher information

    VERSION = "2"  # 1: the paper's step at gamma 1e-8 by default, a thousand times smaller than its own noise
    source = "Wang 2024 and its code; `variant: paper` as arXiv 2512.10150"
    equation = "theta + gamma (1 + .001 F)^-1 |theta| grad / |grad|, then CE(user) + weight * CE(memory)"
    cost = "(J + 2)x"
    # This gamma makes the noise large enough to be seen. Five times as much brought the gradient of one element close
    # to 0. That element then caused 91 to 95 % of the gap between runs; otherwise the gap is 5e-7 to 1e-6.
    contract = Contract(params={"gamma": 1e-3}, variants=({"variant": "paper"},), in_bfloat16=True)
    space = {
        "gamma": {"low": 1e-6, "high": 1e-3, "log": True},
        "unlearn_steps": [1, 2, 3],
        "memory_size": [50, 100, 250],
    }

    @classmethod
    def search_space(cls, config: Config) -> dict[str, Json]:
        damping: dict[str, Json] = {"damping": {"low": 1e-4, "high": 1.0, "log": True}}
        return {**cls.space, **damping} if config.variant == "paper" else cls.space

    @property
    def passes(self) -> float:
        return 1.0 + (self.config.unlearn_steps if self.config.gamma > 0 else 0)

    @property
    def draws(self) -> float:
        return float(self.config.weight > 0)

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {
            "memory": needs.memory(self.config.memory_size),
            "fisher": needs.fisher(self.config.num_rows, "empirical"),
        }

    def prepare(self, run: Run) -> None:
        self.fisher = run.fisher("mean")

    def before_step(self, run: Run, batch: Batch) -> None:
        if self.config.gamma == 0:
            return
        for j in range(self.config.unlearn_steps):
            for part, last in run.each_part(batch):
                run.engine.backward(run.cross_entropy(part), last)
            theta_n = run.theta()
            ascent_n, noise_n = self.change(theta_n, run.gradient(), run.sizes(), run.generator("refresh.noise", j))
            run.log_whole("unlearned", ascent_n.norm() / theta_n.norm())
            run.log_whole("unlearn_noise", noise_n.norm() / theta_n.norm())
            run.set_theta(theta_n + ascent_n + noise_n)
            run.engine.clear_grads()

    def change(
        self, theta_n: Tensor, gradient_n: Tensor, sizes: Sequence[int], noise: Generator
    ) -> tuple[Tensor, Tensor]:
        """(ascent, noise): the unlearning step for parameters `theta_n` [n] whose tensors have these sizes."""
        import torch

        config = self.config
        drawn_n = torch.randn(theta_n.shape, generator=noise, device=noise.device)
        if config.variant == "released":
            rate_n = config.gamma / (1 + 0.001 * self.fisher)
            scale_n = norms(theta_n, sizes) / (norms(gradient_n, sizes) + 1e-12)
            return rate_n * scale_n * gradient_n, rate_n * 0.001 * drawn_n
        inverse_n = 1 / (self.fisher + config.damping)
        wanted_n = (2 * config.gamma * inverse_n).sqrt()
        most_n = config.max_noise * norms(theta_n, sizes, mean=True)
        return config.gamma * inverse_n * gradient_n, torch.minimum(wanted_n, most_n) * drawn_n

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Loss of relearning: that of `replay`."""
        return Replay(self.config).loss(run, batch)

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(gamma=0.0, weight=0.0)


def norms(flat_n: Tensor, sizes: Sequence[int], mean: bool = False) -> Tensor:
    """For each element the L2 norm of its tensor, or with `mean` the RMS, [n]."""
    import torch

    found = torch.stack(torch._foreach_norm(list(torch.split(flat_n, list(sizes)))))
    lengths = torch.tensor(list(sizes), device=flat_n.device)
    return (found / lengths.sqrt() if mean else found).repeat_interleave(lengths, output_size=len(flat_n))
