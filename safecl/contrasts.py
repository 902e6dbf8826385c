"""Contrasts: which methods of one table block may be called different, or alike. Pure functions.

A contrast is the mean difference of two methods, over the seeds that both have (same alignment, data order, poison and
initialisation) and the prompts that both answered. Its variance has a part from seeds and a part from prompts
(`crossed.crossed`), because the claim must hold for other seeds and for other prompts of the same kind. With one common seed
there is no contrast, since another seed may reverse the order of the methods.

There are two families of tests for each model, task, poison ratio and metric. Holm's procedure keeps the familywise error
of each at .05: one false claim anywhere in a family is as rare as a false claim of a single test.

- `sft`: every other method against sft, a reference that was named before any result.
- `best`: every method against the best one. The best one is read from the same data, and tests against the winner alone
  would pick the largest of many chance differences. So the family is *all pairs* of methods. It contains the contrasts of
  any winner, so that they are corrected for. This costs power.

"Differs" is the two-sided test. "Alike" is two one-sided tests within the metric's margin. For a metric of which more is
better (utility) only the lower side is tested: a non-inferiority test. If the prompts seen were all answered alike, "alike"
still allows for other prompts that would be answered differently (`Crossed.least`). The tests of "differs" and of "alike"
are separate families. Both hold for a difference that is real and small. If neither holds, the data cannot tell.

If no answer differs from what its prompt and seed predict, no spread can be estimated. p is then that of a sign test over
seeds (over prompts, if there are fewer of them), and a difference can be marked from six seeds on.
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
    """The difference of one method from another.

    Attributes:
        other: name of the other method.
        num: number of common seeds.
        value: mean of (this - other).
        low, high: its own 95 % interval, not corrected for the family.
        p, p_alike: of "differs" and "alike", as `contrasts` gives them corrected by Holm's procedure.
    """

    other: str
    num: int
    value: float
    low: float
    high: float
    p: float
    p_alike: float

    @property
    def differs(self) -> bool:
        """Whether the methods differ, after Holm's correction."""
        return self.p < ALPHA

    @property
    def alike(self) -> bool:
        """Whether the difference lies within the metric's margin, after Holm's correction."""
        return self.p_alike < ALPHA


def means(seeds: Seeds) -> dict[int, float]:
    """Return the macro mean of each seed that has a parsed outcome."""
    found = {seed: macro(outcomes) for seed, outcomes in seeds.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def contrasts(name: str, methods: Sequence[tuple[str, Seeds]]) -> list[dict[str, Contrast]]:
    """Return each method's contrasts in a metric, by family (`sft`, `best`), in the order of `methods`.

    Args:
        name: of the metric.
        methods: (name, outcomes by seed) of each method.

    Two methods with fewer than two common seeds have no contrast. A method has none with itself.
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
        # Each pair stands once in the family; a pair with the best method is (other - best). Non-inferiority is one-sided,
        # but the null hypotheses of the two directions exclude each other, so choosing the direction by the data costs nothing.
        pairs = [(j, i) if i == best else (i, j) for i, j in pairs]
        for (i, j), contrast in _family(metric, methods, pairs).items():
            if j == best:
                found[i]["best"] = contrast
    return found


def _family(
    metric: Metric, methods: Sequence[tuple[str, Seeds]], pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Contrast]:
    """The contrasts of all pairs with two or more common seeds, corrected together."""
    every = {(i, j): contrast for i, j in pairs if (contrast := paired(metric, methods[i][1], *methods[j]))}
    return dict(zip(every, holm_adjusted(list(every.values())), strict=True))


def holm_adjusted(family: Sequence[Contrast]) -> list[Contrast]:
    """Return the contrasts of one family with `p` and `p_alike` corrected by Holm's procedure, each on its own."""
    adjusted, adjusted_alike = holm([each.p for each in family]), holm([each.p_alike for each in family])
    return [each._replace(p=p, p_alike=alike) for each, p, alike in zip(family, adjusted, adjusted_alike, strict=True)]


def paired(metric: Metric, mine: Seeds, other: str, theirs: Seeds) -> Contrast | None:
    """Return the contrast mine - theirs, not corrected. None if they have fewer than two seeds or prompts in common.

    Args:
        other: the name of the method of `theirs`.
    """
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
    """Return McNemar's counts and p on the common prompts, for each common seed.

    They describe how two trained models differ, and say nothing about the methods. Outcomes that are not 0 or 1, or that
    were not parsed for both, are left out.
    """
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        mine, theirs = ({(o["set"], o["id"]): o["value"] for o in seeds[seed]} for seeds in (first, second))
        both = [(mine[k], theirs[k]) for k in mine if k in theirs and {mine[k], theirs[k]} <= {0, 1}]
        if both:
            found[seed] = mcnemar([a == 1 for a, _ in both], [b == 1 for _, b in both])._asdict()
    return found
