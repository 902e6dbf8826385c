"""Replay: experience replay of refusals. A control for DER: cross-entropy on the same rows that DER draws.

    L(theta) = CE(user) + weight * CE(memory)

    paper               code
    m = |B|             config.memory_size
    (x, y) in B         run.draw(): the same stream as DER's, so with equal sizes the same rows at every step

Source: Rolnick et al. 2019, experience replay. arXiv 2512.10150 has no such row. A memory row is seen about 20 times
as often as when SafeInstr mixes it in. So without this control a good DER result could come from that alone, and not
from the logits.

Choices: `weight` multiplies the mean over the memory batch's own tokens (1 is the relearning step of Refresh, Eq. 9
there).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Strict
from safecl.methods import MEMORY_SIZE, Method, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Replay(Method):
    """Cross-entropy on user rows and on the memory rows that DER would draw."""

    class Config(Strict):
        weight: Annotated[float, Field(ge=0)] = 1.0  # weight of the memory batch; a larger value keeps refusals more
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows

    source = "Rolnick 2019; control: cross-entropy on the very rows DER draws"
    equation = "CE(user) + weight * CE(memory)"
    cost = "2x"
    space = {"weight": {"low": 0.03, "high": 3.0, "log": True}, "memory_size": [50, 100, 250]}

    @property
    def draws(self) -> float:
        return float(self.config.weight > 0)

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"memory": needs.memory(self.config.memory_size)}

    def loss(self, run: Run, batch: Batch) -> Tensor:
        if self.config.weight == 0:  # no forward, no draw: this is SFT bit for bit
            return run.cross_entropy(batch)
        memory = run.draw()
        user_PD, memory_PD = run.forward(batch, memory)
        remembered = run.cross_entropy(memory, memory_PD)
        run.log("replay", remembered.detach())
        loss: Tensor = run.cross_entropy(batch, user_PD) + self.config.weight * remembered
        return loss

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(weight=0.0)
