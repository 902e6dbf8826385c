"""Which methods a table may call different, or alike: declared contrasts of the methods of one table block. Pure.

The seed is the unit. A method's value of a seed is the macro mean over its prompts; methods are paired within the seed
(same alignment, data order, poison and initialisation), so a contrast is a paired t test over the seeds both have. With
one common seed there is none: another seed may turn any order around. Claims are about these test prompts, which all
seeds share.

Two families for each model, task, poison ratio and metric, each held at .05 by Holm's procedure (familywise, so that one
false claim anywhere in a family is as rare as one in a single test):

- `sft`: every other method against sft, a reference that was named before any result;
- `best`: every method against the best one. Which one is best is read from the same data, and testing only against the
  winner would pick the largest of many chance differences. So the family is *all pairs* of methods: whichever wins, its
  contrasts are among those that were corrected for. This costs power, and is honest.

"Differs": the two-sided test. "Alike": two one-sided tests within MARGINS (for utility: at most that much below, a
non-inferiority test). They are separate families; a difference may be real and small, then both hold. Neither holding
means that the data cannot tell. Where all paired differences are equal the spread between seeds cannot be estimated (with
few prompts that happens by chance), a t test would claim certainty, and nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safecl.stats import Outcome, equivalent, holm, macro, mcnemar, non_inferior, paired_difference

MARGINS = {  # the metrics whose contrasts are declared, each with its margin
    "asr": 0.05,
    "asr_coherent": 0.05,
    "over_refusal": 0.05,
    "degenerate": 0.05,
    "utility": 0.02,
}
MORE_IS_BETTER = ("utility",)
ALPHA = 0.05
_NO_SPREAD = 1e-9  # differences of fractions that are equal but for rounding
Seeds = Mapping[int, Sequence[Outcome]]


class Contrast(NamedTuple):
    """`value`: mean of (this - other) over `num` common seeds, `low`, `high` its own 95 % interval (not corrected);
    `p`, `p_alike` after Holm. None: the spread over seeds cannot be estimated."""

    other: str
    num: int
    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_alike: float | None = None

    @property
    def differs(self) -> bool:
        """After Holm."""
        return self.p is not None and self.p < ALPHA

    @property
    def alike(self) -> bool:
        """Within the margin, after Holm."""
        return self.p_alike is not None and self.p_alike < ALPHA


def means(seeds: Seeds) -> dict[int, float]:
    """The macro mean of each seed that has a parsed outcome."""
    found = {seed: macro(outcomes) for seed, outcomes in seeds.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def contrasts(metric: str, methods: Sequence[tuple[str, Mapping[int, float]]]) -> list[dict[str, Contrast]]:
    """Per method, in order: its contrasts by family, `sft` and `best`. Methods are (name, {seed: value}).

    A method without a second seed in common with the other one has no contrast with it, nor has a method with itself.
    """
    found: list[dict[str, Contrast]] = [{} for _ in methods]
    names = [name for name, _ in methods]
    if "sft" in names:
        sft = names.index("sft")
        pairs = [(i, sft) for i in range(len(methods)) if i != sft]
        for (i, _), contrast in _family(metric, methods, pairs).items():
            found[i]["sft"] = contrast
    repeated = [i for i, (_, values) in enumerate(methods) if len(values) > 1]
    if repeated:
        sign = 1 if metric in MORE_IS_BETTER else -1
        best = max(repeated, key=lambda i: sign * sum(methods[i][1].values()) / len(methods[i][1]))
        pairs = [(i, j) for i in repeated for j in repeated if i < j]
        # A pair stands once in its family, against the best from the other's side. Non-inferiority is one-sided, but the
        # hypotheses of the two sides exclude each other: choosing the side by the data costs nothing.
        pairs = [(j, i) if i == best else (i, j) for i, j in pairs]
        for (i, j), contrast in _family(metric, methods, pairs).items():
            if j == best:
                found[i]["best"] = contrast
    return found


def _family(
    metric: str, methods: Sequence[tuple[str, Mapping[int, float]]], pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Contrast]:
    """Contrasts of the pairs that share two seeds or more, corrected together."""
    alike = non_inferior if metric in MORE_IS_BETTER else equivalent
    found: dict[tuple[int, int], Contrast] = {}
    for i, j in pairs:
        (_, first), (other, second) = methods[i], methods[j]
        common = sorted(first.keys() & second.keys())
        if len(common) < 2:
            continue
        mine, theirs = [first[seed] for seed in common], [second[seed] for seed in common]
        differences = [a - b for a, b in zip(mine, theirs, strict=True)]
        if max(differences) - min(differences) < _NO_SPREAD:
            found[i, j] = Contrast(other, len(common), differences[0])
            continue
        test = paired_difference(mine, theirs)
        p_alike = alike(mine, theirs, MARGINS[metric]).p
        found[i, j] = Contrast(other, len(common), test.value, test.low, test.high, test.p, p_alike)
    # What could not be tested stays in the family: leaving it out would choose the family's size by the data.
    adjusted = holm([1.0 if contrast.p is None else contrast.p for contrast in found.values()])
    adjusted_alike = holm([1.0 if contrast.p_alike is None else contrast.p_alike for contrast in found.values()])
    return {
        pair: contrast if contrast.p is None else contrast._replace(p=adjusted[k], p_alike=adjusted_alike[k])
        for k, (pair, contrast) in enumerate(found.items())
    }


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
