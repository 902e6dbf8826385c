"""Contrasts: their p values against SciPy's own tests, what they refuse to claim, and what the table's rows hold."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from safecl import crossed
from safecl.contrasts import MARGINS, contrasts, discordant, means
from safecl.project import _agreement, _contrast, _entry
from safecl.stats import wilson

SFT = [0.80, 0.70, 0.90, 0.75, 0.85]
DER = [0.10, 0.06, 0.19, 0.08, 0.11]
EWC = [0.79, 0.71, 0.89, 0.76, 0.84]  # as sft, to a point
LWF = [0.70, 0.35, 0.95, 0.40, 0.80]  # all over the place


def even(value: float) -> list[dict[str, Any]]:
    """Prompts that all have one value: nothing but the seed tells them apart."""
    return [{"set": "a", "id": str(i), "value": value, "cluster": str(i)} for i in range(5)]


def by_seed(values: list[float] | dict[int, float]) -> dict[int, list[dict[str, Any]]]:
    return {seed: even(v) for seed, v in (values if isinstance(values, dict) else dict(enumerate(values))).items()}


METHODS = [("sft", by_seed(SFT)), ("der", by_seed(DER)), ("ewc", by_seed(EWC)), ("lwf", by_seed(LWF))]


def holm_by_hand(p_values: list[float]) -> list[float]:
    """Adjusted p of i: the largest of (number of p values not below p_j) * p_j over all p_j up to p_i (no ties)."""
    return [min(1.0, max(sum(q >= p for q in p_values) * p for p in p_values if p <= own)) for own in p_values]


@pytest.fixture
def no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that all answered alike leave nothing open: what is left is a t test over seeds."""
    monkeypatch.setattr(crossed, "_FLOOR", 0.0)


@pytest.mark.usefixtures("no_floor")
def test_against_sft_every_method_is_one_paired_t_test_corrected_over_them() -> None:
    found = contrasts("asr", METHODS)
    tests = [ttest_rel(other, SFT) for other in (DER, EWC, LWF)]
    adjusted = holm_by_hand([test.pvalue for test in tests])
    assert "sft" not in found[0]
    for of_method, test, p in zip(found[1:], tests, adjusted, strict=True):
        contrast, interval = of_method["sft"], test.confidence_interval(0.95)
        assert (contrast.low, contrast.high) == pytest.approx((interval.low, interval.high))
        assert contrast.p == pytest.approx(p) and contrast.num == 5 and contrast.other == "sft"
    assert [f["sft"].differs for f in found[1:]] == [True, False, False]
    assert [f["sft"].alike for f in found[1:]] == [False, True, False]  # lwf: neither, the seeds cannot tell


def test_against_the_best_all_pairs_are_the_family() -> None:
    found = contrasts("asr", METHODS)
    values = [SFT, DER, EWC, LWF]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    adjusted = dict(zip(pairs, holm_by_hand([ttest_rel(values[i], values[j]).pvalue for i, j in pairs]), strict=True))
    assert "best" not in found[1]  # der has the lowest ASR
    for i in (0, 2, 3):
        contrast = found[i]["best"]
        assert contrast.other == "der" and contrast.value == pytest.approx(sum(values[i]) / 5 - sum(DER) / 5)
        assert contrast.p == pytest.approx(adjusted[max(i, 1), min(i, 1)])


def test_the_best_utility_is_the_highest() -> None:
    found = contrasts("utility", METHODS)
    assert [f["best"].other if "best" in f else None for f in found] == [None, "sft", "sft", "sft"]


@pytest.mark.usefixtures("no_floor")
def test_alike_is_two_one_sided_tests_and_for_utility_one() -> None:
    differences = [a - b for a, b in zip(EWC, SFT, strict=True)]
    pair = [("sft", by_seed(SFT)), ("ewc", by_seed(EWC))]
    for metric, upper in (("asr", True), ("utility", False)):
        margin = MARGINS[metric]
        expected = ttest_1samp(differences, -margin, alternative="greater").pvalue
        if upper:
            expected = max(expected, ttest_1samp(differences, margin, alternative="less").pvalue)
        assert contrasts(metric, pair)[1]["sft"].p_alike == pytest.approx(expected)
    higher = [
        ("sft", by_seed(SFT)),
        ("der", by_seed([v + d for v, d in zip(SFT, (0.1, 0.11, 0.09, 0.1, 0.12), strict=True)])),
    ]
    assert contrasts("utility", higher)[1]["sft"].alike and not contrasts("asr", higher)[1]["sft"].alike


def test_prompts_that_all_answered_alike_leave_open_how_others_would() -> None:
    """If 5 % of prompts told two methods apart, 40 would hold none of them in 13 % of all draws, 100 in half a per cent."""
    for num, alike in ((40, False), (100, True)):
        seeds = {seed: outcomes("0" * num) for seed in range(8)}
        contrast = contrasts("asr", [("sft", seeds), ("der", seeds)])[1]["sft"]
        assert contrast.alike == alike and not contrast.differs
        assert contrast.high == pytest.approx(1.96 * 1.96 / num, rel=0.05)


def test_picking_the_best_by_the_same_data_makes_no_false_claims() -> None:
    """Six methods that are one: how often is any called different from the best? Uncorrected, far above 1 in 20."""
    rng = random.Random(0)
    num, claims, naive = 100, 0, 0
    for _ in range(num):
        methods = [(f"m{i}", [rng.gauss(0.5, 0.05) for _ in range(5)]) for i in range(6)]
        found = contrasts("asr", [(name, by_seed(values)) for name, values in methods])
        claims += any(f["best"].differs for f in found if "best" in f)
        best = min((values for _, values in methods), key=sum)
        naive += any(ttest_rel(values, best).pvalue < 0.05 for _, values in methods if values is not best)
    assert claims / num <= 0.05 + 2 * (0.05 * 0.95 / num) ** 0.5
    assert naive / num > 0.2


def test_one_seed_or_one_prompt_claims_nothing() -> None:
    one = {"sft": {0: 0.9}, "der": {0: 0.0}, "ewc": {1: 0.5, 2: 0.6}}
    assert contrasts("asr", [(name, by_seed(values)) for name, values in one.items()]) == [{}, {}, {}]
    single = [
        (name, {seed: outcomes(bit) for seed, bit in enumerate(bits)})
        for name, bits in (("sft", "1100"), ("der", "0000"))
    ]
    assert contrasts("asr", single) == [{}, {}]


def test_without_any_spread_the_seeds_are_coins() -> None:
    # .3 - .2 and .4 - .3 are not the same float: a t test of their difference would have p of about 1e-16
    methods = {"sft": {0: 0.2, 1: 0.3}, "der": {0: 0.3, 1: 0.4}, "ewc": {0: 0.2, 1: 0.4}}
    found = contrasts("asr", [(name, by_seed(values)) for name, values in methods.items()])
    contrast = found[1]["sft"]
    assert contrast.value == pytest.approx(0.1) and contrast.low < 0.1 < contrast.high
    assert contrast.p == 1.0 and not contrast.alike  # 2 x 1/4, corrected for two
    for num, differs in ((5, False), (6, True)):  # 1/16, 1/32
        wide = [(name, {s: outcomes(bit * 8) for s in range(num)}) for name, bit in (("sft", "1"), ("der", "0"))]
        assert contrasts("asr", wide)[1]["sft"].differs == differs


@pytest.mark.usefixtures("no_floor")
def test_methods_are_paired_over_the_seeds_and_prompts_that_both_have() -> None:
    methods = {"sft": {2: 0.9, 0: 0.5, 1: 0.4}, "der": {0: 0.1, 2: 0.3, 7: 0.0}}
    found = contrasts("asr", [(name, by_seed(values)) for name, values in methods.items()])
    assert found[1]["sft"].num == 2
    assert found[1]["sft"].value == pytest.approx(((0.1 - 0.5) + (0.3 - 0.9)) / 2)
    assert found[1]["sft"].p == pytest.approx(ttest_rel([0.1, 0.3], [0.5, 0.9]).pvalue)
    read = [("sft", {s: outcomes("11?1") for s in (0, 1)}), ("der", {s: outcomes("1?00") for s in (0, 1, 2)})]
    assert contrasts("asr", read)[1]["sft"].value == -0.5  # the first and the last prompt
    gap = [("sft", {s: outcomes("10", "a") + outcomes("?" if s else "1", "b") for s in (0, 1, 2)})]
    gap.append(("der", {s: outcomes("00", "a") + outcomes("0", "b") for s in (0, 1, 2)}))
    assert contrasts("asr", gap)[1] == {}  # seeds 1 and 2 know nothing of set b


def outcomes(bits: str, set_: str = "attack/a", metric: str = "asr") -> list[dict[str, Any]]:
    """`1`, `0`, or `?` for unparsed, a prompt each."""
    values = [None if bit == "?" else float(bit) for bit in bits]
    return [
        {"metric": metric, "set": set_, "id": f"{set_}/{i}", "value": value, "cluster": f"c{i}"}
        for i, value in enumerate(values)
    ]


def test_mcnemar_is_per_seed_on_prompts_that_both_answered() -> None:
    first, second = {0: outcomes("1110?1"), 3: outcomes("1")}, {0: outcomes("0010?0"), 5: outcomes("1")}
    found = discordant(first, second)
    expected = binomtest(3, 3, 0.5).pvalue  # three prompts only in the first, none only in the second
    assert found == {0: {"only_first": 3, "only_second": 0, "p": pytest.approx(expected)}}
    assert means({0: outcomes("11") + outcomes("0000", "attack/b"), 1: outcomes("?")}) == {0: 0.5}


def test_an_entry_holds_seeds_sets_and_the_pooled_rate() -> None:
    seeds = {
        s: outcomes(a, "attack/a") + outcomes(b, "attack/b")
        for s, (a, b) in {0: ("1?", "0001"), 4: ("11", "0000")}.items()
    }
    entry = _entry("asr", seeds)
    assert entry is not None
    assert entry["seeds"] == {"0": (1 + 1 / 4) / 2, "4": (1 + 0) / 2} and entry["value"] == pytest.approx(
        (0.625 + 0.5) / 2
    )
    assert entry["num"] == 11 and entry["unparsed"] == 1
    assert {name: part["value"] for name, part in entry["sets"].items()} == {
        "attack/a": 1.0,
        "attack/b": (1 / 4 + 0) / 2,
    }
    assert entry["pooled"]["value"] == pytest.approx(
        (2 / 5 + 2 / 6) / 2
    )  # mean over seeds of the rate over all prompts
    one_set = _entry("asr", {0: outcomes("10")})
    assert one_set is not None and "sets" not in one_set and "pooled" not in one_set and "why" not in one_set
    assert _entry("asr", {0: outcomes("?")}) is None


def test_kinds_of_degenerate_answers_are_counted_and_nats_are_not_cut_at_one() -> None:
    rows = outcomes("1011", metric="degenerate")
    for row, why in zip([rows[0], rows[2], rows[3]], ("loop", "echo", "loop"), strict=True):
        row["why"] = why
    entry = _entry("degenerate", {0: rows})
    assert entry is not None and entry["why"] == {"echo": 1, "loop": 2}
    seeds = {s: [{**o, "value": v} for o in outcomes("1", metric="gold_nll")] for s, v in {0: 0.95, 1: 0.85}.items()}
    nats = _entry("gold_nll", seeds)
    assert nats is not None and nats["high"] > 1


def test_rows_get_contrasts_within_their_poison_ratio_only() -> None:
    def row(method: str, poison: float | None) -> dict[str, Any]:
        return {"model": "m", "task": "t", "poison": poison, "method": method}

    table = [row("aligned", None), row("sft", 0.1), row("der", 0.1), row("sft", 0.0), row("ewc", 0.0)]
    two = [
        {0: outcomes("1111"), 1: outcomes("0111")},
        {0: outcomes("0000"), 1: outcomes("0011")},
        {0: outcomes("0000")},
    ]
    _contrast(table, [{"asr": two[0]}, {"asr": two[0]}, {"asr": two[1]}, {"asr": two[0]}, {"asr": two[2]}])
    assert "contrasts" not in table[0]
    der = table[2]["contrasts"]["asr"]
    assert der["sft"]["value"] == pytest.approx(((0 - 1) + (1 / 2 - 3 / 4)) / 2) and not der["sft"]["differs"]
    assert der["mcnemar"]["0"] == {"only_first": 0, "only_second": 4, "p": pytest.approx(binomtest(0, 4, 0.5).pvalue)}
    assert table[1]["contrasts"]["asr"].keys() == {"best"} and table[1]["contrasts"]["asr"]["best"]["other"] == "der"
    assert table[4]["contrasts"]["asr"].keys() == {"mcnemar"}  # one seed: no claim, description only


def test_two_judges_are_compared_on_the_same_answers_seed_by_seed() -> None:
    both = {"asr": {0: outcomes("110?"), 1: outcomes("01")}, "non_refusal": {0: outcomes("1011"), 1: outcomes("11")}}
    found = _agreement(both)
    assert found is not None and (found["num"], found["skipped"]) == (5, 1)  # 1-1, 1-0, 0-1, 0-1, 1-1
    assert found["agree"]["value"] == pytest.approx(0.4)
    assert found["agree"]["low"] == pytest.approx(wilson(0.4 * 3, 3).low)  # three prompts, some with two answers
    assert found["kappa"]["value"] == pytest.approx((0.4 - (0.6 * 0.8 + 0.4 * 0.2)) / (1 - (0.6 * 0.8 + 0.4 * 0.2)))
    assert _agreement({"asr": {0: outcomes("?")}, "non_refusal": {0: outcomes("1")}}) is None
    assert _agreement({}) is None
