"""Statistics against their defining equations, tables of Student's t, and brute-force enumeration."""

import itertools
import math
import random
from statistics import NormalDist

import pytest

from safecl import crossed, stats

T_975 = {1: 12.7062, 2: 4.30265, 4: 2.77645}  # Student's t, 97.5 %, from a printed table
T_95_4 = 2.13185  # 95 %, 4 degrees of freedom


def rows(values: list[float | None], name: str = "s", clusters: list[str] | None = None) -> list[dict[str, object]]:
    return [
        {"set": name, "id": f"{name}{i}", "value": v, "cluster": clusters[i] if clusters else f"c{i}"}
        for i, v in enumerate(values)
    ]


@pytest.mark.parametrize(("hits", "num"), [(1, 10), (5, 10), (37, 120), (119, 120)])
def test_wilson_bounds_solve_the_score_equation(hits: int, num: int) -> None:
    found, z = stats.wilson(hits, num), NormalDist().inv_cdf(0.975)
    for bound in (found.low, found.high):  # |p - bound| = z sqrt(bound (1 - bound) / n)
        assert abs(hits / num - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / num))
    assert found.low < found.value < found.high


def test_wilson_at_the_ends_keeps_its_width_and_stays_inside() -> None:
    z2 = NormalDist().inv_cdf(0.975) ** 2
    none, every = stats.wilson(0, 20), stats.wilson(20, 20)
    assert none[:2] == (0.0, 0.0) and none.high == pytest.approx(z2 / (20 + z2))
    assert (every.value, every.high) == (1.0, 1.0) and every.low == pytest.approx(20 / (20 + z2))
    for hits, num in [(3, 2), (-1, 2), (0, 0)]:
        with pytest.raises(ValueError, match="wilson"):
            stats.wilson(hits, num)


def test_macro_interval_is_wilson_for_one_set_and_covers_for_three() -> None:
    def over(*counts: tuple[int, int]) -> stats.Interval:
        found = crossed.intervals(
            [[r for i, (k, n) in enumerate(counts) for r in rows([1.0] * k + [0.0] * (n - k), f"s{i}")]]
        )
        assert found
        return found

    assert over((7, 40)) == pytest.approx(stats.wilson(7, 40))
    rng, rates, num = random.Random(0), (0.02, 0.3, 0.9), 40
    truth, covered = sum(rates) / 3, 0
    for _ in range(1000):
        found = over(*((sum(rng.random() < p for _ in range(num)), num) for p in rates))
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 1000 <= 0.985  # nominal .95; binomial sd .007


def test_mcnemar_counts_every_assignment_of_the_discordant_pairs() -> None:
    for b, c in [(0, 0), (1, 0), (5, 1), (2, 7), (4, 4), (0, 9)]:
        first = [True] * b + [False] * c + [True, False]
        second = [False] * b + [True] * c + [True, False]
        extreme = sum(
            abs(sum(signs) - (b + c) / 2) >= abs(b - (b + c) / 2) for signs in itertools.product((0, 1), repeat=b + c)
        )
        assert stats.mcnemar(first, second) == (b, c, pytest.approx(extreme / 2 ** (b + c)))


def test_holm_steps_down_in_the_given_order() -> None:
    # sorted .01 .02 .03 .04 -> x4, x3, x2, x1 = .04 .06 .06 .04, made rising: .04 .06 .06 .06
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []
    with pytest.raises(ValueError, match="holm"):
        stats.holm([0.1, float("nan")])


def test_kappa_by_hand() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: agree .7, chance .5 * .6 + .5 * .4 = .5, kappa .4
    first = [True] * 25 + [False] * 25 + [None]
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15 + [True]
    found = stats.agreement(first, second)
    assert (found.num, found.skipped, found.agree) == (50, 1, stats.wilson(35, 50))
    # on kappa's scale: chance 0, complete agreement 1
    assert found.kappa == pytest.approx([(x - 0.5) / 0.5 for x in stats.wilson(35, 50)])
    # five answers to each of ten prompts are no more than ten answers
    apart = stats.agreement(first, second, [i // 5 for i in range(50)] + ["?"])
    assert apart.agree == pytest.approx(stats.wilson(7, 10)) and apart.kappa
    assert apart.kappa.value == pytest.approx(0.4) and apart.kappa.low < found.kappa.low
    assert stats.agreement([1, 1], [1, 1]).kappa is None
    alike = stats.agreement([1, 0], [1, 0]).kappa
    assert alike and alike.value == 1 and alike.low < 0.5  # two answers show little
    with pytest.raises(ValueError, match="no pair"):
        stats.agreement([None], [True])


def test_copies_of_one_prompt_in_a_cluster_do_not_narrow_the_interval() -> None:
    rng = random.Random(5)
    values: list[float | None] = [float(rng.random() < 0.4) for _ in range(30)]
    once = crossed.intervals([rows(values)])
    copied = [v for v in values for _ in range(4)]
    names = [f"c{i}" for i in range(30) for _ in range(4)]
    clustered, naive = crossed.intervals([rows(copied, clusters=names)]), crossed.intervals([rows(copied)])
    assert once and clustered and naive
    assert naive.high - naive.low < 0.6 * (once.high - once.low)
    assert clustered == pytest.approx(once)
    silent = crossed.intervals([rows([0.0] * 120, clusters=names)])
    assert silent == pytest.approx(stats.wilson(0, 30))


def test_one_seed_takes_wilson_over_prompts_and_leaves_unparsed_out() -> None:
    assert crossed.intervals([rows([1, 0, 0, 0, None])]) == pytest.approx(stats.wilson(1, 4))
    two = rows([1, 0], "a") + rows([0, 0, 0, 0], "b")
    parts = [stats.wilson(1, 2), stats.wilson(0, 4)]  # distances squared and added (Newcombe 1998)
    below, above = (math.hypot(*(part.value - part[k] for part in parts)) / 2 for k in (1, 2))
    assert crossed.intervals([two]) == pytest.approx((0.25, 0.25 - below, 0.25 + above))
    assert crossed.macro(two) == pytest.approx(0.25)
    assert crossed.intervals([[]]) is None and crossed.intervals([rows([None])]) is None and crossed.macro([]) is None


def test_a_seed_without_outcomes_or_a_nan_raises() -> None:
    with pytest.raises(ValueError, match="seed number 1"):
        crossed.intervals([rows([1.0, 0.0]), rows([None, None])])
    with pytest.raises(ValueError, match="set 's' is nan"):
        crossed.intervals([rows([1.0, float("nan")])])


def test_a_utility_that_is_not_zero_or_one_has_the_width_of_its_own_spread() -> None:
    rng = random.Random(2)
    values: list[float | None] = [rng.random() for _ in range(200)]
    found = crossed.intervals([rows(values)])
    assert found
    mean = sum(v or 0 for v in values) / 200
    sd = math.sqrt(sum(((v or 0) - mean) ** 2 for v in values) / 200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * sd / math.sqrt(200), rel=0.06)


# 40 rows: 12 hits, 4 false alarms, 6 misses, 18 passes; each row its own cluster.
TRUTH = [True] * 12 + [False] * 4 + [True] * 6 + [False] * 18
SAID: list[bool | None] = [True] * 16 + [False] * 24


def test_quality_by_hand() -> None:
    found = stats.quality(TRUTH, SAID, range(40), num_draws=200)
    assert (found.num, found.skipped, found.auroc) == (40, 0, None)
    for interval, hits, num in [
        (found.truth, 18, 40),
        (found.said, 16, 40),
        (found.accuracy, 30, 40),
        (found.sensitivity, 12, 18),
        (found.specificity, 18, 22),
    ]:
        assert interval == pytest.approx(stats.wilson(hits, num))
    assert found.f1 and found.kappa
    precision, recall = 12 / 16, 12 / 18
    assert found.f1.value == pytest.approx(2 * precision * recall / (precision + recall))
    both = stats.agreement(TRUTH, SAID)
    assert both.kappa and found.kappa.value == pytest.approx(both.kappa.value) and both.agree == found.accuracy
    right, wrong = found.sensitivity, found.specificity
    assert right and wrong and found.balanced and found.balanced.value == pytest.approx((right.value + wrong.value) / 2)
    below = ((right.value - right.low) ** 2 + (wrong.value - wrong.low) ** 2) ** 0.5 / 2
    assert found.balanced.low == pytest.approx(found.balanced.value - below)
    assert stats.quality(TRUTH, [None if t else False for t in TRUTH], range(40), num_draws=9).balanced is None
    assert found.f1.low < found.f1.value < found.f1.high and found.kappa.low < found.kappa.value < found.kappa.high


def test_quality_agrees_with_scikit_learn_ties_included() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(1)
    truth = [rng.random() < 0.3 for _ in range(300)]
    scores = [round(min(1.0, max(0.0, rng.gauss(0.6 if true else 0.4, 0.2))), 1) for true in truth]
    said: list[bool | None] = [score >= 0.5 for score in scores]
    found = stats.quality(truth, said, range(300), scores, num_draws=200)
    assert found.auroc and found.f1 and found.kappa
    assert found.auroc.value == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert found.f1.value == pytest.approx(metrics.f1_score(truth, said))
    assert found.kappa.value == pytest.approx(metrics.cohen_kappa_score(truth, said))
    flipped = stats.quality([not t for t in truth], said, range(300), scores, num_draws=10)
    assert flipped.auroc and flipped.auroc.value == pytest.approx(1 - found.auroc.value)


def test_quality_leaves_unparsed_out_and_undefined_is_none() -> None:
    found = stats.quality([*TRUTH, True, False], [*SAID, None, None], range(42), num_draws=200)
    assert (found.num, found.skipped) == (40, 2)
    assert found.accuracy == pytest.approx(stats.wilson(30, 40))
    benign = stats.quality([False, False], [False, False], range(2), [0.1, 0.2], num_draws=20)
    assert benign.sensitivity is benign.f1 is benign.kappa is benign.auroc is None
    some = stats.quality([True, False], [True, False], range(2), [0.9, None], num_draws=20)
    assert some.auroc is None
    with pytest.raises(ValueError, match="none of 1"):
        stats.quality([True], [None], [0])


def test_quality_resamples_prompts_and_not_their_copies() -> None:
    once = stats.quality(TRUTH, SAID, range(40)).f1
    copied = stats.quality(TRUTH * 4, SAID * 4, list(range(40)) * 4).f1
    naive = stats.quality(TRUTH * 4, SAID * 4, range(160)).f1
    assert once and copied and naive
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_rogan_gladen_solves_for_the_true_rate() -> None:
    # A true rate of .2 seen by a judge with sensitivity .9 and specificity .8: .2 * .9 + .8 * .2 = .34
    found = stats.rogan_gladen((340, 1000), (90, 100), (160, 200))
    assert found and found.value == pytest.approx(0.2) and found.low < 0.2 < found.high
    sure = stats.rogan_gladen((340, 1000), (90_000, 100_000), (80_000, 100_000))
    assert sure and sure.high - sure.low < found.high - found.low
    # What is left is the sampling of the rate alone, spread by 1 / (.9 + .8 - 1).
    wilson = stats.wilson(340, 1000)
    assert sure.high - sure.low == pytest.approx((wilson.high - wilson.low) / 0.7, rel=0.02)
    edge = stats.rogan_gladen((180, 1000), (90, 100), (160, 200))  # below its 20 % of false alarms, within their error
    assert edge.value == edge.low == 0.0 < edge.high


@pytest.mark.parametrize(("said", "share"), [((10, 1000), "1.0%"), ((990, 1000), "99.0%")])
def test_rogan_gladen_says_why_where_no_rate_fits_its_errors(said: tuple[int, int], share: str) -> None:
    with pytest.raises(stats.NotCorrectable, match=rf"{share}.*20.0% where nothing is true, 90.0% where all is"):
        stats.rogan_gladen(said, (90, 100), (160, 200))


def test_rogan_gladen_corrects_nothing_by_a_judge_that_may_be_no_better_than_chance() -> None:
    # One right and one wrong more make 3/4 of m answers right: gain 1/2, variance 2 (3/16) / m, so m > 1.96^2 3/2 = 5.76.
    small = ((2, 2), (2, 2))  # m = 4
    for right, wrong in [((1, 1), (1, 4)), ((1, 1), (1, 10)), ((2, 3), (2, 2)), ((50, 100), (50, 100)), small]:
        with pytest.raises(stats.NotCorrectable, match="beats chance"):
            stats.rogan_gladen((5, 10), right, wrong)
    assert stats.rogan_gladen((5, 10), (5, 6), (5, 6)).value == pytest.approx(0.5)  # m = 8


def test_rogan_gladens_interval_covers() -> None:
    rng, covered = random.Random(4), 0
    for _ in range(1000):
        seen = sum(rng.random() < 0.2 * 0.9 + 0.8 * 0.2 for _ in range(150))
        right = sum(rng.random() < 0.9 for _ in range(60)), sum(rng.random() < 0.8 for _ in range(60))
        found = stats.rogan_gladen((seen, 150), (right[0], 60), (right[1], 60))
        covered += found.low <= 0.2 <= found.high
    assert 0.93 <= covered / 1000 <= 0.985  # nominal .95; binomial sd .007
