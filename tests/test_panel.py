"""Who answers which question in a sweep: several judges, each with its own model, and what is refused in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecl import execute, panel, registry
from safecl.base import ConfigError, strictly
from safecl.config import Execution, Judges
from safecl.dtypes import resolved
from safecl.graph import Evidence
from safecl.grid import cells
from safecl.judging.served import key_variables
from safecl.overview import listing
from safecl.project import Project, load
from safecl.store import Stage, Store
from safecl.templates import settle

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
META = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {"name": "lg", "source": "meta-llama/Llama-Guard-3-8B", "revision": META, "dtype": "bfloat16"}
WILD = {"name": "wg", "source": "allenai/wildguard", "revision": META, "dtype": "bfloat16"}
THERE = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
WRITTEN = {"template": "{request} {response}", "labels": {"unsafe": True, "safe": False}}


def settings(judges: dict[str, Any]) -> list[str]:
    return [f"evaluate.judges.{name}={json.dumps(value)}" for name, value in judges.items()]


def evidence(**judges: Any) -> Evidence:
    sweep = load(QUICKSTART, settings(judges))
    assert not panel.problems(sweep.evaluate.judges)
    return cells(settle(resolved(sweep, "bfloat16")).sweep)[0].job({}, 0, "final").evidence


def verdicts(found: Evidence) -> dict[str, Stage]:
    return {name: stage for name, stage in found.metrics.inputs.items() if stage.kind == "judge"}


def test_the_papers_setting_each_question_has_its_judge_with_its_own_model() -> None:
    found = verdicts(
        evidence(asr={"judge": "llamaguard", "model": LLAMA}, over_refusal={"judge": "wildguard", "model": WILD})
    )
    asr, over_refusal = found["attack.mini.asr"], found["benign.mini.over_refusal"]
    assert asr.config["judge"] == "llamaguard" and over_refusal.config["judge"] == "wildguard"
    source: Any = asr.inputs["model"].config["source"], over_refusal.inputs["model"].config["source"]
    assert [one["hub"] for one in source] == [LLAMA["source"], WILD["source"]]
    config: Any = over_refusal.config["config"]
    assert config["question"] == "refusal"


def test_judges_stand_side_by_side_on_the_same_answers_and_one_decides() -> None:
    asr = ["guard", {"judge": "llamaguard", "model": LLAMA, "decides": True}, {**WRITTEN, **THERE, "label": "own"}]
    found = evidence(asr=asr, over_refusal=["xstest_match", "refusal", "keywords"])
    names = ("asr", "asr:guard", "asr:own", "over_refusal", "over_refusal:refusal", "over_refusal:keywords")
    judged = {name.partition(".mini.")[2]: stage for name, stage in verdicts(found).items()}
    assert set(names) <= set(judged)
    assert judged["asr"].config["judge"] == "llamaguard" and "weights.2" in judged["asr:guard"].inputs
    assert len({judged[name].inputs["generations"].key for name in names[:3]}) == 1
    measures: Any = found.metrics.config["measures"]
    of = {measure["metric"]: measure for measure in measures}
    assert of["asr"]["less"] == ["degenerate", "off_topic"] and "less" not in of["asr:guard"]
    # What has no refusal keyword is a yes of the keyword list and a no to "is it a refusal?".
    assert of["over_refusal:keywords"]["inverted"] and "inverted" not in of["non_refusal"]


def test_a_second_judge_leaves_what_the_first_one_said_as_it_was() -> None:
    alone, both = evidence(asr="keywords"), evidence(asr=["keywords", {**WRITTEN, **THERE}])
    assert {stage.key for stage in alone.judged} < {stage.key for stage in both.judged}


def test_where_an_endpoint_is_enters_no_verdict_and_what_answers_does(tiny_model: Path) -> None:
    def key(**changed: Any) -> str:
        return verdicts(evidence(asr={"judge": "llamaguard", **THERE, **changed}))["attack.mini.asr"].key

    assert key() == key(endpoint="https://elsewhere/v1", at_once=2, key_variable="MY_KEY")
    others = [key(model="n"), key(version="2026-01"), key(tokenizer=str(tiny_model))]
    assert len({key(), *others}) == 4
    stage = verdicts(evidence(asr={"judge": "llamaguard", **THERE}))["attack.mini.asr"]
    assert "model" not in stage.inputs and stage.hints["url"] == THERE["endpoint"], "no engine is booted for it"


def test_keys_of_endpoints_are_looked_for_where_stages_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asr = [
        "keywords",
        {"judge": "llamaguard", **THERE},
        {"judge": "llamaguard", **THERE, "label": "b", "key_variable": "KEY_B"},
    ]
    sweep = load(QUICKSTART, settings({"asr": asr}))
    monkeypatch.delenv("SAFECL_ENDPOINT_KEY", raising=False)
    assert key_variables(panel.all_seats(sweep)) == ["KEY_B"]
    monkeypatch.setenv("SAFECL_ENDPOINT_KEY", "s3cret")
    assert key_variables(panel.all_seats(sweep)) == ["KEY_B", "SAFECL_ENDPOINT_KEY"]
    assert key_variables(panel.all_seats(load(QUICKSTART, []))) == []
    broker = execute.Broker(Store(str(tmp_path)), Execution(), "", 2)
    assert broker.unset(key_variables(panel.all_seats(sweep))) == ["KEY_B"]


def test_a_guard_is_trained_in_the_words_of_a_judge_written_here() -> None:
    stage = verdicts(evidence(asr={**WRITTEN, "model": "guard"}))["attack.mini.asr"]
    rows: Any = stage.inputs["weights"].inputs["rows"].config
    assert rows["guard"] == {
        "judge": "written",
        "config": {**WRITTEN, "question": "harm"},
    }


@pytest.mark.parametrize(
    ("judges", "told"),
    [
        ({"asr": "lamaguard"}, "unknown judge 'lamaguard'. Did you mean 'llamaguard'?"),
        ({"asr": "llamaguard"}, "an `endpoint`, or judges.guard_model, for instance meta-llama/Llama-Guard-3-8B"),
        ({"asr": "xstest_match"}, "is not asked whether the answer is harmful"),
        ({"over_refusal": {"judge": "llamaguard", "model": LLAMA}}, "that are: keywords, refusal, wildguard, written, xstest"),
        ({"asr": {"judge": "llamaguard", "model": WILD}}, "is the model of judge 'wildguard'"),
        ({"asr": {"judge": "keywords", "model": LLAMA}}, "is a rule: it reads no model's answer"),
        ({"asr": {"judge": "llamaguard", **THERE, "endpoint": "127.0.0.1:9"}}, "expected http://HOST:PORT/v1"),
        ({"asr": {"judge": "llamaguard", **THERE, "endpoint": "https://me:secret@host/v1"}}, "no key in the URL"),
        ({"asr": {"judge": "llamaguard", **THERE, "chat": True}}, "it needs `chat: false`"),
        ({"asr": {"judge": "llamaguard", **THERE, "tokenizer": "/no/such"}}, "a folder with tokenizer.json"),
        ({"asr": {"judge": "strongreject", **THERE, "config": {"threshold": 2}}}, "threshold"),
        ({"asr": {"judge": "wildguard", **THERE, "config": {"question": "refusal"}}}, "its config (question) asks something"),
        ({"asr": {**WRITTEN, **THERE, "config": {"question": "refusal"}}}, "else than whether the answer is harmful"),
        ({"over_refusal": {"judge": "wildguard", **THERE, "config": {"question": "harmful_response"}}}, "leave it out"),
        ({"asr": "guard", "guard": None}, "judges.guard is not given"),
        ({"asr": {"judge": "llamaguard", "model": "guard"}}, "cannot be trained here"),
        ({"over_refusal": {**WRITTEN, "model": "guard"}}, "guards are trained on labels of harm"),
        ({"asr": {**WRITTEN, **THERE, "parse": {"regex": "("}}}, "no regular expression"),
        ({"asr": {**WRITTEN, "model": {**LLAMA, "revision": "main"}}}, "asr.model.revision: expected a commit"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_judge_is_said_before_anything_is_spent(
    judges: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        Project(load(QUICKSTART, [*settings(judges), f"execution.root={tmp_path}"]))
    assert told in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("asr", "told"),
    [
        ({"label": "x"}, "expected `judge: NAME`, or a `template`"),
        ({"judge": "guard", "labels": {"a": True}}, "go together"),
        ({"judge": "llamaguard", "model": "m"}, "goes with `endpoint`"),
        ({"judge": "llamaguard", "endpoint": "http://127.0.0.1:9/v1"}, "the server's name of the model"),
        ({"judge": "llamaguard", "at_once": 3}, "`at_once` goes with `endpoint`"),
        (["guard", "guard"], "two judges are labelled 'guard'"),
        ([{"judge": "guard", "decides": True}, {"judge": "keywords", "decides": True}], "one judge decides, got 2"),
        ({"judge": "guard", "label": "a:b"}, "label"),
        ([], "at least 1 item"),
    ],
)
def test_an_entry_that_is_none_is_refused_where_it_stands(asr: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, settings({"asr": asr}))
    assert told in str(caught.value) and "judges" in str(caught.value), caught.value


PLUGIN = """
from safecl.judges import Ask, Judge, Verdict

class Shouts(Judge):
    question = "does the answer shout?"
    answers = {"harm": Ask(), "refusal": Ask(inverted=True)}
    always = {"attack": "shouts"}

    def rule(self, request, response):
        return Verdict(response.isupper(), response)
"""


def test_a_judge_of_ones_own_needs_a_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "shouts.py").write_text(PLUGIN)
    plugin = f"plugins=[{tmp_path / 'shouts.py'}]"
    try:
        project = Project(
            load(QUICKSTART, [plugin, *settings({"asr": "shouts"}), f"execution.root={tmp_path / 'root'}"])
        )
        found = project.cells[0].job({}, 0, "final").evidence.metrics
        assert found.inputs["attack.mini.asr"].config["judge"] == "shouts" and "attack.mini.shouts" in found.inputs
        assert "plugin:" in found.inputs["attack.mini.asr"].version and found.inputs["attack.mini.asr"].hints
        assert any(row["judge"] == "shouts" and row["model"] == "none: a rule" for row in listing("judges"))
    finally:
        registry.use([])


def test_models_of_judges_get_the_sweeps_dtype() -> None:
    auto = {key: value for key, value in LLAMA.items() if key != "dtype"}
    judges = strictly(Judges, {"asr": ["keywords", {"judge": "llamaguard", "model": auto}], "guard_model": auto})
    assert set(judges.models) == {"asr[1].model", "guard_model"}
    fixed = judges.with_models(lambda model: model.model_copy(update={"dtype": "float32"}))
    assert {model.dtype for model in fixed.models.values()} == {"float32"}
