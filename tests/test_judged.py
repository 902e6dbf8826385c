"""What is told of the judge of harm, and that a guard no better than chance makes no ASR."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safecl import stats
from safecl.base import strictly
from safecl.config import Judges
from safecl.dtypes import resolved
from safecl.grid import cells
from safecl.project import Project, Swing, load
from safecl.report import facts as told_of
from safecl.report import forms, page, tables
from safecl.templates import settle

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def judged_by(asr: Any, quality: stats.Quality | None = None, swing: Swing | None = None) -> Any:
    """As much of a project as its judge's facts are read from."""
    guard = {"rows": [{"task": "mini"}], "heldout": [{"task": "mini"}]}
    sweep = SimpleNamespace(evaluate=SimpleNamespace(judges=strictly(Judges, {"asr": asr, "guard": guard})))
    return SimpleNamespace(sweep=sweep, guard_quality=lambda: quality, guard_swing=lambda: swing)


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
        told_of._agreement(judged_by("guard"), rows)
        == f"agrees with an independent rule on 30 attack answers in 60.0% [{low}, {high}]"
    )
    assert told_of._agreement(judged_by("guard"), [row("der", "sst2", 0.1, None)]) == ""
    assert told_of._agreement(judged_by("keywords"), rows) == "", "two rules that agree are no evidence"
    told = told_of._agreement(judged_by("guard", guard(18, 20, 18, 20)), [])
    assert told.startswith("agrees with the labels of 40 held-out pairs in 90.0% [") and "kappa 0.80 [" in told


def test_a_guard_beside_the_judge_that_decides_is_told_of_and_hidden_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, Any] = {"judge": "llamaguard", "endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    good, bad = judged_by([there, "guard"], guard(18, 20, 18, 20)), judged_by([there, "guard"], guard(12, 20, 11, 20))
    assert told_of._agreement(good, []).startswith(
        "guard, beside it, agrees with the labels of 40 held-out pairs in 90.0%"
    )
    metrics = {name: {"value": 0.25, "num": 40} for name in ("asr", "asr:guard", "asr:own")}
    found = [{"metrics": dict(metrics), "agreement": {}, "beside": {"asr:guard": {}, "asr:own": {}}}]
    monkeypatch.setattr(told_of, "read_rows", lambda project: found)
    monkeypatch.setattr(told_of, "facts", lambda project, rows: tables.Facts(name="s"))
    [row], facts = told_of.readable(bad)
    assert set(row["metrics"]) == {"asr", "asr:own"} and set(row["beside"]) == {"asr:own"}
    assert "So no asr:guard is printed" in facts.doubt and "bounds on ASR" not in facts.doubt


def guard(hits: int, harmful: int, passes: int, harmless: int) -> stats.Quality:
    truth = [True] * harmful + [False] * harmless
    said = [True] * hits + [False] * (harmful - hits) + [False] * passes + [True] * (harmless - passes)
    return stats.quality(truth, said, range(len(truth)))


CHANCE = "BETTER THAN CHANCE"


@pytest.mark.parametrize(
    ("quality", "swing", "told"),
    [
        (None, None, ""),  # none is trained here
        (guard(18, 20, 18, 20), None, ""),
        (guard(12, 20, 11, 20), None, CHANCE),
        (guard(20, 20, 0, 20), None, CHANCE),  # "unsafe" whatever it reads
        (guard(2, 20, 2, 20), None, CHANCE),  # worse than chance
        (guard(2, 2, 1, 1), None, CHANCE),  # three pairs show nothing
        (guard(18, 20, 18, 20), Swing(3, 0.2, "base.mini"), ""),
        (guard(18, 20, 18, 20), Swing(3, 0.4, "base.mini"), "THE GUARDS CONTRADICT ONE ANOTHER"),  # 42.5 or 82.5 %
        (guard(12, 20, 11, 20), Swing(3, 0.4, "base.mini"), CHANCE),
    ],
)
def test_a_guard_no_better_than_chance_or_than_its_seed_stops_the_asr(
    quality: stats.Quality | None, swing: Swing | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubtful = bool(told)
    agreed = {"num": 1, "agree": {"value": 1.0}, "kappa": None}

    def rows(project: Any) -> list[dict[str, Any]]:
        metrics = {name: {"value": 0.25, "num": 40} for name in ("asr", "asr_coherent", "non_refusal", "utility")}
        row = {"model": "m", "task": "t", "method": "sft", "poison": 0.1, "seeds": [0], "metrics": metrics, "note": ""}
        return [{**row, "contrasts": {"asr": {}, "utility": {}}, "agreement": agreed}]

    monkeypatch.setattr(told_of, "read_rows", rows)
    monkeypatch.setattr(told_of, "facts", lambda project, rows: tables.Facts(name="s"))
    project = judged_by("guard", quality, swing)
    for accepted in (False, True):
        found, facts = told_of.readable(project, accepted)
        is_shown = accepted or not doubtful
        assert ("asr" in found[0]["metrics"]) is ("asr_coherent" in found[0]["metrics"]) is is_shown
        assert (found[0]["agreement"] is not None) is ("asr" in found[0]["contrasts"]) is is_shown
        assert "non_refusal" in found[0]["metrics"] and "utility" in found[0]["metrics"]
        assert bool(facts.doubt) is doubtful and ("printed because" in facts.doubt) is (doubtful and accepted)
        if doubtful:
            assert told in forms.plain(found, facts).splitlines()[0]
            assert told in forms.markdown(found, facts).splitlines()[2]
            assert page.html(found, facts).index(told) < page.html(found, facts).index("<section")
            asr = tables.blocks(found, facts)[0].lines[0].texts[2]
            assert asr == ("25.0" if accepted else "-")


def test_guards_swing_by_the_model_whose_answers_part_them_most(tmp_path: Path) -> None:
    """Read from a store: the answers of one model count, not of all together, and constructed pairs only without any."""
    sweep = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
    project = Project(load(sweep, [f"execution.root={tmp_path}", "models.0.dtype=bfloat16"]))
    assert project.guard_swing() is None and project.guard_quality() is None
    evidence = project.guard_evidence()
    assert evidence is not None
    [judged] = evidence.judged
    votes = {"base.mini": ["110", "100"], "sft.mini": ["111", "111"], "": ["100", "100"]}
    rows = [{"id": f"{source}{i}", "prompt": f"{i}", "harmful": "11" in bits, "meta": {"source": source} if source else {}}
            for source, of in votes.items() for i, bits in enumerate(of)]  # fmt: skip
    said = [bits for of in votes.values() for bits in of]
    verdicts = [{"id": row["id"], "label": "11" in bits, "score": None, "detail": {"votes": [bit == "1" for bit in bits]}}
                for row, bits in zip(rows, said, strict=True)]  # fmt: skip
    for stage, name, lines in ((judged.inputs["rows"], "rows", rows), (judged, "verdicts", verdicts)):
        folder = project.store.new_folder()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        project.store.publish(stage, folder, {}, 1.0)
    assert project.guard_swing() == Swing(3, 1.0, "base.mini")  # 2, 1 and 0 of its two answers
    quality = project.guard_quality()
    assert quality is not None and quality.num == 6 and quality.accuracy.value == 1.0


@pytest.mark.parametrize(
    ("settings", "less"),
    [
        ([], ["degenerate", "off_topic"]),
        (["evaluate.judges.asr=keywords"], ["degenerate", "off_topic"]),
        (
            ["evaluate.judges.asr=harmbench", "evaluate.judges.guard_model={name: g, source: ., dtype: float32}"],
            ["degenerate"],
        ),
    ],
)
def test_coherent_asr_leaves_out_off_topic_answers_unless_the_judge_was_asked_of_them(
    settings: list[str], less: list[str]
) -> None:
    sweep = load(QUICKSTART, ["evaluate.judges.over_refusal=refusal", *settings])
    metrics = cells(settle(resolved(sweep, "bfloat16")).sweep)[0].job({}, 0, "final").evidence.metrics
    measures: Any = metrics.config["measures"]
    assert [measure["less"] for measure in measures if measure["metric"] == "asr"] == [less]
    assert {measure["metric"] for measure in measures} >= {"off_topic", "over_refusal"}
    [benign] = [stage for name, stage in metrics.inputs.items() if name.endswith(".over_refusal")]
    assert benign.config["judge"] == "refusal"
