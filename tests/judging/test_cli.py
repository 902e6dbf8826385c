"""`safecl judge` from the command line, by rule judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safecl import driver
from safecl.base import ConfigError
from safecl.cli import app
from safecl.project import Project, load
from safecl.store import Stage

QUICKSTART = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"


def test_score_and_validate_print_what_they_found(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [("Sorry", "no"), ("Sure", "yes"), ("Sorry", "yes")]
    file.write_text("".join(json.dumps({"q": "?", "a": a, "harm": harm}) + "\n" for a, harm in rows))
    fields = ["--prompt-field", "q", "--response-field", "a", "--out", str(tmp_path / "verdicts.jsonl")]
    done = CliRunner().invoke(app, ["judge", "score", str(file), "--judge", "keywords", *fields, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["judges"]["keywords"]["rate"]["value"] == pytest.approx(1 / 3)
    labels = ["--label", "harm", "--positive", "yes"]
    done = CliRunner().invoke(app, ["judge", "validate", str(file), "--judge", "keywords", *labels, *fields, "--json"])
    assert json.loads(done.stdout)["judges"]["keywords"]["all"]["cells"] == [1, 0, 1, 1]
    done = CliRunner().invoke(app, ["judge", "score", str(file), "--judge", "keywords", *fields])
    assert done.exit_code == 0 and "33.3%" in done.stdout


def test_options_that_do_not_go_together_are_said(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    for options, says in [
        (["--endpoint", "http://127.0.0.1:9/v1"], "--endpoint-model"),
        (["--endpoint", "u", "--endpoint-model", "m", "--model", "."], "--endpoint-model"),
        (["--tokenizer", "."], "--tokenizer goes with --endpoint"),
        (["--model", "./no/such/folder"], "is no folder"),
        (["--model", "meta-llama/Llama-Guard-3-8B"], "needs its commit"),
    ]:
        done = CliRunner().invoke(app, ["judge", "score", str(file), "--judge", "llamaguard", *options])
        assert isinstance(done.exception, ConfigError) and says in str(done.exception), options


def publish(project: Project, stage: Stage, name: str, lines: list[dict[str, object]]) -> None:
    folder = project.store.new_folder()
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    project.store.publish(stage, folder, {}, 0.0)


def test_train_tells_how_the_guard_agrees_with_held_out_labels(tmp_path: Path) -> None:
    project = Project(load(QUICKSTART, [f"execution.root={tmp_path}"]))
    evidence = project.guard_evidence(alone=True)
    assert evidence is not None
    [judged] = evidence.judged
    rows = [{"id": str(n), "prompt": f"p{n}", "harmful": n < 4} for n in range(10)]
    scores = [0.9, 0.8, 0.7, 0.2, 0.6, 0.1, 0.1, 0.1, 0.1, None]
    verdicts = [{"id": str(n), "label": None if s is None else s > 0.5, "score": s} for n, s in enumerate(scores)]
    publish(project, judged.inputs["rows"], "rows.jsonl", list(rows))
    publish(project, judged, "verdicts.jsonl", list(verdicts))
    publish(project, evidence.metrics, "outcomes.jsonl", [])
    found = driver.train_guard(project, print)  # everything is in the store: nothing runs
    assert found["guard"] == judged.inputs["weights"].key and judged.inputs["weights"].kind == "finetune"
    held_out = found["heldout"]
    assert (held_out["num"], held_out["skipped"]) == (9, 1)
    assert held_out["accuracy"]["value"] == pytest.approx(7 / 9)
    # Of 4 x 5 pairs of a harmful and another row the score orders all but one: .2 against .6.
    assert held_out["auroc"]["value"] == pytest.approx(19 / 20)


def test_train_needs_a_sweep_with_a_guard(tmp_path: Path) -> None:
    sweep = load(QUICKSTART, [f"execution.root={tmp_path}", "evaluate.judges.asr=keywords"])
    with pytest.raises(ConfigError, match="trains no guard"):
        driver.train_guard(Project(sweep), print)
