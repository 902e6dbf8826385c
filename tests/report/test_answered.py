"""What the report says of a server that answered with another model than it was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from safecl.report.facts import answered_otherwise
from safecl.store import Stage


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ([["guard"], ["guard"]], []),
        ([[""], []], []),  # a server that does not say
        ([["other"]], ["The endpoint that was asked for 'guard' says that other answered."]),
        (
            [["guard"], ["guard", "newer"]],
            ["The endpoint that was asked for 'guard' says that guard and newer answered."],
        ),
    ],
)
def test_another_model_than_was_asked_for_is_said(by: list[list[str]], told: list[str]) -> None:
    stages = [Stage("judge", {"judge": "llamaguard", "remote": {"model": "guard"}, "n": n}) for n in range(len(by))]
    results = {stage.key: {"result": {"answered_by": names}} for stage, names in zip(stages, by, strict=True)}
    store = SimpleNamespace(has=lambda stage: True, record=lambda stage: results[stage.key])
    jobs = [
        SimpleNamespace(evidence=SimpleNamespace(judged=(stage, Stage("judge", {"judge": "keywords"}))))
        for stage in stages
    ]
    project: Any = SimpleNamespace(store=store, finals=lambda: [(None, {}, jobs, "")])
    assert answered_otherwise(project) == told
