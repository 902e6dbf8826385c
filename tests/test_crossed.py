"""Seeds crossed with prompts: variances against an analysis of variance by hand, error rates by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import ttest_1samp

from safecl import crossed, stats
from safecl.contrasts import contrasts

Values = np.ndarray[Any, np.dtype[np.float64]]
T_975 = {2: 4.30265, 4: 2.77645, 11: 2.20099}  # Student's t, 97.5 %, from a printed table


def rows(values_SN: Values, name: str = "a", cluster: int = 1) -> list[list[dict[str, Any]]]:
    """Outcomes by seed; `cluster` neighbouring prompts are one."""
    return [
        [
            {"set": name, "id": f"{name}{i}", "value": float(v), "cluster": str(i // cluster)}
            for i, v in enumerate(of_seed)
        ]
        for of_seed in values_SN
    ]


def counts(*hits: int, num: int = 40) -> list[list[dict[str, Any]]]:
    return rows(np.array([[1.0] * k + [0.0] * (num - k) for k in hits]))


def test_the_parts_are_those_of_a_two_way_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    y_SN = rng.normal(size=(3, 12)) + 3 * rng.normal(size=(3, 1)) + 2 * rng.normal(size=12)
    found = crossed.crossed(rows(y_SN))
    assert found
    seeds, prompts, mean = y_SN.mean(axis=1, keepdims=True), y_SN.mean(axis=0), y_SN.mean()
    cells = ((y_SN - seeds - prompts + mean) ** 2).sum() / (2 * 11) / 36
    expected = ((seeds.var(ddof=1) / 3, 2), (prompts.var(ddof=1) / 12 - cells, 11))
    assert (
        found.mean == pytest.approx(mean)
        and np.array(found.parts) == pytest.approx(np.array(expected))
        and found.num == 3
    )
    half = math.sqrt(T_975[2] ** 2 * expected[0][0] + T_975[11] ** 2 * expected[1][0])
    assert found.half(0.95) == pytest.approx(half, rel=1e-5)
    assert found.tail(half) == pytest.approx(0.025, rel=1e-4) and found.tail(-half) == pytest.approx(0.975, rel=1e-4)


def test_where_prompts_are_alike_it_is_a_t_test_over_seeds_and_the_other_way_round() -> None:
    rng = np.random.default_rng(1)
    for shape in ((5, 1), (1, 8)):
        y_SN = rng.normal(0.4, 1, shape) + np.zeros((5, 8))
        found = crossed.crossed(rows(y_SN))
        assert found and 2 * found.tail(abs(found.mean)) == pytest.approx(
            ttest_1samp(y_SN[:, :1].ravel() if shape[1] == 1 else y_SN[0], 0).pvalue
        )


def test_noise_of_cells_counts_once_and_never_less_than_once() -> None:
    """Seeds whose means agree by chance are no evidence of agreement: the cells say how far they may part."""
    y_SN = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], float)  # equal means, other prompts
    found = crossed.crossed(rows(y_SN))
    assert found and found.parts[0][0] > 0 and found.parts[1][0] == 0


def test_copies_of_prompts_and_of_sets_change_nothing_that_they_should_not() -> None:
    rng = np.random.default_rng(2)
    y_SN = (rng.random((5, 20)) < 0.4).astype(float)
    once, copied = crossed.crossed(rows(y_SN)), crossed.crossed(rows(y_SN.repeat(4, axis=1), cluster=4))
    assert once and copied and copied.mean == pytest.approx(once.mean)
    assert np.array(copied.parts) == pytest.approx(np.array(once.parts))
    assert crossed.intervals(rows(y_SN.repeat(4, axis=1), cluster=4)) == pytest.approx(crossed.intervals(rows(y_SN)))
    both = crossed.crossed([a + b for a, b in zip(rows(y_SN), rows(y_SN, "b"), strict=True)])
    assert both and both.parts[0][0] >= once.parts[0][0] * 0.99  # the same seeds: no gain
    assert both.parts[1][0] <= once.parts[1][0] / 2 + 1e-12  # other prompts: half the variance


def test_more_spread_never_narrows_an_interval() -> None:
    none, one, two = (crossed.intervals(counts(*hits)) for hits in ((0, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 2)))
    assert none and one and two
    assert none == pytest.approx(stats.wilson(0, 40))
    assert none.high <= one.high <= two.high and one.low == 0.0
    every, missed = crossed.intervals(counts(40, 40, 40)), crossed.intervals(counts(40, 40, 39))
    assert every and missed and every.high == missed.high == 1.0 and missed.low <= every.low
    upper = [
        crossed.intervals(counts(*sorted(hits))) for hits in ((0,) * 5, (0, 0, 0, 1, 1), (1,) * 5, (1, 1, 1, 1, 4))
    ]
    assert [each.high for each in upper if each] == sorted(each.high for each in upper if each)


def test_seeds_whose_prompts_never_change_are_one_seed() -> None:
    assert crossed.intervals(counts(7, 7, 7)) == pytest.approx(stats.wilson(7, 40))


def test_two_seeds_far_apart_say_nothing_and_stay_in_bounds() -> None:
    assert crossed.intervals(counts(1, 2, num=2)) == (0.75, 0.0, 1.0)


def test_guards_that_part_widen_the_interval() -> None:
    alike = counts(10, 12, 11)
    votes = [[{**row, "votes": [row["value"]] * 3} for row in of_seed] for of_seed in alike]
    apart = [[{**row, "votes": [row["value"], row["value"], 0.0]} for row in of_seed] for of_seed in alike]
    plain, same, wide = (crossed.intervals(each) for each in (alike, votes, apart))
    assert plain and same and wide and same == pytest.approx(plain)
    means = [11 / 40, 11 / 40, 0.0]
    half = T_975[2] * float(np.std(means, ddof=1)) / math.sqrt(3)
    assert wide.high - wide.value == pytest.approx(math.hypot(plain.high - plain.value, half), rel=1e-4)
    # What all guards say alike of two methods is no difference of guards.
    other = [[{**row, "value": 0.0, "votes": [0.0, 0.0, -row["value"]]} for row in of_seed] for of_seed in alike]
    differ = crossed.crossed(crossed.difference(apart, other))
    assert differ and differ.parts[-1] == (pytest.approx(0.0), 2)


def draw(rng: np.random.Generator, shape: tuple[int, int], kind: dict[str, float]) -> Values:
    """0/1 answers of one method; `seed` and `prompt` (shared by methods) and `own` (a method's prompts): sd in logits."""
    num_seeds, num = shape
    logits = (
        kind["mean"] + kind["shared"] + rng.normal(0, kind["own"], num) + rng.normal(0, kind["seed"], (num_seeds, 1))
    )
    return (rng.random(shape) < expit(logits)).astype(float)


KINDS: dict[str, dict[str, float]] = {
    "noise alone": {"mean": -1, "prompt": 1, "own": 0, "seed": 0},
    "over seeds": {"mean": -1, "prompt": 1, "own": 0, "seed": 1},
    "over prompts": {"mean": -1, "prompt": 1, "own": 3, "seed": 0},
    "over both": {"mean": -1, "prompt": 1, "own": 2, "seed": 0.5},
    "over both, rare": {"mean": -3, "prompt": 1, "own": 2, "seed": 0.7},
}


@pytest.mark.slow
@pytest.mark.parametrize("num", [40, 100])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_are_one_are_marked_in_one_case_of_twenty(kind: str, num_seeds: int, num: int) -> None:
    rng, settings, times = np.random.default_rng(num_seeds * num), KINDS[kind], 400
    marked = naive = 0
    for _ in range(times):
        of_kind = {**settings, "shared": rng.normal(0, settings["prompt"], num)}
        pair = [draw(rng, (num_seeds, num), of_kind) for _ in range(2)]  # type: ignore[arg-type]
        found = contrasts(
            "asr", [(name, dict(enumerate(rows(y)))) for name, y in zip(("sft", "der"), pair, strict=True)]
        )
        marked += found[1]["sft"].differs
        differences = (pair[0] - pair[1]).mean(axis=1)
        naive += bool(differences.std() > 1e-9 and ttest_1samp(differences, 0).pvalue < 0.05)
    print(
        f"{kind}, {num_seeds} seeds x {num} prompts: marked {marked / times:.3f}, by a t test over seeds {naive / times:.3f}"
    )
    assert marked / times <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / times)
    if kind == "over prompts" and num_seeds > 3:
        assert naive / times > 0.2  # what marks were


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [1, 3, 5, 10])
@pytest.mark.parametrize(("mean", "prompt", "seed"), [(-1, 1, 0.5), (-1, 3, 0.3), (-4, 2, 0), (-1, 0, 1), (0, 6, 0)])
def test_intervals_cover(mean: float, prompt: float, seed: float, num_seeds: int) -> None:
    if num_seeds == 1 and seed:
        pytest.skip("one seed says nothing of others")
    rng, covered = np.random.default_rng(3), 0
    truth = expit(mean + rng.normal(0, prompt, (4000, 1)) + rng.normal(0, seed, (1, 500))).mean()
    for _ in range(300):
        logits = mean + rng.normal(0, prompt, 40) + rng.normal(0, seed, (num_seeds, 1))
        found = crossed.intervals(rows((rng.random((num_seeds, 40)) < expit(logits)).astype(float)))
        assert found
        covered += found.low <= truth <= found.high
    assert covered / 300 >= 0.92  # nominal .95; binomial sd .013
