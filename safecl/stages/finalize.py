"""Finalize: a post-hoc method makes the final deltas of theta_safe's and the tuned adapter. No training; rows and a model only
where the method asks for them.

    in    safe, tuned (finetunes: adapter/). Without `safe` (`align: none`) the model is theta_safe: `model` and `base`, the one
          it was aligned from, say what the alignment changed where the method needs that. And whatever the method requires
    out   adapter/ (PEFT) where the result is low-rank, else delta/ (dense deltas); both are added to the base

Config: `method`, `params`, `dtype` (in which dense deltas are stored); of a method that requires something `template`, `bos`
and `max_tokens` of user rows.
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
        """Of all weights: a merge may be dense."""
        return of.size_of(stage).parameters * (4 if stage.config["dtype"] == "float32" else 2) / 2**30

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return f"merge {labels.weights(stage, models)}"


def run(context: Context) -> dict[str, Json]:
    """The method's figures, and the size of the result."""
    device = "cuda" if context.execution.use_gpu else "cpu"
    return finalize(dict(context.stage.config), context.inputs, context.out, device)


def finalize(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, device: str = "cpu") -> dict[str, Json]:
    """Write the final weights into `out`, one module at a time."""
    from safecl.training import given, weights

    kind = methods.load(config["method"])
    method = kind(kind.Config(**config["params"]))
    method.read(given.Given(inputs, config, device))
    like = inputs["tuned"] / "adapter"
    tuned = weights.load(like)
    facts: dict[str, Json] = {}
    if "safe" in inputs:
        made = method.finalize(weights.load(inputs["safe"] / "adapter"), tuned, facts)
    else:  # `tuned` is a change of theta_safe, and so must be what is served on it
        safe: weights.Weights = weights.none(tuned)
        if "base" in inputs:
            before, after = (_modules(inputs[name], config["dtype"]) for name in ("base", "model"))
            safe = weights.changes(before, after, tuned)
        whole = weights.Made(tuned, lambda name: weights.combine([(safe[name], 1.0), (tuned[name], 1.0)]))
        made = ((name, weights.combine([(delta, 1.0), (safe[name], -1.0)]))
                for name, delta in method.finalize(safe, whole, facts))  # fmt: skip
    return {**weights.save(made, out, like, config["dtype"]), **facts}


def _modules(folder: Path, dtype: str) -> dict[str, Tensor]:
    """Weights of a model's modules by name, as they are computed with."""
    from safecl.training import model, tokens

    loaded = model.load(tokens.base_folder(folder), dtype)
    return {name: module.weight for name, module in loaded.named_modules() if hasattr(module, "weight")}
