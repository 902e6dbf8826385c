"""Statistics against their defining equations, tables of Student's t, and brute-force enumeration."""

import itertools
import math
import random
from statistics import NormalDist

import pytest

from safecl import stats

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
    assert stats.wilson_macro([(7, 40)]) == pytest.approx(stats.wilson(7, 40))
    rng, rates, num = random.Random(0), (0.02, 0.3, 0.9), 40
    truth, covered = sum(rates) / 3, 0
    for _ in range(1000):
        found = stats.wilson_macro([(sum(rng.random() < p for _ in range(num)), num) for p in rates])
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 1000 <= 0.985  # nominal .95; binomial sd .007


def test_t_interval_agrees_with_the_printed_table() -> None:
    values = [0.10, 0.20, 0.15, 0.30, 0.25]
    mean = sum(values) / 5
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
    found = stats.t_interval(values)
    assert found.value == pytest.approx(mean)
    assert found.high - mean == pytest.approx(T_975[4] * sd / math.sqrt(5), rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        stats.t_interval([0.5])
    with pytest.raises(ValueError, match="finite"):
        stats.t_interval([0.5, float("nan")])


def test_paired_difference_removes_what_the_seeds_share() -> None:
    shared = [0.1, 0.5, 0.9, 0.3, 0.7]
    effect = [0.02, 0.04, 0.03, 0.05, 0.01]
    first = [a + b for a, b in zip(shared, effect, strict=True)]
    sd = math.sqrt(sum((e - 0.03) ** 2 for e in effect) / 4)
    found = stats.paired_difference(first, shared)
    assert found.value == pytest.approx(0.03)
    assert found.low == pytest.approx(0.03 - T_975[4] * sd / math.sqrt(5), rel=1e-4)
    assert found.p < 0.05 and stats.paired_difference(shared, first).p == pytest.approx(found.p)
    # df = 1 is the Cauchy distribution: p = 1 - 2 atan(|t|) / pi
    two = stats.paired_difference([0.3, 0.5], [0.1, 0.1])
    assert two.p == pytest.approx(1 - 2 * math.atan(0.3 / (math.sqrt(0.02) / math.sqrt(2))) / math.pi)
    with pytest.raises(ValueError, match="pair"):
        stats.paired_difference([0.1], [0.1, 0.2])


def test_equivalence_holds_exactly_when_the_ninety_percent_interval_is_inside_the_margin() -> None:
    rng, both = random.Random(3), set()
    for _ in range(200):
        a = [rng.gauss(0, 0.05) for _ in range(5)]
        b = [x + rng.gauss(0.01, 0.03) for x in a]
        found = stats.equivalent(a, b, margin=0.05)
        mean = sum(x - y for x, y in zip(a, b, strict=True)) / 5
        sd = math.sqrt(sum((x - y - mean) ** 2 for x, y in zip(a, b, strict=True)) / 4)
        half = T_95_4 * sd / math.sqrt(5)
        if min(abs(mean - half + 0.05), abs(mean + half - 0.05)) > 1e-5:
            assert found.holds == (mean - half > -0.05 and mean + half < 0.05)
            assert stats.non_inferior(a, b, margin=0.05).holds == (mean - half > -0.05)
            both.add(found.holds)
    assert both == {True, False}


def test_a_method_far_better_is_non_inferior_and_not_equivalent() -> None:
    a, b = [0.9, 0.91, 0.92], [0.5, 0.5, 0.51]
    assert stats.non_inferior(a, b, 0.02).holds and not stats.equivalent(a, b, 0.02).holds
    assert not stats.non_inferior(b, a, 0.02).holds
    same = [0.5, 0.6]
    assert stats.equivalent(same, same, 0.02).holds  # no spread and no difference
    with pytest.raises(ValueError, match="margin"):
        stats.equivalent(a, b, 0.0)


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


def exact_bootstrap(values_SC: list[list[float]]) -> list[float]:
    """All equally likely draws of one set with one prompt a cluster, sorted: seeds x clusters, with replacement."""
    num_seeds, num = len(values_SC), len(values_SC[0])
    return sorted(
        sum(values_SC[s][c] for s in seeds for c in clusters) / (num_seeds * num)
        for seeds in itertools.product(range(num_seeds), repeat=num_seeds)
        for clusters in itertools.product(range(num), repeat=num)
    )


def test_crossed_bootstrap_agrees_with_enumerating_every_draw() -> None:
    values = [[0.0, 0.31, 0.05, 0.43], [0.63, 0.77, 0.91, 1.0], [0.2, 0.2, 0.8, 0.9]]
    draws = exact_bootstrap(values)
    found = stats.crossed_bootstrap([rows(v) for v in values], num_draws=40_000, confidence=0.8)
    assert found.value == pytest.approx(sum(map(sum, values)) / 12)
    for bound, level in ((found.low, 0.1), (found.high, 0.9)):  # sd of the level at 40,000 draws: .0015
        assert sum(d <= bound for d in draws) / len(draws) == pytest.approx(level, abs=0.01)


def test_crossed_bootstrap_is_repeatable_and_follows_its_seed() -> None:
    rng = random.Random(0)
    data = [rows([float(rng.random() < 0.3) for _ in range(50)]) for _ in range(3)]
    assert stats.crossed_bootstrap(data, seed=1) == stats.crossed_bootstrap(data, seed=1)
    assert stats.crossed_bootstrap(data, seed=1) != stats.crossed_bootstrap(data, seed=2)


def test_copies_of_one_prompt_in_a_cluster_do_not_narrow_the_interval() -> None:
    rng = random.Random(5)
    values: list[float | None] = [float(rng.random() < 0.4) for _ in range(30)]
    once = stats.intervals([rows(values)])
    copied = [v for v in values for _ in range(4)]
    names = [f"c{i}" for i in range(30) for _ in range(4)]
    clustered, naive = stats.intervals([rows(copied, clusters=names)]), stats.intervals([rows(copied)])
    assert once and clustered and naive
    assert naive.high - naive.low < 0.6 * (once.high - once.low)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.15)
    silent = stats.intervals([rows([0.0] * 120, clusters=names)])
    assert silent == pytest.approx(stats.wilson(0, 30))


def test_one_seed_takes_wilson_over_prompts_and_leaves_unparsed_out() -> None:
    assert stats.intervals([rows([1, 0, 0, 0, None])]) == pytest.approx(stats.wilson(1, 4))
    two = rows([1, 0], "a") + rows([0, 0, 0, 0], "b")
    assert stats.intervals([two]) == pytest.approx(stats.wilson_macro([(1, 2), (0, 4)]))
    assert stats.macro(two) == pytest.approx(0.25)
    assert stats.intervals([[]]) is None and stats.intervals([rows([None])]) is None and stats.macro([]) is None


def test_several_seeds_take_student_over_seeds_of_the_macro_mean() -> None:
    hits = [(4, 5), (5, 5), (5, 6)]  # of 10 prompts in each of two sets
    seeds = [rows([1] * a + [0] * (10 - a), "a") + rows([1] * b + [0] * (10 - b), "b") for a, b in hits]
    means = [(a + b) / 20 for a, b in hits]
    mean = sum(means) / 3
    half = T_975[2] * math.sqrt(sum((m - mean) ** 2 for m in means) / 2) / math.sqrt(3)
    assert stats.intervals(seeds) == pytest.approx((mean, mean - half, mean + half), rel=1e-5)
    wide = stats.intervals([rows([1, 0]), rows([1, 1])])  # one degree of freedom: far beyond what a fraction can be
    assert wide == (0.75, 0.0, 1.0)


def test_seeds_that_agree_exactly_do_not_claim_certainty() -> None:
    found = stats.intervals([rows([0.0] * 20)] * 3)
    assert found == pytest.approx(stats.wilson(0, 20)) and found and found.high > 0.1


def test_a_seed_without_outcomes_or_a_nan_raises() -> None:
    with pytest.raises(ValueError, match="seed number 1"):
        stats.intervals([rows([1.0, 0.0]), rows([None, None])])
    with pytest.raises(ValueError, match="'s1'"):
        stats.intervals([rows([1.0, float("nan")])])


def test_a_utility_that_is_not_zero_or_one_takes_the_bootstrap() -> None:
    rng = random.Random(2)
    values: list[float | None] = [rng.random() for _ in range(200)]
    found = stats.intervals([rows(values)])
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
    assert found.kappa.value == pytest.approx(stats.agreement(TRUTH, SAID).kappa)
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
    assert stats.rogan_gladen((10, 1000), (90, 100), (160, 200))[0] == 0.0  # type: ignore[index]
    assert stats.rogan_gladen((50, 100), (50, 100), (50, 100)) is None


def test_rogan_gladen_corrects_nothing_by_a_judge_that_may_be_no_better_than_chance() -> None:
    for right, wrong in [((1, 1), (1, 4)), ((1, 1), (1, 10)), ((2, 3), (2, 2))]:
        assert stats.rogan_gladen((5, 10), right, wrong) is None
    # One right and one wrong more make 3/4 of m answers right: gain 1/2, variance 2 (3/16) / m, so m > 1.96^2 3/2 = 5.76.
    assert stats.rogan_gladen((5, 10), (2, 2), (2, 2)) is None  # m = 4
    assert stats.rogan_gladen((5, 10), (5, 6), (5, 6)) is not None  # m = 8


def test_rogan_gladens_interval_covers() -> None:
    rng, covered = random.Random(4), 0
    for _ in range(1000):
        seen = sum(rng.random() < 0.2 * 0.9 + 0.8 * 0.2 for _ in range(150))
        right = sum(rng.random() < 0.9 for _ in range(60)), sum(rng.random() < 0.8 for _ in range(60))
        found = stats.rogan_gladen((seen, 150), (right[0], 60), (right[1], 60))
        assert found
        covered += found.low <= 0.2 <= found.high
    assert 0.93 <= covered / 1000 <= 0.985  # nominal .95; binomial sd .007
