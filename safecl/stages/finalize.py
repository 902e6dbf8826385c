"""Post-hoc methods: final weights from theta_safe's and the tuned adapter, without training -> adapter/."""

from __future__ import annotations

from typing import Any

from safecl.base import Json
from safecl.methods import load
from safecl.store import Context

VERSION = "1"


def run(context: Context) -> dict[str, Json]:
    """Writes what the method's `finalize` returns."""
    from safecl.training import weights

    config: Any = context.stage.config
    kind = load(config["method"])
    read = {name: weights.load(context.inputs[name] / "adapter") for name in ("safe", "tuned")}
    weights.save(kind(kind.Config(**config["params"])).finalize(read), context.out / "adapter")
    return {}
