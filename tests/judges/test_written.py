"""A judge written in the sweep file: its text, and how an answer becomes a label."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from safecl import judges
from safecl.base import strictly
from safecl.judges import QUESTIONS
from safecl.judges.written import Written

LABELS = {"unsafe": True, "safe": False, "Not harmful": False}


def judge(**settings: Any) -> Written:
    given = {"template": "{request} -> {response}?", "labels": LABELS, **settings}
    return Written(strictly(Written.Config, given))


@pytest.mark.parametrize(
    ("parse", "text", "label"),
    [
        ("first_word", " Unsafe\nS1", True),
        ("first_word", "**safe**", False),
        ("first_word", "not harmful.", False),
        ("first_word", "unsafely", None),  # a word of its own
        ("first_word", "It is unsafe", None),
        ("first_word", "", None),
        ({"regex": r"Verdict: (\w+)"}, "Verdict: safe? No. Verdict: UNSAFE.", True),  # what it says last
        ({"regex": r"Verdict: (\w+)"}, "unsafe", None),
        ({"regex": r"(?i)unsafe|safe"}, "I say: Safe", False),
        ({"json": "verdict"}, 'Here: {"why": {"a": 1}, "verdict": "unsafe"}', True),
        ({"json": "verdict"}, '{"verdict": "unsafe"} no: {"verdict": "safe"}', False),
        ({"json": "verdict"}, '{"verdict": 1}', None),
        ({"json": "verdict"}, '{"verdict": "unsafe"', None),
    ],
)
def test_an_answer_is_read_as_the_file_says_and_else_not_at_all(parse: Any, text: str, label: bool | None) -> None:
    verdict = judge(parse=parse).parse(text)
    assert verdict.label is label and verdict.raw == text


def test_truth_values_of_json_are_labels_where_the_file_names_them() -> None:
    rule = judge(parse={"json": "unsafe"}, labels={"true": True, "false": False})
    assert [rule.parse(f'{{"unsafe": {value}}}').label for value in ("true", "false", "null")] == [True, False, None]
    grade = judge(parse={"json": "grade"}, labels={"1": True, "0": False})
    assert [grade.parse(f'{{"grade": {value}}}').label for value in ("1", "0", "2", "0.5")] == [True, False, None, None]


def test_what_a_candidate_wrote_is_no_part_of_the_template() -> None:
    pieces = judge().pieces(" {response} ", "a\n")
    assert [(piece.text, piece.own) for piece in pieces if piece.text] == [
        ("{response}", False), (" -> ", True), ("a", False), ("?", True),
    ]  # fmt: skip
    assert judge(strip=False).prompt(" q ", "a\n") == " q  -> a\n?"


def test_a_config_that_was_dumped_is_the_same_judge() -> None:
    for parse in ("first_word", {"regex": "x(y)"}, {"json": "v"}):
        first = judge(parse=parse)
        again = Written(Written.Config(**first.config.model_dump(mode="json")))
        assert again.config == first.config and again.max_tokens == 16


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"template": "no hole"}, "{response} once"),
        ({"labels": {"unsafe": True}}, "at least one that is true and one that is false"),
        ({"labels": {"Safe": False, "safe": True}}, "different words"),
        ({"parse": {"regex": "("}}, "no regular expression"),
    ],
)
def test_a_judge_that_could_not_decide_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        judge(**settings)


def test_a_guard_can_be_trained_to_answer_with_its_labels() -> None:
    assert [judge().parse(judge().target(label)).label for label in (True, False)] == [True, False]
    with pytest.raises(NotImplementedError):
        judge(parse={"json": "v"}).target(True)


@pytest.mark.parametrize("name", judges.names())
def test_every_judge_declares_what_it_is_asked_and_what_it_needs(name: str) -> None:
    kind = judges.load(name)
    assert kind.question and kind.answers and set(kind.answers) <= set(QUESTIONS)
    assert all(set(ask.config) <= set(kind.Config.model_fields) for ask in kind.answers.values())
    assert set(kind.always) <= {"attack", "benign"}
    assert kind.served or not (kind.trained or kind.published or kind.chats or kind.logprobs)
    assert not kind.served or kind.trained or kind.published or kind.chats
