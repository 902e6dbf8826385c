"""Metrics -> bounds, violations, selection, Pareto front. Pure; metrics are fractions in [0, 1].

A bound is an upper limit on a metric of which less is better: a number, or relative to theta_safe's own value on the
same prompts (`safe + 0.05`). How much a trial may lose is then said against what the aligned model had, so that one
sweep file serves models of different safety.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safecl.base import ConfigError, Json
from safecl.config import Objective

_RELATIVE = re.compile(r"safe\s*(?:(?P<sign>[+-])\s*(?P<offset>\d*\.?\d+(?:[eE][+-]?\d+)?))?")
_TOLERANCE = 1e-9  # safe + 0.05 and a counted fraction may differ in the last bit; that is no violation


class Trial(NamedTuple):
    """A finished trial. `value` is the maximised metric; a violation above 0 makes the trial infeasible."""

    number: int
    params: dict[str, Json]
    value: float
    violations: dict[str, float]

    @property
    def feasible(self) -> bool:
        return all(v <= 0 for v in self.violations.values())


class _Bound(NamedTuple):
    relative: bool
    offset: float


def _parse(metric: str, bound: str | float) -> _Bound:
    where = f"search.objective.bounds.{metric}"
    expected = "expected a fraction in [0, 1], `safe`, `safe + 0.05` or `safe - 0.05`"
    if isinstance(bound, bool):
        raise ConfigError(f"{where}: {expected}, got {bound!r}")
    if isinstance(bound, str):
        match = _RELATIVE.fullmatch(bound.strip())
        if match:
            offset = float(match["offset"] or 0.0) * (-1 if match["sign"] == "-" else 1)
            if abs(offset) > 1:
                raise ConfigError(f"{where}: {expected}, got {bound!r} (5 percentage points are 0.05)")
            return _Bound(True, offset)
        try:
            number = float(bound)
        except ValueError:
            raise ConfigError(f"{where}: {expected}, got {bound!r}") from None
    else:
        number = float(bound)
    if not 0 <= number <= 1:
        raise ConfigError(f"{where}: {expected}, got {bound!r} (5 % is 0.05)")
    return _Bound(False, number)


def check(objective: Objective) -> list[str]:
    """Every error of the bounds as one line each; empty if there is none. Needs no metric values."""
    errors = []
    for metric, bound in objective.bounds.items():
        try:
            _parse(metric, bound)
        except ConfigError as error:
            errors.append(str(error))
    if objective.maximise in objective.bounds:
        errors.append(
            f"search.objective: {objective.maximise!r} is maximised and bounded from above at once; "
            "remove it from `bounds` or maximise another metric"
        )
    return errors


def _read(metrics: Mapping[str, float | None], name: str, of: str) -> float:
    if name not in metrics:
        raise ValueError(f"{of}: metric {name!r} is missing; expected a fraction, got only {sorted(metrics)}")
    value = metrics[name]
    if value is None or not math.isfinite(value):
        raise ValueError(f"{of}: metric {name!r} is {value}; expected a finite number (look at the metrics stage)")
    return float(value)


def bounds(objective: Objective, safe_metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Upper limits as numbers. `safe_metrics` are theta_safe's, read only for relative bounds.

    Raises ConfigError for a bound that cannot be read, ValueError naming a missing or NaN metric of theta_safe.
    """
    limits = {}
    for metric, bound in objective.bounds.items():
        relative, offset = _parse(metric, bound)
        limits[metric] = offset + (_read(safe_metrics, metric, "theta_safe") if relative else 0.0)
    return limits


def violations(metrics: Mapping[str, float | None], limits: Mapping[str, float]) -> dict[str, float]:
    """`metric - limit` for every bounded metric, in fractions: above 0 is violated (Optuna's convention).

    Raises ValueError naming a missing or NaN metric or limit.
    """
    result = {}
    for name in limits:
        excess = _read(metrics, name, "trial") - _read(limits, name, "bound")
        result[name] = 0.0 if abs(excess) < _TOLERANCE else excess
    return result


def select(trials: Sequence[Trial]) -> Trial:
    """The best trial: feasible before infeasible, then the higher value, then the earlier number.

    Where none is feasible, the least summed violation comes first: the trial closest to what was asked.
    Raises ValueError on no trials, and on a NaN.
    """
    if not trials:
        raise ValueError("no finished trial to select from; expected at least one")
    for trial in trials:
        if not math.isfinite(trial.value) or any(math.isnan(v) for v in trial.violations.values()):
            raise ValueError(f"trial {trial.number} holds a NaN: value {trial.value}, violations {trial.violations}")

    def rank(trial: Trial) -> tuple[float, float, int]:
        return sum(v for v in trial.violations.values() if v > 0), -trial.value, trial.number

    return min(trials, key=rank)


def hypervolume(points: Sequence[tuple[float, ...]]) -> float:
    """The share of [0, 1]^d that some point is at least as good as in every loss; a loss above 1 counts as 1."""
    inside = sorted({tuple(min(max(x, 0.0), 1.0) for x in point) for point in points})
    if not inside:
        return 0.0
    if len(inside[0]) == 1:
        return 1.0 - inside[0][0]
    total = 0.0
    for index, point in enumerate(inside):  # slices along the first loss
        until = inside[index + 1][0] if index + 1 < len(inside) else 1.0
        if until > point[0]:
            total += (until - point[0]) * hypervolume([each[1:] for each in inside[: index + 1]])
    return total


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, both coordinates maximised, by rising first coordinate.

    A point beats another if it is at least as good in both and better in one, so equal points stay together.
    Raises ValueError on a NaN.
    """
    for index, point in enumerate(points):
        if any(math.isnan(x) for x in point):
            raise ValueError(f"point {index} is {point}; expected two numbers")
    front: list[int] = []
    best = -math.inf  # second coordinate of everything further right
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    for position, index in enumerate(order):
        same = position > 0 and points[order[position - 1]] == points[index] and order[position - 1] in front
        if points[index][1] > best or same:
            front.append(index)
            best = points[index][1]
    front.sort(key=lambda i: (points[i], i))
    return front
