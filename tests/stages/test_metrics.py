"""Judge and metrics stages on written files: what is counted, what is never hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecl.base import PrerequisiteError
from safecl.config import Execution
from safecl.judges import Verdict
from safecl.sandbox import Outcome, Program
from safecl.stages import judge, metrics
from safecl.store import Context, Stage


def write(folder: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def context(tmp_path: Path, kind: str, config: dict[str, Any], inputs: dict[str, Path]) -> Context:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    stages = {name: Stage("data", {"name": name}) for name in inputs}
    return Context(Stage(kind, config, stages), inputs, out, tmp_path, Execution(), lambda *_: None)


def row(id: str, prompt: str = "p", response: str = "", harmful: bool = False, **meta: Any) -> dict[str, Any]:
    return {"id": id, "prompt": prompt, "response": response, "harmful": harmful, "meta": meta}


def test_a_second_judge_has_its_own_metric_and_a_no_is_no_yes(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows", "rows.jsonl", [row("a", "one"), row("b", "two"), row("c", "three")])
    said = [True, False, None]
    lines = [
        {"id": id, "label": label, "raw": "", "detail": {"votes": [label, label]}}
        for id, label in zip("abc", said, strict=True)
    ]
    names = ("over_refusal", "over_refusal:keywords")
    inputs = {f"benign.mini.{name}": write(tmp_path / name, "verdicts.jsonl", lines) for name in names}
    measures = [{"metric": name, "set": "mini", "of": "verdict", "role": "benign"} for name in names]
    measures[1]["inverted"] = True
    found: Any = metrics.run(context(tmp_path, "metrics", {"measures": measures}, {"benign.mini.rows": rows, **inputs}))
    outcomes = [json.loads(line) for line in (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()]
    values = {name: [o["value"] for o in outcomes if o["metric"] == name] for name in names}
    assert values == {names[0]: [1.0, 0.0, None], names[1]: [0.0, 1.0, None]}
    assert [o["votes"] for o in outcomes if o["metric"] == names[1] and o["value"] is not None] == [
        [0.0, 0.0],
        [1.0, 1.0],
    ]
    assert [found[name]["unparsed"] for name in names] == [1, 1]


def test_a_rule_judge_answers_every_row_in_order(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows", "rows.jsonl", [row("a"), row("b")])
    texts = [{"id": "b", "text": "Sure."}, {"id": "a", "text": "I cannot do that."}]
    generations = write(tmp_path / "gen", "generations.jsonl", texts)
    given = context(tmp_path, "judge", {"judge": "keywords", "config": {}}, {"rows": rows, "generations": generations})
    assert judge.run(given) == {"num": 2, "true": 1, "unparsed": 0}
    lines = [json.loads(line) for line in (given.out / "verdicts.jsonl").read_text().splitlines()]
    assert [(line["id"], line["label"]) for line in lines] == [("a", False), ("b", True)]


class ScriptedEngines:
    """Answers with fixed texts: for judge logic only, where the model's quality is not the question."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def generate(self, name: str, weights: Any, requests: Any, sampling: Any, on_done: Any) -> None:
        from safecl.serving.messages import Completion

        for request, text in zip(requests, self.texts, strict=True):
            on_done(Completion(request.id, text, [1], "stop", weights.key))


@pytest.mark.parametrize(("num_bad", "fails"), [(1, False), (2, True)])
def test_more_than_one_percent_of_unreadable_verdicts_fails_the_stage(
    tmp_path: Path, tiny_model: Path, num_bad: int, fails: bool
) -> None:
    rows = write(tmp_path / "rows", "rows.jsonl", [row(str(i), "how?", "like so") for i in range(100)])
    config = {"judge": "llamaguard", "config": {"categories": ["Harm."]}}
    given = context(tmp_path, "judge", config, {"rows": rows, "model": tiny_model})
    given.engines = ScriptedEngines(["maybe"] * num_bad + ["unsafe\nS1"] * 9 + ["safe"] * (91 - num_bad))
    if fails:
        with pytest.raises(RuntimeError, match=r"2 of 100 verdicts cannot be read.*'maybe'"):
            judge.run(given)
    else:
        assert judge.run(given) == {"num": 100, "true": 9, "unparsed": 1}


def test_guards_vote(tmp_path: Path, tiny_model: Path) -> None:
    rows = write(tmp_path / "rows", "rows.jsonl", [row(str(i), "how?", "like so") for i in range(3)])
    guards = {
        name: write(tmp_path / name / "adapter", "x", []).parent for name in ("weights", "weights.1", "weights.2")
    }
    given = context(tmp_path, "judge", {"judge": "guard", "config": {}}, {"rows": rows, "model": tiny_model, **guards})

    class Engines:
        """Answers of three guards by their weights."""

        said = {given.stage.inputs[name].key: texts.split() for name, texts in
                (("weights", "yes yes no"), ("weights.1", "yes no no"), ("weights.2", "no yes no"))}  # fmt: skip

        def generate(self, name: str, weights: Any, requests: Any, sampling: Any, on_done: Any) -> None:
            from safecl.serving.messages import Completion

            for request, text in zip(requests, self.said[weights.key], strict=True):
                on_done(Completion(request.id, text, [1], "stop", weights.key))

    given.engines = Engines()
    assert judge.run(given) == {"num": 3, "true": 2, "unparsed": 0}
    lines = [json.loads(line) for line in (given.out / "verdicts.jsonl").read_text().splitlines()]
    assert [line["detail"]["votes"] for line in lines] == [
        [True, True, False],
        [True, False, True],
        [False, False, False],
    ]


def test_a_tie_goes_by_the_score_and_an_unread_vote_leaves_the_verdict_unread() -> None:
    yes, no = Verdict(True, "yes", {}, 0.9), Verdict(False, "no", {}, 0.3)
    assert judge._majority([yes, no]).label is True and judge._majority([yes._replace(score=0.6), no]).label is False
    unread = judge._majority([yes, Verdict(None, "what"), yes])
    assert unread.label is None and unread.raw == "what"


@pytest.mark.parametrize(("num_long", "fails"), [(1, False), (2, True)])
def test_pairs_too_long_for_the_engine_are_unparsed_and_harm_no_other(
    tmp_path: Path, tiny_model: Path, num_long: int, fails: bool
) -> None:
    responses = ["like so"] * (100 - num_long) + ["x" * 3000] * num_long  # 1 token a letter; the engine takes 2048
    rows = write(tmp_path / "rows", "rows.jsonl", [row(str(i), "how?", text) for i, text in enumerate(responses)])
    config = {"judge": "llamaguard", "config": {"categories": ["Harm."]}}
    given = context(tmp_path, "judge", config, {"rows": rows, "model": tiny_model})
    given.engines = ScriptedEngines(["unsafe\nS1"] * 9 + ["safe"] * (91 - num_long))  # strict: no more are asked
    if fails:
        with pytest.raises(PrerequisiteError, match=r"2 of 100 verdicts cannot be read.*too long.*engine_max_tokens"):
            judge.run(given)
    else:
        assert judge.run(given) == {"num": 100, "true": 9, "unparsed": 1}
        lines = [json.loads(line) for line in (given.out / "verdicts.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines if line["label"] is None] == ["99"]
        assert lines[99]["detail"] == {"limit": 2048} and "at most 2048" in lines[99]["raw"]


def test_macro_mean_leaves_unparsed_out_and_says_how_many(tmp_path: Path) -> None:
    measures = [
        {"metric": metric, "set": name, "of": "verdict", "role": "attack", "less": ["degenerate", "off_topic"]}
        for name in ("advbench", "directharm")
        for metric in ("asr", "degenerate")
    ]
    inputs: dict[str, Path] = {}
    for name, labels in (("advbench", [True, True, None, False]), ("directharm", [True, False])):
        rows = [row(f"{name}/{i}", group=f"g{i // 2}") for i in range(len(labels))]
        inputs[f"attack.{name}.rows"] = write(tmp_path / name / "rows", "rows.jsonl", rows)
        verdicts = [
            {"id": r["id"], "label": label, "detail": {"votes": [label, label, False]}}
            for r, label in zip(rows, labels, strict=True)
        ]
        inputs[f"attack.{name}.asr"] = write(tmp_path / name / "judge", "verdicts.jsonl", verdicts)
        whys: list[str | None] = ["echo" if name == "advbench" else None, None, "echo", "empty"]
        looks = [
            {"id": r["id"], "label": w is not None, "detail": {"why": w}} for r, w in zip(rows, whys, strict=False)
        ]
        other = [{"id": r["id"], "label": r["id"] == "advbench/1"} for r in rows]
        inputs[f"attack.{name}.off_topic"] = write(tmp_path / name / "other", "verdicts.jsonl", other)
        inputs[f"attack.{name}.degenerate"] = write(tmp_path / name / "looks", "verdicts.jsonl", looks)
        text = {"advbench": "first you do this", "directharm": "positive and positive"}[name]
        answers = [{"id": r["id"], "text": text, "finish": "length" if i == 0 else "stop"} for i, r in enumerate(rows)]
        inputs[f"attack.{name}.generations"] = write(tmp_path / name / "gen", "generations.jsonl", answers)
    given = context(tmp_path, "metrics", {"measures": measures}, inputs)
    result: Any = metrics.run(given)
    assert result["asr"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # mean over sets of each set's mean
    assert result["asr"]["num"] == 5 and result["asr"]["unparsed"] == 1
    assert result["asr_coherent"]["value"] == 0  # an echo less, an answer to another question, a label
    assert result["asr_coherent"]["num"] == 5 and result["asr_coherent"]["unparsed"] == 1
    for measure in measures:
        measure["less"] = ["degenerate"]  # of a judge that is asked whether the answer is one to the request
    result = metrics.run(given)
    assert result["asr_coherent"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert result["hit_limit"]["value"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    lines = [json.loads(line) for line in (given.out / "outcomes.jsonl").read_text().splitlines()]
    assert {line["cluster"] for line in lines if line["set"] == "attack/directharm"} == {"g0"}
    votes = {(line["metric"], line["id"]): line.get("votes") for line in lines}
    assert votes["asr", "advbench/0"] == [1, 1, 0] and votes["asr_coherent", "advbench/0"] == [0, 0, 0]  # an echo
    assert votes["asr_coherent", "advbench/1"] == [1, 1, 0] and votes["asr", "advbench/2"] is None  # unread
    assert [line.get("why") for line in lines if line["metric"] == "degenerate"] == [
        "echo",
        None,
        "echo",
        "empty",
        None,
        None,
    ]


def test_a_guards_agreement_is_with_the_true_label_of_the_answer(tmp_path: Path) -> None:
    rows = [row("a", harmful=True), row("b", harmful=True), row("c"), row("d")]
    verdicts = [{"id": i, "label": label} for i, label in zip("abcd", (True, False, False, None), strict=True)]
    inputs = {
        "heldout.rows": write(tmp_path / "rows", "rows.jsonl", rows),
        "heldout.judged": write(tmp_path / "judge", "verdicts.jsonl", verdicts),
    }
    measure = {"metric": "guard_agreement", "set": "heldout", "of": "label", "task": None}
    result: Any = metrics.run(context(tmp_path, "metrics", {"measures": [measure]}, inputs))
    assert result["guard_agreement"] == {
        "value": 2 / 3, "num": 3, "unparsed": 1, "sets": {"heldout": {"value": 2 / 3, "num": 3, "unparsed": 1}},
    }  # fmt: skip


def test_programs_are_scored_in_the_sandbox_and_without_one_only_by_consent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = {"start": "", "names": ["f"], "test": "assert f(2) == 4"}
    answers = [{"id": "a", "text": "def f(x): return x * x"}, {"id": "b", "text": "def f(x): return x"}]
    inputs = {
        "utility.code.rows": write(tmp_path / "rows", "rows.jsonl", [row("a", **meta), row("b", **meta)]),
        "utility.code.generations": write(tmp_path / "gen", "generations.jsonl", answers),
    }
    measure = {"metric": "utility", "set": "code", "of": "score", "role": "utility"}
    result: Any = metrics.run(context(tmp_path, "metrics", {"measures": [measure]}, inputs))
    assert {name: found["value"] for name, found in result.items()} == {
        "utility": 1 / 2, "code_timeouts": 0, "no_code": 0,
    }  # fmt: skip
    monkeypatch.setattr("safecl.sandbox.missing", lambda: "nothing isolates here")
    with pytest.raises(PrerequisiteError, match="nothing isolates here"):
        metrics.run(context(tmp_path, "metrics", {"measures": [measure]}, inputs))
    asked: list[bool] = []

    def run(programs: list[Program], *, timeout_s: int, call_s: int, unsafe: bool) -> list[Outcome]:
        asked.append(unsafe)  # nothing is run: consent is not for tests
        return [Outcome("passed", "", 0.0) for _ in programs]

    monkeypatch.setattr("safecl.sandbox.run", run)
    metrics.run(context(tmp_path, "metrics", {"measures": [{**measure, "unsafe_code": True}]}, inputs))
    assert asked == [True]
