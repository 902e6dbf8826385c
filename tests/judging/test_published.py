"""The rule judges on human labels, straight from the published files. Found through SAFECL_DATA; skipped without it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from safecl.cli import app

DATA = os.environ.get("SAFECL_DATA")
XSTEST, DO_NOT_ANSWER = "xstest_completions_human.jsonl", "do_not_answer_responses_human.jsonl"


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
