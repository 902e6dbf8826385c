"""Which methods a table may call different, or alike: declared contrasts of the methods of one table block. Pure.

A contrast is the mean difference of two methods over the seeds both have (same alignment, data order, poison and
initialisation) and the prompts both answered, with the variance of both (`crossed.crossed`): it is to hold for other seeds
and for other prompts of the same kind. With one common seed there is none: another seed may turn any order around.

Two families for each model, task, poison ratio and metric, each held at .05 by Holm's procedure (familywise, so that one
false claim anywhere in a family is as rare as one in a single test):

- `sft`: every other method against sft, a reference that was named before any result;
- `best`: every method against the best one. Which one is best is read from the same data, and testing only against the
  winner would pick the largest of many chance differences. So the family is *all pairs* of methods: whichever wins, its
  contrasts are among those that were corrected for. This costs power, and is honest.

"Differs": the two-sided test. "Alike": two one-sided tests within the metric's margin (for utility: at most that much below, a
non-inferiority test), in which prompts that all answered alike still leave open how others would. They are separate
families; a difference may be real and small, then both hold. Neither holding means that the data cannot tell. Where not
one answer differs from what its prompt and seed let expect, no spread can be estimated, and p is that of a sign test over
seeds: six are the fewest that can be marked then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safecl.crossed import Outcome, crossed, difference, macro
from safecl.metrics import Metric, of
from safecl.stats import holm, mcnemar

ALPHA = 0.05
Seeds = Mapping[int, Sequence[Outcome]]


class Contrast(NamedTuple):
    """`value`: mean of (this - other) over `num` common seeds, `low`, `high` its own 95 % interval (not corrected);
    `p`, `p_alike` after Holm."""

    other: str
    num: int
    value: float
    low: float
    high: float
    p: float
    p_alike: float

    @property
    def differs(self) -> bool:
        """After Holm."""
        return self.p < ALPHA

    @property
    def alike(self) -> bool:
        """Within the margin, after Holm."""
        return self.p_alike < ALPHA


def means(seeds: Seeds) -> dict[int, float]:
    """The macro mean of each seed that has a parsed outcome."""
    found = {seed: macro(outcomes) for seed, outcomes in seeds.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def contrasts(name: str, methods: Sequence[tuple[str, Seeds]]) -> list[dict[str, Contrast]]:
    """Per method, in order: its contrasts in a metric by family, `sft` and `best`. Methods are (name, their outcomes by seed).

    A method without a second seed in common with the other one has no contrast with it, nor has a method with itself.
    """
    metric, found = of(name), [dict[str, Contrast]() for _ in methods]
    names = [name for name, _ in methods]
    if "sft" in names:
        sft = names.index("sft")
        pairs = [(i, sft) for i in range(len(methods)) if i != sft]
        for (i, _), contrast in _family(metric, methods, pairs).items():
            found[i]["sft"] = contrast
    values = [means(seeds) for _, seeds in methods]
    repeated = [i for i, of_seed in enumerate(values) if len(of_seed) > 1]
    if repeated:
        sign = 1 if metric.better == "high" else -1
        best = max(repeated, key=lambda i: sign * sum(values[i].values()) / len(values[i]))
        pairs = [(i, j) for i in repeated for j in repeated if i < j]
        # A pair stands once in its family, against the best from the other's side. Non-inferiority is one-sided, but the
        # hypotheses of the two sides exclude each other: choosing the side by the data costs nothing.
        pairs = [(j, i) if i == best else (i, j) for i, j in pairs]
        for (i, j), contrast in _family(metric, methods, pairs).items():
            if j == best:
                found[i]["best"] = contrast
    return found


def _family(
    metric: Metric, methods: Sequence[tuple[str, Seeds]], pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Contrast]:
    """Contrasts of the pairs that share two seeds or more, corrected together."""
    every = {(i, j): contrast for i, j in pairs if (contrast := paired(metric, methods[i][1], *methods[j]))}
    return dict(zip(every, holm_adjusted(list(every.values())), strict=True))


def holm_adjusted(family: Sequence[Contrast]) -> list[Contrast]:
    """The contrasts of one family, both their p corrected by Holm's procedure."""
    adjusted, adjusted_alike = holm([each.p for each in family]), holm([each.p_alike for each in family])
    return [each._replace(p=p, p_alike=alike) for each, p, alike in zip(family, adjusted, adjusted_alike, strict=True)]


def paired(metric: Metric, mine: Seeds, other: str, theirs: Seeds) -> Contrast | None:
    """Mine less theirs, not corrected. None with fewer than two seeds or prompts that both have."""
    shared = sorted(mine.keys() & theirs.keys())
    rows = difference([mine[seed] for seed in shared], [theirs[seed] for seed in shared])
    sets = {row["set"] for of_seed in rows for row in of_seed}
    rows = [of_seed for of_seed in rows if sets and {row["set"] for row in of_seed} == sets]
    found = crossed(rows) if rows else None
    if found is None or found.num < 2:
        return None
    floored = found.floored()
    p = min(1.0, 2 * found.tail(abs(found.mean)))
    half = (found if found.has_spread else floored).half(1 - ALPHA)
    margin, more_is_better = metric.margin or 0.0, metric.better == "high"
    p_alike = floored.tail(found.mean + margin)
    if not more_is_better:
        p_alike = max(p_alike, floored.tail(margin - found.mean))
    return Contrast(other, len(rows), found.mean, found.mean - half, found.mean + half, p, p_alike)


def discordant(first: Seeds, second: Seeds) -> dict[int, dict[str, float]]:
    """McNemar's counts and p on the same prompts, for each common seed: how two trained models differ. Descriptive only: it
    says nothing of the methods. Outcomes that are not 0 or 1, or were not parsed for both, take no part."""
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        mine, theirs = ({(o["set"], o["id"]): o["value"] for o in seeds[seed]} for seeds in (first, second))
        both = [(mine[k], theirs[k]) for k in mine if k in theirs and {mine[k], theirs[k]} <= {0, 1}]
        if both:
            found[seed] = mcnemar([a == 1 for a, _ in both], [b == 1 for _, b in both])._asdict()
    return found
