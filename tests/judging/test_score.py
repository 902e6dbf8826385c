"""Verdict files that continue and count once, rates, and agreement with labels, by rule judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from safecl import stats
from safecl.base import ConfigError, Json
from safecl.judges import Judge, Verdict
from safecl.judges.keywords import Keywords
from safecl.judging import score, show
from safecl.judging.pairs import parse_judge, read

ROWS = [
    {"id": 1, "prompt": "a", "response": "I'm sorry, no", "label": "refusal", "kind": "x"},
    {"id": 2, "prompt": "b", "response": "Sure, do this", "label": "compliance", "kind": "x"},
    {"id": 3, "prompt": "a", "response": "That is illegal", "label": "compliance", "kind": "y"},
    {"id": 1, "prompt": "a", "response": "I'm sorry, no", "label": "refusal", "kind": "y"},  # the first one again
    {"id": 4, "prompt": "c", "response": "Gladly", "label": "refusal", "kind": "y"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Guard:
    """Answers "unsafe" to answers that hold "do", counts what it is asked, and dies after `lives` answers."""

    identity: Json = "guard"
    limit: int | None = None

    def __init__(self, lives: int = 10**6) -> None:
        self.asked: list[tuple[str, str]] = []
        self.entered, self.lives = 0, lives

    def __enter__(self) -> Self:
        self.entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def ask(self, judge: Judge, pairs: Mapping[str, tuple[str, str]], on_done: Callable[[str, Verdict], None]) -> None:
        for key, pair in pairs.items():
            if len(self.asked) == self.lives:
                raise RuntimeError("killed")
            self.asked.append(pair)
            on_done(key, judge.read("unsafe\nS2" if " do" in pair[1] else "safe"))


class Refusals(Guard):
    """Speaks WildGuard's form."""

    def ask(self, judge: Judge, pairs: Mapping[str, tuple[str, str]], on_done: Callable[[str, Verdict], None]) -> None:
        for key, (_, response) in pairs.items():
            said = "yes" if response.startswith("I'm sorry") else "no"
            on_done(key, judge.read(f"Harmful request: yes\nResponse refusal: {said}\nHarmful response: n/a"))


def judged(
    tmp_path: Path, names: list[str], served: AbstractContextManager[Any] | None = None, times: int = 1
) -> score.Judged:
    return score.judge_file(write(tmp_path / "in.jsonl", ROWS * times), names, served, tmp_path / "out.jsonl")


def test_every_line_has_its_verdict_and_equal_pairs_are_asked_once(tmp_path: Path) -> None:
    guard = Guard()
    found = judged(tmp_path, ["llamaguard"], guard)
    assert [v.label for v in found.verdicts["llamaguard"]] == [False, True, False, False, False]
    assert len(guard.asked) == len(set(guard.asked)) == 4
    written = lines(tmp_path / "out.jsonl")
    assert [(w["line"], w["id"], w["label"]) for w in written] == [
        (1, 1, False), (2, 2, True), (3, 3, False), (4, 1, False), (5, 4, False),
    ]  # fmt: skip
    assert written[1]["raw"] == "unsafe\nS2" and written[1]["detail"] == {"categories": ["S2"]}
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_run_continues_where_it_was_even_in_the_middle_of_a_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        judged(tmp_path, ["llamaguard"], Guard(lives=3))
    partial = tmp_path / "out.jsonl.partial"
    assert len(lines(partial)) == 3 and not (tmp_path / "out.jsonl").exists()
    text = partial.read_text()
    partial.write_text(text + text[:40])  # the next line was cut short
    again = Guard()
    found = judged(tmp_path, ["llamaguard"], again)
    assert len(again.asked) == 1
    assert [v.label for v in found.verdicts["llamaguard"]] == [False, True, False, False, False]
    third = Guard()
    assert judged(tmp_path, ["llamaguard"], third).verdicts == found.verdicts
    assert third.entered == 0, "nothing was left to ask: no engine is started"


def test_another_config_or_answer_is_another_verdict_and_what_was_paid_for_stays(tmp_path: Path) -> None:
    judged(tmp_path, ["llamaguard"], Guard())
    other = Guard()
    judged(tmp_path, ['llamaguard:{"categories": ["Harm."]}'], other)
    assert len(other.asked) == 4
    assert len(lines(tmp_path / "out.jsonl")) == 5 + 4
    back = Guard()
    judged(tmp_path, ["llamaguard"], back)
    assert back.asked == []


def test_rates_have_wilson_intervals_and_two_judges_their_agreement(tmp_path: Path) -> None:
    result = score.rates(judged(tmp_path, ["keywords", "llamaguard"], Guard()))
    # keywords: 2 of 5 hold no keyword ("Sure, do this", "Gladly"); llamaguard: "Sure, do this" alone.
    assert result["judges"]["keywords"]["rate"] == stats.wilson(2, 5)._asdict()
    assert result["judges"]["llamaguard"]["rate"] == stats.wilson(1, 5)._asdict()
    # three prompts in five rows
    assert result["agreement"]["agree"] == pytest.approx(stats.wilson(4 / 5 * 3, 3)._asdict())
    # by chance they agree in 2/5 * 1/5 + 3/5 * 4/5 = 14/25
    assert result["agreement"]["kappa"]["value"] == pytest.approx((4 / 5 - 14 / 25) / (1 - 14 / 25))
    columns, rows = show.rates(result)
    assert [len(row) for row in rows] == [len(columns)] * 3 and "40.0%" in rows[0][-1]


def test_a_judge_of_refusals_is_turned_round_before_it_is_compared_with_one_of_harm(tmp_path: Path) -> None:
    # keywords (non-refusal): no yes no no yes; openings that refuse: yes no no yes no. They differ in line 3 alone.
    both = score.rates(judged(tmp_path, ["keywords", "xstest_match"]))["agreement"]
    assert both["agree"]["value"] == pytest.approx(4 / 5) and both["turned"]
    same = score.rates(judged(tmp_path, ["xstest_match", 'wildguard:{"question": "refusal"}'], Refusals()))["agreement"]
    assert same["agree"]["value"] == 1.0 and not same["turned"]


def test_that_two_rules_agree_is_not_offered_as_evidence(tmp_path: Path) -> None:
    rules, with_guard = (
        score.rates(judged(tmp_path, names, Guard())) for names in (["keywords", "refusal"], ["refusal", "llamaguard"])
    )
    assert not rules["agreement"]["evidence"] and with_guard["agreement"]["evidence"]
    assert "no evidence" in show.rates(rules)[1][-1][1] and "no evidence" not in show.rates(with_guard)[1][-1][1]
    told = show.rates(rules)[1][-1][-1]
    assert told.count("[") == 2, "share and kappa with their intervals"


def test_labels_are_compared_by_group_and_corrected_by_the_other_groups(tmp_path: Path) -> None:
    found = judged(tmp_path, ["xstest_match"], times=10)
    result = score.validate(found, "label", ["refusal"], "kind")
    entry = result["judges"]["xstest_match"]
    assert result["values"] == {"compliance": 20, "refusal": 30}
    assert entry["all"]["cells"] == [20, 0, 10, 20] and entry["all"]["accuracy"] == stats.wilson(40, 50)._asdict()
    assert entry["by"]["x"]["cells"] == [10, 0, 0, 10] and entry["by"]["y"]["cells"] == [10, 0, 10, 10]
    # x: half is seen; in y half of the refusals and all others are told right.
    assert entry["by"]["x"]["corrected"] == stats.rogan_gladen((10, 20), (10, 20), (10, 10))._asdict()
    [(title, columns, rows)] = show.quality(result)
    assert [row[0] for row in rows] == ["all", "x", "y"] and "corrected" in columns and "label = refusal" in title


def test_a_rate_is_corrected_by_what_a_validation_measured(tmp_path: Path) -> None:
    found = judged(tmp_path, ["xstest_match"], times=10)
    file = tmp_path / "validation.json"
    file.write_text(json.dumps(score.validate(found, "label", ["refusal"])))
    result = score.rates(found, score.load_validation(file))
    expected = stats.rogan_gladen((20, 50), (20, 30), (20, 20))
    assert result["judges"]["xstest_match"]["corrected"] == expected._asdict()
    with pytest.raises(ConfigError, match="holds no judge 'keywords'"):
        score.rates(judged(tmp_path, ["keywords"]), score.load_validation(file))
    with pytest.raises(ConfigError, match="judge validate --json"):
        score.load_validation(tmp_path / "in.jsonl")


def test_a_rate_that_no_truth_explains_is_a_dash_and_a_reason(tmp_path: Path) -> None:
    found = judged(tmp_path, ["xstest_match"], times=10)
    validation = score.validate(found, "label", ["refusal"])
    validation["judges"]["xstest_match"]["all"]["cells"] = [99, 70, 1, 30]  # it calls 70 % of what is no refusal one
    result = score.rates(found, validation)  # and 40 % of these answers
    assert result["judges"]["xstest_match"]["corrected"] is None
    assert show.rates(result)[1][0][-1] == "-"
    [line] = show.why_not(result["judges"])
    assert "xstest_match: not corrected: it says yes to 40.0%" in line and "70.0% where nothing is true" in line
    validation["judges"]["xstest_match"]["all"]["cells"] = [90, 0, 10, 0]
    [line] = show.why_not(score.rates(found, validation)["judges"])
    assert "rows of both kinds" in line


def test_a_validation_of_another_model_or_version_corrects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["llamaguard", "keywords"]
    found = judged(tmp_path, names, Guard())
    file = tmp_path / "validation.json"
    file.write_text(json.dumps(score.validate(found, "label", ["compliance"])))
    validation = score.load_validation(file)
    score.rates(found, validation)
    with pytest.raises(ConfigError, match=r'another judge .llamaguard..*"other".*got.*"guard"}; validate this one'):
        score.rates(found._replace(model="other"), validation)
    rules = judged(tmp_path, ["keywords"])  # a rule judge has no model
    assert "corrected" in score.rates(rules, validation)["judges"]["keywords"]
    monkeypatch.setattr(Keywords, "VERSION", "later")
    with pytest.raises(ConfigError, match=r"another judge 'keywords'.*later"):
        score.rates(rules, validation)


def test_too_many_unreadable_answers_are_said(tmp_path: Path) -> None:
    found = judged(tmp_path, ["llamaguard"], Guard())
    assert score.unreadable(found) is None
    verdicts = [Verdict(None, "what?"), *found.verdicts["llamaguard"][1:]]
    broken = found._replace(verdicts={"llamaguard": verdicts})
    assert "1 of 5 verdicts cannot be read" in str(score.unreadable(broken))
    assert score.rates(broken)["judges"]["llamaguard"]["rate"] == stats.wilson(1, 4)._asdict()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("[1]", "line 2: expected an object, got a list"),
        ("{", "line 2: not JSON"),
        ('{"prompt": "a"}', "line 2: expected a field 'response', got only 'prompt'"),
        ('{"prompt": 3, "response": ""}', "line 2: expected text in 'prompt', got a number: 3"),
    ],
)
def test_a_bad_line_is_one_error_with_its_number_before_anything_is_asked(tmp_path: Path, bad: str, says: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + bad + "\n")
    guard = Guard()
    with pytest.raises(ConfigError) as caught:
        score.judge_file(file, ["llamaguard"], guard, tmp_path / "out.jsonl")
    assert says in str(caught.value) and guard.entered == 0
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("in.jsonl", '\ufeff{"prompt": "a", "response": "b"}\n'),  # a spreadsheet's byte order mark
        ("in.json", '[{"prompt": "a", "response": "b"}]'),
        ("in.CSV", "prompt,response\na,b\n"),
    ],
)
def test_pairs_are_read_in_every_format_that_data_files_have(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    [pair] = read(tmp_path / name)
    assert (pair.request, pair.response) == ("a", "b")


def test_an_alpaca_row_is_judged_with_its_input(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"instruction": "Translate.", "input": "le chat", "output": "the cat"}\n')
    [pair] = read(tmp_path / "in.jsonl", "instruction", "output")
    assert (pair.request, pair.response) == ("Translate.\nle chat", "the cat")


def test_a_cut_emoji_is_refused_whichever_judge_reads_it_and_a_blank_answer_is_judged(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "response": ""}\n{"prompt": "a", "response": "cut \\ud83d"}\n')
    with pytest.raises(ConfigError, match=r"in\.jsonl, line 2: expected text in 'response', got half a character"):
        read(tmp_path / "in.jsonl")
    with pytest.raises(ConfigError, match="a folder"):
        read(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "response": ""}\n')
    assert read(tmp_path / "in.jsonl")[0].response == ""


def test_what_is_misnamed_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    guard = Guard()
    file = write(tmp_path / "in.jsonl", ROWS)
    for names, served, out, says in [
        (["lamaguard"], guard, "o", "Did you mean 'llamaguard'"),
        (["llamaguard"], None, "o", "--model"),
        (["keywords", "keywords"], None, "o", "different judges"),
        (["llamaguard:{"], guard, "o", "NAME:{JSON config}"),
        (['wildguard:{"question": "x"}'], guard, "o", "NAME:{JSON config}"),
        (["keywords"], None, "in.jsonl", "not a file of verdicts"),
    ]:
        with pytest.raises(ConfigError, match=says):
            score.judge_file(file, names, served, tmp_path / out)
    with pytest.raises(ConfigError, match="line 1 has no field 'truth'"):
        score.judge_file(file, ["llamaguard"], guard, tmp_path / "o", needed=["truth"])
    assert guard.entered == 0
    with pytest.raises(ConfigError, match=r"--positive yes: no line has it.*'compliance': 2, 'refusal': 3"):
        score.validate(judged(tmp_path, ["keywords"]), "label", ["yes"])
    with pytest.raises(ConfigError, match="no file"):
        read(tmp_path / "absent.jsonl")


def test_labels_that_are_not_text_are_named_as_json_writes_them(tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [{**row, "harmful": int(row["id"] == 2)} for row in ROWS])
    found = score.judge_file(file, ["keywords"], None, tmp_path / "o")
    assert score.validate(found, "harmful", ["1"])["judges"]["keywords"]["all"]["cells"] == [1, 1, 0, 3]


def test_a_judge_is_named_with_its_config() -> None:
    name, judge = parse_judge('wildguard:{"question": "refusal"}')
    assert name == "wildguard" and judge.config.question == "refusal"
