"""Bounds, selection, fronts: worked by hand, or against brute force over a grid."""

import random

import pytest

from safecl.base import ConfigError
from safecl.config import Objective
from safecl.objective import (
    Trial,
    bounds,
    check,
    chosen,
    front,
    goals,
    hopeless,
    hypervolume,
    losses,
    pareto_front,
    select,
    violations,
)

OBJECTIVE = Objective(maximise="utility", bounds={"asr": "safe + 0.05", "over_refusal": "safe+.10", "degenerate": 0.05})
SAFE = {"asr": 0.1, "over_refusal": 0.2}


def test_a_metric_without_an_end_may_have_a_bound_above_one() -> None:
    """gold_nll is in nats a token."""
    assert check(Objective(bounds={"gold_nll": 2.0})) == []
    assert bounds(Objective(bounds={"gold_nll": "safe + 1.5"}), {"gold_nll": 0.75}) == {"gold_nll": 2.25}
    [error] = check(Objective(bounds={"gold_nll": -1.0}))
    assert "expected a number, at least 0" in error
    assert check(Objective(bounds={"asr": 1.5}))


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


FRONT = Objective(pareto=("asr", "utility"))


def with_values(*pairs: tuple[float, float], feasible: bool = True) -> list[Trial]:
    bound = {"asr": -0.1 if feasible else 0.1}
    return [Trial(i, {}, utility, bound, {"utility": utility, "asr": asr}) for i, (utility, asr) in enumerate(pairs)]


def test_several_objectives_are_asked_each_towards_its_better_end_the_maximised_one_first() -> None:
    assert goals(FRONT) == {"utility": "maximize", "asr": "minimize"} and goals(Objective()) == {"utility": "maximize"}
    [trial] = with_values((0.7, 0.2))
    assert losses(trial) == pytest.approx((0.3, 0.2))
    assert check(FRONT) == []
    wrong = {("asr", "over_refusal"): "'utility'", ("utility", "utility"): "twice", ("utility",): "two objectives"}
    for names, says in wrong.items():
        assert any(says in error for error in check(Objective(pareto=names))), names
    assert "name the objectives" in check(Objective(choose="nearest"))[0]


def test_a_front_is_who_nobody_beats_within_the_bounds() -> None:
    rng = random.Random(1)
    for _ in range(200):
        grid = [(rng.randint(0, 5) / 5, rng.randint(0, 5) / 5) for _ in range(rng.randint(1, 12))]
        trials = with_values(*grid)
        unbeaten = {p for p in grid if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in grid)}
        found = front(trials)
        assert [(t.value, t.values["asr"]) for t in found] == sorted(unbeaten, key=lambda p: -p[0])
        assert all(grid.index((t.value, t.values["asr"])) == t.number for t in found)  # of equals the earliest
        outside = with_values((1.0, 0.0), feasible=False)[0]._replace(number=99)
        assert front([*trials, outside]) == found
    assert [t.number for t in front(with_values((0.9, 0.5), (0.1, 0.1), feasible=False))] == [0]


def test_who_of_the_front_is_run_is_as_the_rule_says() -> None:
    trials = with_values((0.9, 0.5), (0.6, 0.1), (0.5, 0.0), (0.9, 0.6))  # distances .51, .41, .5

    def numbers(**rule: str) -> list[int]:
        return [t.number for t in chosen(trials, Objective.model_validate({"pareto": ("utility", "asr"), **rule}))]

    assert numbers() == [0] and numbers(choose="nearest") == [1] and numbers(choose="front") == [0, 1, 2]
    assert [t.number for t in chosen(trials, Objective())] == [select(trials).number]


def test_hypervolume_is_the_share_of_the_cube_that_is_reached() -> None:
    assert hypervolume([]) == 0.0 and hypervolume([(0.0, 0.0)]) == 1.0 and hypervolume([(1.2, 0.0)]) == 0.0
    assert hypervolume([(0.5, 0.5)]) == 0.25 and hypervolume([(0.5, 0.0), (0.0, 0.5)]) == 0.75
    rng = random.Random(2)
    for num in (2, 3, 4):  # against counting the cells of a grid
        points = [tuple(rng.randint(0, 6) / 6 for _ in range(num)) for _ in range(5)]
        cells = [[]]  # type: ignore[var-annotated]
        for _ in range(num):
            cells = [[*cell, (i + 0.5) / 6] for cell in cells for i in range(6)]
        reached = sum(any(all(a <= b for a, b in zip(p, cell, strict=True)) for p in points) for cell in cells)
        assert hypervolume(points) == pytest.approx(reached / 6**num)


def test_who_is_pruned_would_not_have_been_chosen() -> None:
    """What is known of a trial is its ASR, or that and its utility; the choice is that of all trials measured whole."""
    rng, num_pruned = random.Random(3), 0
    for case in range(300):
        kept: list[Trial] = []
        whole: list[Trial] = []
        for number in range(12):
            asr, utility, other = rng.random(), rng.randint(0, 5) / 5, rng.random() - 0.6
            limits = {"asr": 0.8 if case % 3 else -1.0, "over_refusal": 0.5}
            trial = Trial(number, {}, utility, {"asr": asr - limits["asr"], "over_refusal": other})
            known: dict[str, float | None] = {"asr": asr} if case % 2 else {"asr": asr, "utility": utility}
            whole.append(trial)
            why = hopeless(known, limits, "utility", kept)
            num_pruned += bool(why)
            kept += [] if why else [trial]
        assert select(kept) == select(whole)
    assert 300 < num_pruned < 3300
    trial = Trial(4, {}, 0.5, {"asr": -0.1})
    assert hopeless({"asr": None, "utility": float("nan")}, {"asr": 0.1}, "utility", [trial]) == ""
    assert "asr 0.2 is above its bound 0.1" in hopeless({"asr": 0.2}, {"asr": 0.1}, "utility", [trial])
    assert "no more than the 0.5 of trial 4" in hopeless({"utility": 0.5}, {"asr": 0.1}, "utility", [trial])
