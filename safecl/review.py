"""Questions about finished work: finding a stage by its name, a sweep's chosen configurations, comparing two sweeps.
Runs no stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl import metrics, sweepfile
from safecl.base import ConfigError, Damaged
from safecl.contrasts import Contrast, discordant, holm_adjusted, means, paired
from safecl.graph import REFERENCES
from safecl.report.published import flat
from safecl.report.rows import by_metric
from safecl.stages import load as kind_of
from safecl.store import Stage, Store, canonical

if TYPE_CHECKING:
    from safecl.grid import Cell
    from safecl.project import Project


def find(store: Store, wanted: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, record) of finished stages whose key begins with `wanted`. If there is none: of stages whose name contains
    all words of `wanted`, such as `finetune der, mini p=0.1, seed 0`."""
    by_key = store.find(wanted) if " " not in wanted else []
    records = {record["key"]: record for record in by_key or store.find("")}
    names = {key: name_of(record, records if not by_key else {}, store) for key, record in records.items()}
    if by_key:
        return [(names[key], record) for key, record in records.items()]
    words = wanted.replace(",", " ").split()
    return [
        (name, records[key])
        for key, name in names.items()
        if all(word in name.replace(",", " ").split() for word in words)
    ]


def name_of(record: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], store: Store) -> str:
    """A stage's name for people, see stages.Kind.label. Only its kind, if a stage below it is missing."""

    def stage(of: Mapping[str, Any]) -> Stage:
        inputs = {}
        for role, key in of["inputs"].items():
            below = known.get(key) or next(iter(store.find(key)), None)
            if below is not None:
                inputs[role] = stage(below)
        return Stage.of(of, inputs)

    with suppress(
        KeyError, ValueError, AttributeError, TypeError, ConfigError
    ):  # written by an earlier version, or with inputs that were removed
        return kind_of(record["kind"]).label(stage(record), {})
    return str(record["kind"])


def best(project: Project, path: Path, settings: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A sweep file's content with every search replaced by what it chose, and one line for each row where nothing is
    chosen.

    If rows of one method chose different values, these become entries with their own labels, and `only` says which row
    has which.
    """
    raw = sweepfile.raw_of(path, settings)
    entries: dict[str, dict[str, Any]] = {}  # by name and configuration
    rows: dict[str, list[dict[str, Any]]] = {}
    left: list[str] = []
    num_rows = 0
    for cell, params, jobs, note in project.finals():
        recipe = cell.recipe
        if recipe.method in REFERENCES:
            continue
        num_rows += 1
        if not jobs:
            left.append(f"{cell.label}: {note}")
            continue
        entry: dict[str, Any] = {"name": recipe.method, "label": cell.method, "config": {**recipe.params, **params}}
        key = canonical(entry)
        entries.setdefault(key, entry)
        where = {"models": [recipe.model.name], "tasks": [recipe.task.task], "ratios": [recipe.poison_ratio]}
        rows.setdefault(key, []).append(where)
    if not entries:
        raise ConfigError("no row of this sweep is chosen yet: " + "; ".join(left))
    _told_apart(entries)
    raw["methods"] = [
        {name: value for name, value in entry.items() if not (name == "label" and value == entry["name"])}
        for entry in entries.values()
    ]
    whole = num_rows - len(left)
    raw.pop("only", None)
    if left or (len(entries) > 1 and any(len(found) * len(entries) != whole for found in rows.values())):
        raw["only"] = [{**where, "methods": [entries[key]["label"]]} for key, found in rows.items() for where in found]
    return raw, left


def _told_apart(entries: Mapping[str, dict[str, Any]]) -> None:
    """Number the entries that have the same label."""
    labels = [entry["label"] for entry in entries.values()]
    seen: dict[str, int] = {}
    for entry in entries.values():
        label = entry["label"]
        if labels.count(label) > 1:
            seen[label] = seen.get(label, 0) + 1
            entry["label"] = f"{label} {seen[label]}"


def compare(first: Project, second: Project) -> dict[str, Any]:
    """Similarities and differences of two sweeps, as plain data.

    `settings`: the settings that differ. `rows`, for each common row: whether data and weights are the same; each
    metric with a margin in both sweeps; and the paired test of second - first over common seeds and prompts, corrected
    by Holm over all tests. With one common seed there are only McNemar's counts, which say nothing about the methods.
    """
    ours, theirs = (flat(project.sweep, {}) for project in (first, second))
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if not key.startswith("execution.")]
    settings = [
        {"setting": key, "first": ours.get(key, "-"), "second": theirs.get(key, "-")}
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]
    cells = {_name(cell): (cell, jobs) for cell, _, jobs, _ in second.finals()}
    rows: list[dict[str, Any]] = []
    tests: list[Contrast] = []
    places: list[dict[str, Any]] = []
    for cell, _, jobs, _ in first.finals():
        name = _name(cell)
        if name not in cells:
            continue
        mine, others = _measured(first, jobs), _measured(second, cells[name][1])
        common = sorted({job.seed for job in jobs} & {job.seed for job in cells[name][1]})
        pairs = [(_job(jobs, seed), _job(cells[name][1], seed)) for seed in common]
        row: dict[str, Any] = {
            "row": cell.label,
            "seeds": common,
            "data": all(a.evidence.metrics.inputs.keys() == b.evidence.metrics.inputs.keys()
                        and _rows(a) == _rows(b) for a, b in pairs),
            "weights": all(_weights(a) == _weights(b) for a, b in pairs),
            "metrics": {},
        }  # fmt: skip
        for metric in metrics.ordered(mine.keys() & others.keys()):
            if metric.margin is None:
                continue
            values = [_mean(found[metric.name]) for found in (mine, others)]
            told: dict[str, Any] = {"first": values[0], "second": values[1]}
            test = paired(metric, others[metric.name], "first", mine[metric.name])
            if test is not None:
                tests.append(test)
                places.append(told)
            else:
                told["mcnemar"] = discordant(others[metric.name], mine[metric.name])
            row["metrics"][metric.name] = told
        rows.append(row)
    for told, test in zip(places, holm_adjusted(tests), strict=True):
        told["test"] = {**test._asdict(), "differs": test.differs, "alike": test.alike}
    only = [
        [cell.label for cell, *_ in project.finals() if _name(cell) not in names]
        for project, names in ((first, cells.keys()), (second, {_name(cell) for cell, *_ in first.finals()}))
    ]
    return {"settings": settings, "rows": rows, "only_first": only[0], "only_second": only[1]}


def _name(cell: Cell) -> tuple[Any, ...]:
    recipe = cell.recipe
    ratio = None if recipe.method in REFERENCES else recipe.poison_ratio
    return recipe.model.name, cell.task, ratio, cell.method


def _measured(project: Project, jobs: Sequence[Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    found = {}
    for job in jobs:
        with suppress(Damaged):
            if (outcomes := project.outcomes(job)) is not None:
                found[job.seed] = outcomes
    return by_metric(found)


def _job(jobs: Sequence[Any], seed: int) -> Any:
    return next(job for job in jobs if job.seed == seed)


def _rows(job: Any) -> set[str]:
    """Keys of all data stages that a trial is based on."""
    return {stage.key for stage in job.evidence.metrics.walk() if stage.kind == "data"}


def _weights(job: Any) -> str | None:
    return None if job.graph.final is None else str(job.graph.final.key)


def _mean(seeds: Mapping[int, Any]) -> float | None:
    found = list(means(seeds).values())
    return sum(found) / len(found) if found else None


def told(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A comparison as tables: (title, columns, rows)."""
    tables = []
    if found["settings"]:
        lines = [[each["setting"], str(each["first"]), str(each["second"])] for each in found["settings"]]
        tables.append(("settings that differ", ["setting", "first", "second"], lines))
    lines = []
    for row in found["rows"]:
        same = "same" if row["weights"] else "same data" if row["data"] else "other data"
        for name, entry in row["metrics"].items():
            numbers = ["-" if entry[key] is None else f"{100 * entry[key]:.1f}" for key in ("first", "second")]
            lines.append([row["row"], metrics.of(name).title, *numbers, _tested(entry), same])
    head = ["row", "metric", "first", "second", "second - first, points; p after Holm", "weights"]
    tables.append(("numbers, percent", head, lines))
    for key in ("only_first", "only_second"):
        if found[key]:
            tables.append(
                (f"rows of the {key.removeprefix('only_')} alone", ["row"], [[label] for label in found[key]])
            )
    return tables


def _tested(entry: Mapping[str, Any]) -> str:
    if (test := entry.get("test")) is not None:
        mark = " differs" if test["differs"] else " alike" if test["alike"] else ""
        value, low, high = (f"{100 * test[key]:+.1f}" for key in ("value", "low", "high"))
        return f"{value} [{low}, {high}] p {test['p']:.2g}{mark}"
    counts = [f"{one['only_first']}:{one['only_second']}" for one in entry.get("mcnemar", {}).values()]
    return f"McNemar {', '.join(counts)}" if counts else "-"
