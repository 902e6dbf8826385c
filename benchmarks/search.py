"""What trials at once cost a search in quality: python benchmarks/search.py

Regret of the chosen trial after 20, on closed-form objectives under a constraint, over 30 seeds: how far the best feasible
value that was found lies below the best there is, as a share of how far random points lie (1: no better than one random
feasible point). With several objectives: the share of the true front's hypervolume that was not reached. `--quick`: 3 seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any, NamedTuple

import _bench
import optuna

from safecl.base import Json
from safecl.objective import Trial, front, hypervolume, losses, select
from safecl.study import CellStudy

TRIALS = 20
UNIT: dict[str, Json] = {"low": 0.0, "high": 1.0}


class Problem(NamedTuple):
    """`measure(**params) -> (value, violation)`; `start`: trial 0; `grid`: how finely its best is looked for."""

    name: str
    space: dict[str, Json]
    start: dict[str, Json]
    measure: Callable[..., tuple[float, float]]
    grid: int


def weight(w: float) -> tuple[float, float]:
    """One weight on a logarithm: safety rises with it, use falls; the best lies where the bound is met."""
    safe = 1 / (1 + math.exp(-3 * math.log10(w)))
    return 0.9 - 0.4 * safe, 0.8 * (1 - safe) - 0.15


def weight_and_size(w: float, m: int, kind: str) -> tuple[float, float]:
    """The same with a number of rows that helps, but costs, and a choice of which one is right."""
    safe = 1 / (1 + math.exp(-3 * math.log10(w) - (m - 40) / 20 - (kind == "b")))
    return 0.9 - 0.4 * safe - m / 640 - 0.05 * (kind == "c"), 0.8 * (1 - safe) - 0.15


def branin(x: float, y: float) -> tuple[float, float]:
    """Branin's function with two of its three minima outside a disk (Gelbart et al., arXiv 1403.5607)."""
    a, b = 15 * x - 5, 15 * y
    value = (
        (b - 5.1 * a * a / (4 * math.pi**2) + 5 * a / math.pi - 6) ** 2
        + 10 * (1 - 1 / (8 * math.pi)) * math.cos(a)
        + 10
    )
    return -value, ((a - 2.5) ** 2 + (b - 7.5) ** 2 - 50) / 50


def ridge(x: float, y: float, z: float) -> tuple[float, float]:
    """A narrow diagonal ridge that the bound cuts."""
    return -10 * abs(x - y) - abs(z - 0.3) + x, x + z - 1.0


PROBLEMS = (
    Problem("weight", {"w": {"low": 0.01, "high": 100.0, "log": True}}, {"w": 1.0}, weight, 4000),
    Problem(
        "weight, rows, choice",
        {
            "w": {"low": 0.01, "high": 100.0, "log": True},
            "m": {"low": 8, "high": 64, "step": 8},
            "kind": ["a", "b", "c"],
        },
        {"w": 1.0, "m": 16, "kind": "a"},
        weight_and_size,
        400,
    ),
    Problem("Branin in a disk", {"x": UNIT, "y": UNIT}, {"x": 0.5, "y": 0.5}, branin, 400),
    Problem("ridge", {"x": UNIT, "y": UNIT, "z": UNIT}, {"x": 0.5, "y": 0.5, "z": 0.5}, ridge, 80),
)
SAMPLERS = {
    "tpe, one at a time": ("tpe", 1),
    "tpe, 4 at once": ("tpe", 4),
    "tpe, 8 at once": ("tpe", 8),
    "random": ("random", 8),
}


def points(form: Any, num: int) -> list[Any]:
    """Values of a parameter, evenly over its range."""
    if isinstance(form, list):
        return form
    low, high = form["low"], form["high"]
    if "step" in form:
        return list(range(low, high + 1, form["step"]))
    shares = [i / (num - 1) for i in range(num)]
    return [low * (high / low) ** s if form.get("log") else low + (high - low) * s for s in shares]


def truth(problem: Problem) -> tuple[float, float]:
    """The best feasible value, and the mean of feasible ones."""
    grid = itertools.product(*(points(form, problem.grid) for form in problem.space.values()))
    found = (problem.measure(**dict(zip(problem.space, values, strict=True))) for values in grid)
    feasible = [value for value, violation in found if violation <= 0]
    return max(feasible), mean(feasible)


def searched(problem: Problem, sampler: str, at_once: int, seed: int, goals: dict[str, str]) -> list[Trial]:
    """The trials of one search."""
    storage = optuna.storages.InMemoryStorage()
    study = CellStudy(problem.name, problem.space, problem.start, storage, seed, TRIALS, sampler, at_once, goals)
    while study.remaining:
        batch = []
        while study.remaining and study.ready:
            batch.append(study.ask())
        for number, params in batch:
            value, violation = problem.measure(**params)
            if len(goals) > 1:  # the constraint as an objective
                study.tell(number, {"utility": value, "asr": violation + 0.15}, {})
            else:
                study.tell(number, value, {"asr": violation})
    return study.complete()


def row(found: list[float], **more: Any) -> dict[str, Any]:
    return {
        "regret, mean": mean(found),
        "standard error": stdev(found) / math.sqrt(len(found)),
        "worst": max(found),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    seeds = range(3 if parser.parse_args().quick else 30)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows: list[dict[str, Any]] = []
    pooled: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for problem in PROBLEMS:
        best, usual = truth(problem)
        for name, (sampler, at_once) in SAMPLERS.items():
            regrets, without = [], 0
            for seed in seeds:
                chosen = select(searched(problem, sampler, at_once, seed, {"value": "maximize"}))
                without += not chosen.feasible
                regrets.append((best - chosen.value) / (best - usual) if chosen.feasible else 1.0)
            pooled[name] += regrets
            rows.append({"objective": problem.name, "search": name, **row(regrets), "found nothing feasible": without})
            print(rows[-1], flush=True)
    plain = pooled["tpe, one at a time"]
    overall = []
    for name, regrets in pooled.items():
        loss = [a - b for a, b in zip(regrets, plain, strict=True)]
        rounds = math.ceil(TRIALS / SAMPLERS[name][1])
        overall.append(
            {"search": name, "rounds": rounds, **row(regrets), "more than one at a time": mean(loss),
             "its standard error": stdev(loss) / math.sqrt(len(loss))}
        )  # fmt: skip
        print(overall[-1], flush=True)
    fronts = []
    problem = PROBLEMS[1]
    grid = itertools.product(*(points(form, 200) for form in problem.space.values()))
    all_points = {
        (1 - v, a + 0.15) for v, a in (problem.measure(**dict(zip(problem.space, p, strict=True))) for p in grid)
    }
    best_points, lowest = [], math.inf
    for point in sorted(all_points):
        if point[1] < lowest:
            best_points.append(point)
            lowest = point[1]
    volume = hypervolume(best_points)
    for name, (sampler, at_once) in SAMPLERS.items():
        goals = {"utility": "maximize", "asr": "minimize"}
        reached = [
            hypervolume([losses(t) for t in front(searched(problem, sampler, at_once, seed, goals))]) for seed in seeds
        ]
        fronts.append({"search": name, **row([1 - one / volume for one in reached])})
        print(fronts[-1], flush=True)
    told = f"{TRIALS} trials, {len(seeds)} seeds"
    numbers = {
        f"All objectives: {told} each": overall,
        f"Each objective: {told}": rows,
        f"Use and harm of the second as two objectives, hypervolume of the front not reached: {told}": fronts,
    }
    print(_bench.write("search", numbers))


if __name__ == "__main__":
    main()
