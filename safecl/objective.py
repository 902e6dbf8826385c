"""From metrics to bounds, violations, selection and the Pareto front. Pure functions; metrics are fractions in [0, 1].

With several objectives (`pareto`) losses are compared. A loss is a metric turned so that less is better and 0 is
perfect. A front shows the possible trade-offs. The sweep file names the rule (`choose`) that picks the trials to run
from it.

A bound is an upper limit on a metric where less is better. It is a number, or relative to theta_safe's own value on
the same prompts (`safe + 0.05`). A relative bound limits how much a trial may lose of the aligned model's safety, so
one sweep file serves models of different safety.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safecl import metrics as declared
from safecl.base import ConfigError, Json
from safecl.config import Objective

_RELATIVE = re.compile(r"safe\s*(?:(?P<sign>[+-])\s*(?P<offset>\d*\.?\d+(?:[eE][+-]?\d+)?))?")
_TOLERANCE = 1e-9  # safe + 0.05 and a counted fraction may differ in the last bit; this is no violation


class Trial(NamedTuple):
    """A finished trial. `value` is the maximised metric. A violation above 0 makes the trial infeasible. `values` holds
    all objectives, if there are several."""

    number: int
    params: dict[str, Json]
    value: float
    violations: dict[str, float]
    values: Mapping[str, float] = {}

    @property
    def feasible(self) -> bool:
        """Whether the trial violates no bound."""
        return all(v <= 0 for v in self.violations.values())


class _Bound(NamedTuple):
    relative: bool
    offset: float


def _parse(metric: str, bound: str | float) -> _Bound:
    where = f"search.objective.bounds.{metric}"
    top = _highest(metric)
    range_ = "a fraction in [0, 1]" if top == 1 else "a number, at least 0"
    expected = f"expected {range_}, `safe`, `safe + 0.05` or `safe - 0.05`"
    if isinstance(bound, bool):
        raise ConfigError(f"{where}: {expected}, got {bound!r}")
    if isinstance(bound, str):
        match = _RELATIVE.fullmatch(bound.strip())
        if match:
            offset = float(match["offset"] or 0.0) * (-1 if match["sign"] == "-" else 1)
            if abs(offset) > top:
                raise ConfigError(f"{where}: {expected}, got {bound!r} (5 percentage points are 0.05)")
            return _Bound(True, offset)
        try:
            number = float(bound)
        except ValueError:
            raise ConfigError(f"{where}: {expected}, got {bound!r}") from None
    else:
        number = float(bound)
    if not 0 <= number <= top:
        raise ConfigError(f"{where}: {expected}, got {bound!r} (5 % is 0.05)")
    return _Bound(False, number)


def _highest(metric: str) -> float:
    """The largest value of a metric; infinity if it has none. check.py refuses names that are no metric."""
    try:
        top = declared.of(metric).bounds[1]
    except ConfigError:
        return 1.0
    return math.inf if top is None else top


def check(objective: Objective) -> list[str]:
    """All errors of the bounds and the front, one line each; empty if there is none. Needs no metric values."""
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
    return errors + _front_errors(objective)


def _front_errors(objective: Objective) -> list[str]:
    names, where = objective.pareto, "search.objective.pareto"
    if not names:
        without = f"search.objective.choose: {objective.choose!r} chooses from a front; name the objectives in `pareto`"
        return [without] if objective.choose != "bounds" else []
    errors = [f"{where}: names {name!r} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if objective.maximise not in names:
        errors.append(f"{where}: {objective.maximise!r}, which is maximised, is to be among them")
    if len(set(names)) == 1:
        errors.append(f"{where}: expected two objectives or more; for one alone leave it out")
    return errors


def goals(objective: Objective) -> dict[str, str]:
    """The objectives of a study: "maximize" or "minimize" by metric, the maximised one first."""
    others = [name for name in objective.pareto if name != objective.maximise]
    return {
        objective.maximise: "maximize",
        **{name: "maximize" if declared.of(name).better == "high" else "minimize" for name in others},
    }


def _read(metrics: Mapping[str, float | None], name: str, of: str) -> float:
    if name not in metrics:
        raise ValueError(f"{of}: metric {name!r} is missing; expected a fraction, got only {sorted(metrics)}")
    value = metrics[name]
    if value is None or not math.isfinite(value):
        raise ValueError(f"{of}: metric {name!r} is {value}; expected a finite number (look at the metrics stage)")
    return float(value)


def bounds(objective: Objective, safe_metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Upper limits as numbers. `safe_metrics` are theta_safe's metrics; only relative bounds read them.

    Raises:
        ConfigError: a bound cannot be read.
        ValueError: a metric of theta_safe is missing or NaN; the message names it.
    """
    limits = {}
    for metric, bound in objective.bounds.items():
        relative, offset = _parse(metric, bound)
        limits[metric] = offset + (_read(safe_metrics, metric, "theta_safe") if relative else 0.0)
    return limits


def violations(metrics: Mapping[str, float | None], limits: Mapping[str, float]) -> dict[str, float]:
    """`metric - limit` for every bounded metric, in fractions. Above 0 is violated (Optuna's convention).

    Raises:
        ValueError: a metric or limit is missing or NaN; the message names it.
    """
    result = {}
    for name in limits:
        excess = _read(metrics, name, "trial") - _read(limits, name, "bound")
        result[name] = 0.0 if abs(excess) < _TOLERANCE else excess
    return result


def hopeless(
    known: Mapping[str, float | None], limits: Mapping[str, float], maximise: str, before: Sequence[Trial]
) -> str:
    """Why a trial can no longer be chosen (see `select`), given the metrics that are `known`, whatever its other
    metrics are. "" if it still can.

    `before` holds the trials that were told earlier. The result is exact: `select` would choose the same trial if this
    one were measured completely.
    """
    within = [trial for trial in before if trial.feasible]
    if not within:
        return ""  # if all trials break the bounds, the one that breaks them least is chosen
    read = {name: value for name, value in known.items() if value is not None and math.isfinite(value)}
    for name, excess in violations(read, {name: limit for name, limit in limits.items() if name in read}).items():
        if excess > 0:
            return f"{name} {read[name]:.3g} is above its bound {limits[name]:.3g}"
    best = select(within)
    if maximise in read and read[maximise] <= best.value:
        return f"{maximise} {read[maximise]:.3g} is no more than the {best.value:.3g} of trial {best.number}"
    return ""


def select(trials: Sequence[Trial]) -> Trial:
    """The best trial: feasible before infeasible, then the higher value, then the lower number.

    If no trial is feasible, the one with the smallest sum of violations is best.

    Raises:
        ValueError: there is no trial, or one holds a NaN.
    """
    if not trials:
        raise ValueError("no finished trial to select from; expected at least one")
    for trial in trials:
        if not math.isfinite(trial.value) or any(math.isnan(v) for v in trial.violations.values()):
            raise ValueError(f"trial {trial.number} holds a NaN: value {trial.value}, violations {trial.violations}")

    def rank(trial: Trial) -> tuple[float, float, int]:
        return sum(v for v in trial.violations.values() if v > 0), -trial.value, trial.number

    return min(trials, key=rank)


def losses(trial: Trial) -> tuple[float, ...]:
    """A trial's objectives, each turned so that less is better. For a fraction it is the distance to the perfect
    value."""
    return tuple(_loss(name, value) for name, value in trial.values.items())


def _loss(name: str, value: float) -> float:
    metric = declared.of(name)
    top = metric.bounds[1] if metric.is_bounded else 0.0
    assert top is not None
    return top - value if metric.better == "high" else value


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front of the trials within the bounds, sorted by falling `value`. No other trial is better than one of
    these in one objective and at least as good in the rest. Of equal trials the earliest is kept. If no trial is within
    the bounds: the trial that violates them least.

    Raises:
        ValueError: as `select` does.
    """
    best = select(trials)
    if not best.feasible:
        return [best]
    points = {trial.number: losses(trial) for trial in trials if trial.feasible}
    kept = [
        trial
        for trial in trials
        if trial.feasible and not any(_beats(number, point, trial.number, points) for number, point in points.items())
    ]
    return sorted(kept, key=lambda trial: (-trial.value, trial.number))


def _beats(number: int, point: tuple[float, ...], other: int, points: Mapping[int, tuple[float, ...]]) -> bool:
    theirs = points[other]
    return all(a <= b for a, b in zip(point, theirs, strict=True)) and (point != theirs or number < other)


def chosen(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """The trials whose parameters run on every reported seed, by the rule `objective.choose`.

    Raises:
        ValueError: as `select` does.
    """
    if not objective.pareto:
        return [select(trials)]
    found = front(trials)
    if objective.choose == "nearest":
        return [min(found, key=lambda trial: (math.hypot(*losses(trial)), trial.number))]
    return found if objective.choose == "front" else found[:1]


def hypervolume(points: Sequence[tuple[float, ...]]) -> float:
    """The fraction of [0, 1]^d that some point dominates: the point is at least as good in every loss. A loss above 1
    counts as 1.

    Raises:
        ValueError: a point holds a NaN.

    >>> round(hypervolume([(0.5, 0.5), (0.1, 0.8)]), 2)
    0.33
    """
    for index, point in enumerate(points):
        if any(map(math.isnan, point)):
            raise ValueError(f"point {index} is {point}; expected numbers")
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
    """Indices of the points that no other point beats, sorted by rising first coordinate. Both coordinates are
    maximised.

    A point beats another if it is at least as good in both coordinates and better in one, so equal points are all kept.

    Raises:
        ValueError: a point holds a NaN.
    """
    for index, point in enumerate(points):
        if any(math.isnan(x) for x in point):
            raise ValueError(f"point {index} is {point}; expected two numbers")
    front: list[int] = []
    best = -math.inf  # highest second coordinate of the points further right
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    for position, index in enumerate(order):
        same = position > 0 and points[order[position - 1]] == points[index] and order[position - 1] in front
        if points[index][1] > best or same:
            front.append(index)
            best = points[index][1]
    front.sort(key=lambda i: (points[i], i))
    return front
