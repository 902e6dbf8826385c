"""DER: dark experience replay. Keep the logits on a few safety rows close to theta_safe's.

    L(theta) = CE(user) + lambda * E over memory tokens of |f_theta(x) - z|^2 / V  [+ mu * CE(memory')],
                                                                               z = f_theta_safe(x)

    paper               code
    lambda              config.weight
    m = |B|             config.memory_size
    (x, z) in B         run.draw(): rows with theta_safe's hidden states h_safe, z = W h_safe
    f_theta(x) - z      W dh with dh = h - h_safe, never formed: |W dh|^2 = dh^T G dh + V (w . dh)^2, w the mean row of W
                        and G the Gram matrix of its rows less w
    mu (DER++)          config.label_weight, on a second, independent draw

Source: arXiv 2512.10150, section 4.1.2 (DER with the aligned model's logits, stored before fine-tuning), after
Buzzega et al. 2020, Eq. 6 (DER++: Eq. 7).

With `align: none` z is of the model itself without its adapter, on the given safety rows.

Choices where the paper is silent: the sum over positions is a mean over the drawn batch's response tokens (the last
prompt token predicts the first of them). The sum over the vocabulary is a mean, so that one lambda fits models of any
vocabulary. Draws are without replacement within a step. The draw is as large as the user batch by default.
`center_logits` subtracts the mean over the vocabulary from both sides, which softmax ignores. Both distances are
logged.

Differences from the reference code (mammoth, models/der.py): there is no reservoir, and no logits are stored at
training time (the memory is complete before fine-tuning starts). Rows are teacher-forced sequences, not images. No
vocabulary-sized tensor is stored, and none is formed if the output layer is plainly linear (the memory stage checks
this). With a bias or a soft cap (Gemma-2) logits are compared after the cap on both sides, a part of the
vocabulary at a time.
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


class Der(Method):
    """Cross-entropy on user rows plus the squared logit distance to theta_safe on memory rows."""

    class Config(Strict):
        weight: Annotated[float, Field(ge=0)] = 1.0  # lambda; a larger value keeps more safety, at the task's cost
        label_weight: Annotated[float, Field(ge=0)] = 0.0  # DER++: cross-entropy on a second draw of memory rows
        center_logits: bool = False  # compare logits minus their mean, as softmax does
        memory_size: Annotated[int, Field(ge=1)] = MEMORY_SIZE  # m: safety rows kept
        memory_batch_size: Annotated[int, Field(ge=1)] | None = None  # rows a step; null: as many as user rows

    VERSION = "3"  # 2 computed the centred distance as a difference of two large numbers, up to a tenth off
    source = "arXiv 2512.10150, section 4.1.2; Buzzega 2020 (mammoth)"
    equation = "CE(user) + weight * E_memory |f(x) - z|^2 / V [+ label_weight * CE(memory')]"
    cost = "2x, 3x with label_weight"
    contract = Contract(zero_at_start=("der",), in_bfloat16=True)
    space = {"weight": {"low": 0.03, "high": 3.0, "log": True}, "memory_size": [50, 100, 250]}

    @property
    def draws(self) -> float:
        return float(self.config.weight > 0) + float(self.config.label_weight > 0)

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"memory": needs.memory(self.config.memory_size, "response")}

    def prepare(self, run: Run) -> None:
        from safecl.training import losses

        if self.config.weight > 0:
            self.distance = losses.LogitDistance(run.head, self.config.center_logits)

    def loss(self, run: Run, batch: Batch) -> Tensor:
        from safecl.training import losses

        config = self.config
        draws = {"memory": config.weight, "memory.labels": config.label_weight}
        drawn = [run.draw(name) for name, weight in draws.items() if weight > 0]
        user_PD, *drawn_PD = run.forward(batch, *drawn)
        loss = run.cross_entropy(batch, user_PD)
        if config.weight > 0:
            memory, memory_PD = drawn[0], drawn_PD[0]
            assert memory.states_ND is not None
            mask_P, _ = losses.targets(memory.labels_P)
            raw, centred = self.distance(memory_PD[mask_P], memory.states_ND)
            run.log("der", raw.detach() / memory.num_targets)
            run.log("der_centred", centred.detach() / memory.num_targets)
            loss = loss + config.weight * (centred if config.center_logits else raw) / memory.num_targets
        if config.label_weight > 0:
            remembered = run.cross_entropy(drawn[-1], drawn_PD[-1])
            run.log("replay", remembered.detach())
            loss = loss + config.label_weight * remembered
        return loss

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(weight=0.0)
