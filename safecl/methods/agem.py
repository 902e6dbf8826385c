"""A-GEM: averaged gradient episodic memory. Remove from the user gradient the part that would raise the loss on a
memory batch.

    g <- g - (g . g_s / g_s . g_s) g_s   if g . g_s < 0,   else g stays;     g = grad CE(user), g_s = grad CE(memory)

    paper               code
    g                   run.gradient() after the last backward: summed over micro-batches and ranks, not yet clipped
    g_s                 the same after a backward on memory rows; it is kept, then the gradients are cleared
    B                   run.draw(); config.memory_size rows, config.memory_batch_size a step

Source: Chaudhry et al. 2019, Eq. 11; arXiv 2512.10150, section 4.1.2.

Same as the reference code (mammoth and avalanche, agem): one dot product over all trained parameters. Different: the
memory holds `memory_size` rows (mammoth fills it from one loader batch). Products are summed in float64. g_s is
computed at the same dropout rate, with its own masks.

The guarantee holds for g only. AdamW's step has another direction, so the sign of the step against g_s is logged as
`step_along_ref`: positive means that this step lowered the memory loss to first order. `violation` is 1 if g was
projected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Strict
from safecl.methods import MEMORY_SIZE, Contract, Method, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Agem(Method):
    """SFT whose gradient never points against the gradient of the memory rows."""

    class Config(Strict):
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = 20  # rows a step; more: less noise in g_s, more cost

    source = "Chaudhry 2019, Eq. 11 (mammoth, avalanche)"
    equation = "g - (g.g_s / g_s.g_s) g_s where g.g_s < 0; g = grad CE(user), g_s = grad CE(memory)"
    cost = "1x + memory_batch_size / batch_size"
    contract = Contract(in_bfloat16=True)
    space = {"memory_size": [50, 100, 250], "memory_batch_size": [5, 10, 20, 50]}

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"memory": needs.memory(self.config.memory_size)}

    def before_step(self, run: Run, batch: Batch) -> None:
        for _, last in run.each_part(batch):
            run.engine.backward(run.cross_entropy(run.draw()), last)
        self.reference = run.gradient().clone()
        run.engine.clear_grads()

    def after_backward(self, run: Run, batch: Batch) -> None:
        gradient_n, reference_n = run.gradient(), self.reference
        along, size = dot(gradient_n, reference_n), dot(reference_n, reference_n)
        violated = along < 0
        run.log_whole("violation", violated)
        run.log_whole("cosine", along / (dot(gradient_n, gradient_n) * size).sqrt().clamp(min=1e-30))
        share = violated * along / (size + 1e-12)  # 0 without a violation, and no wait for the device
        run.set_gradient(gradient_n - share.float() * reference_n)
        self.before = run.theta().clone()

    def after_step(self, run: Run) -> None:
        moved_n = self.before - run.theta()  # minus the step
        run.log_whole("step_along_ref", (dot(moved_n, self.reference) > 0) * 2.0 - 1)


def dot(first_n: Tensor, second_n: Tensor) -> Tensor:
    """Inner product, summed in float64."""
    return first_n.double() @ second_n.double()
