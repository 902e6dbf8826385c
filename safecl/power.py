"""`safecl power`: the difference between two methods that a sweep can detect, and what it takes to detect a given one.

The test is that of `contrasts`. A difference over S seeds and C prompt clusters has the variance

    V = s^2 / S + p^2 / C + e^2 / (S C) + g

s, p and e are the standard deviations (sd) of a difference between seeds, between prompts, and of one answer, as
fractions (0.1 is 10 points). g is the variance that several disagreeing guards add; it is known from finished rows
only. A difference is detectable if it is marked in a fraction POWER of all such sweeps. The smallest one is the
half-width of the interval, plus the amount by which the estimate falls below the true difference in one of five
sweeps. The level is Holm's first one: .05 divided by the number of methods other than sft.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import metrics
from safecl.base import ConfigError
from safecl.contrasts import ALPHA
from safecl.crossed import Crossed, components, crossed, difference
from safecl.graph import REFERENCES
from safecl.tasks._overlap import clusters
from safecl.tasks._written import find

if TYPE_CHECKING:
    from safecl.config import Rows
    from safecl.project import Project

POWER = 0.8
DISCORDANT = (
    0.3  # of prompts, if nothing is known: two methods answer this fraction differently, half of it in every seed
)
MOST_SEEDS, MOST_PROMPTS = 100, 100_000  # a sweep that needs more is called out of reach
SEEDS = (3, 5, 10, 20)  # the numbers of seeds for which the needed prompts are reported


class Noise(NamedTuple):
    """Standard deviations of a difference of two methods: between seeds, between prompts, and of one answer. `source`:
    their origin as text. `guards`: the variance from the choice of guards and its degrees of freedom; None if unknown,
    or for one judge."""

    seeds: float
    prompts: float
    cells: float
    source: str
    guards: tuple[float, float] | None = None


def detectable(noise: Noise, num_seeds: int, num_prompts: float, num_tests: int = 1) -> float | None:
    """The smallest difference that is marked in a fraction POWER of all sweeps. None with one seed or one prompt, where
    no difference can be marked."""
    if num_seeds < 2 or num_prompts < 2:
        return None
    of_seeds = noise.seeds**2 / num_seeds + noise.cells**2 / (num_seeds * num_prompts)
    of_prompts = noise.prompts**2 / num_prompts
    found = Crossed(0.0, (of_seeds, num_seeds - 1), (of_prompts, num_prompts - 1), noise.guards, num_seeds)
    return found.half(1 - ALPHA / num_tests) + found.half(2 * POWER - 1)


def seeds_for(aim: float, noise: Noise, num_prompts: float, num_tests: int = 1) -> int | None:
    """The smallest number of seeds with which `aim` is detectable; None if more than MOST_SEEDS are needed."""
    return next((n for n in range(2, MOST_SEEDS + 1) if _reaches(aim, noise, n, num_prompts, num_tests)), None)


def prompts_for(aim: float, noise: Noise, num_seeds: int, num_tests: int = 1) -> int | None:
    """The smallest number of prompts (clusters) with which `aim` is detectable; None if more than MOST_PROMPTS are
    needed."""
    if not _reaches(aim, noise, num_seeds, MOST_PROMPTS, num_tests):
        return None
    low, high = 1, MOST_PROMPTS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _reaches(aim, noise, num_seeds, middle, num_tests) else (middle, high)
    return high


def _reaches(aim: float, noise: Noise, num_seeds: int, num_prompts: float, num_tests: int) -> bool:
    found = detectable(noise, num_seeds, num_prompts, num_tests)
    return found is not None and found <= aim


def power(project: Project, noise: float | None, discordant: float | None, aim: float | None) -> list[dict[str, Any]]:
    """A row for each metric; for utility a row for each task.

    Args:
        noise: sd between seeds, in (0, 1). If None, it is estimated from the store's finished trials.
        discordant: fraction of prompts that two methods answer differently, in (0, 1). If None, it is estimated from
            the finished trials too, or assumed where there are none.
        aim: a difference, in (0, 1), for which to report the seeds and prompts needed.

    Raises:
        ConfigError: a number is outside (0, 1).
    """
    for name, value in (("--noise", noise), ("--discordant", discordant), ("--detect", aim)):
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{name}: expected a fraction in (0, 1), got {value:g} (5 points are 0.05)")
    sweep = project.sweep
    together = Counter((cell.recipe.model.name, cell.task, cell.recipe.poison_ratio) for cell in project.cells
                       if cell.recipe.method not in REFERENCES)  # fmt: skip
    num_seeds, num_tests = len(sweep.seeds), max(1, max(together.values(), default=1) - 1)  # of the largest table
    found = []
    for metric, task, parts in _sets(project):
        sizes = [_num_clusters(project, part, split) for part, split in parts]
        worth = len(sizes) ** 2 / sum(1 / num for _, num in sizes)  # size of one set with the same error of the mean
        own = _noise(project, metric, task, noise, discordant)
        row: dict[str, Any] = {
            "metric": metric,
            "task": task,
            "seeds": num_seeds,
            "prompts": sum(rows for rows, _ in sizes),
            "groups": sum(num for _, num in sizes),
            "noise": None if own is None else own._asdict(),
            "detectable": None if own is None else detectable(own, num_seeds, worth, num_tests),
        }
        if aim is not None and own is not None:
            row["aim"] = aim
            row["seeds_needed"] = seeds_for(aim, own, worth, num_tests)
            row["groups_needed"] = {
                str(n): prompts_for(aim, own, n, num_tests) for n in sorted({*SEEDS, num_seeds} - {1})
            }
        found.append(row)
    return found


def _sets(project: Project) -> Iterator[tuple[str, str | None, list[tuple[Rows, str]]]]:
    """Metrics that are tested between methods and measured on one kind of prompts, with the sets they are the mean
    of."""
    from safecl.config import Rows

    test = project.sweep.evaluate.test
    for metric in metrics.asked(project.sweep.evaluate.metrics):
        if metric.margin and metric.question:
            for role in metric.roles:
                yield metric.name, None, [(part, f"{role}.test") for part in getattr(test, role)]
    for task in project.sweep.tasks:
        num_rows = test.utility_rows if task.utility_rows is None else task.utility_rows.test or test.utility_rows
        yield "utility", task.task, [(Rows(task=task.task, num_rows=num_rows), "utility.test")]


def _num_clusters(project: Project, part: Rows, split: str) -> tuple[int, int]:
    """Number of prompts of a set, and number of groups of near-duplicates among them."""
    rows = find(part.task, project.sweep.data)(project.folder).rows(split, part.num_rows, 0)
    return len(rows), len(set(clusters(rows)))


def _noise(
    project: Project, metric: str, task: str | None, seeds: float | None, discordant: float | None
) -> Noise | None:
    """None if the noise between seeds is neither given nor in the store."""
    pairs = list(_differences(project, metric, task))
    of = [components(pair) for pair in pairs if len(pair) > 1 and len({o["cluster"] for o in pair[0]}) > 1]
    share = discordant
    if share is None and not of and pairs:  # only one seed
        values = [float(outcome["value"]) ** 2 for pair in pairs for of_seed in pair for outcome in of_seed]
        share = sum(values) / len(values) if values else None
    if seeds is None and not of:
        return None
    stated = [f"{seeds:g} between seeds"] if seeds is not None else []
    stated += [f"{discordant:g} of prompts discordant"] if discordant is not None else []
    if of:
        between, prompts, cells = (math.sqrt(sum(each) / len(of)) for each in zip(*of, strict=True))
        source = f"{len(of)} differences of finished rows"
    else:
        source = "an assumption for prompts" if share is None else "the finished seed"
    if discordant is not None or not of:
        prompts = cells = math.sqrt((DISCORDANT if share is None else share) / 2)
    if seeds is not None:
        between = seeds
    everything = seeds is not None and discordant is not None
    guards = [found.guards for pair in pairs if (found := crossed(pair)) is not None and found.guards is not None]
    spread = (sum(variance for variance, _ in guards) / len(guards), guards[0][1]) if guards else None
    return Noise(between, prompts, cells, ", ".join([*stated, *([] if everything else [source])]), spread)


def _differences(project: Project, metric: str, task: str | None) -> Iterator[list[list[dict[str, Any]]]]:
    """For every two methods of one block of the table: outcome differences by common seed."""
    blocks: dict[Any, list[dict[int, Any]]] = {}
    for cell, _, jobs, _ in project.finals():
        recipe = cell.recipe
        if recipe.method in REFERENCES or task not in (None, recipe.task.task):
            continue
        read = {job.seed: [o for o in outcomes if o["metric"] == metric]
                for job in jobs if (outcomes := project.outcomes(job)) is not None}  # fmt: skip
        blocks.setdefault((recipe.model.name, recipe.task.task, recipe.poison_ratio), []).append(read)
    for methods in blocks.values():
        for first, second in itertools.combinations(methods, 2):
            seeds = sorted(first.keys() & second.keys())
            found = difference([first[seed] for seed in seeds], [second[seed] for seed in seeds])
            if found and all(found):
                yield found


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of text: what is detectable, and what `aim` needs. In percentage points."""
    lines = []
    for row in rows:
        noise, least = row["noise"], row["detectable"]
        told = ["-"] * 3 if noise is None else [f"{100 * noise[k]:.1f}" for k in ("seeds", "prompts", "cells")]
        reach = "-" if least is None else f"{100 * least:.1f}" if least <= 1 else "none"
        lines.append([_name(row), str(row["seeds"]), f"{row['prompts']} ({row['groups']})", *told, reach])
    yield "power", ["metric", "seeds", "prompts (groups)", "sd: seeds", "prompts", "answer", "detectable"], lines
    having = [row for row in rows if "aim" in row]
    if having:
        seeds = list(having[0]["groups_needed"])
        columns = ["metric", "seeds, as it is", *(f"groups, {num} seeds" for num in seeds)]
        lines = []
        for row in having:
            groups = [str(row["groups_needed"][num] or "-") for num in seeds]
            lines.append([_name(row), str(row["seeds_needed"] or f"> {MOST_SEEDS}"), *groups])
        yield f"needed to mark {100 * having[0]['aim']:g} points", columns, lines


def _name(row: dict[str, Any]) -> str:
    return row["metric"] if row["task"] is None else f"{row['metric']} ({row['task']})"


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers are based on, one line each."""
    found = [
        f"In points. Detectable: marked as different from sft in {POWER:.0%} of all sweeps, after Holm. Groups: prompts that "
        "are not near-duplicates. sd: of a difference between seeds, between prompts, and of one answer. What guards "
        "add that disagree counts where finished rows tell."
    ]
    for source in dict.fromkeys(row["noise"]["source"] for row in rows if row["noise"]):
        names = ", ".join(row["metric"] for row in rows if row["noise"] and row["noise"]["source"] == source)
        found.append(f"Noise of {names}: {source}.")
    for row in rows:
        if row["noise"] and row["noise"]["guards"]:
            error = math.sqrt(row["noise"]["guards"][0])
            found.append(
                f"{_name(row)}: guards that disagree add an error of {100 * error:.1f}, whatever the seeds and prompts."
            )
    if any(row["seeds"] < 2 for row in rows):
        found.append("One seed marks nothing: another seed may turn any order around. Name more under `seeds`.")
    if any(row["noise"] is None for row in rows):
        found.append("No two methods have two finished seeds in common: state the sd between seeds, e.g. --noise 0.05.")
    return found
