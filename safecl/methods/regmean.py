"""RegMean: merge each linear module so that on each model's own data its outputs stay close to that model's.

    W = argmin (1 - a) E_safety |W x - S x|^2 + a E_user |W x - T x|^2
      = S + U a G_u ((1 - a) G_s + a G_u)^-1,                                   G = E x x^T over the tokens of rows
    S = theta_safe, T = theta_tuned, U = T - S

    paper               code
    X_i^T X_i           G_s: of the module's inputs in theta_safe on memory rows; G_u: in the tuned model on user rows
    alpha               config.off_diagonal: elements off the diagonal of each G are multiplied by it
    -                   config.share, a: of the tuned model (the paper: equal)

Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models (ICLR 2023, arXiv 2212.09849), Eq.
2 and its reduction of off-diagonal items (alpha .9; .1 for T5).

In a direction that only user rows use, the user's update stays whole. In a direction that only safety rows use, the
update is removed. Differences from the paper: G is a mean over tokens, so that a longer set of rows has no more
weight; only adapted modules are merged. The result has the rank of U. Memory: two I x I matrices per module. As many
modules as fit into one GiB are handled together, with their own forwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.base import Json, Strict
from safecl.methods import Method, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from safecl.sizes import Size
    from safecl.store import Stage
    from safecl.training.given import Given
    from safecl.training.weights import Dense, LoRA, Weights

GROUP_BYTES = 2**30  # of inner products held at once


class Regmean(Method):
    """SFT, then a merge of each module by its inputs on safety rows and on user rows."""

    class Config(Strict):
        share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # a: the weight of user rows, towards the tuned model
        # less: more stable; at 1 a G of few rows has no inverse
        off_diagonal: Annotated[float, Field(ge=0, lt=1)] = 0.9
        num_rows: Annotated[int, Field(ge=1)] = 100  # rows of each kind (memory, user) that are read

    source = "Jin 2023 (arXiv 2212.09849), Eq. 2"
    equation = "theta_safe + U a G_u ((1 - a) G_s + a G_u)^-1, G = E x x^T of a module's inputs"
    cost = "SFT's, shared, and 2 num_rows forwards for each GiB of G"
    trains_as = "sft"
    memory_key = "num_rows"
    space = {"share": {"low": 0.1, "high": 0.9, "log": False}, "off_diagonal": {"low": 0.1, "high": 0.95, "log": False}}

    @property
    def needs_base(self) -> bool:
        return False

    def requires(self, needs: Needs) -> dict[str, Stage]:
        return {"user": needs.user_rows, "memory": needs.memory(self.config.num_rows)}

    def looks(self, size: Size) -> float:
        """Both models read all rows again for each group of modules. Estimated for a common shape: in a layer six
        modules take a hidden state as input, and one takes the MLP's state, three times as wide."""
        num_groups = 2 * 4 * (6 + 3**2) * size.layers * size.width**2 / GROUP_BYTES
        return 2.0 * int(self.config.num_rows) * math.ceil(num_groups)

    def read(self, given: Given) -> None:
        self.given = given

    def finalize(self, safe: Weights, tuned: Weights, log: dict[str, Json]) -> Iterator[tuple[str, LoRA | Dense]]:
        import torch

        from safecl.training.weights import Dense, LoRA, combine

        config, given = self.config, self.given
        seen = {"safe": given.rows("memory"), "tuned": given.rows("user")[: config.num_rows]}
        log.update(memory_rows=len(seen["safe"]), user_rows=len(seen["tuned"]))
        for group in groups(tuned):
            found = {which: given.inner_products(which, rows, group) for which, rows in seen.items()}
            for name in group:
                safe_II, user_II = (found[which][name].double() for which in ("safe", "tuned"))
                for gram_II in (safe_II, user_II):
                    gram_II.mul_(config.off_diagonal + (1 - config.off_diagonal) * torch.eye(len(gram_II)).to(gram_II))
                user_II *= config.share
                both_II = (1 - config.share) * safe_II + user_II
                both_II.diagonal().add_(1e-6 * both_II.diagonal().mean())  # for directions in no row's input
                kept_II = torch.linalg.solve(both_II, user_II).T.float().cpu()
                update = combine([(tuned[name], 1.0), (safe[name], -1.0)])
                if isinstance(update, LoRA):
                    yield name, combine([(safe[name], 1.0), (LoRA(update.down_RI @ kept_II, update.up_OR, 1.0), 1.0)])
                else:
                    yield name, Dense(safe[name].delta() + update.delta() @ kept_II)


def groups(tuned: Weights) -> Iterator[list[str]]:
    """Names of modules, in groups whose inner products fit into GROUP_BYTES together."""

    def width(name: str) -> int:
        delta = tuned[name]
        found: Tensor = delta.down_RI if hasattr(delta, "down_RI") else delta.delta()
        return found.shape[1]

    group: list[str] = []
    held = 0
    for name in tuned:
        size = 2 * 4 * width(name) ** 2
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group, held = [*group, name], held + size
    if group:
        yield group
