"""The answers behind a report's numbers, in chunks: each prompt with every method's answer and its metrics.

A chunk holds the answers of all methods for one model, task, poison ratio, seed and set of prompts. Base and aligned are in
the chunks of every ratio. As JSON:

    {"metrics": ["asr", ..], "methods": ["base", ..], "prompts": [{"id", "prompt", "reference",
     "answers": [{"text", "cut", "values": [1.0, ..], "why"} or null, a method each]}]}

A value is null if the verdict is unparsed, and `-1` if the metric is not measured on such a prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from safecl import metrics
from safecl.base import Damaged
from safecl.graph import REFERENCES

if TYPE_CHECKING:
    from safecl.grid import Job
    from safecl.project import Project

ABSENT = -1
INLINE = 1_500_000  # most bytes of answers that a page itself holds


def answers(project: Project, job: Job) -> Iterator[dict[str, Any]]:
    """Yield every answer of a finished trial.

    Keys: `role`, `set`, `id`, `prompt`, `reference`, `answer`, `finish`, and `generation` (the key of the stage that holds the
    answer).
    """
    inputs = job.evidence.metrics.inputs
    for name, stage in inputs.items():
        prefix, _, what = name.rpartition(".")
        rows = inputs.get(f"{prefix}.rows")
        if what != "generations" or rows is None or not (project.store.has(stage) and project.store.has(rows)):
            continue
        role, _, set_ = prefix.partition(".")
        asked = {row["id"]: row for row in project.lines(rows, "rows")}
        for line in project.lines(stage, "generations"):
            row = asked[line["id"]]
            yield {"role": role, "set": set_, "id": line["id"], "prompt": row["prompt"], "reference": row["response"],
                   "before": row.get("before") or [], "answer": line["text"], "finish": line["finish"],
                   "generation": stage.key}  # fmt: skip


class _Read:
    """Answers of a job by set, with their metrics. Read once for all chunks that show them."""

    def __init__(self, project: Project, job: Job, shown: Collection[str]) -> None:
        self.values: dict[tuple[str, str], dict[str, Any]] = {}
        self.whys: dict[tuple[str, str], list[str]] = {}
        self.by_set: dict[str, list[dict[str, Any]]] = {}
        with suppress(Damaged):
            outcomes = project.outcomes(job)
            if outcomes is None:
                return
            for outcome in outcomes:
                where = (outcome["set"], outcome["id"])
                if outcome["metric"] in shown:
                    self.values.setdefault(where, {})[outcome["metric"]] = outcome["value"]
                    if outcome.get("why"):
                        self.whys.setdefault(where, []).append(outcome["why"])
            for line in answers(project, job):
                self.by_set.setdefault(f"{line['role']}/{line['set']}", []).append(line)

    def answer(self, set_: str, line: dict[str, Any], names: list[str]) -> dict[str, Any]:
        measured = self.values.get((set_, line["id"]), {})
        found = {"text": line["answer"], "values": [measured.get(name, ABSENT) for name in names]}
        if line["finish"] == "length":
            found["cut"] = True
        if why := self.whys.get((set_, line["id"])):
            found["why"] = ", ".join(dict.fromkeys(why))
        return found


def chunks(project: Project, shown: Collection[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (where, chunk) of the finished final trials. `shown`: the metrics that may be printed (see facts.readable)."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for cell, _, jobs, _ in project.finals():
        groups.setdefault((cell.recipe.model.name, cell.task), []).append((cell, jobs))
    for (model, task), members in groups.items():
        tuned = {cell.recipe.poison_ratio for cell, _ in members if cell.recipe.method not in REFERENCES}
        for seed in project.sweep.seeds:
            read: dict[Any, _Read] = {}
            for ratio in sorted(tuned) or [0.0]:
                having = []
                for cell, jobs in members:
                    is_reference = cell.recipe.method in REFERENCES
                    job = next((job for job in jobs if job.seed == seed), None)
                    if job is not None and (is_reference or cell.recipe.poison_ratio == ratio):
                        found = read.get(cell) or _Read(project, job, shown)
                        if is_reference:
                            read[cell] = found
                        if found.by_set:
                            having.append((cell.method, found))
                sets = dict.fromkeys(set_ for _, found in having for set_ in found.by_set)
                for set_ in sets:
                    where = {"model": model, "task": task, "poison": ratio, "seed": seed, "set": set_}
                    yield where, _chunk(set_, having)


def _chunk(set_: str, having: list[tuple[str, _Read]]) -> dict[str, Any]:
    having = [(method, found) for method, found in having if set_ in found.by_set]
    named = {name for _, found in having for (where, _), of in found.values.items() if where == set_ for name in of}
    names = [metric.name for metric in metrics.ordered(named)]
    prompts: dict[str, dict[str, Any]] = {}
    for place, (_, found) in enumerate(having):
        for line in found.by_set[set_]:
            entry = prompts.get(line["id"])
            if entry is None:
                said = [f"{role}: {text}" for role, text in line["before"]]
                prompt = "\n".join([*said, line["prompt"]])
                entry = {"id": line["id"], "prompt": prompt, "reference": line["reference"] or ""}
                prompts[line["id"]] = {**entry, "answers": [None] * len(having)}
            prompts[line["id"]]["answers"][place] = found.answer(set_, line, names)
    return {"metrics": names, "methods": [method for method, _ in having], "prompts": list(prompts.values())}
