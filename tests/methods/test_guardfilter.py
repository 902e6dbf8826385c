from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecl import registry
from safecl.base import ConfigError
from safecl.methods.guardfilter import Guardfilter
from safecl.tasks import Row
from safecl.testing import world as contract
from safecl.testing.world import World
from tests.methods import reference


def test_it_trains_to_what_a_plain_loop_over_the_safe_rows_gives(world: World, tmp_path: Path) -> None:
    settings = contract.config("guardfilter", dropout=0.0)
    steps = reference.dealt(world, settings)
    lines = map(json.loads, (world.verdicts / "verdicts.jsonl").read_text().splitlines())
    safe = [line["id"] for line in lines if not line["label"]]
    assert sum(len(rows["user"]) for rows in steps) == round(1.5 * len(safe))

    def backward(model: Any, rows: dict[str, reference.Rows], _: object) -> None:
        reference.cross_entropy(model, rows["user"]).backward()

    start = contract.adapter(world.safe.parent)
    expected = reference.train(world, steps, backward)
    found = contract.train(world, tmp_path, settings)
    assert contract.gap(expected, found, start) < 1e-3
    facts = json.loads((tmp_path / "result" / "result.json").read_text())
    assert (facts["rows"], facts["filtered"]) == (len(safe), 23 - len(safe)) == (18, 5)


def test_rows_judged_harmful_or_not_read_are_left_out_and_none_left_is_an_error() -> None:
    rows = [Row(str(i), "q", "a", meta={"unsafe": label}) for i, label in enumerate((False, True, None, False))]

    def kept(unread: str, given: list[Row]) -> list[str]:
        return [row.id for row in Guardfilter(Guardfilter.Config(unread=unread)).rows(given, [])]

    assert kept("drop", rows) == ["0", "3"] and kept("keep", rows) == ["0", "2", "3"]
    with pytest.raises(ConfigError, match="none of 1 user rows safe"):
        kept("drop", [rows[1]])


def test_a_judge_whose_true_is_a_no_to_harm_is_refused_rather_than_read_the_wrong_way_round(tmp_path: Path) -> None:
    from tests.test_around import QUICKSTART, load
    from tests.test_around import Project as Opened

    (tmp_path / "fine.py").write_text(
        "from safecl.judges import Ask, Judge, Verdict\nclass Fine(Judge):\n    question = 'Is it fine?'\n"
        "    answers = {'harm': Ask(inverted=True)}\n    def rule(self, request, response):\n        return Verdict(True, '')\n"
    )
    given = [f"plugins=[{tmp_path / 'fine.py'}]", "evaluate.judges.asr=fine", f"execution.root={tmp_path}"]
    try:
        Opened(load(QUICKSTART, [*given, "methods=[{name: sft}]"]))
        for method in ("guardfilter", "grsap"):
            with pytest.raises(
                ConfigError, match=f"method '{method}': needs to know .* 'fine', the judge of asr, says True"
            ):
                Opened(load(QUICKSTART, [*given, f"methods=[{{name: {method}}}]", "execution.engine_max_tokens=4096"]))
    finally:
        registry.use([])
