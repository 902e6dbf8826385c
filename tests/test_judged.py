"""What is told of the judge of harm, and that a guard no better than chance makes no ASR."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from safecl import overview, stats
from safecl.report import page, tables


def judged_by(asr: str, quality: stats.Quality | None = None) -> Any:
    """As much of a project as its judge's facts are read from."""
    sweep = SimpleNamespace(evaluate=SimpleNamespace(judges=SimpleNamespace(asr=asr)))
    return SimpleNamespace(sweep=sweep, guard_quality=lambda: quality)


def test_the_judges_agreement_is_told_with_intervals_and_each_prompt_counts_once() -> None:
    def row(method: str, task: str, poison: float | None, value: float | None) -> dict[str, Any]:
        told = {} if value is None else {"guard_rule_agreement": {"value": value, "num": 10}}
        return {"model": "m", "method": method, "task": task, "poison": poison, "metrics": told, "seeds": [0]}

    # Base stands below every task with the same answers: 10 of its and 2 x 10 of sft's, to 10 prompts.
    rows = [row("base", task, None, 1.0) for task in ("sst2", "gsm8k")] + [
        row("sft", task, 0.1, 0.4) for task in ("sst2", "gsm8k")
    ]
    low, high = (f"{x:.1%}" for x in stats.wilson(6, 10)[1:])
    assert (
        overview._agreement(judged_by("guard"), rows)
        == f"agrees with an independent rule on 30 attack answers in 60.0% [{low}, {high}]"
    )
    assert overview._agreement(judged_by("guard"), [row("der", "sst2", 0.1, None)]) == ""
    assert overview._agreement(judged_by("keywords"), rows) == "", "two rules that agree are no evidence"
    told = overview._agreement(judged_by("guard", guard(18, 20, 18, 20)), [])
    assert told.startswith("agrees with the labels of 40 held-out pairs in 90.0% [") and "kappa 0.80 [" in told


def guard(hits: int, harmful: int, passes: int, harmless: int) -> stats.Quality:
    truth = [True] * harmful + [False] * harmless
    said = [True] * hits + [False] * (harmful - hits) + [False] * passes + [True] * (harmless - passes)
    return stats.quality(truth, said, range(len(truth)))


@pytest.mark.parametrize(
    ("quality", "doubtful"),
    [
        (None, False),  # none is trained here
        (guard(18, 20, 18, 20), False),
        (guard(12, 20, 11, 20), True),
        (guard(20, 20, 0, 20), True),  # "unsafe" whatever it reads
        (guard(2, 20, 2, 20), True),  # worse than chance
        (guard(2, 2, 1, 1), True),  # three pairs show nothing
    ],
)
def test_a_guard_no_better_than_chance_stops_the_asr(
    quality: stats.Quality | None, doubtful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed = {"num": 1, "agree": {"value": 1.0}, "kappa": None}

    def rows() -> list[dict[str, Any]]:
        metrics = {name: {"value": 0.25, "num": 40} for name in ("asr", "asr_coherent", "non_refusal", "utility")}
        told = {"model": "m", "task": "t", "method": "sft", "poison": 0.1, "seeds": [0], "metrics": metrics, "note": ""}
        return [{**told, "contrasts": {"asr": {}, "utility": {}}, "agreement": agreed}]

    monkeypatch.setattr(overview, "facts", lambda project, rows: tables.Facts(name="s"))
    project = judged_by("guard", quality)
    project.rows = rows
    for accepted in (False, True):
        found, facts = overview.readable(project, accepted)
        is_shown = accepted or not doubtful
        assert ("asr" in found[0]["metrics"]) is ("asr_coherent" in found[0]["metrics"]) is is_shown
        assert (found[0]["agreement"] is not None) is ("asr" in found[0]["contrasts"]) is is_shown
        assert "non_refusal" in found[0]["metrics"] and "utility" in found[0]["metrics"]
        assert bool(facts.doubt) is doubtful and ("printed because" in facts.doubt) is (doubtful and accepted)
        if doubtful:
            assert "BETTER THAN CHANCE" in tables.plain(found, facts).splitlines()[0]
            assert "BETTER THAN CHANCE" in tables.markdown(found, facts).splitlines()[2]
            assert page.html(found, facts).index("BETTER THAN CHANCE") < page.html(found, facts).index("<section>")
            asr = tables.cells(found[0], tables.columns(found, facts))[2]
            assert asr == ("25.0" if accepted else "-")
