"""Finalize: a post-hoc method makes the final deltas of theta_safe's and the tuned adapter. No training, no model.

    in    safe, tuned (finetunes: adapter/)
    out   adapter/ (PEFT) where the result is low-rank, else delta/ (dense deltas); both are added to the base

Config: `method`, `params`, `dtype` (in which dense deltas are stored).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safecl.base import Json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from safecl.store import Context

VERSION = "1"


def run(context: Context) -> dict[str, Json]:
    """The method's figures, and the size of the result."""
    return finalize(dict(context.stage.config), context.inputs, context.out)


def finalize(config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path) -> dict[str, Json]:
    """Write the final weights into `out`, one module at a time."""
    from safecl import methods
    from safecl.training import weights

    kind = methods.load(config["method"])
    safe, tuned = weights.load(inputs["safe"] / "adapter"), weights.load(inputs["tuned"] / "adapter")
    facts: dict[str, Json] = {}
    made = kind(kind.Config(**config["params"])).finalize(safe, tuned, facts)
    return {**weights.save(made, out, inputs["safe"] / "adapter", config["dtype"]), **facts}
