"""The mean of outcomes over seeds and prompts, with its variance and interval.

All functions are pure. numpy and scipy are imported inside functions.

What a table says about a *method* must hold for other seeds (alignment, data order, poison draw, initialisation) *and* for
other prompts of the same kind. Every seed answered the same prompts: seeds and prompts are crossed. So the variance of a
mean has a part from seeds and a part from prompts (`Crossed`). The squared half-width of an interval is the sum of the
parts' squared half-widths. One seed alone shows only how precisely one trained model was measured. Near-duplicate prompts
form a cluster, which counts as one prompt.

An outcome is one line of outcomes.jsonl: `{"set": str, "id": str, "value": 0|1|float|None, "cluster": str}`. The value None
(unparsed) is left out here and counted elsewhere. If several guards judged, `votes` holds the value that each of them gave,
in a fixed order. The variance between guards is then a third part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl.stats import Interval, checked_level, wilson_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Outcome = Mapping[str, Any]
_NO_SPREAD = 1e-18  # a variance up to this comes from rounding alone
_FLOOR = 1.96**2  # if all prompts seen were alike, so many others (half on each side) may still differ: Wilson's z^2


class _Set(NamedTuple):
    """The outcomes of one set, with axes S (seeds), C (clusters; a prompt without `cluster` is one of its own), G (guards).

    `sums_SC` and `counts_SC`: sum and number of the values of each cell. `votes_GS`: each guard's mean by seed; None if one
    judge decided.
    """

    sums_SC: NDArray[np.float64]
    counts_SC: NDArray[np.float64]
    votes_GS: NDArray[np.float64] | None

    @property
    def means_S(self) -> NDArray[np.float64]:
        """Mean of each seed, of shape S."""
        found: NDArray[np.float64] = self.sums_SC.sum(axis=1) / self.counts_SC.sum(axis=1)
        return found

    def deviations(self, centre: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What adds to the mean's distance from `centre` (default: each seed's own mean): (of each cluster, of each cell beyond
        its cluster), of shapes C and SC. Counts are weights, so cells without a parsed value add nothing."""
        at_S1 = self.means_S[:, None] if centre is None else centre
        of_cell_SC = (self.sums_SC - at_S1 * self.counts_SC) / self.counts_SC.sum(axis=1, keepdims=True)
        own_SC = (self.sums_SC - self.means_S[:, None] * self.counts_SC) / self.counts_SC.sum(axis=1, keepdims=True)
        return of_cell_SC.mean(axis=0), own_SC - own_SC.mean(axis=0)

    @property
    def cells(self) -> float:
        """Squared standard error of the mean from single cells alone. The parts of seeds and of prompts both contain it."""
        (num_seeds, num), (_, own_SC) = self.sums_SC.shape, self.deviations()
        if num_seeds < 2 or num < 2:
            return 0.0
        return float((own_SC**2).sum() * num / (num - 1) / (num_seeds * (num_seeds - 1)))


def _sets(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, _Set]:
    """The sets by name. `outcomes[s]` are the rows of seed s. Raises ValueError if a seed has no parsed outcome of a set."""
    import numpy as np

    places: dict[str, dict[str, int]] = {}
    entries: dict[str, tuple[list[int], list[int], list[float]]] = {}
    votes: dict[str, list[list[Sequence[float]]]] = {}
    for seed, rows in enumerate(outcomes):
        for row in rows:
            if (value := row["value"]) is None:
                continue
            name = row["set"]
            if name not in places:
                places[name], entries[name], votes[name] = {}, ([], [], []), [[] for _ in outcomes]
            of_set, (seeds, clusters, values) = places[name], entries[name]
            seeds.append(seed)
            clusters.append(of_set.setdefault(row.get("cluster") or row["id"], len(of_set)))
            values.append(value)
            if each := row.get("votes"):
                votes[name][seed].append(each)
    found = {}
    for name, (seeds, clusters, values) in entries.items():
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"an outcome of set {name!r} is {next(v for v in values if not math.isfinite(v))}; expected a number"
            )
        sums_SC, counts_SC = np.zeros((2, len(outcomes), len(places[name])))
        np.add.at(sums_SC, (seeds, clusters), values)
        np.add.at(counts_SC, (seeds, clusters), 1)
        if len(empty := np.flatnonzero(counts_SC.sum(axis=1) == 0)):
            raise ValueError(f"set {name!r} has no parsed outcome for seed number {empty[0]} of {len(outcomes)}")
        sizes = {len(each) for of_seed in votes[name] for each in of_seed}
        votes_GS = None
        if sum(map(len, votes[name])) == len(values) and len(sizes) == 1 and min(sizes) > 1:
            votes_GS = np.array([np.mean(of_seed, axis=0) for of_seed in votes[name]]).T
        found[name] = _Set(sums_SC, counts_SC, votes_GS)
    return found


def macro(outcomes: Sequence[Outcome]) -> float | None:
    """Return the mean over sets of the mean over prompts, for one seed; None without a parsed outcome."""
    sets = _sets([outcomes])
    return sum(float(each.means_S[0]) for each in sets.values()) / len(sets) if sets else None


class Crossed(NamedTuple):
    """A mean over seeds, prompts and guards, with the parts of its variance.

    Attributes:
        mean: the mean.
        seeds, prompts, guards: (squared standard error, degrees of freedom) of each part; None with fewer than two units.
        num: the number of seeds or of prompts, whichever is smaller.
        least: lower bound for the prompts' part (used by `floored`). Prompts that were all alike do not show that others
            would be: `_FLOOR` of them may differ.
    """

    mean: float
    seeds: tuple[float, float] | None
    prompts: tuple[float, float] | None
    guards: tuple[float, float] | None
    num: int
    least: float = 0.0

    @property
    def parts(self) -> tuple[tuple[float, float], ...]:
        """The parts that are not None, as (squared standard error, degrees of freedom)."""
        return tuple(part for part in (self.seeds, self.prompts, self.guards) if part is not None)

    def floored(self) -> Crossed:
        """Return the same mean with the prompts' part raised to `least` if it is smaller."""
        if self.prompts is None:
            return self
        return self._replace(prompts=(max(self.prompts[0], self.least), self.prompts[1]))

    @property
    def has_spread(self) -> bool:
        """Whether any part of the variance is above zero (beyond rounding)."""
        return any(variance > _NO_SPREAD for variance, _ in self.parts)

    def half(self, level: float) -> float:
        """Return the half-width of the two-sided interval of this level, as 0.95."""
        from scipy.special import stdtrit  # scipy.stats takes a second to import

        return math.sqrt(sum(float(stdtrit(df, (1 + level) / 2)) ** 2 * variance for variance, df in self.parts))

    def tail(self, distance: float) -> float:
        """Return the one-sided p of a mean that lies `distance` beyond the tested value, on the side of the alternative.

        p is the level at which the interval just reaches the tested value. Without any spread a t test would give p = 0, so
        that p is a sign test's, 1/2 to the power of `num`.
        """
        if distance <= 0:
            return 0.5 if distance == 0 else 1 - self.tail(-distance)
        if not self.has_spread:
            return 0.5**self.num
        low, high = math.log(1e-16), math.log(0.5)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if self.half(1 - 2 * math.exp(middle)) < distance else (middle, high)
        return math.exp(high)


def crossed(outcomes: Sequence[Sequence[Outcome]]) -> Crossed | None:
    """Return the mean over seeds of the macro mean, with the parts of its variance. None without a parsed outcome.

    With S seeds and C clusters: V_S = variance of seed means / S, V_C = variance of cluster means / C, and V_E = the cells'
    own noise, which both contain. The seeds' part is max(V_S, V_E) and the prompts' part is max(V_C - V_E, 0). So the noise
    counts once (Cameron, Gelbach and Miller 2011 subtract it in the same way). The seeds' part has few degrees of freedom,
    and V_E, estimated from many cells, is its lower bound. Each part gets Student's t of its own degrees of freedom, and the
    squared half-widths are added (as MOVER does). This rule was chosen among six by simulation (`tests/test_crossed.py`).
    Different sets have different prompts, so their variances from prompts add up.

    Args:
        outcomes: `outcomes[s]` are the rows of seed s.

    Raises:
        ValueError: a seed has no parsed outcome of a set that another seed has, or a value is not finite.
    """
    sets = _sets(outcomes)
    return _crossed(sets) if sets else None


def _mean(arrays: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    import numpy as np

    found: NDArray[np.float64] = np.mean(list(arrays), axis=0)
    return found


def _crossed(sets: Mapping[str, _Set]) -> Crossed:
    num_sets, means_S = len(sets), _mean(each.means_S for each in sets.values())
    num_seeds = len(means_S)
    cells = sum(each.cells for each in sets.values()) / num_sets**2
    prompts, below, sizes = 0.0, 0.0, [each.sums_SC.shape[1] for each in sets.values()]
    for each, num in zip(sets.values(), sizes, strict=True):
        if num > 1:
            variance = float((each.deviations()[0] ** 2).sum()) * num / (num - 1) / num_sets**2
            prompts, below = prompts + variance, below + variance**2 / (num - 1)
    df = prompts**2 / below if below > 0 else float(sum(sizes) - num_sets)  # Welch and Satterthwaite over sets
    return Crossed(
        float(means_S.mean()),
        (max(float(means_S.var(ddof=1)) / num_seeds, cells), num_seeds - 1) if num_seeds > 1 else None,
        (max(prompts - cells, 0.0), df) if max(sizes) > 1 else None,
        _guards(sets),
        min(num_seeds, *sizes),
        sum(_FLOOR / num**2 for num in sizes) / num_sets**2,
    )


def components(outcomes: Sequence[Sequence[Outcome]]) -> tuple[float, float, float]:
    """Return the variances of single units: (between seeds, between prompts or clusters, of one cell).

    All sets are taken as one. Needs two seeds or more. `outcomes[s]` are the rows of seed s.
    """
    [whole] = _sets(
        [[{**row, "set": "", "cluster": f"{row['set']}: {row['cluster']}"} for row in of_seed] for of_seed in outcomes]
    ).values()
    (num_seeds, num), cells = whole.sums_SC.shape, whole.cells
    of_seeds = float(whole.means_S.var(ddof=1)) / num_seeds
    of_prompts = float((whole.deviations()[0] ** 2).sum()) * num / (num - 1)
    return max(of_seeds - cells, 0.0) * num_seeds, max(of_prompts - cells, 0.0) * num, cells * num_seeds * num


def _guards(sets: Mapping[str, _Set]) -> tuple[float, float] | None:
    """(squared standard error, degrees of freedom) of the part from guards; None if a set has no votes, or if the sets' numbers
    of guards differ."""
    means = [each.votes_GS.mean(axis=1) for each in sets.values() if each.votes_GS is not None]
    if len(means) < len(sets) or len({len(means_G) for means_G in means}) > 1:
        return None
    means_G = _mean(means)
    return float(means_G.var(ddof=1)) / len(means_G), len(means_G) - 1


def difference(first: Sequence[Sequence[Outcome]], second: Sequence[Sequence[Outcome]]) -> list[list[dict[str, Any]]]:
    """Return `first - second` as outcomes, seed by seed, for the prompts that were parsed for both.

    Votes are subtracted guard by guard; they are empty if the two had different numbers of guards.

    Raises:
        ValueError: the two have different numbers of seeds.
    """
    if len(first) != len(second):
        raise ValueError(f"difference: expected the same seeds, got {len(first)} and {len(second)}")
    found = []
    for mine, theirs in zip(first, second, strict=True):
        other = {(row["set"], row["id"]): row for row in theirs if row["value"] is not None}
        pairs = [(row, other[row["set"], row["id"]]) for row in mine
                 if row["value"] is not None and (row["set"], row["id"]) in other]  # fmt: skip
        found.append(
            [
                {
                    "set": a["set"],
                    "id": a["id"],
                    "cluster": a.get("cluster"),
                    "value": a["value"] - b["value"],
                    "votes": _minus(a, b),
                }
                for a, b in pairs
            ]
        )
    return found


def _minus(first: Outcome, second: Outcome) -> list[float]:
    mine, theirs = first.get("votes"), second.get("votes")
    if not mine or not theirs or len(mine) != len(theirs):
        return []
    return [a - b for a, b in zip(mine, theirs, strict=True)]


def intervals(outcomes: Sequence[Sequence[Outcome]], confidence: float = 0.95, bounded: bool = True) -> Interval | None:
    """Return the value and interval of one metric, as a table prints them. None without a parsed outcome.

    If `bounded`, the prompts' part is Wilson's interval, set by set, with the number of prompts that would give the variance
    seen (`_wilson_set`). It stays inside [0, 1] and has a width also at 0 and 1 (0 of 40 prompts in every seed gives Wilson's
    interval for 0 of 40). It grows with any spread that is added. The parts of seeds and guards use Student's t. Squared
    half-widths are added, and the interval is cut to [0, 1]. With one seed there are only the parts of prompts and guards.
    If not `bounded`, all parts use Student's t (`crossed`).

    Args:
        outcomes: `outcomes[s]` are the metric's rows of seed s.
        confidence: level of the two-sided interval.
        bounded: whether values are in [0, 1].
    """
    if not (sets := _sets(outcomes)):
        return None
    found = _crossed(sets)
    if not bounded:
        half = found.half(checked_level(confidence))
        return Interval(found.mean, found.mean - half, found.mean + half)
    by_set = [_wilson_set(each, confidence) for each in sets.values()]
    half = found._replace(prompts=None).half(checked_level(confidence))
    below = math.sqrt(sum((each.value - each.low) ** 2 for each in by_set) / len(by_set) ** 2 + half**2)
    above = math.sqrt(sum((each.high - each.value) ** 2 for each in by_set) / len(by_set) ** 2 + half**2)
    return Interval(found.mean, max(0.0, found.mean - below), min(1.0, found.mean + above))


def _wilson_set(of_set: _Set, confidence: float) -> Interval:
    """Wilson's interval of one set over prompts. The variance is that of the set's clusters together with z^2 / 2 prompts of
    value 1 and z^2 / 2 prompts of value 0, which Wilson's centre adds (Agresti and Coull 1998). With one seed and no
    clusters of several prompts this is exactly Wilson's own interval."""
    num, z = of_set.sums_SC.shape[1], NormalDist().inv_cdf((1 + confidence) / 2)
    value = min(1.0, max(0.0, float(of_set.means_S.mean())))
    centre = (value * num + z * z / 2) / (num + z * z)
    seen = float((of_set.deviations(centre)[0] ** 2).sum()) * num**2
    noise = of_set.cells * num * (num - 1)
    added = z * z / 2 * (centre**2 + (1 - centre) ** 2)
    worth = centre * (1 - centre) * (num + z * z) ** 2 / (max(seen - noise, 0.0) + added) - z * z
    return wilson_of(value, max(worth, 1.0), confidence)
