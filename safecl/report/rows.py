"""The rows of a sweep's table, from the store alone: every metric with its interval, and the contrasts between methods.

A row is `{"model", "task", "poison", "method", "params", "seeds", "metrics": {name: entry}, "contrasts": {name: ..},
"agreement", "seconds", "weights", "note", ...}`; an entry is `{"value", "low", "high", "num", "unparsed", "seeds"}`, where
there are several sets with `"sets"` and `"pooled"`, of degenerate answers with `"why"`.
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
    """The table's rows: every metric with its interval over the seeds that are finished, and its contrasts with the rows of
    the same model, task and poison ratio."""
    table: list[dict[str, Any]] = []
    measured: list[dict[str, dict[int, Outcomes]]] = []  # of a row, by metric and seed
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
            "kind": recipe.method,  # whatever it is called here
            "params": {**cell.defaults, **params},
            "memory": _memory(cell, params),
            "seeds": [job.seed for job in finished],
            "metrics": entries,
            "agreement": agreement(measured[-1]),
            "beside": _beside(measured[-1]),
            "seconds": sum(own_seconds(project, job) for job in finished),
            # Keys of what was served, a seed each; for `safecl export`.
            "weights": [final.key for job in finished if (final := job.graph.final) is not None],
            "note": note if finished else note or "not run yet",
            "search": None if cell.space is None else told(project, cell),
        }
        table.append({**row, **_behind(project, cell, list(finished))})
    contrast(table, measured)
    return table


def _memory(cell: Cell, params: Mapping[str, Any]) -> float | None:
    """How many safety rows the method keeps; None of one that keeps none."""
    if cell.recipe.method in REFERENCES or not cell.memory_key:
        return None
    found = {**cell.defaults, **params}.get(cell.memory_key)
    return float(found) if isinstance(found, int | float) else None


def _names(cells: Sequence[Cell]) -> list[str]:
    """What tells the rows of one cell apart: their number on its front; nothing where it has one row."""
    return [f" #{cells[: i + 1].count(cell)}" if cells.count(cell) > 1 else "" for i, cell in enumerate(cells)]


def by_metric(of_seeds: Mapping[int, Outcomes]) -> dict[str, dict[int, Outcomes]]:
    """Outcomes by metric and seed."""
    names = dict.fromkeys(outcome["metric"] for found in of_seeds.values() for outcome in found)
    return {
        name: {seed: [o for o in found if o["metric"] == name] for seed, found in of_seeds.items()} for name in names
    }


def entry(name: str, seeds: dict[int, Outcomes]) -> dict[str, Any] | None:
    """One metric of one row; None without a parsed outcome. `value` is the mean over seeds of the macro mean over sets;
    where there are several sets, `sets` holds each one and `pooled` all their prompts alike."""
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
    """How two judges (by their metrics; the judge of harm and the keyword list) agree on the same answers of all seeds, with
    intervals in which a prompt counts once; None where nothing was read."""
    judge, listed = (
        {(seed, o["set"], o["id"]): o["value"] for seed, found in measured.get(name, {}).items() for o in found}
        for name in (decides, beside)
    )
    other = [listed[answer] for answer in judge]
    if all(None in pair for pair in zip(judge.values(), other, strict=True)):
        return None
    return as_json(agreement_of([*judge.values()], other, [answer[1:] for answer in judge]))


def _beside(measured: Mapping[str, dict[int, Outcomes]]) -> dict[str, Any]:
    """How each further judge of a question agrees with the one that decides, by its metric (`asr:LABEL`)."""
    names = [name for name in measured if ":" in name and name.partition(":")[0] in measured]
    return {name: agreement(measured, name.partition(":")[0], name) for name in names}


def contrast(table: list[dict[str, Any]], measured: Sequence[Mapping[str, dict[int, Outcomes]]]) -> None:
    """Adds `contrasts` to the rows of methods: {metric: {"sft" | "best": Contrast, "mcnemar": {seed: counts and p}}}, of
    every metric that has a margin."""
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
    """A row's method; what all are compared with is sft whatever its label."""
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
    """What the finished trials of a row rest on: libraries, training, cut prompts, and how true serving is to training."""
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
        "cut_prompts": num_cut,  # of all seeds' evaluation prompts
        "merge_loss": max(merge_losses, default=None),
        "served": _worst(served),
    }


def _result(project: Project, stage: Stage) -> dict[str, Any] | None:
    """What a stage told; None where it is damaged, or was pruned below a finished one."""
    with suppress(KeyError, Damaged):
        found: dict[str, Any] = project.store.record(stage)["result"]
        return found
    return None


def _worst(served: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Trained against served over all seeds: the largest gap, the worst mean (nats a token), and of how many tokens."""
    if not served:
        return None
    gap, mean = (max(result[name] for result in served) for name in ("served_gap", "served_mean"))
    return {"gap": gap, "mean": mean, "tokens": sum(result["served_tokens"] for result in served)}


def own_seconds(project: Project, job: Job) -> float:
    """Wall time of the stages that this row alone needed: those of the aligned row are everyone's."""
    shared: set[str] = set()
    if job.cell.recipe.method not in REFERENCES:
        shared = {stage.key for stage in job.aligned.evidence.metrics.walk()}
    total = 0.0
    for stage in job.evidence.metrics.walk():
        if stage.key not in shared and project.store.has(stage):
            with suppress(Damaged):
                total += float(project.store.record(stage)["seconds"])
    return total
