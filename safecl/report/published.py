"""Compare our rows with published ones, and list the settings that differ.

The published numbers are in a data file such as sweeps/paper/published.yaml:

    source      where the numbers were published
    settings    {dotted key of a sweep file: value}; list entries are named by their names. Unknown settings are left out
    rows        [{table, model, task, poison, method, and metrics in percent}], with the names of the sweep
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import ConfigError, Strict
from safecl.config import Method, Sweep
from safecl.report.tables import Detail
from safecl.sweepfile import read_yaml

_NAMES = ("table", "model", "task", "poison", "method")  # keys of a row; all other keys are its metrics


class Published(NamedTuple):
    """The content of a file of published numbers."""

    source: str
    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]


class Beside(NamedTuple):
    """One number of ours with the published one, as fractions. `low` and `high` are our interval. `inside`: the published
    number is in our interval."""

    table: int
    model: str
    task: str
    poison: float
    method: str
    metric: str
    ours: float
    low: float
    high: float
    theirs: float

    @property
    def inside(self) -> bool:
        return self.low <= self.theirs <= self.high


class Comparison(NamedTuple):
    """The comparison with published numbers that a report prints: their source, both numbers, and the settings that differ."""

    source: str
    numbers: tuple[Beside, ...]
    differences: tuple[str, ...]


def read(path: Path) -> Published:
    """Read a file of published numbers.

    Raises:
        ConfigError: the file does not have the expected form.
    """
    found = read_yaml(path)
    if not isinstance(found, dict) or set(found) != {"source", "settings", "rows"}:
        raise ConfigError(f"{path}: expected a mapping with `source`, `settings` and `rows`")
    for i, row in enumerate(found["rows"]):
        wrong = [name for name in _NAMES if name not in row]
        wrong += [name for name in row if name not in _NAMES and not _is_percent(row[name])]
        if wrong:
            raise ConfigError(
                f"{path}: rows[{i}].{wrong[0]}: expected {'a percentage' if wrong[0] in row else 'it'}, got {row}"
            )
    return Published(str(found["source"]), dict(found["settings"]), tuple(found["rows"]))


def _is_percent(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100


def comparison(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Comparison | None:
    """Compare a sweep's rows with the published numbers that it names. None if it names none.

    Raises:
        ConfigError: the file of published numbers does not have the expected form.
    """
    if sweep.published is None:
        return None
    found, models = read(Path(sweep.published.file)), sweep.published.models
    return Comparison(found.source, tuple(beside(rows, found, models)), tuple(differences(sweep, found, models)))


def beside(rows: Sequence[Mapping[str, Any]], published: Published, models: Mapping[str, str]) -> list[Beside]:
    """Published numbers for which our rows have a number too, in the published order.

    `models` maps our name of a model to the published name, if they differ. A number that is in several published tables is
    returned once for each table.
    """
    found = []
    for theirs in published.rows:
        for row in rows:
            same = (models.get(row["model"], row["model"]), row["task"], row["poison"], row["method"])
            if same != tuple(theirs[name] for name in _NAMES[1:]):
                continue
            for metric, value in theirs.items():
                if metric not in _NAMES and (entry := row["metrics"].get(metric)) is not None:
                    ours = (entry["value"], entry["low"], entry["high"])
                    found.append(Beside(theirs["table"], row["model"], *same[1:], metric, *ours, value / 100))
    return found


def differences(sweep: Sweep, published: Published, models: Mapping[str, str]) -> list[str]:
    """Settings whose published value differs from ours, one line each. Settings that this sweep does not have (such as another
    table's task) are left out."""
    ours = flat(sweep, models)
    return [
        f"{key}: {_said(ours[key])} here, {_said(theirs)} there"
        for key, theirs in published.settings.items()
        if key in ours and ours[key] != theirs
    ]


def _said(value: Any) -> str:
    """A setting's value as text. None (a number of rows) means "all"."""
    return "all" if value is None else str(value)


def flat(value: Any, models: Mapping[str, str], where: str = "") -> dict[str, Any]:
    """{dotted key: value} of a config.

    A config with a name also has the name as its own value. In a list it is addressed by its name instead of its index. A list
    of named configs also has the value "name, name, ...".
    """
    if isinstance(value, tuple) and value and all(map(_name, value)):
        found: dict[str, Any] = {where: ", ".join(map(_name, value))}
        for item in value:
            found |= flat(item, models, f"{where}.{models.get(_name(item), _name(item))}")
        return found
    if isinstance(value, Strict):
        found = {where: _name(value)} if _name(value) else {}
        for key in type(value).model_fields:
            found |= flat(getattr(value, key), models, f"{where}.{key}" if where else key)
        return found
    return {f"{where}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {where: value}


def _name(item: Any) -> str:
    if isinstance(item, Method) and item.label:
        return item.label
    return str(getattr(item, "name", "") or getattr(item, "task", "")) if isinstance(item, Strict) else ""


def details(found: Comparison, titles: Mapping[str, str]) -> dict[str, Detail]:
    """A table for each `model / task`, with one line for each published row and two columns for each metric.

    `titles` maps metrics to their titles; a metric without a title is shown by its name.
    """
    tables: dict[str, dict[tuple[Any, ...], dict[str, Beside]]] = {}
    for number in found.numbers:
        of_task = tables.setdefault(f"{number.model} / {number.task}", {})
        of_task.setdefault((number.method, number.poison, number.table), {})[number.metric] = number
    made = {}
    for where, rows in tables.items():
        metrics = list(dict.fromkeys(metric for of_row in rows.values() for metric in of_row))
        head = ["method", "poison", "their table"]
        for metric in metrics:
            head += [titles.get(metric, metric), "theirs"]
        lines = []
        for (method, poison, table), of_row in rows.items():
            line = [method, f"{100 * poison:g} %", str(table)]
            for metric in metrics:
                one = of_row.get(metric)
                ours = "-" if one is None else f"{100 * one.ours:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"
                line += [ours, "-" if one is None else f"{100 * one.theirs:.1f}{'' if one.inside else ' *'}"]
            lines.append(line)
        made[where] = Detail(f"Beside {found.source} (theirs; * outside our interval)", head, lines, in_every_form=True)
    return made


def note(found: Comparison) -> str:
    """One line with the settings that differ."""
    return f"Settings that differ from {found.source}: {'; '.join(found.differences) or 'none of those that it gives'}."
