"""The metrics that are measured by rule, each by the contract."""

from __future__ import annotations

from typing import Any

from safecl import metrics
from safecl.testing import MetricContract

for _metric in metrics.METRICS:
    if _metric.of is not None:
        _class: Any = type(f"Test_{_metric.name}", (MetricContract,), {"metric": _metric.name, "__module__": __name__})
        globals()[_class.__name__] = _class
