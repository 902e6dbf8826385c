"""Commands that read leave a store as it is, to the byte, also beside a live driver; and what they say of it."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from safecl import cli, hardware, review_cli, upkeep
from safecl.hardware import Speed
from safecl.project import Project, load
from safecl.report.facts import facts
from safecl.report.rows import rows
from safecl.store import below
from tests.made_up import finish, put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
WRITING = {"run", "judge", "init", "promote", "submit", "cancel"}  # and all that `judge` has
OWN: dict[str, list[str]] = {
    "schema": [],  # what a verb takes, where it is not a sweep file
    "view": ["FILE", "--set", "SETTING", "--set", "DTYPE", "--out", "OUT"],
    "compare": ["FILE", "FILE", "--set", "SETTING", "--set", "DTYPE"],
    "ls": [],
    "show": ["KEY", "--root", "ROOT"],
    "export": ["KEY", "OUT", "--root", "ROOT"],
    "doctor": ["--root", "ROOT"],
    "logs": ["--root", "ROOT"],
    "report": ["FILE", "--set", "SETTING", "--set", "DTYPE", "--out", "OUT"],
}
VERBS = [c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback]  # type: ignore[attr-defined]


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in WRITING])
def test_a_reading_verb_changes_nothing_beside_a_live_driver(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: {"bfloat16": Speed(9, 9), "float32": Speed(9, 9)})
    monkeypatch.setattr(review_cli, "_serve", lambda server: server.server_close())  # else until Ctrl-C
    root = tmp_path / "root"
    dtype = "models.0.dtype=float32"
    driver = Project(load(QUICKSTART, [dtype, "poison.ratios=[0.1]", f"execution.root={root}"]))
    key = ""
    with driver.lease():
        upkeep.check_writable(driver.store, 0.0)
        for cell in driver.cells:
            if (study := driver.study(cell)) is not None:
                number, _ = study.ask()
            else:
                top = cell.job({}, 0, "final").evidence.metrics
                put(driver.store, [s for s in below([top], driver.store.has) if s.kind != "data"])  # plan reads rows
                key = top.key
        (root / "logs").mkdir()
        (root / "logs" / "one.log").touch()
        words = {
            "KEY": key[:12], "ROOT": str(root), "OUT": str(tmp_path / "out"), "FILE": str(QUICKSTART),
            "SETTING": f"execution.root={root}", "DTYPE": dtype,
        }  # fmt: skip
        before = contents(root)
        given = OWN.get(
            verb, ["FILE", "--set", "SETTING", "--set", "DTYPE", "--set", "search.objective.bounds={asr: 0.5}"]
        )
        try:
            cli.app([verb, *(words.get(word, word) for word in given)], standalone_mode=False)
        except Exception as error:  # what has no result yet may be refused
            assert verb in ("export", "label", "trace", "ui"), error
        after = {name: found for name, found in contents(root).items() if "lease-" not in name}  # its driver lives
        assert after == {name: found for name, found in before.items() if "lease-" not in name}
        assert not list(root.glob("tmp/*"))
    driver_study = next(found for cell in driver.cells if (found := driver.study(cell)) is not None)
    driver_study.tell(number, 0.7, {})  # as if nobody had looked


def test_a_study_whose_driver_died_while_it_wrote_is_read_without_undoing_it(tmp_path: Path) -> None:
    """SQLite leaves a journal that only a writer may play back; a reader needs what it gives."""
    settings = ["models.0.dtype=float32", "poison.ratios=[0.1]", f"execution.root={tmp_path}"]
    driver = Project(load(QUICKSTART, settings))
    cell = next(cell for cell in driver.cells if cell.space is not None)
    study: Any = driver.study(cell)
    number, params = study.ask()
    study.tell(number, 0.5, {"asr": -0.1})
    writer = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    writer.execute("PRAGMA cache_size=1")  # so that pages are written before the end
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("CREATE TABLE large (text)")
    writer.executemany("INSERT INTO large VALUES (?)", [("x" * 4000,)] * 50)
    writer.execute("UPDATE trials SET state = 'FAIL'")
    dead = tmp_path / "dead"
    dead.mkdir()
    for name in ("study.db", "study.db-journal"):
        (dead / name).write_bytes((tmp_path / name).read_bytes())
    writer.execute("ROLLBACK")
    writer.close()
    before = contents(dead)
    past = Project(load(QUICKSTART, [*settings[:-1], f"execution.root={dead}"])).past(cell)
    assert past is not None and [(trial.params, trial.value) for trial in past.complete()] == [(params, 0.5)]
    assert contents(dead) == before


def test_the_report_says_how_far_served_is_from_trained_and_when_that_is_no_rounding(tmp_path: Path) -> None:
    settings = ["methods=[{name: sft}]", "poison.ratios=[0.1]", "models.0.dtype=float32", f"execution.root={tmp_path}"]
    project = Project(load(QUICKSTART, [*settings, "evaluate.judges.asr=keywords"]))
    stages = finish(project)
    assert not any("served" in note for note in facts(project, rows(project)).notes)
    for gap, mean, says in (
        (3e-4, 2e-5, "differ by at most 0.0003 nats"),
        (2.5, 0.4, "is not the one that was trained"),
    ):
        asked = [s for s in stages if s.kind == "generate" and s.inputs["rows"].config["role"] == "attack.test"]
        for stage in [s for s in asked if "weights" in s.inputs]:
            file = tmp_path / "store" / "generate" / stage.key / "record.json"
            result = {"served_gap": gap, "served_mean": mean, "served_tokens": 190}
            file.write_text(json.dumps({**json.loads(file.read_text()), "result": result}))
        found = rows(project)
        assert [row["served"] and row["served"]["gap"] for row in found] == [None, gap, gap]  # base, aligned, sft
        [note] = [note for note in facts(project, found).notes if "trained and served" in note]
        assert says in note and f"of {2 * 190} tokens" in note


def test_a_damaged_row_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    settings = ["methods=[{name: sft}]", "poison.ratios=[0.1]", "models.0.dtype=float32", f"execution.root={tmp_path}"]
    project = Project(load(QUICKSTART, settings))
    finish(project)
    [sft] = [cell for cell in project.cells if cell.recipe.method == "sft"]
    stage = sft.job({}, project.sweep.seeds[0], "final").evidence.metrics
    folder = tmp_path / "store" / "metrics" / stage.key
    record = json.loads((folder / "record.json").read_text())
    record["files"] = {"outcomes.jsonl": (folder / "outcomes.jsonl").stat().st_size + 1}
    (folder / "record.json").write_text(json.dumps(record))
    began = time.monotonic()
    found = rows(Project(load(QUICKSTART, settings)))
    assert [bool(row["metrics"]) for row in found] == [True, True, False] and time.monotonic() - began < 30
    assert f"stage metrics {stage.key[:12]} is damaged: outcomes.jsonl has" in found[-1]["note"]
