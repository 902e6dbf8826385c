"""Intervals and paired tests. Pure: numbers in, numbers out; numpy and scipy are imported inside functions.

The seed is the unit: what a table claims about a *method* must survive a new alignment, data order, poison draw and
initialisation. Intervals over prompts alone say how well one trained model was measured, no more.
An outcome is one line of outcomes.jsonl: `{"set": str, "id": str, "value": 0|1|float|None, "cluster": str}`; None
(unparsed) takes no part here and is counted elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Outcome = Mapping[str, Any]
_CHUNK = 500  # bootstrap draws at once: bounds memory at about _CHUNK x clusters x 8 bytes


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference with its two-sided t interval and p."""

    value: float
    low: float
    high: float
    p: float


class Equivalence(NamedTuple):
    """`low`, `high`: the interval of level 1 - 2 alpha; `p` of the test; `holds`: p < alpha."""

    value: float
    low: float
    high: float
    p: float
    holds: bool


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
    z = NormalDist().inv_cdf((1 + _level(confidence)) / 2)
    p = successes / num
    centre = (p + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    # At the ends the bound is the observed value exactly; rounding must not put it beside it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == num else min(1.0, centre + half)
    return Interval(p, low, high)


def wilson_macro(counts: Sequence[tuple[float, int]], confidence: float = 0.95) -> Interval:
    """Interval of the plain mean of independent proportions, from each one's Wilson interval.

    Newcombe's square-and-add (MOVER; Newcombe 1998, Zou and Donner 2008): one set gives Wilson itself, and unlike a
    percentile bootstrap it keeps its width where every outcome is 0 or every outcome is 1.
    `counts`: (successes, number) of each set.
    """
    parts = [wilson(successes, num, confidence) for successes, num in counts]
    if not parts:
        raise ValueError("wilson_macro: expected at least one set, got none")
    value = sum(p.value for p in parts) / len(parts)
    below = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / len(parts)
    above = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / len(parts)
    return Interval(value, max(0.0, value - below), min(1.0, value + above))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean over seeds. Needs at least 2 values; equal values give width 0."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    array = _finite(values, "t_interval", 2)
    mean = float(array.mean())
    half = (
        float(stdtrit(len(array) - 1, (1 + _level(confidence)) / 2)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    )
    return Interval(mean, mean - half, mean + half)


def _paired(first: Sequence[float], second: Sequence[float], what: str) -> NDArray[np.float64]:
    if len(first) != len(second):
        raise ValueError(f"{what}: expected one pair per seed, got {len(first)} and {len(second)} values")
    return _finite(first, what, 2) - _finite(second, what, 2)


def _t_tail(mean: float, error: float, df: int) -> float:
    """P(T >= mean / error). With no spread at all the outcome is certain, or even where the mean is 0 as well."""
    from scipy.special import stdtr

    if error == 0:
        return 0.5 if mean == 0 else float(mean < 0)
    return float(stdtr(df, -mean / error))


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean of `first - second`, paired within the seed (same order), with t interval and two-sided p."""
    difference = _paired(first, second, "paired_difference")
    mean, low, high = t_interval(difference.tolist(), confidence)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return Difference(mean, low, high, min(1.0, 2 * _t_tail(abs(mean), error, len(difference) - 1)))


def equivalent(first: Sequence[float], second: Sequence[float], margin: float, alpha: float = 0.05) -> Equivalence:
    """TOST: is |mean(first - second)| < margin? Two one-sided paired t tests (Schuirmann 1987).

    Margins of this project: .05 for ASR, .02 for SST-2. Not rejecting a difference is not equivalence; this is.
    """
    return _one_sided(first, second, margin, alpha, both=True)


def non_inferior(first: Sequence[float], second: Sequence[float], margin: float, alpha: float = 0.05) -> Equivalence:
    """Is mean(first - second) > -margin, that is, is `first` at most `margin` below `second`? (More is better.)"""
    return _one_sided(first, second, margin, alpha, both=False)


def _one_sided(first: Sequence[float], second: Sequence[float], margin: float, alpha: float, both: bool) -> Equivalence:
    if not margin > 0 or not 0 < alpha < 0.5:
        raise ValueError(f"expected margin > 0 and 0 < alpha < .5, got margin {margin}, alpha {alpha}")
    difference = _paired(first, second, "equivalent" if both else "non_inferior")
    mean, low, high = t_interval(difference.tolist(), 1 - 2 * alpha)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    p = _t_tail(mean + margin, error, len(difference) - 1)
    if both:
        p = max(p, _t_tail(margin - mean, error, len(difference) - 1))
    return Equivalence(mean, low, high, p, p < alpha)


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
) -> Interval | None:
    """The true rate behind a judge's rate, from (count, num) of what it said and of its sensitivity and specificity
    elsewhere: (p + sp - 1) / (se + sp - 1), cut to [0, 1] (Rogan and Gladen 1978). The interval adds what is unknown of
    all three (Lang and Reiczigel 2014). None where the judge was not clearly better than chance (se + sp - 1 may be 0
    at this confidence): nothing can be corrected."""
    (p, se, sp) = (count / num for count, num in (said, sensitivity, specificity))
    z = NormalDist().inv_cdf((1 + _level(confidence)) / 2)
    num, num_se, num_sp = said[1] + z * z, sensitivity[1] + 2, specificity[1] + 2
    p_, se_, sp_ = (said[0] + z * z / 2) / num, (sensitivity[0] + 1) / num_se, (specificity[0] + 1) / num_sp
    gain = se_ + sp_ - 1
    se_part, sp_part = se_ * (1 - se_) / num_se, sp_ * (1 - sp_) / num_sp
    if se + sp - 1 <= 0 or gain <= z * math.sqrt(se_part + sp_part):
        return None
    rate = (p_ + sp_ - 1) / gain
    centre = rate + 2 * z * z * (rate * se_part - (1 - rate) * sp_part)
    half = z / gain * math.sqrt(p_ * (1 - p_) / num + rate**2 * se_part + (1 - rate) ** 2 * sp_part)
    value = min(1.0, max(0.0, (p + sp - 1) / (se + sp - 1)))
    low, high = min(1.0, max(0.0, centre - half)), min(1.0, max(0.0, centre + half))
    return Interval(value, min(low, value), max(high, value))


def _tables(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Per set: sums_SC and counts_SC over seeds S and clusters C (a prompt without `cluster` is its own)."""
    import numpy as np

    places: dict[str, dict[str, int]] = {}
    entries: list[tuple[str, int, int, float]] = []
    for seed, rows in enumerate(outcomes):
        for row in rows:
            if row["value"] is None:
                continue
            value = float(row["value"])
            if not math.isfinite(value):
                raise ValueError(f"outcome {row.get('id')!r} of set {row['set']!r} is {value}; expected a number")
            of_set = places.setdefault(str(row["set"]), {})
            cluster = of_set.setdefault(str(row.get("cluster") or row["id"]), len(of_set))
            entries.append((str(row["set"]), seed, cluster, value))
    tables = {s: (np.zeros((len(outcomes), len(c))), np.zeros((len(outcomes), len(c)))) for s, c in places.items()}
    for name, seed, cluster, value in entries:
        tables[name][0][seed, cluster] += value
        tables[name][1][seed, cluster] += 1
    for name, (_, counts_SC) in tables.items():
        empty = np.flatnonzero(counts_SC.sum(axis=1) == 0)
        if len(empty):
            raise ValueError(f"set {name!r} has no parsed outcome for seed number {empty[0]} of {len(outcomes)}")
    return tables


def macro(outcomes: Sequence[Outcome]) -> float | None:
    """Mean over sets of the mean over prompts, of one seed; None without a parsed outcome."""
    tables = _tables([outcomes])
    return sum(float(s.sum() / n.sum()) for s, n in tables.values()) / len(tables) if tables else None


def crossed_bootstrap(
    outcomes: Sequence[Sequence[Outcome]], seed: int = 0, num_draws: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Percentile interval of the mean over seeds of the macro mean, seeds and prompt clusters resampled crosswise.

    `outcomes[s]` are the rows of seed s. Every draw takes seeds with replacement, and within each set prompt clusters
    with replacement, the same ones for all seeds, because the seeds answered the same prompts (Owen 2007, "pigeonhole
    bootstrap"). One seed: prompts only. With few seeds it is somewhat too narrow: descriptive beside the t interval.
    """
    import numpy as np

    tables = _tables(outcomes)
    if not tables:
        raise ValueError("crossed_bootstrap: no parsed outcome")
    num_seeds = len(outcomes)
    value = sum(float((s.sum(axis=1) / n.sum(axis=1)).mean()) for s, n in tables.values()) / len(tables)
    rng = np.random.default_rng(seed)
    draws_D = np.empty(num_draws)
    for start in range(0, num_draws, _CHUNK):
        size = min(_CHUNK, num_draws - start)
        seeds_DS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=size) / num_seeds
        total_D = np.zeros(size)
        for sums_SC, counts_SC in tables.values():
            clusters = sums_SC.shape[1]
            weights_DC = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)
            numbers_DS = weights_DC @ counts_SC.T
            sums_DS = weights_DC @ sums_SC.T
            # A draw may hold no parsed answer of a seed (few clusters, some unparsed): that seed then counts nothing.
            means_DS = np.divide(sums_DS, numbers_DS, out=np.zeros_like(sums_DS), where=numbers_DS > 0)
            present_DS = seeds_DS * (numbers_DS > 0)
            total_D += (present_DS * means_DS).sum(axis=1) / np.maximum(present_DS.sum(axis=1), 1e-300)
        draws_D[start : start + size] = total_D / len(tables)
    tail = (1 - _level(confidence)) / 2
    low, high = np.quantile(draws_D, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def intervals(outcomes: Sequence[Sequence[Outcome]], confidence: float = 0.95, bounded: bool = True) -> Interval | None:
    """Value and interval of one metric as a table prints them. `outcomes[s]` are its rows of seed s; None if empty.

    Several seeds: Student's t over the seeds' macro means, cut to [0, 1] if `bounded`. One seed, or seeds that agree
    to the last digit (a t interval of width 0 would claim certainty): prompts only. There 0/1 outcomes of separate
    prompts take Wilson, over several sets combined by `wilson_macro`; others a bootstrap of prompt clusters.
    """
    tables = _tables(outcomes)
    if not tables:
        return None
    if len(outcomes) > 1:
        means = sum((sums_SC.sum(axis=1) / counts_SC.sum(axis=1)) for sums_SC, counts_SC in tables.values())
        found = t_interval([float(mean) / len(tables) for mean in means], confidence)
        if found.high - found.low > 1e-12:
            return _cut(found) if bounded else found
        one = intervals(outcomes[:1], confidence, bounded)
        return None if one is None else Interval(found.value, one.low, one.high)
    binary = all(float(r["value"]) in (0.0, 1.0) for r in outcomes[0] if r["value"] is not None)
    separate = all(bool((counts_SC <= 1).all()) for _, counts_SC in tables.values())
    if binary and separate:
        return wilson_macro([(float(s.sum()), int(n.sum())) for s, n in tables.values()], confidence)
    found = crossed_bootstrap(outcomes, confidence=confidence)
    if found.high - found.low < 1e-12 and binary:  # all 0 or all 1: clusters, not prompts, are what was seen
        sizes = [sums_SC.shape[1] for sums_SC, _ in tables.values()]
        rates = [float(s.sum() / n.sum()) for s, n in tables.values()]
        return wilson_macro([(rate * n, n) for rate, n in zip(rates, sizes, strict=True)], confidence)
    return _cut(found) if bounded else found


def _cut(interval: Interval) -> Interval:
    return Interval(interval.value, max(0.0, interval.low), min(1.0, interval.high))
