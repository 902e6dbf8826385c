"""A-GEM: averaged gradient episodic memory. Take off the user gradient what would raise the loss on a memory batch.

    g <- g - (g . g_s / g_s . g_s) g_s   if g . g_s < 0,   else g stays;     g = grad CE(user), g_s = grad CE(memory)

    paper               code
    g                   run.engine.full_grad after the last backward: averaged over ranks, accumulated, not yet clipped
    g_s                 the same after a memory backward of its own, kept, cleared
    B                   run.draw(); config.memory_size rows, config.memory_batch_size a step

Source: Chaudhry et al. 2019, Eq. 11; arXiv 2512.10150, section 3.

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
from safecl.methods import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from safecl.plan import Graph
    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.loop import Run


class Agem(Method):
    """SFT whose gradient never points against the memory's."""

    class Config(Strict):
        memory_size: Annotated[int, Field(ge=1)] = 50  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = 20  # rows a step; more: a steadier g_s, a dearer step

    equation = "g - (g.g_s / g_s.g_s) g_s where g.g_s < 0; g = grad CE(user), g_s = grad CE(memory)"
    cost = "2x"
    space = {"memory_size": [50, 100, 250], "memory_batch_size": [5, 10, 20, 50]}

    def requires(self, graph: Graph) -> dict[str, Stage]:
        return {"memory": graph.memory(self.config.memory_size)}

    def before_step(self, run: Run, batch: Batch) -> None:
        for _, last in run.each_part(batch):
            run.engine.backward(run.cross_entropy(run.draw()), last)
        self.reference = {name: run.engine.full_grad(p) for name, p in run.parameters().items()}
        run.engine.clear_grads()

    def after_backward(self, run: Run, batch: Batch) -> None:
        parameters, reference = run.parameters(), self.reference
        grads = {name: run.engine.full_grad(p) for name, p in parameters.items()}
        along, size = dot(grads, reference), dot(reference, reference)
        run.log_whole("violation", float(along < 0))
        run.log_whole("cosine", along / max((dot(grads, grads) * size) ** 0.5, 1e-30))
        if along < 0:
            for name, p in parameters.items():
                run.engine.set_full_grad(p, grads[name] - (along / (size + 1e-12)) * reference[name])
        self.before = {name: value.clone() for name, value in run.values().items()}

    def after_step(self, run: Run) -> None:
        moved = {name: self.before[name] - value for name, value in run.values().items()}  # minus the step
        run.log_whole("step_along_ref", float(dot(moved, self.reference) > 0) * 2 - 1)


def dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Inner product over all tensors, summed in float64."""
    return sum(float((first[name].double() * second[name].double()).sum()) for name in first)
