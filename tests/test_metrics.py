"""What is measured is declared once: what it takes to add a metric, that an undeclared one is refused, and how names resolve."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from safecl import metrics, tasks
from safecl.base import ConfigError
from safecl.metrics import Asked, Metric
from safecl.project import Project, load
from safecl.report import forms, page, tables
from safecl.report.caption import caption
from safecl.report.facts import readable
from safecl.stages import metrics as stage
from tests.made_up import finish
from tests.report import golden
from tests.stages.test_metrics import context, row, write

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
PACKAGE = Path(metrics.__file__).parent


def long(asked: Asked) -> dict[str, float | None]:
    """One answer in words; unread where there is no text."""
    return {line["id"]: float(len(line["text"].split()) > 3) if line["text"] else None for line in asked.answers}


LONG = Metric("long", "over 3 words", "low", margin=0.1, roles=("attack", "benign", "utility"), of=long)


@pytest.fixture
def with_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one entry would add it."""
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, LONG))


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_gives_only_what_it_declares(name: str) -> None:
    kind = tasks.load(name)
    declared = metrics.of_task(kind)
    if "utility.test" in kind.SPLITS:
        given = kind().scores([], []).keys() | kind().likelihood_scores([], []).keys()
        assert given <= declared.keys()
    assert all(metric.roles == ("utility",) and metric.column for metric in declared.values())
    assert {each.name for each in kind.METRICS} <= set(metrics.names())


def measured(tmp_path: Path, task: str, scores: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = tasks.load(task)
    monkeypatch.setattr(kind, "scores", lambda self, rows, texts: {name: [v] for name, v in scores.items()})
    inputs = {
        f"utility.{task}.rows": write(tmp_path / "rows", "rows.jsonl", [row("a")]),
        f"utility.{task}.generations": write(tmp_path / "gen", "generations.jsonl", [{"id": "a", "text": "x"}]),
    }
    measure = {"metric": "utility", "set": task, "of": "score", "role": "utility"}
    return stage.run(context(tmp_path, "metrics", {"measures": [measure]}, inputs))


def test_a_metric_that_a_task_does_not_declare_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(tmp_path, "sst2", {"utility": 1.0, "invalid": 0.0}, monkeypatch)["invalid"]["value"] == 0
    told = r"task 'sst2' measures speed, which it does not declare: expected Metric\('speed', ...\) among the METRICS of Sst2"
    with pytest.raises(ConfigError, match=told):
        measured(tmp_path, "sst2", {"utility": 1.0, "speed": 0.5}, monkeypatch)
    for outside in ("gold_nll", "asr"):  # another's
        with pytest.raises(ConfigError, match=outside):
            measured(tmp_path, "sst2", {"utility": 1.0, outside: 0.5}, monkeypatch)
    verdicts = write(tmp_path / "judged", "verdicts.jsonl", [{"id": "a", "label": True}])
    inputs = {"attack.mini.toxic": verdicts, "attack.mini.rows": write(tmp_path / "rows", "rows.jsonl", [row("a")])}
    measure = {"metric": "toxic", "set": "mini", "of": "verdict", "role": "attack"}
    with pytest.raises(ConfigError, match="unknown metric 'toxic'"):
        stage.run(context(tmp_path, "metrics", {"measures": [measure]}, inputs))


def test_two_tasks_may_share_a_name_only_for_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    same, other = tasks.load("sst2").METRICS[-1], Metric("invalid", "invalid", "high")
    monkeypatch.setattr(tasks.load("mini"), "METRICS", (same,))
    assert metrics.of("invalid").better == "low"
    monkeypatch.setattr(tasks.load("mini"), "METRICS", (other,))
    with pytest.raises(
        ConfigError, match="task 'sst2' declares metric 'invalid', which is declared otherwise elsewhere"
    ):
        metrics.of("invalid")


def test_another_judges_share_is_the_decisions_metric_under_its_own_name() -> None:
    other = metrics.of("asr:wildguard")
    asr = metrics.of("asr")
    assert (other.column, other.title, other.name) == ("ASR (wildguard)", "ASR (wildguard)", "asr:wildguard")
    assert (other.better, other.margin, other.bounds, other.roles) == (asr.better, asr.margin, asr.bounds, asr.roles)
    assert asr.header({"asr": "guard"}) == "ASR (guard)" and asr.title == "ASR"
    assert metrics.decided_by("asr", ["asr", "asr:wildguard", "asr_coherent", "utility", "guard_rule_agreement"]) == [
        "asr", "asr_coherent", "guard_rule_agreement",
    ]  # fmt: skip
    names = [
        "utility",
        "gold_nll",
        "off_topic",
        "over_refusal:refusal",
        "asr_coherent",
        "asr:wildguard",
        "over_refusal",
        "asr",
    ]
    assert [metric.name for metric in metrics.ordered(names)] == [
        "asr", "asr:wildguard", "asr_coherent", "off_topic", "over_refusal", "over_refusal:refusal", "utility", "gold_nll",
    ]  # fmt: skip
    for wrong in ("utility:wildguard", "asr:", "assr:wildguard"):
        with pytest.raises(ConfigError, match="unknown metric"):
            metrics.of(wrong)


def test_another_judges_share_stands_beside_the_decision_and_is_tested_alone() -> None:
    """Its contrasts are a family of their own: those of the decision are as they were."""
    every = [golden.outcomes("gsm8k", method, share) for method, share in (("sft", 0.8), ("der", 0.05), ("ewc", 0.4))]
    table: list[Any] = [
        {"model": "m", "task": "t", "poison": 0.1, "method": name, "seeds": [0, 1, 2], "metrics": {}}
        for name in ("sft", "der", "ewc")
    ]
    alone = [dict(each) for each in table]
    golden.contrast(alone, [{"asr": found["asr"]} for found in every])
    both = [{"asr": found["asr"], "asr:wildguard": found["over_refusal"]} for found in every]
    golden.contrast(table, both)
    assert [r["contrasts"]["asr"] for r in table] == [r["contrasts"]["asr"] for r in alone]
    assert table[1]["contrasts"]["asr:wildguard"]["sft"]["p"] <= 1
    for told, found in zip(table, both, strict=True):
        told["metrics"] = {name: golden.entry(name, of_seed) for name, of_seed in found.items()}
    assert tables.blocks(table, golden.FACTS)[0].header[2:4] == ["ASR (guard)", "ASR (wildguard)"]


def test_one_entry_adds_a_metric_to_every_table_plot_and_page(tmp_path: Path, with_long: None) -> None:
    settings = ["methods=[{name: sft}, {name: der}]", "poison.ratios=[0.1]", "models.0.dtype=float32", "seeds=[0, 1]"]
    settings += ["evaluate.judges.asr=keywords", f"execution.root={tmp_path}"]
    plain = Project(load(QUICKSTART, settings))
    project = Project(load(QUICKSTART, [*settings, "evaluate.metrics=[long]"]))
    assert "long" not in str(plain.cells[0].job({}, 0, "final").evidence.metrics.config)
    finish(project)
    found, facts = readable(project)
    sft = next(row for row in found if row["method"] == "sft")
    assert sft["metrics"]["long"]["num"] == 2 * 3 * 20 and set(sft["metrics"]["long"]["sets"]) == {
        "attack/mini", "benign/mini", "utility/mini",
    }  # fmt: skip
    assert "sft" in next(row for row in found if row["method"] == "der")["contrasts"]["long"]
    for text in (forms.plain(found, facts), forms.markdown(found, facts), page.html(found, facts)):
        assert "over 3 words" in text
    assert "over 3 words: lower is better" in forms.plain(found, facts) or "over 3 words" in caption(found, facts)[0]
    assert any("over 3 words: within 10" in line for line in caption(found, facts))
    assert '"long"' in forms.to_json(found, facts)
    bounded = [*settings, "evaluate.metrics=[long]", "search.objective.bounds={long: 0.2}"]
    assert Project(load(QUICKSTART, bounded)).cells
    with pytest.raises(ConfigError, match="'long' is no metric"):  # of this sweep
        Project(load(QUICKSTART, [*settings, "search.objective.bounds={long: 0.2}"]))


def test_what_a_sweep_names_is_part_of_its_metrics_stage_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(version: str) -> dict[str, set[str]]:
        monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS[:10], dataclasses.replace(LONG, version=version)))
        sweep = load(QUICKSTART, ["evaluate.metrics=[long]"] if version else [])
        found: dict[str, set[str]] = {}
        for each in Project(
            sweep.model_copy(update={"execution": sweep.execution.model_copy(update={"root": str(tmp_path)})})
        ).cells:
            for below in each.job({}, 0, "final").evidence.metrics.walk():
                found.setdefault(below.kind, set()).add(below.key)
        return found

    without, first, second = stages(""), stages("1"), stages("2")
    assert not without["metrics"] & first["metrics"] and not first["metrics"] & second["metrics"]
    assert {kind for kind in without if without[kind] != first[kind]} == {"metrics"}


def test_a_rule_reads_answers_and_verdicts_and_carries_the_votes_it_rests_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmful_and_long(asked: Asked) -> dict[str, float | None]:
        labels = {line["id"]: line["label"] for line in asked.verdicts["asr"]}
        return {
            id: None if labels[id] is None or value is None else value * labels[id] for id, value in long(asked).items()
        }

    both = Metric("both", roles=("attack",), of=harmful_and_long, rests_on=("asr",), votes_of="asr")
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, both, LONG))
    texts = {"a": "one two three four", "b": "one", "c": ""}
    votes = {"a": [True, False, True], "b": [True, True, True], "c": [None, True, True]}
    labels = {"a": True, "b": True, "c": None}
    verdicts = [{"id": i, "label": labels[i], "detail": {"votes": votes[i]}} for i in "abc"]
    inputs = {
        "attack.mini.rows": write(tmp_path / "rows", "rows.jsonl", [row(i) for i in "abc"]),
        "attack.mini.asr": write(tmp_path / "judged", "verdicts.jsonl", verdicts),
        "attack.mini.generations": write(
            tmp_path / "gen",
            "generations.jsonl",
            [{"id": i, "text": text, "finish": "stop"} for i, text in texts.items()],
        ),
    }
    measures = [
        {"metric": name, "set": "mini", "of": "rule", "role": "attack", "version": "1"} for name in ("both", "long")
    ]
    given = context(tmp_path, "metrics", {"measures": measures}, inputs)
    result: Any = stage.run(given)
    assert {name: (found["value"], found["num"], found["unparsed"]) for name, found in result.items()} == {
        "both": (0.5, 2, 1), "long": (0.5, 2, 1),
    }  # fmt: skip
    lines = [json.loads(line) for line in (given.out / "outcomes.jsonl").read_text().splitlines()]
    assert [line.get("votes") for line in lines] == [[1, 0, 1], [0, 0, 0], None, None, None, None]


def test_no_other_room_lists_metrics() -> None:
    """Three names or more within a few lines are a list."""
    names = [name for name in metrics.names() if name != "utility"]  # also a role
    for path in PACKAGE.rglob("*.py"):
        if path.name == "metrics.py" or path.parts[-2] in ("tasks", "judges"):
            continue
        text = re.sub(r'"""[\s\S]*?"""|#[^\n]*', "", path.read_text())
        places = sorted(found.start() for name in names for found in re.finditer(f'"{name}"', text))
        close = [a for a, b in zip(places, places[2:], strict=False) if b - a < 200]
        if path.parts[-2] == "config":  # the default objective: a setting, which a sweep file may change
            close = [place for place in close if "bounds: dict" not in text[place - 80 : place]]
        assert not close, f"{path.name}: {text[close[0] - 40 : close[0] + 200]}"


def test_the_report_of_made_up_outcomes_is_as_it_was() -> None:
    """After a change that is meant: `python -m tests.report.golden`."""
    for name, text in golden.forms().items():
        assert text == (golden.FOLDER / name).read_text(encoding="utf-8"), name
