"""The MLflow run of one trial, from the store: its numbers with intervals, curves, costs, data, answers and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from safecl import labels, metrics
from safecl.base import Damaged, json_lines
from safecl.graph import REFERENCES
from safecl.report.answers import answers
from safecl.report.forms import markdown_table
from safecl.report.rows import by_metric, entry
from safecl.report.tables import number
from safecl.tracking.messages import DataSet, Model, Run, text
from safecl.tracking.names import Names

if TYPE_CHECKING:
    from safecl.grid import Job
    from safecl.project import Project
    from safecl.schedule import Done


def name_of(job: Job) -> str:
    """A name that is unique within the trial's cell, so that a rerun finds its MLflow run. It holds the seed, because all
    seeds of base have the same key."""
    return f"{job.evidence.metrics.key[:16]}-{job.split}-{job.seed}"


def trial(project: Project, names: Names, done: Done) -> Run:
    """The run of a finished job. Reads only the store, because it is called in another thread than the driver's."""
    job, graph = done.job, done.job.graph
    stages = {"metrics": job.evidence.metrics.key}
    trained = job.cell.recipe.method not in REFERENCES
    if trained:
        stages["finetune"] = graph.tuned.key
    if graph.final is not None:
        stages["served"] = graph.final.key
    known = {**names.params(job.cell, job.params), "seed": job.seed, "prompts": job.split}
    why = done.error or done.pruned
    measured, told = {}, {}
    if done.result is not None:
        outcomes = _outcomes(project, job)
        measured = numbers({job.seed: outcomes}) if outcomes else values(done.result)
        told = answered(project, job, outcomes or [])
    began, ended, seconds = spent(project, job)
    return Run(
        name=names.trial(job),
        params=known,
        metrics={**measured, **seconds},
        curves=curves(project, job),
        tags={
            "safecl.method": graph.recipe.method,
            "safecl.role": job.role,
            **({"safecl.error": done.error, "safecl.failure": done.kind} if done.error else {}),
            **({"safecl.pruned": done.pruned} if done.pruned else {}),
            **{f"safecl.stage.{role}": key for role, key in stages.items()},
        },
        status="KILLED" if done.pruned else "FINISHED" if done.result is not None else "FAILED",
        note=f"**{'Ended early' if done.pruned else 'Failed'}**: {why}" if why else "\n".join(numbers_table(measured)),
        data=list(data(project, job)),
        tables=told,
        model=_model(names, job, known, measured) if job.role == "final" and done.result is not None else None,
        began=began,
        ended=ended,
    )


def numbers(of_seeds: Mapping[int, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Every metric over seeds, such as `asr`, with its 95 % interval (`asr.low`, `asr.high`).

    With several sets of prompts it also has each set (`asr.attack.mini`). It also has the number of unparsed verdicts.
    """
    found: dict[str, float | None] = {}
    measured = by_metric(of_seeds)
    for metric in metrics.ordered(measured):
        one = entry(metric.name, measured[metric.name])
        if one is None:
            continue
        found |= _ends(metric.name, one)
        for name, of_set in one.get("sets", {}).items():
            if of_set is not None:
                found |= _ends(f"{metric.name}.{name.replace('/', '.')}", of_set)
        if one["unparsed"]:
            found[f"unparsed/{metric.name}"] = one["unparsed"]
    return found


def _ends(name: str, one: Mapping[str, Any]) -> dict[str, float]:
    ends = {name: one["value"], f"{name}.low": one["low"], f"{name}.high": one["high"]}
    return {name: value for name, value in ends.items() if value is not None}


def values(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The values from the result of a metrics stage, without intervals, if its outcomes cannot be read."""
    return {name: entry["value"] for name, entry in result.items()}


def _outcomes(project: Project, job: Job) -> list[dict[str, Any]] | None:
    with suppress(Damaged, OSError):
        return project.outcomes(job)
    return None


def curves(project: Project, job: Job) -> list[dict[str, Any]]:
    """A trial's training curves as metrics by step. Empty if nothing was trained."""
    if job.cell.recipe.method in REFERENCES:
        return []
    with suppress(Damaged, KeyError, OSError):
        lines = json_lines(project.store.file(job.graph.tuned, "curves.jsonl"))
        return [{name if name == "step" else f"train/{name}": value for name, value in line.items()} for line in lines]
    return []


def spent(project: Project, job: Job) -> tuple[float | None, float | None, dict[str, float | None]]:
    """(start of the first, end of the last, seconds by kind) of a trial's own stages. Times are seconds since the epoch."""
    began, ended, seconds = [], [], dict[str, float | None]()
    for stage in job.own or [job.evidence.metrics]:
        with suppress(Damaged, KeyError, OSError, ValueError):
            record = project.store.record(stage)
            at = datetime.fromisoformat(str(record["created"])).timestamp()
            took = float(record["seconds"])
            began.append(at - took)
            ended.append(at)
            name = f"seconds.{stage.kind}"
            seconds[name] = (seconds.get(name) or 0.0) + took
    if not seconds:
        return None, None, {}
    return min(began), max(ended), {"seconds": sum(value or 0.0 for value in seconds.values()), **seconds}


def data(project: Project, job: Job) -> Iterator[DataSet]:
    """The data sets that a trial was trained on and evaluated on, with their sources."""
    seen = set()
    for stage in job.evidence.metrics.walk():
        role = str(stage.config.get("role", "")) if stage.kind == "data" else ""
        if not role or role == "exclude" or stage.key in seen:
            continue
        seen.add(stage.key)
        config: Any = stage.config
        num = None
        with suppress(Damaged, KeyError, OSError):
            num = project.store.record(stage)["result"].get("num_rows")
        asked = role.partition(".")[0] in ("attack", "benign", "utility") and not role.endswith(".train")
        title = f"{labels.task(stage).strip(' ,')} rows" if role == "user" else labels.answered(stage)
        source = {"parts": config.get("parts"), "poison": config.get("poison"), "seed": config.get("seed")}
        yield DataSet(title, stage.key, "evaluation" if asked else "training", {"stage": stage.key, **source}, num)


def answered(project: Project, job: Job, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Tables of answers with their metrics, one for each set. Empty unless it is a final trial, whose answers a reader
    compares.

    MLflow groups the rows of such a table by its first column and compares the second column between runs.
    """
    if job.role != "final":
        return {}
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    for outcome in outcomes:
        measured.setdefault((outcome["set"], outcome["id"]), {})[outcome["metric"]] = outcome["value"]
    tables: dict[str, list[dict[str, Any]]] = {}
    with suppress(Damaged, KeyError, OSError):
        for line in answers(project, job):
            said = [f"{role}: {text}" for role, text in line["before"]]
            verdicts = measured.get((f"{line['role']}/{line['set']}", line["id"]), {})
            told = [f"{name} {'?' if value is None else f'{value:g}'}" for name, value in verdicts.items()]
            row = {
                "prompt": "\n".join([*said, line["prompt"]]),
                "judged": f"{line['answer']}\n\n[{' · '.join(told)}]",
                "answer": line["answer"],
                "finish": line["finish"],
                **verdicts,
                "id": line["id"],
            }
            tables.setdefault(f"answers/{line['role']}.{line['set']}.json".replace(" ", "_"), []).append(row)
    return tables


def _model(names: Names, job: Job, params: Mapping[str, Any], measured: Mapping[str, float | None]) -> Model | None:
    """A final trial's adapter with its model card and the place of its weights. None if there is no adapter."""
    final = job.graph.final
    if final is None or job.cell.recipe.method in REFERENCES:
        return None
    title = names.trial(job)
    told = card(title, job, params, measured)
    return Model(
        title,
        params,
        {"safecl.stage.served": final.key, "mlflow.note.content": told},
        {"README.md": told, "safecl.json": json.dumps({"stage": final.key}, indent=1)},
    )


def card(title: str, job: Job, params: Mapping[str, Any], measured: Mapping[str, float | None]) -> str:
    """The model card of an adapter in Markdown: what its weights are and how they were made."""
    recipe, final = job.cell.recipe, job.graph.final
    assert final is not None
    lines = [
        f"# {title}",
        "",
        f"A LoRA adapter on {recipe.model.name} (`{recipe.model.source}`), made by method `{recipe.method}` of safecl: aligned, "
        f"then fine-tuned on {recipe.task.task} with a poison ratio of {recipe.poison_ratio:g}.",
        "",
        f"Weights: `safecl export {final.key[:12]} OUT` writes them as a PEFT adapter, with `--merged` as a whole model.",
        "",
        *numbers_table(measured),
        "",
        *markdown_table(["setting", "value"], [[name, text(value)] for name, value in params.items()]),
    ]
    return "\n".join(lines) + "\n"


def numbers_table(measured: Mapping[str, float | None]) -> list[str]:
    """Metrics as lines of a Markdown table, in percent as in the report."""
    lines = []
    plain = [name for name in measured if not {"/", "."} & {*name}]
    for metric in metrics.ordered(plain):
        ends = {end: measured.get(f"{metric.name}.{end}") for end in ("low", "high")}
        shown, _, interval = number({"value": measured[metric.name], **ends}, metric.unit).partition(" ")
        unit = "" if metric.unit == "%" else f" ({metric.unit})"
        lines.append([f"{metric.title}{unit}", shown, interval.strip("[]")])
    return markdown_table(["measured, percent", "value", "95 % interval"], lines)
