"""A-GEM: averaged gradient episodic memory. Take off the user gradient what would raise the loss on a memory batch.

    g <- g - (g . g_s / g_s . g_s) g_s   if g . g_s < 0,   else g stays;     g = grad CE(user), g_s = grad CE(memory)

    paper               code
    g                   run.engine.full_grad after the last backward: averaged over ranks, accumulated, not yet clipped
    g_s                 the same after a memory backward of its own, kept, cleared
    B                   run.draw(); config.memory_size rows, config.memory_batch_size a step

Source: Chaudhry et al. 2019, Eq. 11; arXiv 2512.10150, section 4.1.2.

Same as the reference code (mammoth and avalanche, agem): one dot product over all trained parameters. Different: the
memory holds what `memory_size` says (mammoth fills it from one loader batch); products are summed in float64; g_s is
taken under the same dropout rate, with masks of its own.

The guarantee holds for g alone. AdamW's step is another direction, so its sign against g_s is logged (`step_along_ref`):
positive means that this step lowered the memory loss to first order. `violation` is 1 where the projection acted.
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
    """SFT whose gradient never points against the memory's."""

    class Config(Strict):
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = 20  # rows a step; more: a steadier g_s, a dearer step

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
        share = (
            violated * along / (size + 1e-12)
        )  # 0 where nothing is violated, without waiting for the device to say so
        run.set_gradient(gradient_n - share.float() * reference_n)
        self.before = run.theta().clone()

    def after_step(self, run: Run) -> None:
        moved_n = self.before - run.theta()  # minus the step
        run.log_whole("step_along_ref", (dot(moved_n, self.reference) > 0) * 2.0 - 1)


def dot(first_n: Tensor, second_n: Tensor) -> Tensor:
    """Inner product, summed in float64."""
    return first_n.double() @ second_n.double()
