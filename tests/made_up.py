"""A store that looks as if a sweep had run: for tests and benchmarks of what only reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safecl.project import Project
from safecl.store import Stage, Store

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
DER = "{name: der, config: {memory_size: 20}, search: {weight: {low: 0.1, high: 30.0}, memory_size: [10, 20]}}"
NUM_PROMPTS = 20  # outcomes of each set


def finish(project: Project, seconds: Callable[[Stage], float] = lambda stage: 10.0) -> list[Stage]:
    """Put every stage of a sweep (after `search`, if it has any) into its store; gives those stages.

    `seconds`: what each took.
    """
    made: dict[str, Stage] = {}
    tops = [job.evidence.metrics for _, _, jobs, _ in project.finals() for job in jobs]
    for top in (*tops, *project.guard_stages()):
        made |= {stage.key: stage for stage in top.walk()}
    put(project.store, [stage for stage in made.values() if not project.store.has(stage)], seconds)
    return list(made.values())


def search(project: Project, seconds: Callable[[Stage], float] = lambda stage: 10.0) -> None:
    """Finish every search of a sweep: the more of a parameter, the more useful and the less safe."""
    done: set[str] = set()
    project.store.local.mkdir(parents=True, exist_ok=True)
    for cell in project.cells:
        study: Any = project.study(cell)
        while study is not None and study.remaining:
            number, params = study.ask()
            stages = {stage.key: stage for stage in cell.trial(params).evidence.metrics.walk()}
            new = [stage for key, stage in stages.items() if key not in done and not project.store.has(stage)]
            put(project.store, new, seconds)
            done |= stages.keys()
            places = [
                value / form["high"] for (_, value), form in zip(sorted(params.items()), _forms(cell), strict=True)
            ]
            study.tell(number, sum(places) / len(places), {"asr": places[0] - 0.6, "over_refusal": -0.1})


def _forms(cell: Any) -> list[Any]:
    """Of each parameter, by name: its range, or as much of one as a choice has."""
    forms = [form for _, form in sorted(cell.space.items())]
    return [{"high": max(form)} if isinstance(form, list | tuple) else form for form in forms]


def put(store: Store, stages: Iterable[Stage], seconds: Callable[[Stage], float] = lambda stage: 10.0) -> None:
    """Put stages into a store, as if they had been run (without waiting for the disk)."""
    for number, stage in enumerate(stages):
        folder = store.local / "store" / stage.kind / stage.key
        folder.mkdir(parents=True)
        result: dict[str, Any] = {}
        if stage.kind == "metrics":
            outcomes = _outcomes(stage)
            (folder / "outcomes.jsonl").write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
            for metric in dict.fromkeys(outcome["metric"] for outcome in outcomes):
                values = [outcome["value"] for outcome in outcomes if outcome["metric"] == metric]
                result[metric] = {"value": sum(values) / len(values), "num": len(values), "unparsed": 0, "sets": {}}
        if stage.kind == "data":
            texts = [
                {"id": str(i), "prompt": f"ask {i} of <{stage.key[:4]}>", "response": "gold"}
                for i in range(NUM_PROMPTS)
            ]
            (folder / "rows.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        if stage.kind == "generate":
            answers = [
                {"id": str(i), "text": f"answer {i}: <b>{stage.key[:8]}</b>" + " word" * 3 * i}
                for i in range(NUM_PROMPTS)
            ]
            lines = (json.dumps({**answer, "finish": "stop", "num_tokens": 2}) + "\n" for answer in answers)
            (folder / "generations.jsonl").write_text("".join(lines))
        if stage.kind == "model":
            result = {"parameters": 135e6}
        if stage.kind == "finetune":
            (folder / "curves.jsonl").write_text("".join(f'{{"step": {i}, "loss": {9 - i}}}\n' for i in range(9)))
        record = {
            "key": stage.key,
            "kind": stage.kind,
            "config": dict(stage.config),
            "inputs": {name: other.key for name, other in stage.inputs.items()},
            "version": stage.version,
            "result": result,
            "seconds": seconds(stage),
            "created": f"2026-01-01T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}+00:00",
            "libraries": {"safecl": "0"},
            "files": {},
        }
        (folder / "record.json").write_text(json.dumps(record))


def _outcomes(stage: Stage) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    measures: Any = stage.config["measures"]
    for number, measure in enumerate(measures):
        names = [measure["metric"], *(["asr_coherent", "hit_limit"] if measure["metric"] == "asr" else [])]
        label = measure["set"] if measure["of"] == "label" else f"{measure['role']}/{measure['set']}"
        for i in range(NUM_PROMPTS):
            value = float(int(stage.key[i % 60 : i % 60 + 2], 16) * (number + 1) % 7 < 3)
            ids = {"set": label, "id": str(i), "cluster": str(i)}
            found += [{"metric": name, **ids, "value": value} for name in names]
    return found
