"""The one spelling that rules read."""

from __future__ import annotations

import time

import pytest

from safecl.text import number_text, plain, same_characters, without_markdown, without_reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" no tag \n", " no tag \n"),
        ("<think>\nlocks\n</think>\n\nI can't.", "I can't."),
        ("<think></think>Sure.", "Sure."),
        ("It is about locks. I refuse.\n</think>\n\nI can't.", "I can't."),
        ("<think>I should go on and", ""),
        ("Sure. <think>hm", "Sure."),
        ("<think>one</think> First. <think>two</think> Second.", "First.  Second."),
        ("<think>tags like <think> are odd</think>Sure.", "Sure."),
        ("<think>a<think>b</think>c</think>Sure.", "Sure."),
        ("<THINK>a</Think>Sure.", "Sure."),
        ("It is <think>a</think> so b</think>Sure.", "Sure."),
        ("[THINK]a[/THINK]Sure.", "Sure."),
        ("<thinking>a</thinking>Sure.", "Sure."),
        ("<reasoning>a</reasoning>\n<answer>\nSure.\n</answer>", "<answer>\nSure.\n</answer>"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Sure.", "Sure."),
        ("The tag `<think>` opens it.", "The tag `<think>` opens it."),
        ("I think > you </thinker>", "I think > you </thinker>"),
    ],
)
def test_reasoning_is_no_part_of_the_answer(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer


@pytest.mark.parametrize(
    "mark", ["'", "\u2019", "\u2018", "\u02bc", "\uff07", "`", "\u00b4", "\u2032", "&#39;", "&rsquo;", "â€™"]
)
def test_an_apostrophe_is_an_apostrophe(mark: str) -> None:
    assert same_characters(f"I{mark}m sorry") == "I'm sorry"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("I\u00a0can\u200bnot\ufeff", "I cannot"),
        ("\uff29 \uff43\uff41\uff4e\uff4e\uff4f\uff54", "I cannot"),
        ("\U0001d408 \U0001d41c\U0001d41a\U0001d427\U0001d427\U0001d428\U0001d42d", "I cannot"),
        ("\u22123 \u0663\uff11", "-3 31"),
        ("\u201cNo\u201d\u2026 10\u00b2 \u00bd \u2014 caf\u00e9", '"No"... 10\u00b2 \u00bd \u2014 caf\u00e9'),
    ],
)
def test_characters_of_one_meaning_are_one(text: str, same: str) -> None:
    assert same_characters(text) == same


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("**I'm sorry**, but _no_.", "I'm sorry, but no."),
        ("## I'm sorry\n\n> 1. *No*", "I'm sorry\n\nNo"),
        ("- I **can't** do a*b or snake_case", "I can't do a*b or snake_case"),
        ("**I'm sorry", "I'm sorry"),
        ("```text\nNo.\n```", "\nNo.\n"),
        ("<p>No.<br/></p> a < b > c", "No. a < b > c"),
        ("---\nNo", "\nNo"),
    ],
)
def test_markdown_is_taken_off_and_words_stay(text: str, words: str) -> None:
    assert without_markdown(text) == words


def test_plain_text_is_all_of_it_and_is_plain_already() -> None:
    text = "<think>hm</think>\n\n### **I\u2019m\u00a0sorry**, but"
    assert plain(text) == "I'm sorry, but" == plain(plain(text))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("#### \u221218", "#### -18"),
        ("It is **$18.00**.", "It is $18.00."),
        (r"\boxed{1{,}250}", "1,250"),
        (r"$\frac{3}{4}$ of \$5", "$3/4$ of $5"),
        ("1\u202f250 or 1\u2019250 or 1\u00a0250", "1,250 or 1,250 or 1,250"),
        ("1\u00bd and \u00be", "1 1/2 and 3/4"),
        ("\u0661\u0662\u066b\u0665 and \uff13", "12.5 and 3"),
        ("\u20133 but 10\u201312, 10\u00b2, 2*3*4", "-3 but 10\u201312, 10\u00b2, 2*3*4"),
        ("<think>7</think>\n8", "8"),
    ],
)
def test_numbers_are_written_one_way(text: str, numbers: str) -> None:
    assert number_text(text) == numbers


@pytest.mark.parametrize(
    "part", ["<think>", "</think>", "*a ", "\\frac{", "# ", "`", "_a", "{,}1", "<p ", "\u2019", "1. "]
)
def test_long_texts_take_no_longer_than_their_length(part: str) -> None:
    start = time.process_time()
    plain(part * 50_000)
    number_text(part * 50_000)
    assert time.process_time() - start < 2
