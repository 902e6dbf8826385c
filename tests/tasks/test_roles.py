"""No prompt of one role has a twin in another, in the rows that a sweep's own data stages make."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from safecl.config import Execution, Sweep
from safecl.dtypes import resolved
from safecl.graph import Graph
from safecl.grid import cells
from safecl.project import load
from safecl.stages import data
from safecl.store import Context, Stage
from safecl.tasks import Row
from safecl.tasks._overlap import content_words, normalise
from safecl.templates import settle

SWEEPS = Path(__file__).parents[2] / "sweeps"
DATA = os.environ.get("SAFECL_DATA")


def made(stage: Stage, root: Path, folder: Path | None) -> list[Row]:
    """A data stage's rows, its excluded inputs made first. What needs a model is left out: answers, a guard's template."""
    out = root / stage.key
    if not out.exists():
        inputs = {name: below for name, below in stage.inputs.items() if name.startswith("exclude_")}
        for below in inputs.values():
            made(below, root, folder)
        out.mkdir()
        plain = Stage("data", {**stage.config, "guard": None}, inputs, stage.version)
        places = {name: root / below.key for name, below in inputs.items()}
        where = Execution(data_dir=None if folder is None else str(folder))
        data.run(Context(plain, places, out, out, where, lambda *_: None))
    return [Row(**json.loads(line)) for line in (out / "rows.jsonl").read_text().splitlines()]


def stages(graph: Graph) -> Iterator[tuple[str, Stage]]:
    """(role, data stage) of everything that a recipe trains on or measures."""
    yield "alignment", graph.safety_rows
    for name, below in graph.safety_rows.inputs.items():
        if name.startswith("answers_"):
            yield "alignment", below.inputs["rows"]
    yield "user", graph.user_rows
    yield "guard", graph.guards(graph.asr_judge)[0].inputs["rows"]
    agreement = graph.guard_agreement()
    assert agreement is not None
    yield "guard.heldout", agreement.metrics.inputs["heldout.rows"]
    for split in ("validation", "test"):
        for name, below in graph.evidence(split).metrics.inputs.items():
            if name.endswith(".rows"):
                yield f"{name.split('.')[0]}.{split}", below


def twins(first: set[str], second: set[str]) -> list[tuple[str, str]]:
    """Pairs equal in normal form or with a Jaccard similarity of content words of at least .6, by matrix product."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    a, b = sorted(first), sorted(second)
    words = CountVectorizer(analyzer=lambda text: [*content_words(text)], binary=True, dtype=np.int32).fit(
        [*a, *b, "word"]
    )
    at, bt = words.transform(a), words.transform(b)
    sizes_a, sizes_b = (np.asarray(m.sum(1)).ravel() for m in (at, bt))
    shared = (at @ bt.T).tocoo()
    either = sizes_a[shared.row] + sizes_b[shared.col] - shared.data
    alike = 5 * shared.data >= 3 * either
    found = {(a[i], b[j]) for i, j in zip(shared.row[alike], shared.col[alike], strict=True)}
    normal = {normalise(text): text for text in b}
    return sorted(found | {(text, normal[normalise(text)]) for text in a if normalise(text) in normal})


def whole(sweep: Sweep) -> Sweep:
    """The sweep with all rows of every set but the user's task."""

    def opened(value: object) -> object:
        if isinstance(value, dict):
            return {k: None if k in ("num_rows", "utility_rows") else opened(v) for k, v in value.items()}
        return [opened(item) for item in value] if isinstance(value, list | tuple) else value

    raw = resolved(sweep, "float32").model_dump(mode="json")
    return settle(Sweep(**{**raw, **{key: opened(raw[key]) for key in ("align", "evaluate", "tasks")}})).sweep


def check(sweep: Sweep, root: Path, folder: Path | None) -> dict[str, int]:
    """Number of prompts by role, after no twin was found in another role than two published test sets."""
    found = {}
    for task in {cell.recipe.task.task for cell in cells(sweep, folder)}:
        poisoned = (c for c in cells(sweep, folder) if c.recipe.method == "sft" and c.recipe.poison_ratio)
        [cell] = [c for c in poisoned if c.recipe.task.task == task]
        prompts: dict[str, set[str]] = {}
        phrases: dict[str, set[str]] = {}  # of SST-2: all of its prompts share an instruction
        for role, stage in stages(cell.job({}, 0, "final").graph):
            for row in made(stage, root, folder):
                role_of = "poison" if "/poison/" in row.id else role
                prompts.setdefault(role_of, set()).add(row.prompt)
                phrases.setdefault(role_of, set()).add(str(row.meta.get("sentence", row.prompt)))
        for one, other in combinations(prompts, 2):
            texts = phrases if {one, other} <= {"user", "utility.validation", "utility.test"} else prompts
            if {one, other} != {"attack.test", "benign.test"}:
                assert twins(texts[one], texts[other]) == [], (task, one, other)
        found |= {role: len(texts) for role, texts in prompts.items()}
    return found


def test_twins_are_seen() -> None:
    assert twins({"Steal a blue car?", "sing"}, {"steal a BLUE car", "dance"}) == [
        ("Steal a blue car?", "steal a BLUE car")
    ]
    assert twins({"alpha beta gamma"}, {"alpha beta gamma delta epsilon"})  # 3 of 5
    assert not twins({"alpha beta"}, {"alpha beta gamma delta"})  # 2 of 4
    assert twins({"how do i do it"}, {"How do I do it?"})  # equal, without a content word


def test_no_prompt_of_mini_has_a_twin_in_another_role(tmp_path: Path) -> None:
    found = check(whole(load(SWEEPS / "quickstart.yaml", [])), tmp_path, None)
    assert len(found) == 11 and min(found.values()) >= 60


@pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")
def test_no_prompt_of_the_real_data_has_a_twin_in_another_role(tmp_path: Path) -> None:
    assert DATA is not None
    found = check(whole(load(SWEEPS / "local_data.yaml", [f"execution.data_dir={DATA}"])), tmp_path, Path(DATA))
    assert found["attack.test"] == 920 and found["benign.test"] == 250  # published sets stay whole
    assert found["attack.validation"] >= 490 and found["poison"] >= 600 and found["alignment"] >= 1500
