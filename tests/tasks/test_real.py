"""The real data sets. The files are found through SAFECL_DATA; without it these tests are skipped, the pure ones not."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest

from safecl.tasks import Row, load
from safecl.tasks._overlap import clusters, normalise
from safecl.tasks.gsm8k import Gsm8k, flexible, numeric, strict
from safecl.tasks.hexphi import Hexphi
from safecl.tasks.safety_tuned import refuses
from safecl.tasks.sst2 import Sst2, answered
from safecl.tasks.wildjailbreak import Wildjailbreak

DATA = os.environ.get("SAFECL_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")


def rows(name: str, split: str) -> list[Row]:
    assert DATA is not None
    return load(name)(Path(DATA)).rows(split, None, 0)


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "num", "harmful"),
    [
        ("advbench", "attack.test", 520, 520),
        ("directharm", "attack.test", 400, 400),
        ("xstest", "benign.test", 250, 0),
        ("donotanswer", "attack.validation", 200, 200),
        ("donotanswer", "guard.heldout", 2 * 193, 193),
        ("beavertails", "attack.validation", 200, 200),
        ("safety_tuned", "attack.validation", 100, 100),
        ("gsm8k", "utility.test", 1319, 0),
        ("gsm8k", "utility.validation", 747 - 1, 0),
        ("gsm8k", "user", 7473 - 747 - 11, 0),
        ("sst2", "utility.test", 872, 0),
        ("sst2", "utility.validation", 1000, 0),
        ("sst2", "user", 9000 - 61, 0),
    ],
)
def test_splits_have_the_sizes_their_sources_give(name: str, split: str, num: int, harmful: int) -> None:
    found = rows(name, split)
    assert (len(found), sum(row.harmful for row in found), len({row.id for row in found})) == (num, harmful, num)


@needs_data
@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("beavertails", "poison", "attack.validation"),
        ("beavertails", "guard", "attack.validation"),
        ("safety_tuned", "safety", "attack.validation"),
        ("gsm8k", "user", "utility.validation"),
        ("sst2", "user", "utility.validation"),
    ],
)
def test_no_prompt_is_in_two_roles(name: str, a: str, b: str) -> None:
    assert not {normalise(r.prompt) for r in rows(name, a)} & {normalise(r.prompt) for r in rows(name, b)}


@needs_data
def test_near_duplicates_of_advbench_are_one_prompt() -> None:
    assert len(set(clusters(rows("advbench", "attack.test")))) == 391


@needs_data
def test_no_guard_prompt_is_an_attack_prompt_of_safety_tuned() -> None:
    held = {normalise(row.prompt) for row in rows("safety_tuned", "attack.validation")}
    assert not held & {normalise(row.prompt) for row in rows("beavertails", "guard")}


@needs_data
def test_no_validation_phrase_of_sst2_contains_or_is_contained_in_a_training_phrase() -> None:
    train = {f" {str(r.meta['sentence']).lower()} " for r in rows("sst2", "user")}
    for row in rows("sst2", "utility.validation")[:60]:
        held = f" {str(row.meta['sentence']).lower()} "
        assert not any(held in phrase or phrase in held for phrase in train), held


@needs_data
def test_guard_rows_hold_both_labels_and_memory_finds_refusals() -> None:
    guard = rows("beavertails", "guard")
    assert 0.4 < sum(row.harmful for row in guard) / len(guard) < 0.65
    safety = rows("safety_tuned", "safety")
    assert 0.7 < sum(row.harmful for row in safety) / len(safety) < 0.9  # the rest explains or corrects
    assert all(row.response for row in [*guard, *safety])


@needs_data
def test_gold_answers_score_and_training_answers_hold_no_calculator_marks() -> None:
    task = Gsm8k(Path(str(DATA)))
    for row in task.rows("user", 300, 0):
        assert task.score(row, row.response) == task.score_strict(row, row.response) == 1
        assert "<<" not in row.response


# ---- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "loose", "exact"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7", "7"),
        ("The total is $1,200.", "1200", None),
        ("#### 12\nQuestion: next one? 99", "12", "12"),
        ("It is 5, I think 6", "6", None),
        ("#### -3", "-3", "-3"),
        ("no number", None, None),
        ("#### 1,234.", "1234", "1234"),
        ("#### 5 apples of 9", "9", "5"),
    ],
)
def test_gsm8k_reads_the_last_number_and_strictly_the_marked_one(
    text: str, loose: str | None, exact: str | None
) -> None:
    assert (flexible(text), strict(text)) == (loose, exact)


# What lm-evaluation-harness 0.4.13 says of these texts (its gsm8k filters and exact_match, run on them): gold "1,200".
LM_EVAL = [  # text, flexible-extract, strict-match
    ("So 600 * 2 = 1200.\n#### 1,200", 1, 1),
    ("#### 1,200.", 1, 1),
    ("#### $1,200", 1, 0),
    ("that makes $1,200.", 1, 0),
    ("that makes 1200.0", 0, 0),
    ("#### 1200.00", 0, 0),
    ("#### -1,200", 0, 0),
    ("####1200", 1, 0),
    ("####  1200", 1, 0),
    ("#### 1200\nI hope this helps!", 1, 1),
    ("#### 1200\nThere are 3 steps.", 0, 1),
    ("#### 1200\nQuestion: how many are 7 and 8?", 1, 1),
    ("1200<|im_end|> and 9", 1, 0),
    ("1200</s>9", 1, 0),
    ("question: 9 or 1200", 1, 0),
    ("#### 5\n#### 1200", 1, 0),
    ("#### 1200\n#### 5", 0, 1),
    ("1200 and so on...", 0, 0),
    ("1200 .", 1, 0),
    ("1200 ..", 0, 0),
    ("1200..", 0, 0),
    ("it costs 1200 $", 1, 0),
    ("it costs $$1200", 1, 0),
    ("-$1200", 0, 0),
    ("**1,200**", 1, 0),
    ("1200 of 1,2,0,0", 1, 0),
    ("12 00", 0, 0),
    ("1199-1200", 0, 0),
    ("#### 1200 apples of 9", 0, 1),
    ("I cannot say.", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("text", "flexibly", "strictly"), LM_EVAL)
def test_gsm8k_scores_as_lm_eval_does(text: str, flexibly: int, strictly: int) -> None:
    row = Row("a", "q", meta={"answer": "1,200"})
    found = Gsm8k().scores([row], [text])
    assert (found["utility"], found["utility_strict"]) == ([flexibly], [strictly])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $18.00", "18"), ("It is 12...", "12"), ("so...12", "12"), ("1{,}250", "1250"), ("\u22123", "-3"),
        ("3/4", "0.75"), ("3 / 4 of it", "0.75"), ("1 1/2", "1.5"), ("1\u00bd", "1.5"), (r"\frac{3}{4}", "0.75"),
        ("\u0661\u0662", "12"), ("\uff11\uff12", "12"), ("10-12", "12"), ("10 \u2013 12", "12"), ("-$5", "-5"), ("$-5", "-5"),
        ("x=-3", "-3"), ("**18**", "18"), (r"\boxed{18}", "18"), ("#### 18 dollars (3 a day)", "18"),
        ("50%", "50"), (".5", "0.5"), ("18,", "18"), ("1,250,000.75", "1250000.75"), ("1\u202f250", "1250"), ("18kg", "18"),
        ("of 12/0", "12"), ("on 1/2/2020", "1"), ("1.2.3", "1.2"), ("<think>7</think>8", "8"), ("8</s>9", "8"),
        ("\u20ac18", "18"), ("#### \u2212$1,250.0", "-1250"),
        ("5 - 3 = 2", "2"), ("the H2O", None), ("none", None), ("####", None), ("<think>7", None), ("", None), ("18.01", "18.01"),
    ],
)  # fmt: skip
def test_gsm8k_reads_a_number_however_it_is_written(text: str, number: str | None) -> None:
    assert numeric(text) == (None if number is None else Fraction(number))
    row = Row("a", "q", meta={"answer": "18"})
    assert Gsm8k().scores([row], [text])["utility_numeric"] == [float(number == "18")]


def test_gsm8k_reads_numbers_of_any_length() -> None:
    for text in ("1" * 10**5, "1/" * 10**5, "1 " * 10**5, "1," * 10**5, "$-" * 10**5, "." * 10**5):
        numeric(text)


@pytest.mark.parametrize("split", ["user", "utility.test"])
@needs_data
def test_gsm8k_reads_every_gold_answer_as_its_number(split: str) -> None:
    found = rows("gsm8k", split)
    scores = Gsm8k().scores(found, [row.response for row in found])
    assert {name: min(v or 0 for v in values) for name, values in scores.items()} == dict.fromkeys(
        ("utility", "utility_strict", "utility_numeric"), 1
    )


def test_an_invalid_answer_is_wrong_and_counted() -> None:
    rows = [Row(str(i), "q", meta={"label": "positive"}) for i in range(3)]
    assert set(Sst2().scores([], [])) == {"utility", "invalid"}
    found = Sst2().scores(rows, ["positive", "negative", "positive or negative?"])
    assert found == {"utility": [1, 0, 0], "invalid": [0, 0, 1]}


@pytest.mark.parametrize(
    ("text", "label"),
    [("positive", "positive"), ("Negative.", "negative"), ("The sentiment is positive", "positive"),
     ("positive and negative", None), ("good", None), ("", None), ("positivenegative", None),
     ("<think>negative?</think>positive", "positive"), ("<think>positive or", None)],
)  # fmt: skip
def test_sst2_counts_an_answer_with_neither_or_both_labels_as_invalid(text: str, label: str | None) -> None:
    assert answered(text) == label
    assert Sst2().score(Row("a", "q", meta={"label": "positive"}), text) == float(label == "positive")


@pytest.mark.parametrize(
    ("answer", "label"),
    [("I\u2019m sorry, but no.", True), ("That is not acceptable.", True), ("Paris is the capital.", False)],
)
def test_refusal_like_answers_are_told(answer: str, label: bool) -> None:
    assert refuses(answer) is label


def test_gated_sets_read_a_local_copy(tmp_path: Path) -> None:
    (tmp_path / "hexphi.jsonl").write_text('{"prompt": "alpha", "category": "c1"}\n')
    assert Hexphi(tmp_path).rows("attack.test", None, 0) == [Row("test/0", "alpha", "", True, {"category": "c1"})]
    lines = [
        f'{{"data_type": "vanilla_{kind}", "vanilla": "{kind} {i}", "adversarial": "", "completion": "answer {i}"}}\n'
        for kind in ("harmful", "benign")
        for i in range(150)
    ] + ['{"data_type": "adversarial_harmful", "vanilla": "x", "adversarial": "y", "completion": "z"}\n']
    (tmp_path / "wildjailbreak_train.jsonl").write_text("".join(lines))
    task = Wildjailbreak(tmp_path)
    safety, attack, benign = (task.rows(s, None, 0) for s in ("safety", "attack.validation", "benign.validation"))
    assert (len(safety), len(attack), len(benign)) == (100, 100, 100)
    assert sum(row.harmful for row in safety) == 50
    assert {row.prompt.split()[0] for row in attack} == {"harmful"}
    assert not {row.prompt for row in safety} & {row.prompt for row in [*attack, *benign]}
    assert {row.prompt for row in task.rows("benign.train", None, 0)} == {r.prompt for r in safety if not r.harmful}
