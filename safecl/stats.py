"""Intervals and paired tests. Pure: numbers in, numbers out; numpy and scipy are imported inside functions.

What a table says of a *method* must survive other seeds (alignment, data order, poison draw, initialisation) *and* other
prompts of the same kind, and every seed answered the same prompts: seeds and prompts are crossed. So the variance of a
mean has a part from seeds and a part from prompts (`Crossed`), and an interval squares and adds their half-widths. One
seed alone says how well one trained model was measured, no more. Near-duplicate prompts (a cluster) are one prompt.

An outcome is one line of outcomes.jsonl: `{"set": str, "id": str, "value": 0|1|float|None, "cluster": str}`; None
(unparsed) takes no part here and is counted elsewhere. Where several guards judged, `votes` holds what each of them said,
in a fixed order: how far they part is a third part of the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Outcome = Mapping[str, Any]
_CHUNK = 500  # bootstrap draws at once: bounds memory at about _CHUNK x clusters x 8 bytes
_NO_SPREAD = 1e-18  # variances of fractions that are equal but for rounding
_FLOOR = 1.96**2  # prompts (half of them for each side) that may differ where none of those seen did: Wilson's z^2


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class NotCorrectable(ValueError):
    """Why a judge's rate cannot be corrected, in words for a table's reader."""


class McNemar(NamedTuple):
    only_first: int
    only_second: int
    p: float


class Agreement(NamedTuple):
    """`kappa` is None where chance agreement is complete (both always give one and the same label)."""

    num: int
    agree: Interval
    kappa: Interval | None
    skipped: int  # pairs in which either label is None


class Quality(NamedTuple):
    """A yes/no judge against the truth. None: undefined here (no true row, no score, chance agreement complete)."""

    num: int
    skipped: int  # rows whose verdict is None
    truth: Interval  # share of rows that are true
    said: Interval  # share of rows that the judge calls true
    accuracy: Interval
    sensitivity: Interval | None  # share called true of the true rows
    specificity: Interval | None  # share called false of the others
    balanced: Interval | None  # mean of the two: 1/2 is chance, whatever the share of true rows
    f1: Interval | None
    kappa: Interval | None
    auroc: Interval | None


def _finite(values: Sequence[float], what: str, at_least: int) -> NDArray[np.float64]:
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"{what}: expected at least {at_least} numbers, got {array.size}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what}: expected finite numbers, got {array.tolist()}")
    return array


def _level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    return confidence


def wilson(successes: float, num: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927). Never leaves [0, 1] and has width at 0 and 1."""
    if num < 1 or not 0 <= successes <= num:
        raise ValueError(f"wilson: expected 0 <= successes <= num and num >= 1, got {successes} of {num}")
    return _wilson(successes / num, num, confidence)


def _wilson(p: float, num: float, confidence: float) -> Interval:
    z = NormalDist().inv_cdf((1 + _level(confidence)) / 2)
    centre = (p + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    # At the ends the bound is the observed value exactly; rounding must not put it beside it.
    low = 0.0 if p == 0 else max(0.0, centre - half)
    high = 1.0 if p == 1 else min(1.0, centre + half)
    return Interval(p, low, high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact two-sided McNemar test on 0/1 outcomes of the same prompts. Descriptive: one seed, one model each."""
    if len(first) != len(second):
        raise ValueError(f"mcnemar: expected paired outcomes, got {len(first)} and {len(second)}")
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    num = only_first + only_second
    tail = sum(math.comb(num, k) for k in range(min(only_first, only_second) + 1))  # of 2**num, exactly
    p = min(1.0, 2 * tail / 2**num)
    return McNemar(only_first, only_second, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (Holm 1979), in the order given."""
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"holm: expected p values in [0, 1], got {list(p_values)}")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def agreement(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Agreement:
    """Share of equal labels and Cohen's kappa (1960) of two judges on the same answers; pairs with a None are skipped.

    The share has Wilson's interval, in which answers of one cluster (to one prompt) count once, as if they were one answer;
    kappa's is the same, moved to kappa's scale with chance agreement as it was seen, which is what Cohen's standard error
    does. Raises ValueError where no pair is left.
    """
    every = list(zip(first, second, clusters if clusters is not None else range(len(first)), strict=True))
    pairs = [(a, b) for a, b, _ in every if a is not None and b is not None]
    num = len(pairs)
    if num == 0:
        raise ValueError(f"agreement: no pair of labels to compare ({len(every)} skipped)")
    num_apart = len({cluster for a, b, cluster in every if a is not None and b is not None})
    share = sum(a == b for a, b in pairs) / num
    agree = wilson(share * num_apart, num_apart, confidence)
    labels = {label for pair in pairs for label in pair}
    chance = sum(sum(a == k for a, _ in pairs) * sum(b == k for _, b in pairs) for k in labels) / num**2
    kappa = None if chance == 1 else Interval(*(max(-1.0, (x - chance) / (1 - chance)) for x in agree))
    return Agreement(num, agree, kappa, len(every) - num)


def as_json(found: Agreement | Quality) -> dict[str, Any]:
    """With its intervals as objects of `value`, `low` and `high`."""
    return {name: x._asdict() if isinstance(x, Interval) else x for name, x in found._asdict().items()}


def _mean_of_two(first: Interval, second: Interval) -> Interval:
    """Of independent proportions, by squaring and adding their distances to the bounds (Newcombe 1998)."""
    value = (first.value + second.value) / 2
    below = math.hypot(first.value - first.low, second.value - second.low) / 2
    above = math.hypot(first.high - first.value, second.high - second.value) / 2
    return Interval(value, value - below, value + above)


def quality(
    truth: Sequence[bool],
    said: Sequence[bool | None],
    clusters: Sequence[Hashable],
    scores: Sequence[float | None] | None = None,
    seed: int = 0,
    num_draws: int = 2000,
    confidence: float = 0.95,
) -> Quality:
    """How well `said` tells `truth`. Wilson intervals for shares (rows taken as independent); for F1, Cohen's kappa and
    AUROC (of `scores`, where every judged row has one) percentile bootstraps of clusters: rows with one prompt."""
    import numpy as np

    if not len(truth) == len(said) == len(clusters) or (scores is not None and len(scores) != len(truth)):
        raise ValueError(f"quality: expected equal lengths, got {len(truth)}, {len(said)}, {len(clusters)}")
    judged = [i for i, label in enumerate(said) if label is not None]
    if not judged:
        raise ValueError(f"quality: none of {len(said)} verdicts could be read")
    true_N = np.array([bool(truth[i]) for i in judged])
    said_N = np.array([bool(said[i]) for i in judged])
    places: dict[Hashable, int] = {}
    cluster_N = np.array([places.setdefault(clusters[i], len(places)) for i in judged])
    cells_N4 = np.stack([true_N & said_N, ~true_N & said_N, true_N & ~said_N, ~true_N & ~said_N], 1).astype(np.float64)
    hits, alarms, misses, passes = (int(n) for n in cells_N4.sum(axis=0))
    rng = np.random.default_rng(seed)
    tail = (1 - _level(confidence)) / 2

    def interval(statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Interval | None:
        value = float(statistic(np.ones((1, len(judged))))[0])
        draws = []
        for start in range(0, num_draws, _CHUNK):
            size = min(_CHUNK, num_draws - start)
            weights_DC = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=size)
            draws.append(statistic(weights_DC[:, cluster_N].astype(np.float64)))
        draws_D = np.concatenate(draws)
        if math.isnan(value) or np.isnan(draws_D).all():
            return None
        low, high = np.nanquantile(draws_D, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    sensitivity = wilson(hits, hits + misses, confidence) if hits + misses else None
    specificity = wilson(passes, passes + alarms, confidence) if passes + alarms else None
    have = [] if scores is None else [scores[i] for i in judged]
    scores_N = np.array(have, dtype=np.float64) if have and None not in have else None
    return Quality(
        num=len(judged),
        skipped=len(said) - len(judged),
        truth=wilson(hits + misses, len(judged), confidence),
        said=wilson(hits + alarms, len(judged), confidence),
        accuracy=wilson(hits + passes, len(judged), confidence),
        sensitivity=sensitivity,
        specificity=specificity,
        balanced=_mean_of_two(sensitivity, specificity) if sensitivity and specificity else None,
        f1=interval(lambda weights_DN: _f1(weights_DN @ cells_N4)),
        kappa=interval(lambda weights_DN: _kappa(weights_DN @ cells_N4)),
        auroc=None if scores_N is None else interval(lambda weights_DN: _auroc(weights_DN, scores_N, true_N)),
    )


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _f1(cells_D4: NDArray[np.float64]) -> NDArray[np.float64]:
    hits_D, alarms_D, misses_D, _ = cells_D4.T
    return _ratio(2 * hits_D, 2 * hits_D + alarms_D + misses_D)


def _kappa(cells_D4: NDArray[np.float64]) -> NDArray[np.float64]:
    hits_D, alarms_D, misses_D, passes_D = cells_D4.T
    num_D = cells_D4.sum(axis=1)
    by_chance_D = (hits_D + misses_D) * (hits_D + alarms_D) + (passes_D + alarms_D) * (passes_D + misses_D)
    return _ratio((hits_D + passes_D) * num_D - by_chance_D, num_D**2 - by_chance_D)


def _auroc(
    weights_DN: NDArray[np.float64], scores_N: NDArray[np.float64], true_N: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Chance that a true row scores above another; ties count half (Mann and Whitney 1947)."""
    import numpy as np

    order_N = np.argsort(scores_N, kind="stable")
    starts = np.flatnonzero(np.diff(scores_N[order_N], prepend=-np.inf))  # of runs of equal scores
    true_DG, other_DG = (
        np.add.reduceat(weights_DN[:, order_N] * kind_N[order_N], starts, axis=1) for kind_N in (true_N, ~true_N)
    )
    below_DG = other_DG.cumsum(axis=1) - other_DG
    return _ratio((true_DG * (below_DG + other_DG / 2)).sum(axis=1), true_DG.sum(axis=1) * other_DG.sum(axis=1))


def rogan_gladen(
    said: tuple[int, int], sensitivity: tuple[int, int], specificity: tuple[int, int], confidence: float = 0.95
) -> Interval:
    """The true rate behind a judge's rate, from (count, num) of what it said and of its sensitivity and specificity
    elsewhere: (p + sp - 1) / (se + sp - 1), cut to [0, 1] (Rogan and Gladen 1978). The interval adds what is unknown of
    all three (Lang and Reiczigel 2014).

    Raises:
        NotCorrectable: the judge was not clearly better than chance (se + sp - 1 may be 0 at this confidence), or no true
            rate gives the rate it said with these errors: they are not those it makes on these answers.
    """
    (p, se, sp) = (count / num for count, num in (said, sensitivity, specificity))
    z = NormalDist().inv_cdf((1 + _level(confidence)) / 2)
    num, num_se, num_sp = said[1] + z * z, sensitivity[1] + 2, specificity[1] + 2
    p_, se_, sp_ = (said[0] + z * z / 2) / num, (sensitivity[0] + 1) / num_se, (specificity[0] + 1) / num_sp
    gain = se_ + sp_ - 1
    se_part, sp_part = se_ * (1 - se_) / num_se, sp_ * (1 - sp_) / num_sp
    if se + sp - 1 <= 0 or gain <= z * math.sqrt(se_part + sp_part):
        raise NotCorrectable("the validation set does not show that the judge beats chance")
    rate = (p_ + sp_ - 1) / gain
    centre = rate + 2 * z * z * (rate * se_part - (1 - rate) * sp_part)
    half = z / gain * math.sqrt(p_ * (1 - p_) / num + rate**2 * se_part + (1 - rate) ** 2 * sp_part)
    if centre + half < 0 or centre - half > 1:
        raise NotCorrectable(
            f"it says yes to {p:.1%}, which its errors on the validation set allow for no true rate ({1 - sp:.1%} where "
            f"nothing is true, {se:.1%} where all is): it errs otherwise on these answers"
        )
    value = min(1.0, max(0.0, (p + sp - 1) / (se + sp - 1)))
    low, high = min(1.0, max(0.0, centre - half)), min(1.0, max(0.0, centre + half))
    return Interval(value, min(low, value), max(high, value))


# ---- seeds x prompts ---------------------------------------------------------------------------------------------------


class _Set(NamedTuple):
    """Of one set: sums and numbers of values over seeds S and clusters C (a prompt without `cluster` is its own), and
    `votes_GS`: each guard's mean by seed; None where one judge decided."""

    sums_SC: NDArray[np.float64]
    counts_SC: NDArray[np.float64]
    votes_GS: NDArray[np.float64] | None

    @property
    def means_S(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.sums_SC.sum(axis=1) / self.counts_SC.sum(axis=1)
        return found

    def deviations(self, centre: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What each cluster, and each cell beyond its cluster, adds to the mean's distance from `centre` (the seed's own
        mean). Counts are weights, so cells that could not be read are left out."""
        at_S1 = self.means_S[:, None] if centre is None else centre
        of_cell_SC = (self.sums_SC - at_S1 * self.counts_SC) / self.counts_SC.sum(axis=1, keepdims=True)
        own_SC = (self.sums_SC - self.means_S[:, None] * self.counts_SC) / self.counts_SC.sum(axis=1, keepdims=True)
        return of_cell_SC.mean(axis=0), own_SC - own_SC.mean(axis=0)

    @property
    def cells(self) -> float:
        """Squared standard error of the mean from cells alone: the noise that both other parts hold."""
        (num_seeds, num), (_, own_SC) = self.sums_SC.shape, self.deviations()
        if num_seeds < 2 or num < 2:
            return 0.0
        return float((own_SC**2).sum() * num / (num - 1) / (num_seeds * (num_seeds - 1)))


def _sets(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, _Set]:
    """`outcomes[s]` are the rows of seed s. Raises ValueError for a set that a seed has nothing of."""
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
    """Mean over sets of the mean over prompts, of one seed; None without a parsed outcome."""
    sets = _sets([outcomes])
    return sum(float(each.means_S[0]) for each in sets.values()) / len(sets) if sets else None


class Crossed(NamedTuple):
    """A mean over seeds, prompts and guards with its squared standard errors: `seeds`, `prompts` and `guards`, each with its
    degrees of freedom, those that there are two of. `num`: the smaller number of seeds and prompts behind it. `least`: what
    the prompts' part is at least where prompts all alike leave open how others would be (`_FLOOR` of them may differ)."""

    mean: float
    seeds: tuple[float, float] | None
    prompts: tuple[float, float] | None
    guards: tuple[float, float] | None
    num: int
    least: float = 0.0

    @property
    def parts(self) -> tuple[tuple[float, float], ...]:
        return tuple(part for part in (self.seeds, self.prompts, self.guards) if part is not None)

    def floored(self) -> Crossed:
        """With at least that part from prompts."""
        if self.prompts is None:
            return self
        return self._replace(prompts=(max(self.prompts[0], self.least), self.prompts[1]))

    @property
    def has_spread(self) -> bool:
        return any(variance > _NO_SPREAD for variance, _ in self.parts)

    def half(self, level: float) -> float:
        """Half-width of the two-sided interval of that level."""
        from scipy.special import stdtrit  # scipy.stats takes a second to import

        return math.sqrt(sum(float(stdtrit(df, (1 + level) / 2)) ** 2 * variance for variance, df in self.parts))

    def tail(self, distance: float) -> float:
        """One-sided p of a mean that lies `distance` on the right side of what is tested: the level at which the interval
        just reaches it. Without any spread the sign test's (1/2 to the number of units): a t test would be certain."""
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
    """The mean over seeds of the macro mean, and where its variance comes from. `outcomes[s]` are the rows of seed s. None
    without a parsed outcome.

    Seeds S and clusters C: V_S = var of seed means / S, V_C = var of cluster means / C, V_E the share of both that is the
    cells' own noise. The seeds' part is max(V_S, V_E), the prompts' max(V_C - V_E, 0), so that the noise counts once
    (Cameron, Gelbach and Miller 2011 subtract it likewise) and the part with few degrees of freedom is never below what
    many say it is at least; each is taken with Student's t of its own degrees of freedom, half-widths squared and added
    (as MOVER does). Picked by simulation among six: see `tests/test_crossed.py`. Sets add up, their prompts are others.
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
    """Variances of single units behind a mean of two seeds or more, all sets taken as one: between seeds, between prompts
    (clusters), and of one cell."""
    [whole] = _sets(
        [[{**row, "set": "", "cluster": f"{row['set']}: {row['cluster']}"} for row in of_seed] for of_seed in outcomes]
    ).values()
    (num_seeds, num), cells = whole.sums_SC.shape, whole.cells
    of_seeds = float(whole.means_S.var(ddof=1)) / num_seeds
    of_prompts = float((whole.deviations()[0] ** 2).sum()) * num / (num - 1)
    return max(of_seeds - cells, 0.0) * num_seeds, max(of_prompts - cells, 0.0) * num, cells * num_seeds * num


def _guards(sets: Mapping[str, _Set]) -> tuple[float, float] | None:
    """The part of the variance that comes from which guards judged."""
    means = [each.votes_GS.mean(axis=1) for each in sets.values() if each.votes_GS is not None]
    if len(means) < len(sets) or len({len(means_G) for means_G in means}) > 1:
        return None
    means_G = _mean(means)
    return float(means_G.var(ddof=1)) / len(means_G), len(means_G) - 1


def difference(first: Sequence[Sequence[Outcome]], second: Sequence[Sequence[Outcome]]) -> list[list[dict[str, Any]]]:
    """`first - second` as outcomes, seed by seed: prompts that could be read for both, votes guard by guard."""
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
    """Value and interval of one metric as a table prints them. `outcomes[s]` are its rows of seed s; None if empty.

    `bounded` (values in [0, 1]): the prompts' part is Wilson's interval with as many prompts as would give the variance
    seen, set by set (`_wilson_set`), so that it stays inside [0, 1], has width at its ends (0 of 40 prompts in every seed is
    Wilson's 0 of 40) and grows with whatever spread is added; the parts of seeds and guards are Student's, squared and
    added, and cut to [0, 1]. One seed: prompts (and guards) only. Else all parts are Student's (`crossed`).
    """
    if not (sets := _sets(outcomes)):
        return None
    found = _crossed(sets)
    if not bounded:
        half = found.half(_level(confidence))
        return Interval(found.mean, found.mean - half, found.mean + half)
    by_set = [_wilson_set(each, confidence) for each in sets.values()]
    half = found._replace(prompts=None).half(_level(confidence))
    below = math.sqrt(sum((each.value - each.low) ** 2 for each in by_set) / len(by_set) ** 2 + half**2)
    above = math.sqrt(sum((each.high - each.value) ** 2 for each in by_set) / len(by_set) ** 2 + half**2)
    return Interval(found.mean, max(0.0, found.mean - below), min(1.0, found.mean + above))


def _wilson_set(of_set: _Set, confidence: float) -> Interval:
    """Wilson's interval of a set over prompts, from the variance that its clusters show beside z^2 / 2 prompts that all
    answer 1 and as many that all answer 0: what Wilson's centre adds (Agresti and Coull 1998). Separate prompts of one
    seed give Wilson's own interval exactly."""
    num, z = of_set.sums_SC.shape[1], NormalDist().inv_cdf((1 + confidence) / 2)
    value = min(1.0, max(0.0, float(of_set.means_S.mean())))
    centre = (value * num + z * z / 2) / (num + z * z)
    seen = float((of_set.deviations(centre)[0] ** 2).sum()) * num**2
    noise = of_set.cells * num * (num - 1)
    added = z * z / 2 * (centre**2 + (1 - centre) ** 2)
    worth = centre * (1 - centre) * (num + z * z) ** 2 / (max(seen - noise, 0.0) + added) - z * z
    return _wilson(value, max(worth, 1.0), confidence)
