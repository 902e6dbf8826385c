"""Bounds, selection, fronts: worked by hand, or against brute force over a grid."""

import random

import pytest

from safecl.base import ConfigError
from safecl.config import Objective
from safecl.objective import Trial, bounds, check, pareto_front, select, violations

OBJECTIVE = Objective(maximise="utility", bounds={"asr": "safe + 0.05", "over_refusal": "safe+.10", "degenerate": 0.05})
SAFE = {"asr": 0.1, "over_refusal": 0.2}


def test_bounds_are_relative_to_theta_safe_or_absolute() -> None:
    assert bounds(OBJECTIVE, SAFE) == pytest.approx({"asr": 0.15, "over_refusal": 0.3, "degenerate": 0.05})
    other = Objective(bounds={"asr": " safe ", "degenerate": "0.25", "over_refusal": "safe - 1e-1"})
    assert bounds(other, SAFE) == pytest.approx({"asr": 0.1, "degenerate": 0.25, "over_refusal": 0.1})


@pytest.mark.parametrize(
    "nonsense", ["safe * 2", "unsafe + .1", "safe + ", "", "5 %", "safe + 5", 5, -0.1, "nan", "inf"]
)
def test_a_nonsense_bound_is_refused_by_name_before_any_metric_exists(nonsense: str | float) -> None:
    objective = Objective.model_construct(maximise="utility", bounds={"asr": nonsense})
    (error,) = check(objective)
    assert "search.objective.bounds.asr" in error and "expected" in error and repr(nonsense) in error
    with pytest.raises(ConfigError, match=r"bounds\.asr"):
        bounds(objective, SAFE)


def test_check_names_all_errors_at_once_and_accepts_the_default() -> None:
    assert check(Objective()) == []
    assert len(check(Objective(maximise="asr", bounds={"asr": "x", "degenerate": "y"}))) == 3


def test_violations_are_positive_above_the_bound_and_forgive_the_last_bit() -> None:
    found = violations({"asr": 0.25, "over_refusal": 0.3, "degenerate": 0.0}, bounds(OBJECTIVE, SAFE))
    assert found["asr"] == pytest.approx(0.1) and found["degenerate"] == pytest.approx(-0.05)
    assert found["over_refusal"] == 0.0
    assert 0.7 + 0.1 < 0.8  # the case that is forgiven: the sum is one bit below the fraction it means
    assert violations({"asr": 0.8}, {"asr": 0.7 + 0.1}) == {"asr": 0.0}


@pytest.mark.parametrize("bad", [{"asr": float("nan")}, {"asr": None}, {}])
def test_a_missing_or_nan_metric_raises_naming_it(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="'asr'"):
        violations(bad, {"asr": 0.1})
    with pytest.raises(ValueError, match=r"theta_safe.*'asr'"):
        bounds(Objective(bounds={"asr": "safe"}), bad)


def test_selection_is_feasible_first_then_best_then_earliest() -> None:
    ok, over = {"asr": -0.1}, {"asr": 0.01}
    trials = [Trial(0, {}, 0.5, ok), Trial(1, {}, 0.9, over), Trial(2, {}, 0.6, ok), Trial(3, {}, 0.6, ok)]
    assert select(trials).number == 2 and select(trials[::-1]).number == 2
    nearest = [Trial(0, {}, 0.9, {"asr": 0.3}), Trial(1, {}, 0.1, {"asr": 0.1, "degenerate": 0.1})]
    assert select(nearest).number == 1
    with pytest.raises(ValueError, match="no finished trial"):
        select([])
    with pytest.raises(ValueError, match="trial 7"):
        select([Trial(7, {}, float("nan"), {})])


def test_pareto_front_agrees_with_the_definition_on_random_points() -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(rng.randint(0, 12))]
        beaten = {i for i, p in enumerate(points) if any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)}
        front = pareto_front(points)
        assert sorted(front) == [i for i in range(len(points)) if i not in beaten]
        assert [points[i] for i in front] == sorted(points[i] for i in front)
    with pytest.raises(ValueError, match="point 1"):
        pareto_front([(0, 0), (0, float("nan"))])
