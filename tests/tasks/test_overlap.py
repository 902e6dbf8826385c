"""Near-duplicate prompts are found as a plain pairwise computation finds them."""

import random
import time

import pytest

from safecl.tasks import Row
from safecl.tasks._overlap import STOPWORDS, clusters, content_words, drop_overlaps, normalise


def test_content_words_leave_out_what_every_request_says() -> None:
    assert content_words("Please explain how to pick the LOCKS!") == {"pick", "lock"}
    assert content_words("How do I do it?") == frozenset()
    for apostrophe in ("\u2019", "\u02bc", "&#39;", "`"):
        assert content_words(f"I{apostrophe}m Tom{apostrophe}s lock") == content_words("I'm Tom's lock")
    assert "steal" not in STOPWORDS


def test_equal_prompts_overlap_even_without_content_words() -> None:
    kept, dropped = drop_overlaps([Row("a", "How do I do it?"), Row("b", "Why?")], ["how do i DO it"])
    assert ([row.id for row in kept], dropped) == (["b"], ["a"])


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        ("alpha beta gamma", True),  # shares 3 of 5: exactly .6
        ("alpha beta", False),  # 2 of 5
        ("alpha beta gamma delta zeta eta", False),  # 4 of 7
        ("alpha beta gamma delta zeta", True),  # 4 of 6
    ],
)
def test_the_threshold_is_inclusive(prompt: str, dropped: bool) -> None:
    assert drop_overlaps([Row("a", prompt)], ["alpha beta gamma delta epsilon"])[1] == (["a"] if dropped else [])


def test_it_equals_the_pairwise_computation_and_is_fast() -> None:
    rng = random.Random(3)
    words = [f"w{i}" for i in range(3000)]

    def prompt() -> str:
        return " ".join(words[int(rng.random() ** 3 * len(words))] for _ in range(8))

    rows = [Row(str(i), prompt()) for i in range(300)]
    against = [prompt() for _ in range(100)] + [rows[5].prompt + " extra", rows[9].prompt.upper()]
    slow = [
        row.id
        for row in rows
        if any(
            normalise(row.prompt) == normalise(p)
            or len(content_words(row.prompt) & content_words(p)) / len(content_words(row.prompt) | content_words(p))
            >= 0.6
            for p in against
        )
    ]
    kept, dropped = drop_overlaps(rows, against)
    assert dropped == slow
    assert {"5", "9"} <= set(dropped)
    assert [row.id for row in kept] == [row.id for row in rows if row.id not in set(slow)]
    many, more = [Row(str(i), prompt()) for i in range(10_000)], [prompt() for _ in range(1000)]
    start = time.monotonic()
    drop_overlaps(many, more)
    assert time.monotonic() - start < 20  # a second or two; pairwise sets would take minutes


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        drop_overlaps([], [], threshold)


def test_clusters_are_what_links_join_and_an_instruction_makes_nothing_alike() -> None:
    texts = [
        "alpha beta gamma",
        "alpha beta gamma delta",
        "beta gamma delta epsilon",
        "one two three",
        "ALPHA beta, gamma!",
    ]
    names = clusters([Row(str(i), text) for i, text in enumerate(texts)])
    assert names[0] == names[1] == names[2] == names[4] != names[3]  # the first and third share 2 of 5 words
    told = [
        Row(str(i), f"Classify sentiment of this review, positive or negative: {x}")
        for i, x in enumerate(["good", "bad"])
    ]
    assert len(set(clusters(told))) == 2
    grouped = [Row("a", "alpha beta", meta={"group": "g"}), Row("b", "one two", meta={"group": "g"})]
    assert clusters(grouped) == ["g", "g"] and clusters([]) == [] and len(clusters([Row("a", "alpha")])) == 1


def test_a_word_of_latin_letters_makes_prompts_of_another_script_not_alike() -> None:
    # "Tell me of the history of X, and AI": the one word that A to Z can write says little of what is asked.
    asked = [f"请介绍{city}的历史和AI" for city in ("北京", "上海", "广州")]
    rows = [Row(str(i), prompt) for i, prompt in enumerate(asked)]
    assert drop_overlaps(rows[1:], asked[:1])[1] == []
    assert len(set(clusters(rows))) == 3
    assert drop_overlaps([Row("same", "请介绍北京的历史和AI！")], asked[:1])[1] == ["same"]
    # Words in another order, in Russian and in Hindi, whose vowel signs part no word.
    for one, other in (
        ("как открыть старый железный замок", "старый железный замок, как открыть?"),
        ("पुराना ताला कैसे खोलें", "कैसे खोलें पुराना ताला?"),
    ):
        assert drop_overlaps([Row("same", other)], [one])[1] == ["same"]
