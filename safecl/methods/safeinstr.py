"""SafeInstr: mix safety rows into the user's data.

    L(theta) = CE(user + B), shuffled together, one pass

    paper               code
    m = |B|             config.memory_size (the paper: 5 % of the user rows)
    D_user + B          `rows`: user rows and refusals in one seeded order

Source: Bianchi et al. 2024 (safety-tuned LLaMAs); a baseline of arXiv 2512.10150, sections 5.4 and 5.5.

Differences from the reference code: the loss is on responses only (there it is on the prompt too). More rows mean
more steps than SFT takes, and so another learning-rate schedule. `steps` of each record gives their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Strict
from safecl.methods import MEMORY_SIZE, Method, Needs
from safecl.tasks import Row

if TYPE_CHECKING:
    from safecl.store import Stage


class Safeinstr(Method):
    """SFT on user rows and refusals together."""

    class Config(Strict):
        # m: refusals mixed in; too many teach the model to refuse everything
        memory_size: Annotated[int, Field(ge=0)] = MEMORY_SIZE

    source = "Bianchi 2024"
    equation = "CE(user + memory)"
    cost = "1x + m/N"
    space = {"memory_size": [50, 100, 250, 500]}

    def num_trained(self, user: int, kept: int) -> int:
        return user + kept

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"memory": needs.memory(self.config.memory_size)} if self.config.memory_size else {}

    def rows(self, user: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
        return [*user, *memory[: self.config.memory_size]]

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(memory_size=0)
