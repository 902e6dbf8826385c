"""Finalize: a post-hoc method computes the final weight deltas from theta_safe's adapter and the tuned adapter.

Nothing is trained. Rows and a model are inputs only if the method requires them.

    in    safe, tuned (finetune stages: adapter/), and the other inputs that the method requires.
          Without `safe` (`align: none`) `model` itself is theta_safe. If the method needs the change that alignment made,
          it is the difference of `model` and `base`, where `base` is the model before alignment.
    out   adapter/ (PEFT) if the result is low-rank, else delta/ (dense deltas). Both are added to the base model's weights.

Config: `method`, `params`, `dtype` (of stored dense deltas). A method that requires further inputs also has `template`,
`bos` and `max_tokens` of the user rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safecl import labels, methods
from safecl.base import Json
from safecl.sizes import TYPICAL
from safecl.stages import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from safecl.estimate import Estimator
    from safecl.store import Context, Stage

VERSION = "1"


class Finalize(Kind):
    runs = "trainer"
    unit = ""
    fixed_s = 2.0
    apart_by = "method"
    holds_weights = True
    reads = ("safe", "tuned", "model")

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        size, rows = of.size_of(stage), stage.inputs["tuned"].inputs.get("rows")
        length = TYPICAL if rows is None else of.length(rows)
        looks = methods.of_stage(stage.config).looks(size)
        return size.parameters / 5e7 + of.passes(stage, looks * (length.prompt + length.answer), backward=0.0)

    @staticmethod
    def weights_gib(stage: Stage, of: Estimator) -> float:
        """Size of all weights of the model, because a merge may be dense."""
        return of.size_of(stage).parameters * (4 if stage.config["dtype"] == "float32" else 2) / 2**30

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return f"merge {labels.weights(stage, models)}"


def run(context: Context) -> dict[str, Json]:
    """Write the final weights. Returns the method's figures and the size of the result."""
    device = "cuda" if context.execution.use_gpu else "cpu"
    return finalize(dict(context.stage.config), context.inputs, context.out, device)


def finalize(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, device: str = "cpu") -> dict[str, Json]:
    """Write the final weights into `out`, one module at a time. Returns facts as `run` does."""
    from safecl.training import given, weights

    kind = methods.load(config["method"])
    method = kind(kind.Config(**config["params"]))
    method.read(given.Given(inputs, config, device))
    like = inputs["tuned"] / "adapter"
    tuned = weights.load(like)
    facts: dict[str, Json] = {}
    if "safe" in inputs:
        made = method.finalize(weights.load(inputs["safe"] / "adapter"), tuned, facts)
    else:  # `tuned` is a delta to theta_safe, so the result must be one too: subtract `safe`
        safe: weights.Weights = weights.none(tuned)
        if "base" in inputs:
            before, after = (_modules(inputs[name], config["dtype"]) for name in ("base", "model"))
            safe = weights.changes(before, after, tuned)
        whole = weights.Made(tuned, lambda name: weights.combine([(safe[name], 1.0), (tuned[name], 1.0)]))
        made = ((name, weights.combine([(delta, 1.0), (safe[name], -1.0)]))
                for name, delta in method.finalize(safe, whole, facts))  # fmt: skip
    return {**weights.save(made, out, like, config["dtype"]), **facts}


def _modules(folder: Path, dtype: str) -> dict[str, Tensor]:
    """Weights of a model's modules by name, in the dtype of computing."""
    from safecl.training import model, tokens

    loaded = model.load(tokens.base_folder(folder), dtype)
    return {name: module.weight for name, module in loaded.named_modules() if hasattr(module, "weight")}
