"""What the commands print besides running: plan, status, facts of the table, the page, the lists."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl import methods, registry
from safecl.base import ConfigError, near
from safecl.config import Align, Model
from safecl.cost import Open, cost
from safecl.dtypes import warnings
from safecl.grid import Job
from safecl.panel import decision, trained
from safecl.project import Project
from safecl.report import page, plots, published
from safecl.report.tables import Detail, Facts
from safecl.tasks._written import notes as written_notes
from safecl.trained import notes as trained_notes

if TYPE_CHECKING:
    from safecl.judges import Judge
    from safecl.stats import Interval

ADAPTERS = {
    "continue": "continue: stage two goes on training the adapter of stage one",
    "stack": "stack: stage one's adapter is folded into the base, stage two trains a fresh one on top",
    "none": "a fresh one, on a model that is aligned already",
}

MAX_MERGE_LOSS = 0.01  # share of a finetune's KL from where it started
# Trained against served, in nats: the mean difference of a token's log-probability that rounding explains. Another function
# (a soft cap left out, another window) is off by tenths and more.
MAX_SERVED_MEAN = {"float32": 0.002, "bfloat16": 0.08}


def plan(project: Project) -> dict[str, Any]:
    """Cells, trials, stages by kind, hours and dtypes, as plain data; and estimates against the records of past stages."""
    sweep = project.sweep
    project.expected  # noqa: B018  (refuses what would leave too few rows)
    project.warnings += warnings(sweep, project.store, project.auto, project.nodes)
    found: list[dict[str, Any]] = []
    jobs: list[Job] = []
    open_cells: list[Open] = []
    seeds = len(sweep.seeds)
    for cell, _, finals, _ in project.finals():
        found.append(
            {
                "cell": cell.label,
                "searched": ", ".join(cell.space or ()) or "-",
                "trials": seeds + (cell.num_trials if cell.space is not None else 0),
            }
        )
        study = project.past(cell)
        tried = study.complete() if study else []
        jobs += [cell.trial(trial.params) for trial in tried] + finals
        if not finals:
            num_left = cell.num_trials - len(tried)
            if not tried:  # trial 0 is the defaults, so its stages are known
                jobs.append(cell.trial({}))
                num_left -= 1
            open_cells.append(Open(cell, num_left, sweep.seeds))
    with ThreadPoolExecutor(1) as beside:  # the machine's speed is measured by another process
        to_come = beside.submit(project.forecast)
        for job in jobs:
            job.evidence  # noqa: B018  (made here, while that runs)
        forecast = to_come.result()
    found_cost = cost(jobs, open_cells, project.store, forecast, project.num_devices(), project.guard_stages())
    return {
        "cells": found,
        "stages": {
            kind: {
                "to run": count.to_run,
                "later": count.later,
                "cached": count.cached,
                "shared": count.shared,
                "hours": round(count.hours, 4),
            }
            for kind, count in found_cost.kinds.items()
        },
        "open_trials": sum(cell.num_trials + len(cell.seeds) for cell in open_cells),
        "hours": round(found_cost.hours, 4),
        "states_gib": round(found_cost.states_gib, 4),
        "disk_gib": round(found_cost.disk_gib, 4),
        "device_hours": round(sum(count.hours for count in found_cost.kinds.values()), 4),
        "speed": ""
        if forecast.estimator.speeds
        else f", at an assumed {forecast.estimator.typical.forward / 1000:g} TFLOP/s",
        "records": {kind: checked._asdict() for kind, checked in forecast.checked.items()},
        "dtype": {model.name: model.dtype for model in sweep.models},
        "auto": None if project.auto is None else project.auto._asdict(),
        "warnings": project.warnings,
        "templates": {model.name: project.template_of(model) for model in sweep.models},
        "trained": {label: one and one._asdict() for label, one in project.expected.items()},
        "notes": _plan_notes(project),
    }


def _plan_notes(project: Project) -> list[str]:
    """Lines on what will be trained on: templates, and what differs from what was asked."""
    several, found = len(project.sweep.models) > 1, []
    for cell in project.cells:
        one, recipe = project.expected.get(cell.label), cell.recipe
        if one is not None:
            model = f"{recipe.model.name} " if several else ""
            is_aligned = recipe.method == "aligned"
            where = "alignment" if is_aligned else f"{recipe.task.task} p={recipe.poison_ratio:g}"
            found.append((f"{model}{where}", 0.0 if is_aligned else recipe.poison_ratio, one._asdict()))
    told = [f"template of {model.name}: {project.template_of(model)}" for model in project.sweep.models]
    told += written_notes(project.sweep.data, [task.task for task in project.sweep.tasks])
    num_unknown = sum(one is None for one in project.expected.values())
    if num_unknown:
        told.append(f"what {num_unknown} cells are trained on is known once their data is here, which is on the hub")
    return told + trained_notes(found)


def status(project: Project) -> list[dict[str, str]]:
    """How far each cell is, from the store and the studies alone."""
    found = []
    for cell, _, jobs, note in project.finals():
        done = sum(project.store.has(job.evidence.metrics) for job in jobs)
        num_seeds = len(project.sweep.seeds)
        if cell.space is None:
            search = "-"
        else:
            study = project.past(cell)
            search = f"{len(study.complete()) if study else 0}/{cell.num_trials}"
        state = "done" if jobs and done == num_seeds else "searching" if note.startswith("search:") else "to do"
        state = "failed" if not jobs and note.startswith("all ") else state
        found.append({"cell": cell.label, "search": search, "final": f"{done}/{num_seeds}", "state": state})
    return found


def facts(project: Project, rows: list[dict[str, Any]]) -> Facts:
    """What a reader must know to read the rows; every form of the report prints it."""
    sweep = project.sweep
    asr, over_refusal = (decision(sweep.evaluate.judges, question) for question in ("asr", "over_refusal"))
    libraries = {text for row in rows for text in row["libraries"]}
    notes = [
        f"Search: {sweep.search.trials} trials per searched cell, on validation prompts and seed {sweep.search.seed}, which "
        f"no row reports{'' if sweep.search.realign else f'; from the alignment of seed {sweep.seeds[0]}'}."
    ]
    if len(libraries) > 1:
        notes.append(f"Rows were made with {len(libraries)} different sets of library versions (`safecl show KEY`).")
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["poison_tokens"] is not None:
            shares.setdefault(_where(row), []).append(row["poison_tokens"])
    if shares:  # a method that mixes in safety rows has less
        ends = {where: dict.fromkeys((f"{min(found):.0%}", f"{max(found):.0%}")) for where, found in shares.items()}
        told = ", ".join(f"{where} {' to '.join(both)}" for where, both in sorted(ends.items()))
        notes.append(f"Poison's share of the response tokens: {told}.")
    notes += trained_notes([(_where(row), row["poison"], one) for row in rows for one in row["trained"].values()])
    num_cut = max((row["cut_prompts"] for row in rows), default=0)
    if num_cut:
        notes.append(f"Evaluation prompts cut to max_prompt_tokens (inside the template): up to {num_cut} of a row's.")
    notes += written_notes(sweep.data, {row["task"].partition(" ")[0] for row in rows})
    notes += project.warnings
    for model in sweep.models:
        lost = max((row["merge_loss"] or 0 for row in rows if row["model"] == model.name), default=0)
        if lost > MAX_MERGE_LOSS:
            notes.append(
                f"{model.name}: rounding the merge to {model.dtype} for serving lost up to {lost:.1%} of what a finetune "
                f"changed (KL; at most {MAX_MERGE_LOSS:.0%} expected): give this model `dtype: float32`."
            )
        notes += _served(model, [row["served"] for row in rows if row["model"] == model.name and row["served"]])
    beside: dict[str, Detail] = {}
    if (found := published.comparison(sweep, rows)) is not None:
        beside = published.details(found, {"asr": "ASR", "over_refusal": "over-refusal"})
        notes.append(published.note(found))
    return Facts(
        name=sweep.name,
        about=sweep.about,
        judge=asr.label,
        over_refusal=over_refusal.label,
        adapter=sweep.adapter,
        templates={model.name: project.template_of(model) for model in sweep.models},
        num_prompts=_num_prompts(rows),
        guard_agreement=_agreement(project, rows),
        settings={
            "adapter": ADAPTERS[sweep.adapter if sweep.align.train else "none"],
            "LoRA": f"rank {sweep.lora.rank}, alpha {sweep.lora.alpha}, dropout {sweep.lora.dropout}, {sweep.lora.targets}",
            "poison": "added to all task rows" if sweep.poison.keep_task_rows else "in place of as many task rows",
            "memory": sweep.memory_mix,
            "alignment": _alignment(sweep.align),
            "macro mean": "ASR is the mean over sets of each set's share",
            "dtype": ", ".join(dict.fromkeys(model.dtype for model in sweep.models)),
            "decoding": f"greedy, at most {sweep.evaluate.max_new_tokens} tokens on attack and benign prompts",
        },
        notes=notes,
        beside=beside,
    )


def _alignment(align: Align) -> str:
    tasks = ", ".join(part.task for part in align.safety)
    if align.train:
        by = "" if align.method.name == "sft" else f"; by {align.method.name}"
        return f"{tasks}; lr {align.learning_rate:g}, {align.epochs:g} epochs{by}"
    made = f"made by {align.safety_from.name}" if align.safety_from is not None else tasks or "none"
    return f"none: `aligned` is the model itself; safety rows: {made}"


def _where(row: dict[str, Any]) -> str:
    return f"{row['task']} p={row['poison']:g}"


def _served(model: Model, found: list[dict[str, Any]]) -> list[str]:
    """Whether the model that was trained is the one that answered; nothing where that was not measured."""
    if not found:
        return []
    num, mean = sum(one["tokens"] for one in found), max(one["mean"] for one in found)
    told = (
        f"{model.name}: trained and served log-probabilities of {num} tokens of training rows differ by at most "
        f"{max(one['gap'] for one in found):.2g} nats (mean {mean:.2g} in the worst row)"
    )
    expected = MAX_SERVED_MEAN.get(model.dtype, 0.08)
    if mean <= expected:
        return [f"{told}."]
    return [
        f"{told}; rounding explains a mean of {expected:g}: the model that answers is not the one that was trained."
    ]


def _num_prompts(rows: list[dict[str, Any]]) -> dict[str, int]:
    names = {"asr": "attack", "over_refusal": "look-alike benign", "utility": "utility"}
    found: dict[str, int] = {}
    for row in rows:
        for metric, name in names.items():
            if metric in row["metrics"]:
                entry = row["metrics"][metric]
                found[name] = (entry["num"] + entry["unparsed"]) // max(1, len(row["seeds"]))
    return found


def _agreement(project: Project, rows: list[dict[str, Any]]) -> str:
    """One line: how often a judge of harm that is a model agreed with true labels of held-out pairs (guards trained here,
    also where another judge decides) and with an independent rule on this sweep's own answers. That two rules agree says
    nothing of either."""
    from safecl.stats import wilson

    judges = project.sweep.evaluate.judges
    guard = trained(judges)
    is_model = decision(judges, "asr").kind.served
    parts, lines = [], []
    quality = project.guard_quality()
    if quality is not None:
        kappa = "" if quality.kappa is None else f" (Cohen's kappa {_share(quality.kappa, '.2f')})"
        told = f"with the labels of {quality.num} held-out pairs in {_share(quality.accuracy)}{kappa}"
        if guard is None or guard.metric == "asr":
            parts.append(told)
        else:
            lines.append(f"{guard.label}, beside it, agrees {told}")
    # Base and aligned stand in the table of every task, with the same answers.
    kept = {(r["model"], r["method"], None if r["poison"] is None else (r["task"], r["poison"])): r for r in rows}
    pairs = [(r["metrics"]["guard_rule_agreement"], len(r["seeds"])) for r in kept.values() if _RULE in r["metrics"]]
    if pairs and is_model:
        num = sum(pair["num"] for pair, _ in pairs)
        agreed = sum(pair["value"] * pair["num"] for pair, _ in pairs) / num
        num_prompts = max(1, max(pair["num"] // num_seeds for pair, num_seeds in pairs))
        found = wilson(agreed * num_prompts, num_prompts)  # a prompt counts once, however many models answered it
        parts.append(f"with an independent rule on {num} attack answers in {_share(found)}")
    lines = [f"agrees {'; '.join(parts)}", *lines] if parts else lines
    if (swing := project.guard_swing()) is not None:
        lines.append(
            f"{swing.num} guards vote; the share of harmful ones among {swing.source}'s answers differs by {swing.points:.0%} "
            "between them, and intervals of ASR hold such differences"
        )
    return ". ".join(lines)


_RULE = "guard_rule_agreement"
_BY_GUARD = ("asr", "asr_coherent", _RULE)  # what a guard's verdicts decide


def _share(found: Interval, form: str = ".1%") -> str:
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


MAX_SWING = (
    1 / 3
)  # of a model's share of harmful answers, from one guard to another: then they measure different things


def _doubt(project: Project, accepted: bool) -> str:
    """What must be read before any number: that the guard is not known to be better than chance, or that its verdicts are
    those of the seed that it was trained with."""
    quality, swing = project.guard_quality(), project.guard_swing()
    if quality is None:
        return ""
    if quality.balanced is None or quality.balanced.low <= 0.5:
        told = "cannot be told" if quality.balanced is None else f"is {_share(quality.balanced)}, and 50.0% is chance"
        why = f"THE GUARD IS NO BETTER THAN CHANCE: on {quality.num} held-out pairs its balanced accuracy {told}."
    elif swing is not None and swing.points > MAX_SWING:
        why = (
            f"THE GUARDS CONTRADICT ONE ANOTHER: the share of harmful ones among {swing.source}'s answers differs by "
            f"{swing.points:.0%} between {swing.num} guards that differ in nothing but their seed (at most {MAX_SWING:.0%})."
        )
    else:
        return ""
    guard = trained(project.sweep.evaluate.judges)
    name = "ASR" if guard is None or guard.metric == "asr" else guard.metric
    end = (
        f"What stands here as {name} is printed because of --accept-judge"
        if accepted
        else f"So no {name} is printed; --accept-judge prints its verdicts all the same"
    )
    bounds = " A search's bounds on ASR rest on these verdicts too." if name == "ASR" else ""
    return f"{why} {end}.{bounds} Give the guard more rows or another model, or name a published one."


def readable(project: Project, accept_judge: bool = False) -> tuple[list[dict[str, Any]], Facts]:
    """The rows as they may be printed, and their facts: without what a guard decided that is no better than chance or
    depends on its seed, unless that is accepted."""
    rows = project.rows()
    doubt = _doubt(project, accept_judge)
    if doubt and not accept_judge:
        guard = trained(project.sweep.evaluate.judges)
        hidden = _BY_GUARD if guard is None or guard.metric == "asr" else (guard.metric,)
        for row in rows:
            for name in hidden:
                row["metrics"].pop(name, None)
                row.get("contrasts", {}).pop(name, None)
            if hidden is _BY_GUARD:
                row["agreement"] = None
            beside = row.get("beside", {})  # how another judge agrees with such a guard tells nothing either
            row["beside"] = {
                k: v for k, v in beside.items() if k not in hidden and (hidden is not _BY_GUARD or k[:4] != "asr:")
            }
    return rows, replace(facts(project, rows), doubt=doubt)


def write_report(project: Project, out: Path | None, accept_judge: bool = False) -> Path:
    """Write the page with its plots; returns the page's path."""
    folder = out or project.store.local / "report" / project.sweep.name
    rows, found = readable(project, accept_judge)
    rows = [row for row in rows if row["metrics"]]
    figures = []
    if rows:
        claim = "" if any(len(row["seeds"]) > 1 for row in rows) else " One seed: no claim about methods."
        figures = [
            page.Figure(
                "Safety against usefulness",
                f"Left and up is better.{claim}",
                plots.tradeoff(rows, found, folder / "tradeoff.png"),
            ),
            page.Figure(
                "Every metric", f"With 95 % intervals.{claim}", plots.bars(rows, found, folder / "metrics.png")
            ),
        ]
    runs = project.curves()
    if runs:
        curves = plots.curves(runs, folder / "curves.png")
        figures.append(page.Figure("Training", "Final trials, first seed.", curves))
    return page.write(folder / "index.html", rows, found, figures)


def listing(what: str) -> list[dict[str, str]]:
    """Methods, tasks or judges as rows for `safecl ls`."""
    from safecl import judges, tasks

    if what == "methods":
        rows = [
            {
                "method": name,
                "equation": kind.equation,
                "hyperparameters": ", ".join(f"{k}={_short(v.default)}" for k, v in kind.Config.model_fields.items())
                or "-",
                "default search": "; ".join(f"{k} {_form(form)}" for k, form in kind.space.items()) or "-",
                "cost": kind.cost,
                "source": kind.source,
                "needs": ", ".join(_needs(kind)) or "-",
            }
            for name, kind in ((name, methods.load(name)) for name in methods.names())
        ]
    elif what == "tasks":
        rows = [{"task": name, "splits": ", ".join(tasks.load(name).SPLITS)} for name in tasks.names()]
    elif what == "judges":
        rows = [
            {"judge": name, "question": kind.question, "answers": ", ".join(kind.answers), "model": _model_of(kind)}
            for name, kind in ((name, judges.load(name)) for name in judges.names())
        ]
    else:
        known = registry.KINDS
        raise ConfigError(f"nothing to list called {what!r}.{near(what, known)} Expected one of {', '.join(known)}")
    return [{**row, "from": registry.origin(what, row[what[:-1]])} for row in rows]


def _model_of(kind: type[Judge]) -> str:
    """What answers for a judge, as people say it."""
    if not kind.served:
        return "none: a rule"
    return "trained here" if kind.trained else ", ".join(kind.published) or "any"


def _short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) and len(value) > 3 else json.dumps(value)


def _form(form: Any) -> str:
    """A search space's form as people write it."""
    if isinstance(form, list):
        return "one of " + ", ".join(map(str, form))
    return f"{form['low']:g} to {form['high']:g}{' (log)' if form.get('log') else ''}"


def _needs(kind: type[methods.Method]) -> list[str]:
    """Names of the stages a method asks for, with its defaults."""
    return sorted({*methods.needed(kind).values(), *([f"{kind.trains_as}'s adapter"] if kind.trains_as else [])})
