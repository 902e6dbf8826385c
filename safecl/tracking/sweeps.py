"""The MLflow run of a sweep: its file, plan and environment at the beginning; table, plots and choices at the end."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any, Literal

from safecl import metrics
from safecl.records import libraries
from safecl.report import charts, forms
from safecl.report.costs import costs
from safecl.report.facts import readable
from safecl.report.pictures import pictures
from safecl.report.rows import curves
from safecl.report.tables import Facts, Row, blocks, columns
from safecl.store import below
from safecl.tracking.messages import TEXT, VIEW, Run
from safecl.tracking.names import CORE, Names

if TYPE_CHECKING:
    from safecl.config import Sweep
    from safecl.project import Project

LOSS = "train/loss"
MAX_COLUMNS = 6  # most columns of metrics, and of params, that the table of runs shows first


def tags(sweep: Sweep) -> dict[str, Any]:
    """The tags of a sweep's run."""
    return {
        "safecl.version": libraries().get("safecl", "unknown"),
        "mlflow.source.name": f"safecl run {sweep.name}",
        "mlflow.source.type": "LOCAL",
    }


def under_way(project: Project, status: Literal["RUNNING", "KILLED"] = "RUNNING") -> Run:
    """The run of a sweep that is running or was interrupted, without results."""
    sweep = project.sweep
    told = {"RUNNING": "Under way.", "KILLED": "Interrupted: the same command continues."}[status]
    return Run(
        sweep.name,
        _params(sweep),
        tags=tags(sweep),
        status=status,
        note="\n\n".join(filter(None, [sweep.about, f"{told} The table stands here at the end of a run; `safecl status` and "
                                       "`safecl report` have it at any time."])),
        files={"sweep.yaml": sweep_file(sweep), "plan.json": plan(project), **environment()},
    )  # fmt: skip


def finished(project: Project, names: Names, missing: Sequence[str]) -> Run:
    """The run of a sweep at its end, with results. Reads the studies."""
    sweep = project.sweep
    found, facts = readable(project)
    rows = [row for row in found if row["metrics"]]
    spent = costs(project)
    drawn = {
        "safety and usefulness": charts.front(rows, facts),
        "poison ratio": charts.by_setting(rows, facts, "poison", "poison, % of the task's rows"),
        "memory size": charts.by_setting(rows, facts, "memory", "safety rows kept"),
        "every metric": charts.dots(blocks(rows, facts)),
        "searches": charts.fronts(rows),
        "curves": charts.curves(curves(project)),
        "cost": charts.cost(spent),
    }
    chosen = {
        cell.label: {"params": {**cell.defaults, **params}, "note": how}
        for cell, params, jobs, how in project.finals()
        if jobs
    }
    num_trials = sum(method["trials"] + method["finals"] for method in spent["methods"])
    lacking = {"safecl.error": "; ".join(missing)} if missing else {}
    return Run(
        sweep.name,
        _params(sweep),
        {"trials": num_trials, "rows": len(rows), "rows missing": len(missing), "seconds": spent["spent"],
         "seconds without sharing": spent["alone"]},
        tags={**tags(sweep), **lacking, **({"safecl.doubt": facts.doubt} if facts.doubt else {})},
        status="FAILED" if missing else "FINISHED",
        note=note(rows, facts, missing),
        files={
            "sweep.yaml": sweep_file(sweep),
            "plan.json": plan(project),
            **environment(),
            "results.md": forms.markdown(rows, facts),
            "results.csv": forms.to_csv(rows, facts),
            "chosen.json": json.dumps(chosen, indent=1),
            **pictures(drawn),
        },
        view=view(project, names, rows, facts),
    )  # fmt: skip


def note(rows: Sequence[Row], facts: Facts, missing: Sequence[str]) -> str:
    """The result table in Markdown, shortened to the length that MLflow keeps."""
    lines = [text for line in (facts.doubt, facts.about) if line for text in (line, "")]
    lines += [text for line in missing for text in (f"**Missing**: {line}", "")]
    for block in blocks(rows, facts):
        table = forms.markdown_table(block.header, [forms.strong(line) for line in block.lines])
        lines += [f"**{block.title}** (percent, 95 % intervals)", "", *table, ""]
    last = "All tables, and what the numbers rest on: `results.md`. The answers: `safecl view`."
    while len("\n".join([*lines, "", last])) > TEXT:
        lines = [*lines[:-2], "| ... |"] if lines[-1] == "| ... |" else [*lines[:-1], "| ... |"]
    return "\n".join([*lines, "", last])


def view(project: Project, names: Names, rows: Sequence[Row], facts: Facts) -> dict[str, Any]:
    """The view of MLflow's table of runs, in the form in which its UI keeps a shared view.

    Columns are metrics of the report's main table and params that differ. Rows are the rows of that table. Charts are harm
    against usefulness, the effect of params that all methods have on both, and the training loss.
    """
    table = [column.metric for column in columns(rows, facts)]
    # Harm and usefulness first, then the other metrics that contrasts test. MLflow always shows them sorted by name.
    main = sorted((metric for metric in table if metric.axis or metric.margin), key=lambda metric: not metric.axis)
    measured = [metric.name for metric in main][:MAX_COLUMNS]
    differing: dict[str, set[str]] = {}
    for cell in project.cells:
        for name, value in names.params(cell, {}).items():
            differing.setdefault(name, set()).add(str(value))
        for name in cell.space or ():
            differing[name] = {"searched", "otherwise"}
    params = [name for name in (*CORE, *sorted(differing.keys() - {*CORE})) if len(differing.get(name, ())) > 1]
    params = params[:MAX_COLUMNS]
    harm, use = (metric.name for metric in metrics.plane())
    common = {"metricSectionId": VIEW, "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    axes = {"xaxis": {"key": harm, "type": "METRIC"}, "yaxis": {"key": use, "type": "METRIC"}}
    # A line needs every one of them: with a param that some methods lack, their rows would have none.
    chosen = {
        "selectedParams": [name for name in params if name in CORE],
        "selectedMetrics": [harm, use],
        "showAllRuns": True,
    }
    loss = {"metricKey": LOSS, "selectedMetricKeys": [LOSS], "xAxisKey": "step", "xAxisScaleType": "linear",
            "scaleType": "linear", "yAxisKey": "metric", "lineSmoothness": 0, "useGlobalXaxisKey": False,
            "useGlobalLineSmoothing": False}  # fmt: skip
    return {
        "selectedColumns": [
            *(f"metrics.`{name}`" for name in (*measured, "seconds")),
            *(f"params.`{name}`" for name in (*params, "seed")),
        ],
        # Rows of the table, the safest first. Without a filter, sorted by time, MLflow nests trials below them.
        "searchFilter": f"tags.`safecl.sweep` = '{project.sweep.name}' and tags.`safecl.level` = 'cell'",
        "orderByKey": f"metrics.`{harm}`",
        "orderByAsc": True,
        "compareRunCharts": [
            {**common, "type": "SCATTER", "uuid": f"{VIEW}-front", **axes},
            {**common, "type": "PARALLEL", "uuid": f"{VIEW}-params", **chosen},
            {**common, "type": "LINE", "uuid": f"{VIEW}-loss", **loss},
        ],
        "compareRunSections": [
            {"uuid": VIEW, "name": "Safety and usefulness", "display": True, "isReordered": True, "deleted": False,
             "isGenerated": False}
        ],
        "isAccordionReordered": True,
    }  # fmt: skip


def _params(sweep: Sweep) -> dict[str, Any]:
    """Params of a sweep's run: its models, tasks, poison ratios, methods and seeds, and what all its rows have in common."""
    return {
        "models": ", ".join(model.name for model in sweep.models),
        "tasks": ", ".join(task.task for task in sweep.tasks),
        "poison ratios": ", ".join(f"{ratio:g}" for ratio in sweep.poison.ratios),
        "methods": ", ".join(dict.fromkeys(method.label or method.name for method in sweep.methods)),
        "seeds": ", ".join(map(str, sweep.seeds)),
        "adapter": sweep.adapter,
        "lora": f"rank {sweep.lora.rank}, alpha {sweep.lora.alpha}, dropout {sweep.lora.dropout:g}, {sweep.lora.targets}",
        "search trials": sweep.search.trials if any(method.search is not None for method in sweep.methods) else 0,
    }


def sweep_file(sweep: Sweep) -> str:
    """The sweep as YAML, without the addresses of its databases, which may hold passwords, and without default values."""
    import yaml

    found = sweep.model_dump(mode="json", exclude_defaults=True, exclude={"execution": {"tracking_uri", "study_uri"}})
    text: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
    return text


def plan(project: Project) -> str:
    """Rows, trials and stages of a sweep as JSON, as far as they are known before a search."""
    seeds = project.sweep.seeds
    cells = [
        {"cell": cell.label, "searched": list(cell.space or ()), "trials": len(seeds) + (cell.num_trials if cell.space else 0)}
        for cell in project.cells
    ]  # fmt: skip
    tops = [cell.job({}, seed, "final").evidence.metrics for cell in project.cells for seed in seeds]
    stages = Counter(stage.kind for stage in below(tops))
    return json.dumps({"cells": cells, "stages of the final trials": dict(sorted(stages.items()))}, indent=1)


def environment() -> dict[str, str]:
    """Files that describe this machine (environment.json) and the installed packages (requirements.txt)."""
    told = {"python": sys.version.split()[0], "platform": platform.platform(), "cpus": os.cpu_count(), **libraries()}
    pins = sorted({f"{dist.metadata['Name']}=={dist.version}" for dist in distributions() if dist.metadata["Name"]})
    return {"environment.json": json.dumps(told, indent=1), "requirements.txt": "\n".join(pins) + "\n"}
