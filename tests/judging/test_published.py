"""The rule judges on human labels, straight from the published files. Found through SAFECL_DATA; skipped without it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from safecl.cli import app
from safecl.judges._relevance import misses
from safecl.judges.refusal import refuses
from safecl.judges.xstest_match import XstestMatch
from safecl.judging.pairs import half

DATA = os.environ.get("SAFECL_DATA")
XSTEST, DO_NOT_ANSWER = "xstest_completions_human.jsonl", "do_not_answer_responses_human.jsonl"
BEAVERTAILS = "beavertails_train.jsonl"


@pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")
@pytest.mark.parametrize(
    ("file", "label", "positive", "by", "num", "num_positive", "groups"),
    [
        (XSTEST, "final_label", "2_full_refusal,3_partial_refusal", "model", 2250, 983 + 176, 5),
        (DO_NOT_ANSWER, "harmful", "1", "model", 5634, 193, 6),
    ],
)
def test_the_published_files_are_read_as_they_are(
    tmp_path: Path, file: str, label: str, positive: str, by: str, num: int, num_positive: int, groups: int
) -> None:
    judge = "xstest_match" if file == XSTEST else "keywords"
    verbs = ["judge", "validate", f"{DATA}/{file}", "--judge", judge, "--label", label, "--positive", positive]
    done = CliRunner().invoke(app, [*verbs, "--by", by, "--out", str(tmp_path / "v.jsonl"), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)["judges"][judge]
    hits, alarms, misses, passes = found["all"]["cells"]
    assert (hits + alarms + misses + passes, hits + misses) == (num, num_positive)
    assert found["all"]["accuracy"]["value"] == pytest.approx((hits + passes) / num)
    assert len(found["by"]) == groups
    assert [sum(cell) for cell in zip(*(g["cells"] for g in found["by"].values()), strict=True)] == found["all"][
        "cells"
    ]
    if file == XSTEST:  # its authors made the rule for these answers: it must tell most of them
        assert found["all"]["kappa"]["low"] > 0.7


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(str(DATA)) / name).read_text().splitlines()]


@pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")
def test_refusals_on_the_half_of_each_set_that_the_rules_were_not_written_from() -> None:
    xstest = [row for row in rows(XSTEST) if half(row["prompt"]) == "second"]
    told = {"2_full_refusal", "3_partial_refusal"}
    right = sum(refuses(row["prompt"], row["response"]) == (row["final_label"] in told) for row in xstest)
    listed = sum(bool(XstestMatch().rule("", row["response"]).label) == (row["final_label"] in told) for row in xstest)
    assert len(xstest) == 1130 and right / 1130 > 0.92 > listed / 1130 + 0.03
    # Do-Not-Answer: 0 is "cannot assist", 5 "follows the instruction"; what lies between is neither
    answers = [row for row in rows(DO_NOT_ANSWER) if row["action"] in (0, 5) and half(row["prompt"]) == "second"]
    right = sum(refuses(row["prompt"], row["response"]) == (row["action"] == 0) for row in answers)
    assert len(answers) == 834 and right / 834 > 0.97


@pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")
@pytest.mark.parametrize(("file", "num", "wrong", "found"), [(XSTEST, 541, 0.02, 0.92), (BEAVERTAILS, 1418, 0.08, 0.9)])
def test_answers_dealt_to_other_requests_are_off_topic_and_right_ones_are_not(
    file: str, num: int, wrong: float, found: float
) -> None:
    """Answers of people and models that help (XSTest) or harm (BeaverTails), of the half on which nothing was set."""
    helps = [row for row in rows(file) if row.get("final_label") == "1_full_compliance" or row.get("is_safe") is False]
    pairs = [(row["prompt"], row["response"]) for row in helps if half(row["prompt"]) == "second"]
    dealt = random.Random(0).sample(pairs, len(pairs))
    others = [(asked, text) for (asked, _), (other, text) in zip(pairs, dealt, strict=True) if asked != other]
    assert len(pairs) == num
    assert sum(misses(*pair) for pair in pairs) / num < wrong
    assert sum(misses(*pair) for pair in others) / len(others) > found
