"""Lisa: lazy safety alignment. Train on refusals and on user rows in turns; each turn is tied to the end of the
other.

    state "alignment" (K1 steps):  L = CE(memory) + (rho/2) |theta - theta_other|^2
    state "finetune"  (K2 steps):  L = CE(user)   + (rho/2) |theta - theta_other|^2

    paper               code
    rho                 config.rho
    K1 + K2             steps // config.cycles, in optimizer steps
    K1                  round((K1 + K2) * config.alignment_share), at least 1 and at most K1 + K2 - 1
    theta_other         run.kept: the last iterate of the other state, taken at each switch; at first theta_safe
    B                   run.draw(); config.memory_size rows

Source: Huang et al. 2024 (Lisa), Algorithm 2; a baseline of arXiv 2512.10150, sections 5.4 and 5.5. As in the
reference code (git-disl/Lisa, trainer.py) the run starts with alignment, and one optimizer state serves both states.
User batches that fall on alignment steps are not trained on (`user_step` is 0 there, and they cost no forward).

Differences from the reference code: turns are counted in optimizer steps. There they are counted in micro-steps,
which is wrong with gradient accumulation. Its switch of 100 and 900 steps is a share here, because a run of 60 steps
would never leave alignment. It leaves out the proximal term in the first 10 % of the steps. Here that is
`free_share`, off by default, because the paper's formula has no such exception.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import ConfigError, Strict
from safecl.methods import MEMORY_SIZE, Contract, Method, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Lisa(Method):
    """Turns of alignment and fine-tuning with a proximal term between them."""

    class Config(Strict):
        rho: Annotated[float, Field(ge=0)] = 1.0  # pull towards the other state's last iterate
        cycles: Annotated[int, Field(ge=3)] = 10  # full turns of both states in the run
        alignment_share: Annotated[float, Field(gt=0, lt=1)] = 0.1  # K1 / (K1 + K2)
        # the first steps, this fraction of all, have no proximal term
        free_share: Annotated[float, Field(ge=0, le=1)] = 0.0
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows

    source = "Huang 2024, Algorithm 2 (git-disl)"
    equation = "CE(memory) and CE(user) in turns, + (rho/2) |theta - theta_other|^2"
    cost = "1x"
    # With other draws one element causes 70 to 99 % of the gap between runs; otherwise the gap is 4e-7 to 8e-7.
    contract = Contract(params={"cycles": 3, "alignment_share": 0.5, "memory_batch_size": 8})
    space = {
        "rho": {"low": 1e-3, "high": 10.0, "log": True},
        "cycles": [5, 10, 20],
        "alignment_share": {"low": 0.05, "high": 0.5, "log": False},
    }

    VERSION = "2"  # 1 rounded the period up, so not every run had all its cycles

    @property
    def passes(self) -> float:
        return 1.0 - self.draws

    @property
    def draws(self) -> float:
        return float(self.config.alignment_share)

    def check_steps(self, num_steps: int) -> None:
        if num_steps < 2 * self.config.cycles:
            raise ConfigError(
                f"lisa: {num_steps} optimizer steps are too few for {self.config.cycles} cycles of both states: expected "
                f"at least {2 * self.config.cycles}. Lower cycles (3 at least) or train for longer"
            )

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"memory": needs.memory(self.config.memory_size)}

    def prepare(self, run: Run) -> None:
        self.check_steps(run.num_steps)
        self.period = run.num_steps // self.config.cycles
        self.num_aligned = min(self.period - 1, max(1, round(self.period * self.config.alignment_share)))

    def before_step(self, run: Run, batch: Batch) -> None:
        place = run.step % self.period
        self.aligning = place < self.num_aligned
        if place in (0, self.num_aligned):
            run.kept = {"other": run.theta().clone()}
        run.log_whole("user_step", float(not self.aligning))

    def loss(self, run: Run, batch: Batch) -> Tensor:
        return run.cross_entropy(run.draw() if self.aligning else batch)

    def after_backward(self, run: Run, batch: Batch) -> None:
        """Add the proximal term's gradient rho (theta - theta_other), once per step: the term does not depend on
        rows."""
        if self.config.rho == 0 or run.step < self.config.free_share * run.num_steps:
            return
        apart_n = run.theta() - run.kept["other"]
        run.log_whole("proximal", apart_n.double().square().sum())
        run.add_gradient(self.config.rho * apart_n)
