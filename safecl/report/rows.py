"""The rows of a sweep's table, read only from the store: every metric with its interval, and contrasts between methods.

A row is `{"model", "task", "poison", "method", "params", "seeds", "metrics": {name: entry}, "contrasts": {name: ..},
"agreement", "seconds", "weights", "note", ...}`. An entry is `{"value", "low", "high", "num", "unparsed", "seeds"}`. With
several sets it also has `"sets"` and `"pooled"`; the entry of degenerate answers also has `"why"`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from safecl import metrics
from safecl.base import Damaged
from safecl.contrasts import contrasts, discordant, means
from safecl.crossed import intervals
from safecl.graph import REFERENCES
from safecl.report.searches import told
from safecl.stats import agreement as agreement_of
from safecl.stats import as_json
from safecl.trained import recorded

if TYPE_CHECKING:
    from safecl.grid import Cell, Job
    from safecl.project import Project
    from safecl.store import Stage

Outcomes = list[dict[str, Any]]


def rows(project: Project) -> list[dict[str, Any]]:
    """The table's rows: every metric with its interval over the finished seeds, and contrasts with the other rows of the same
    model, task and poison ratio."""
    table: list[dict[str, Any]] = []
    measured: list[dict[str, dict[int, Outcomes]]] = []  # for each row, outcomes by metric and seed
    finals = project.finals()
    for (cell, params, jobs, note), name in zip(finals, _names([cell for cell, *_ in finals]), strict=True):
        finished: dict[Job, Outcomes] = {}
        for job in jobs:
            try:
                if (outcomes := project.outcomes(job)) is not None:
                    finished[job] = outcomes
            except Damaged as error:
                note = f"{note}; seed {job.seed}: {error}".removeprefix("; ")
        measured.append(by_metric({job.seed: found for job, found in finished.items()}))
        entries = {name: found for name, of_seed in measured[-1].items() if (found := entry(name, of_seed)) is not None}
        recipe = cell.recipe
        row = {
            "model": recipe.model.name,
            "task": cell.task,
            "poison": None if recipe.method in REFERENCES else recipe.poison_ratio,
            "method": f"{cell.method}{name}",
            "kind": recipe.method,  # the method's own name, without the sweep's label
            "params": {**cell.defaults, **params},
            "memory": _memory(cell, params),
            "seeds": [job.seed for job in finished],
            "metrics": entries,
            "agreement": agreement(measured[-1]),
            "beside": _beside(measured[-1]),
            "seconds": sum(own_seconds(project, job) for job in finished),
            # Keys of the served weights, one for each seed; for `safecl export`.
            "weights": [final.key for job in finished if (final := job.graph.final) is not None],
            "note": note if finished else note or "not run yet",
            "search": None if cell.space is None else told(project, cell),
        }
        table.append({**row, **_behind(project, cell, list(finished))})
    contrast(table, measured)
    return table


def _memory(cell: Cell, params: Mapping[str, Any]) -> float | None:
    """Number of safety rows that the method keeps. None if it keeps none."""
    if cell.recipe.method in REFERENCES or not cell.memory_key:
        return None
    found = {**cell.defaults, **params}.get(cell.memory_key)
    return float(found) if isinstance(found, int | float) else None


def _names(cells: Sequence[Cell]) -> list[str]:
    """Suffixes that distinguish the rows of one cell: their number on its front. "" if the cell has one row."""
    return [f" #{cells[: i + 1].count(cell)}" if cells.count(cell) > 1 else "" for i, cell in enumerate(cells)]


def by_metric(of_seeds: Mapping[int, Outcomes]) -> dict[str, dict[int, Outcomes]]:
    """Group outcomes by metric and seed."""
    names = dict.fromkeys(outcome["metric"] for found in of_seeds.values() for outcome in found)
    return {
        name: {seed: [o for o in found if o["metric"] == name] for seed, found in of_seeds.items()} for name in names
    }


def entry(name: str, seeds: dict[int, Outcomes]) -> dict[str, Any] | None:
    """One metric of one row. None if no outcome was parsed.

    `value` is the mean over seeds of the macro mean over sets. With several sets, `sets` holds each set, and `pooled` is the
    mean over all prompts with equal weight.
    """
    read = [[o for o in of_seed if o["value"] is not None] for of_seed in seeds.values()]
    found = _interval(name, read)
    if found is None:
        return None
    found["unparsed"] = sum(map(len, seeds.values())) - found["num"]
    found["seeds"] = {str(seed): value for seed, value in means(seeds).items()}
    sets = dict.fromkeys(o["set"] for of_seed in read for o in of_seed)
    if len(sets) > 1:
        found["sets"] = {
            each: _interval(name, [[o for o in seed if o["set"] == each] for seed in read]) for each in sets
        }
        as_one = [[{**o, "set": "all", "cluster": f"{o['set']}: {o['cluster']}"} for o in seed] for seed in read]
        found["pooled"] = _interval(name, as_one)
    whys = [o["why"] for of_seed in read for o in of_seed if o.get("why")]
    return {**found, "why": {why: whys.count(why) for why in sorted(set(whys))}} if whys else found


def _interval(name: str, read: list[Outcomes]) -> dict[str, Any] | None:
    found = intervals(read, bounded=metrics.of(name).is_bounded)
    return None if found is None else {**found._asdict(), "num": sum(map(len, read))}


def agreement(
    measured: Mapping[str, dict[int, Outcomes]], decides: str = "asr", beside: str = "non_refusal"
) -> dict[str, Any] | None:
    """Agreement of two judges on the same answers of all seeds. None if no answer was read by both.

    Judges are named by their metrics (by default the judge of harm and the keyword list). In the intervals a prompt counts
    once, even if there are several seeds.
    """
    judge, listed = (
        {(seed, o["set"], o["id"]): o["value"] for seed, found in measured.get(name, {}).items() for o in found}
        for name in (decides, beside)
    )
    other = [listed[answer] for answer in judge]
    if all(None in pair for pair in zip(judge.values(), other, strict=True)):
        return None
    return as_json(agreement_of([*judge.values()], other, [answer[1:] for answer in judge]))


def _beside(measured: Mapping[str, dict[int, Outcomes]]) -> dict[str, Any]:
    """Agreement of each further judge of a question with the deciding judge, by the further judge's metric (`asr:LABEL`)."""
    names = [name for name in measured if ":" in name and name.partition(":")[0] in measured]
    return {name: agreement(measured, name.partition(":")[0], name) for name in names}


def contrast(table: list[dict[str, Any]], measured: Sequence[Mapping[str, dict[int, Outcomes]]]) -> None:
    """Add `contrasts` to the rows of methods, in place, for every metric that has a margin.

    The form is {metric: {"sft" | "best": Contrast, "mcnemar": {seed: counts and p}}}.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(table):
        if row["method"] not in REFERENCES:
            groups.setdefault((row["model"], row["task"], row["poison"]), []).append(i)
            row["contrasts"] = {}
    tested = [each.name for each in metrics.ordered(name for found in measured for name in found) if each.margin]
    for members in groups.values():
        for metric in tested:
            having = [i for i in members if metric in measured[i]]
            sft = next((i for i in having if _named(table[i]) == "sft"), None)
            found = contrasts(metric, [(_named(table[i]), measured[i][metric]) for i in having])
            for i, of_row in zip(having, found, strict=True):
                told: dict[str, Any] = {
                    family: {**one._asdict(), "differs": one.differs, "alike": one.alike}
                    for family, one in of_row.items()
                }
                if sft is not None and i != sft:
                    pairs = discordant(measured[i][metric], measured[sft][metric])
                    told["mcnemar"] = {str(seed): test for seed, test in pairs.items()}
                table[i]["contrasts"][metric] = told


def _named(row: Mapping[str, Any]) -> str:
    """A row's method. Rows of method sft are called "sft" even if the sweep gives them another label."""
    return "sft" if row.get("kind") == "sft" else str(row["method"])


def curves(project: Project) -> list[dict[str, Any]]:
    """Training curves of every final trial: `{"run": name, "method", "points": [{"step", name: float, ..}]}`."""
    found: list[dict[str, Any]] = []
    finals = project.finals()
    for (cell, _, jobs, _), name in zip(finals, _names([cell for cell, *_ in finals]), strict=True):
        for job in jobs if cell.recipe.method not in REFERENCES else ():
            if project.store.has(job.graph.tuned):
                with suppress(Damaged):
                    points = project.lines(job.graph.tuned, "curves")
                    run = f"{cell.label}{name}, seed {job.seed}"
                    found.append({"run": run, "method": f"{cell.method}{name}", "points": points})
    return found


def _behind(project: Project, cell: Cell, jobs: Sequence[Job]) -> dict[str, Any]:
    """Facts of a row's finished trials: libraries, training, cut prompts, and how well serving matches training."""
    store, recipe = project.store, cell.recipe
    libraries: set[str] = set()
    poison_tokens: float | None = None
    trained: dict[str, Any] = {}  # what each seed's finetune was trained on
    num_cut = 0
    merge_losses: list[float] = []
    served: list[dict[str, Any]] = []
    for job in jobs:
        if recipe.method not in REFERENCES and store.has(tuned := job.graph.tuned):
            training = _result(project, tuned) or {}
            poison_tokens = training.get("harmful_token_share") if recipe.poison_ratio > 0 else None
            with suppress(Damaged):
                trained |= {str(job.seed): one} if (one := recorded(job, store)) else {}
            if training.get("kl_moved"):
                merge_losses.append(training["kl_merged"] / training["kl_moved"])
        answers = {stage.key: stage for stage in job.evidence.metrics.inputs.values() if stage.kind == "generate"}
        told = [found for stage in answers.values() if (found := _result(project, stage)) is not None]
        num_cut += sum(found.get("cut_prompts", 0) for found in told)
        served += [found for found in told if "served_gap" in found]
        libraries.add(json.dumps(store.record(job.evidence.metrics)["libraries"], sort_keys=True))
    return {
        "libraries": sorted(libraries),
        "poison_tokens": poison_tokens,
        "trained": trained,
        "cut_prompts": num_cut,  # number of cut evaluation prompts, over all seeds
        "merge_loss": max(merge_losses, default=None),
        "served": _worst(served),
    }


def _result(project: Project, stage: Stage) -> dict[str, Any] | None:
    """A stage's result. None if the stage is damaged, or was pruned after a stage that reads it had finished."""
    with suppress(KeyError, Damaged):
        found: dict[str, Any] = project.store.record(stage)["result"]
        return found
    return None


def _worst(served: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Difference of trained and served log-probabilities over all seeds: largest gap and largest mean (nats a token), and the
    number of tokens."""
    if not served:
        return None
    gap, mean = (max(result[name] for result in served) for name in ("served_gap", "served_mean"))
    return {"gap": gap, "mean": mean, "tokens": sum(result["served_tokens"] for result in served)}


def own_seconds(project: Project, job: Job) -> float:
    """Wall time in seconds of a job's own stages. For a method, the stages that the aligned row also needs do not count."""
    shared: set[str] = set()
    if job.cell.recipe.method not in REFERENCES:
        shared = {stage.key for stage in job.aligned.evidence.metrics.walk()}
    total = 0.0
    for stage in job.evidence.metrics.walk():
        if stage.key not in shared and project.store.has(stage):
            with suppress(Damaged):
                total += float(project.store.record(stage)["seconds"])
    return total
