"""EWC: elastic weight consolidation. Pull each parameter back to theta_safe, in proportion to how much safety depends
on it.

    L(theta) = CE(user) + (lambda/2) sum_i F_i (theta_i - theta*_i)^2,   F_i = E_T1 (d log p(y|x) / d theta_i)^2 at theta*

    paper               code
    lambda              config.weight
    theta*              theta_safe's adapter
    F                   the fisher stage: squared gradients of whole responses, a row at a time, averaged over rows
    T1                  the first config.num_rows of the safety rows, harmful and benign requests

Source: Kirkpatrick et al. 2017, Eq. 3; arXiv 2512.10150, section 4.1.1.

Choices where the paper is silent: F is divided by its mean (`fisher_norm: mean`), so that one lambda fits other
models and other lengths of answers. `none` does not divide; lambda is then about 1e2 to 1e8.

Differences from the reference codes: mammoth multiplies a row's squared gradient by p(y|x) and has no 1/2. avalanche
and git-disl square gradients of whole batches, in which the gradients of rows cancel. `fisher: true` samples the
labels from the model instead of taking the data's.

Refused with `adapter: stack` and `align: none`: a fresh adapter has B = 0, so the gradient of A is zero, and so is
its Fisher information.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import Contract, Method, Needs

if TYPE_CHECKING:
    from safecl.store import Stage
    from safecl.training.batches import Batch
    from safecl.training.run import Run


class Ewc(Method):
    """Cross-entropy on user rows plus a quadratic pull to theta_safe, weighted by the Fisher information."""

    class Config(Strict):
        weight: Annotated[float, Field(ge=0)] = 1.0  # lambda; with fisher_norm `mean` worth searching in [1e-3, 1e3]
        fisher: Literal["empirical", "true"] = "empirical"  # labels of the data, or sampled from the model
        fisher_norm: Literal["mean", "none"] = "mean"
        num_rows: Annotated[int, Field(ge=1)] = 1000  # most safety rows for the Fisher information

    source = "Kirkpatrick 2017, Eq. 3"
    equation = "CE(user) + (weight/2) sum_i F_i (theta_i - theta_safe_i)^2"
    contract = Contract(variants=({"fisher_norm": "none"},), zero_at_start=("ewc",), in_bfloat16=True)
    space = {"weight": {"low": 1e-3, "high": 1e3, "log": True}}

    @classmethod
    def search_space(cls, config: Config) -> dict[str, Json]:
        return cls.space if config.fisher_norm == "mean" else {"weight": {"low": 1.0, "high": 1e8, "log": True}}

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"fisher": needs.fisher(self.config.num_rows, self.config.fisher)}

    def prepare(self, run: Run) -> None:
        if self.config.weight > 0:
            self.fisher = run.fisher(self.config.fisher_norm)
            self.anchor = run.theta_safe()

    def after_backward(self, run: Run, batch: Batch) -> None:
        """Add the penalty's gradient lambda F (theta - theta*), once per step: the penalty does not depend on rows."""
        if self.config.weight == 0:
            return
        apart_n = run.theta() - self.anchor
        pull_n = self.fisher * apart_n
        run.log_whole("ewc", pull_n.double() @ apart_n.double())
        run.add_gradient(self.config.weight * pull_n)

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config(weight=0.0)
