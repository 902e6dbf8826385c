"""Intervals and paired tests of one sample. Pure functions of numbers. numpy and scipy are imported inside
functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK = 500  # bootstrap draws at once: limits memory to about _CHUNK x clusters x 8 bytes


class Interval(NamedTuple):
    """A value with the lower and upper bound of its confidence interval."""

    value: float
    low: float
    high: float


class NotCorrectable(ValueError):
    """Why a judge's rate cannot be corrected. The message is for the reader of a table."""


class McNemar(NamedTuple):
    """Numbers of prompts that are true only for the first and only for the second model, and the two-sided p value."""

    only_first: int
    only_second: int
    p: float


class Agreement(NamedTuple):
    """Agreement of two judges. `kappa` is None if chance agreement is complete (both always give the same single
    label)."""

    num: int
    agree: Interval
    kappa: Interval | None
    skipped: int  # pairs in which either label is None


class Quality(NamedTuple):
    """Quality of a yes/no judge, compared with the true labels. A field is None where it is undefined (no true row, no
    score, complete chance agreement)."""

    num: int
    skipped: int  # rows whose verdict is None
    truth: Interval  # fraction of rows that are true
    said: Interval  # fraction of rows that the judge calls true
    accuracy: Interval
    sensitivity: Interval | None  # fraction called true of the true rows
    specificity: Interval | None  # fraction called false of the false rows
    balanced: Interval | None  # mean of sensitivity and specificity: 1/2 is chance, whatever the fraction of true rows
    f1: Interval | None
    kappa: Interval | None
    auroc: Interval | None


def checked_level(confidence: float) -> float:
    """The confidence level itself. Raises ValueError unless it is in (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    return confidence


def wilson(successes: float, num: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927). It lies within [0, 1], and also has a width at 0 and 1.

    Raises:
        ValueError: `num` is below 1, or `successes` is not in [0, num].
    """
    if num < 1 or not 0 <= successes <= num:
        raise ValueError(f"wilson: expected 0 <= successes <= num and num >= 1, got {successes} of {num}")
    return wilson_of(successes / num, num, confidence)


def wilson_of(p: float, num: float, confidence: float) -> Interval:
    """Wilson's score interval of a proportion `p` of `num`, which need not be a whole number. Raises ValueError for a
    level outside (0, 1)."""
    z = NormalDist().inv_cdf((1 + checked_level(confidence)) / 2)
    centre = (p + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    # At 0 and 1 the bound is exactly the observed value; rounding must not change it.
    low = 0.0 if p == 0 else max(0.0, centre - half)
    high = 1.0 if p == 1 else min(1.0, centre + half)
    return Interval(p, low, high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact two-sided McNemar test on 0/1 outcomes of the same prompts. Descriptive only: one seed, one model each."""
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
    """Fraction of equal labels, and Cohen's kappa (1960), of two judges on the same answers. Pairs with a None are
    skipped.

    The fraction has Wilson's interval, in which all answers of one cluster (to one prompt) count as one answer. Kappa's
    interval is the same, converted to kappa's scale with the observed chance agreement, as Cohen's standard error does.

    Raises:
        ValueError: no pair is left.
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
    """The result as a dict, with intervals as objects of `value`, `low` and `high`."""
    return {name: x._asdict() if isinstance(x, Interval) else x for name, x in found._asdict().items()}


def _mean_of_two(first: Interval, second: Interval) -> Interval:
    """Mean of two independent proportions: their distances to the bounds are squared and added (Newcombe 1998)."""
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
    """How well `said` agrees with `truth`. Rows whose `said` is None are skipped.

    Fractions have Wilson intervals, for which rows count as independent. F1, Cohen's kappa and AUROC have percentile
    bootstrap intervals over clusters (rows with one prompt). AUROC needs `scores` for every judged row.

    Raises:
        ValueError: lengths differ, or no verdict could be read.
    """
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
    tail = (1 - checked_level(confidence)) / 2

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
    """Probability that a true row scores above a false one; ties count half (Mann and Whitney 1947)."""
    import numpy as np

    order_N = np.argsort(scores_N, kind="stable")
    starts = np.flatnonzero(np.diff(scores_N[order_N], prepend=-np.inf))  # starts of runs of equal scores
    true_DG, other_DG = (
        np.add.reduceat(weights_DN[:, order_N] * kind_N[order_N], starts, axis=1) for kind_N in (true_N, ~true_N)
    )
    below_DG = other_DG.cumsum(axis=1) - other_DG
    return _ratio((true_DG * (below_DG + other_DG / 2)).sum(axis=1), true_DG.sum(axis=1) * other_DG.sum(axis=1))


def rogan_gladen(
    said: tuple[int, int], sensitivity: tuple[int, int], specificity: tuple[int, int], confidence: float = 0.95
) -> Interval:
    """The true rate behind a judge's rate: (p + sp - 1) / (se + sp - 1), cut to [0, 1] (Rogan and Gladen 1978).

    Each argument is (count, num): of the judge's yes verdicts, and of its sensitivity and specificity on a validation
    set. The interval includes the uncertainty of all three (Lang and Reiczigel 2014).

    Raises:
        NotCorrectable: the judge is not clearly better than chance (se + sp - 1 may be 0 at this confidence). Or no
            true rate explains the judge's rate with these error rates: it makes other errors on these answers.
    """
    (p, se, sp) = (count / num for count, num in (said, sensitivity, specificity))
    z = NormalDist().inv_cdf((1 + checked_level(confidence)) / 2)
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
