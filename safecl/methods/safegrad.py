"""SafeGrad: gradient surgery. Remove from the user gradient the part against the alignment gradient, then add that
gradient.

    g_align = grad E over memory tokens of KL(p_safe || p_theta)
    g_user <- g_user - (g_user . g_align / g_align . g_align) g_align   where g_user . g_align < 0
    g = g_user + rho g_align

    paper               code
    g_user              run.gradient() after the last backward: summed over micro-batches and ranks, not yet clipped
    g_align             the same after a backward on memory rows; it is kept, then the gradients are cleared
    theta_0, D_align    theta_safe by its stored hidden states; the memory, config.memory_batch_size rows a step
    rho                 config.rho

Source: Yi et al., Gradient Surgery for Safe LLM Fine-Tuning (arXiv 2508.07172), Eqs. 3-6. The paper's text was not
available to us. The equations and rho = 1 are those of two independent ports of its code.

As in those ports: one conflict test over all trained parameters, and no projection where |g_align|^2 <= 1e-9 (at
theta_safe without dropout g_align is only rounding error). Different: the KL is over response tokens (the code's sum
also has prompt and padding positions). Products are summed in float64. Gradients are accumulated before the surgery
(in the code the last micro-batch overwrites the others).

SafeGrad is A-GEM with another reference gradient, and it also adds that gradient. `agem` only projects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Strict
from safecl.methods import MEMORY_SIZE, Method, Needs
from safecl.methods.agem import dot

if TYPE_CHECKING:
    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run

LEAST_SQUARE = 1e-9  # of g_align, below which nothing is projected


class Safegrad(Method):
    """SFT without the part of its gradient against the gradient of the KL to theta_safe on memory rows, plus that
    gradient."""

    class Config(Strict):
        rho: Annotated[float, Field(ge=0)] = 1.0  # weight of the alignment's gradient; 0: only the projection
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept (the paper: 100)
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows

    source = "Yi 2025 (arXiv 2508.07172), Eqs. 3-6"
    equation = "g_user less its part against g_align, + rho g_align; g_align = grad KL(p_safe || p) on memory"
    cost = "2x"
    space = {"rho": {"low": 0.03, "high": 30.0, "log": True}, "memory_size": [50, 100, 250]}

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"memory": needs.memory(self.config.memory_size, "response")}

    def before_step(self, run: Run, batch: Batch) -> None:
        from safecl.training import losses

        for _, last in run.each_part(batch):
            memory = run.draw()
            assert memory.states_ND is not None
            [hidden_PD] = run.forward(memory)
            mask_P, _ = losses.targets(memory.labels_P)
            divergence = losses.divergence_sum(hidden_PD[mask_P], memory.states_ND, run.head) / memory.num_targets
            run.log("kl_memory", divergence.detach())
            run.engine.backward(divergence, last)
        self.reference = run.gradient().clone()
        run.engine.clear_grads()

    def after_backward(self, run: Run, batch: Batch) -> None:
        gradient_n, reference_n = run.gradient(), self.reference
        along, size = dot(gradient_n, reference_n), dot(reference_n, reference_n)
        conflict = (along < 0) & (size > LEAST_SQUARE)
        run.log_whole("conflict", conflict)
        run.log_whole("cosine", along / (dot(gradient_n, gradient_n) * size).sqrt().clamp(min=1e-30))
        share = conflict * along / size.clamp(min=LEAST_SQUARE)
        run.set_gradient(gradient_n + (self.config.rho - share.float()) * reference_n)
