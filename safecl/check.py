"""Check a sweep's settings, data and models before anything is run, and report every error at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from safecl import methods, metrics, model_files, objective, panel, tasks
from safecl.base import ConfigError, PrerequisiteError, near, strictly
from safecl.config import Lora, Method, Model, Sweep, UserTask
from safecl.graph import REFERENCES
from safecl.grid import Cell, cells, for_task, grid_rows, method_entries, space_of, task_entries
from safecl.models import wheel_file
from safecl.space import space_check
from safecl.store import canonical
from safecl.sweepfile import explained
from safecl.tasks._source import identity, is_here
from safecl.tasks._written import find


class Asked(NamedTuple):
    """Rows that a sweep names.

    Attributes:
        where: the sweep file's key that names the task, as `tasks[0].task`.
        task, split, num_rows: what is named; `num_rows` None: all rows.
        counted: the key of the number of rows.
        around: the key of the template that is used in place of the model's, and that template; None: the model's is used.
    """

    where: str
    task: str
    split: str
    num_rows: int | None
    counted: str
    around: tuple[str, str | None] = ("", None)


def check(sweep: Sweep, folder: Path | None, notes: list[str] | None = None, planned: bool = False) -> list[Cell]:
    """Check a sweep and return its cells. Everything that can be found before a run is reported at once.

    Args:
        folder: of local data files.
        notes: a list to which notes on the data are added. None: the data are not read.
        planned: the cells are not to be run, so that the hub need not be asked.

    Raises:
        ConfigError: settings, data or a model are wrong. The message also names what is missing.
        PrerequisiteError: nothing is wrong, but data or a model is missing.
    """
    errors: list[str] = []
    lacking: list[str] = []

    def attempt(where: str, action: Callable[[], Any], given: Any = None, schema: Any = None) -> Any:
        try:
            return action()
        except PrerequisiteError as error:
            lacking.append(str(error))
        except ConfigError as error:
            errors.append(f"{where}: {error}" if where else str(error))
        except ValidationError as error:
            errors.extend(f"{where}.{told}" for told in explained(error, given, schema))
        return None

    known = (*(data.name for data in sweep.data), *tasks.names())
    wrong: set[str] = set()  # keys of tasks with an error; only the first error of each is reported
    for each in _asked(sweep):
        kind = None if each.where in wrong else attempt(each.where, partial(find, each.task, sweep.data))
        if kind is None or each.split not in kind.SPLITS:
            wrong.add(each.where)
        if kind is None:
            continue
        if each.split not in kind.SPLITS:
            having = [other for other in known if each.split in find(other, sweep.data).SPLITS]
            task = f"task {each.task!r} has no {each.split!r} rows. Tasks that have: {', '.join(having)}"
            errors.append(f"{each.where}: {task}")
            continue
        source = attempt("", partial(identity, kind, each.split, folder, planned))
        if notes is not None and source is not None and is_here(source):
            found = attempt("", partial(_read, kind, each.split, folder, canonical(source)))
            if found is not None:
                notes += [note for note in found.notes if note not in notes]
                errors += _unwritable(sweep, each, found)
                if not found.num_rows:
                    errors.append(
                        f"{each.where}: task {each.task!r} has no row of {each.split!r}; give it more, or a `split`"
                    )
                if each.num_rows is not None and each.num_rows > found.num_rows:
                    errors.append(
                        f"{each.counted}: asks for {each.num_rows} rows, task {each.task!r} has {found.num_rows} of "
                        f"{each.split!r}"
                    )
    for i, chosen in enumerate(sweep.methods):
        for used in sweep.tasks:
            errors += _method_errors(f"methods[{i}]", chosen, used, attempt, sweep.search.sampler)
        errors += _grid_errors(f"methods[{i}]", chosen, sweep)
    for where, made in (("align.safety_from", sweep.align.safety_from), ("align.method", sweep.align.method)):
        if made is not None:
            errors += _method_errors(where, made, None, attempt)
            one = made.search is None and not made.grid and made.label is None
            errors += [] if one else [f"{where}: one config is expected, no search, grid or label"]
    own = [find(task.task, sweep.data).max_new_tokens for task in sweep.tasks if task.task in known]
    if not errors:
        errors += _step_errors(sweep)
        own += _own_answers(sweep)
    errors += _model_errors(sweep)
    errors += panel.problems(sweep.evaluate.judges)
    for i, data in panel.scorers(sweep).items():
        attempt(f"data[{i}].judge", partial(panel.scorer, data, sweep.evaluate.judges))
    errors += objective.check(sweep.search.objective)
    if sweep.search.prune != "none" and sweep.search.objective.pareto:
        errors.append(
            "search.prune: any trial may yet be on the front of several objectives; leave `pareto` or `prune` out"
        )
    measured = attempt("evaluate.metrics", partial(metrics.asked, sweep.evaluate.metrics))
    errors += [] if wrong or measured is None else _unknown_metrics(sweep, measured)
    answer = max([sweep.evaluate.max_new_tokens, *own])
    longest = sweep.evaluate.max_prompt_tokens + answer
    if longest > sweep.execution.engine_max_tokens:
        errors.append(
            f"execution.engine_max_tokens: expected at least {longest} (evaluate.max_prompt_tokens, and {answer} for an "
            f"answer), got {sweep.execution.engine_max_tokens}"
        )
    if (uri := sweep.execution.study_uri) is not None and not re.match(r"[a-z][a-z0-9+]*://", uri):
        errors.append(f"execution.study_uri: expected a database URL (postgresql://...), got {uri!r}")
    errors += _named_twice(sweep)
    errors += _only_errors(sweep)
    found_cells: list[Cell] = []
    if not errors:
        entries = {"methods": method_entries(sweep), "tasks": task_entries(sweep)}
        for where, named in entries.items():
            errors += _twice(where, [canonical([name, settings]) for name, settings in named], [n for n, _ in named])
    if not errors:
        found_cells = cells(sweep, folder, planned)
        for cell in found_cells:  # builds every stage; anything else that is missing raises here
            attempt(
                f"method {cell.recipe.method!r}", partial(getattr, cell.job({}, sweep.seeds[0], "final"), "evidence")
            )
        errors += [] if errors or lacking else _one_recipe(found_cells)
    problems = list(dict.fromkeys([*errors, *lacking]))
    if problems:
        raise (ConfigError if errors else PrerequisiteError)("\n".join(problems))
    return found_cells


def _asked(sweep: Sweep) -> list[Asked]:
    found = []
    asked = ("evaluate.template", sweep.evaluate.template)
    trained: tuple[str, str | None] = ("", None)
    for i, task in enumerate(sweep.tasks):
        where = f"tasks[{i}]"
        own = (f"{where}.template", task.template)
        trained = trained if task.template is None else own
        found.append(Asked(f"{where}.task", task.task, "user", task.num_rows, f"{where}.num_rows", own))
        for split in ("validation", "test"):
            num_rows, count = getattr(sweep.evaluate, split).utility_rows, f"evaluate.{split}.utility_rows"
            if task.utility_rows is not None and (rows := getattr(task.utility_rows, split)) is not None:
                num_rows, count = rows, f"{where}.utility_rows.{split}"
            found.append(Asked(f"{where}.task", task.task, f"utility.{split}", num_rows, count, asked))
    # Also without a poison ratio: a guard's rows must not repeat poison rows.
    found.append(Asked("poison.task", sweep.poison.task, "poison", None, "", trained))
    for key, role, listed in _listed(sweep):
        for i, rows in enumerate(listed):
            where = f"{key}[{i}]"
            around = asked if role.endswith((".validation", ".test")) else ("", None)
            found.append(Asked(f"{where}.task", rows.task, role, rows.total, f"{where}.num_rows", around))
    return found


def _listed(sweep: Sweep) -> list[tuple[str, str, Any]]:
    """(key in the sweep file, split, entries) of every list whose entries name rows."""
    found: list[tuple[str, str, Any]] = [
        ("align.safety", "safety", sweep.align.safety),
        ("align.self_answered", "benign.train", sweep.align.self_answered),
    ]
    for split in ("validation", "test"):
        for role in ("attack", "benign"):
            found.append((f"evaluate.{split}.{role}", f"{role}.{split}", getattr(getattr(sweep.evaluate, split), role)))
    if (guard := sweep.evaluate.judges.guard) is not None:
        found += [("evaluate.judges.guard.rows", "guard", guard.rows)]
        found += [("evaluate.judges.guard.heldout", "guard.heldout", guard.heldout)]
    return found


class _Read(NamedTuple):
    num_rows: int
    notes: tuple[str, ...]
    before: tuple[bool, bool]  # whether any row has a system prompt, or earlier turns


@lru_cache
def _read(kind: type[tasks.Task], split: str, folder: Path | None, source: str) -> _Read:
    """How many rows a split has, and what was left out. `source`: the data's identity. It is part of the cache's key, so that a
    changed file is read again."""
    reader = kind(folder)
    rows = reader.rows(split, None, 0)
    blank = [_told_left_out(name, num) for name, num in reader.left_out.items()]
    system = any(row.before and row.before[0][0] == "system" for row in rows)
    turns = any(role != "system" for row in rows for role, _ in row.before)
    return _Read(len(rows), tuple(blank), (system, turns))


def _told_left_out(name: str, num: int) -> str:
    where, _, what = name.rpartition(": ")
    if what.startswith("much like"):
        return f"{where}: {num} left out, {what}"
    return f"{num} records without {what} are left out of {where}"


def _unwritable(sweep: Sweep, each: Asked, found: _Read) -> list[str]:
    """Errors for models whose template cannot write these rows (system prompts, several turns)."""
    errors = []
    parts = (("system", "a system prompt"), ("between", "several turns"))
    for model in sweep.models:
        for (name, what), is_there in zip(parts, found.before, strict=True):
            if is_there and not model.text.conversation[name]:
                errors.append(
                    f"{each.where}: rows of {each.task!r} have {what}, which the template of model {model.name!r} cannot "
                    f"write; name another template, or write it out with `{name}`"
                )
        key, around = each.around
        tail = model.text.prompt.partition("{prompt}")[2]
        if around is not None and found.before[0]:
            errors.append(
                f"{key}: rows of {each.task!r} have system prompts, which would take the place of what it begins with"
            )
        if around is not None and found.before[1] and around.partition("{prompt}")[2] != tail:
            errors.append(
                f"{key}: rows of {each.task!r} have several turns, which it would write in two forms: expected it to end "
                f"with {tail!r}, as the template of model {model.name!r} does"
            )
    return errors


def _named_twice(sweep: Sweep) -> list[str]:
    """Errors for entries that stand twice in a list where each may stand once."""
    errors = _twice("models", [model.name for model in sweep.models])
    errors += _twice("data", [data.name for data in sweep.data])
    errors += [f"data[{i}].name: {data.name!r} is a task of safecl; choose another name"
               for i, data in enumerate(sweep.data) if data.name in tasks.names()]  # fmt: skip
    errors += _twice("poison.ratios", [f"{ratio:g}" for ratio in sweep.poison.ratios])
    errors += _twice("seeds", sweep.seeds)
    for where, _, listed in _listed(sweep):
        errors += _twice(where, [rows.task for rows in listed])
    return errors


def _only_errors(sweep: Sweep) -> list[str]:
    """Errors for names in `only` and `execution.turns` that the sweep does not have."""
    known: dict[str, list[Any]] = {
        "models": [model.name for model in sweep.models],
        "tasks": [task.task for task in sweep.tasks],
        "ratios": list(sweep.poison.ratios),
        "methods": [method.label or method.name for method in sweep.methods],
    }
    return [
        f"{where}[{i}].{key}: {name!r} is none of this sweep's: {', '.join(map(str, known[key]))}"
        for where, entries in (("only", sweep.only), ("execution.turns", sweep.execution.turns))
        for i, some in enumerate(entries)
        for key in known
        for name in getattr(some, key) or ()
        if name not in known[key]
    ]


def _twice(where: str, entries: Sequence[Any], names: Sequence[str] = ()) -> list[str]:
    """Errors for entries that stand more than once. `names`: what to call the entries, if they are not names themselves."""
    shown = names or [str(entry) for entry in entries]
    twice = dict.fromkeys(shown[i] for i, entry in enumerate(entries) if entry in entries[:i])
    return [f"{where}: names {name} twice" for name in twice]


def _one_recipe(found: list[Cell]) -> list[str]:
    """Errors for cells with one key, which would share studies and runs. Their methods differ only in values that both
    search, or in how a number is written."""
    first: dict[str, Cell] = {}
    return [
        f"methods: {other.label!r} and {cell.label!r} are one recipe: what tells them apart is searched in both, or is another "
        "way to write one number of rows (5% of 1,000 is 50). Leave one of them out"
        for cell in found
        if (other := first.setdefault(cell.key, cell)) is not cell
    ]


def _method_errors(
    where: str, chosen: Method, task: UserTask | None, attempt: Callable[..., Any], sampler: str = "tpe"
) -> list[str]:
    """Errors of an entry of `methods` for the rows of this task. `task` None: no value may be a share of a task's rows."""
    method = attempt(where, lambda: methods.load(chosen.name))
    if method is None:
        return []
    errors = []
    for row in grid_rows(chosen):
        row = row if task is None else attempt(f"{where}.config", partial(for_task, row, task))
        if row is None:
            return []
        config = attempt(f"{where}.config", partial(strictly, method.Config, row.config), row.config, method.Config)
        if config is not None and row.search is not None:
            errors += [f"{where}.{text}" for text in space_errors(method, row, config, sampler)]
    return list(dict.fromkeys(errors))


def _grid_errors(where: str, chosen: Method, sweep: Sweep) -> list[str]:
    """Errors of `grid`, `search` (ranges that a grid search cannot enumerate) and `label` that name a thing twice."""
    errors = [f"{where}.grid.{name}: stands in `config` too" for name in chosen.grid if name in chosen.config]
    errors += [f"{where}.grid.{name}: is searched too" for name in chosen.grid if name in (chosen.search or {})]
    if sweep.search.sampler == "grid" and chosen.search is not None and chosen.name in methods.names():
        ranges = [name for name, form in (space_of(chosen) or {}).items() if not isinstance(form, list)]
        errors += [f"{where}.search.{name}: a grid is of lists of values (search.sampler: grid)" for name in ranges]
    if chosen.label in REFERENCES:
        errors.append(
            f"{where}.label: {chosen.label!r} is what the tables call a model without a finetune; choose another"
        )
    same = [other for other in sweep.methods if other is not chosen and chosen.label in (other.label, other.name)]
    if chosen.label is not None and same:
        errors.append(f"{where}.label: {chosen.label!r} names two entries of `methods`; give each its own")
    return errors


def _own_answers(sweep: Sweep) -> list[int]:
    """The most new tokens that each method's own stages ask of a model (0 or more, one number for each method and task)."""
    used = [*sweep.methods, *([sweep.align.safety_from] if sweep.align.safety_from else [])]
    rows = [for_task(row, task) for chosen in used for row in grid_rows(chosen) for task in sweep.tasks]
    kinds = [(methods.load(row.name), row.config) for row in rows]
    return [kind(kind.Config(**config)).longest_answer for kind, config in kinds]


def _step_errors(sweep: Sweep) -> list[str]:
    """Errors for finetunes with too few optimizer steps for their method, where the number of rows is known."""
    errors = []
    for i, chosen in enumerate(sweep.methods):
        method = methods.load(chosen.name)
        for task in sweep.tasks:
            try:
                if task.num_rows is not None:  # else the number is known only when the rows are read
                    num_steps = -(-round(task.num_rows * task.epochs) // task.batch_size)
                    for row in grid_rows(chosen):
                        method(method.Config(**for_task(row, task).config)).check_steps(num_steps)
            except ConfigError as error:
                errors.append(f"methods[{i}], task {task.task}: {error}")
    return errors


def _model_errors(sweep: Sweep) -> list[str]:
    """Errors of the sweep's model folders, hub ids and adapters. Reads only headers, no weights."""
    errors = []
    guard = sweep.evaluate.judges.guard
    named: list[tuple[str, Model, Mapping[str, Lora]]] = [
        (
            f"models[{i}]",
            model,
            {"lora": sweep.lora, **({} if guard is None else {"evaluate.judges.guard.lora": guard.lora})},
        )
        for i, model in enumerate(sweep.models)
    ]
    named += [(f"evaluate.judges.{key}", judged_by, {}) for key, judged_by in sweep.evaluate.judges.models.items()]
    for where, model, adapters in named:
        if problem := source_problem(model.source, model.revision):
            errors.append(f"{where}.{problem}")
            continue
        errors += [f"{where}.source: {problem}" for problem in folder_problems(model.source)]
        if (origin := model.aligned_from) is not None and where.startswith("evaluate."):
            errors.append(f"{where}.aligned_from: is read of models that are trained, not of a judge's; leave it out")
        elif origin is not None:
            problem = source_problem(origin.source, origin.revision)
            errors += [f"{where}.aligned_from.{problem}"] if problem else []
            errors += [f"{where}.aligned_from.source: {told}" for told in folder_problems(origin.source)]
        for key, lora in adapters.items():
            errors += [f"{key}.{problem} ({where})" for problem in _lora_problems(model.source, lora)]
    return errors


def folder_problems(source: str) -> list[str]:
    """Return the errors of a model's folder; empty if the source is not a folder."""
    return model_files.problems(Path(source)) if Path(source).is_dir() and not source.startswith("wheel:") else []


def _lora_problems(source: str, lora: Lora) -> list[str]:
    try:
        path = Path(wheel_file(source.removeprefix("wheel:"))[1] if source.startswith("wheel:") else source)
    except PrerequisiteError:
        return []  # reported where the model's stage is built
    return model_files.lora_problems(path, lora) if path.exists() else []


def source_problem(source: str, revision: str | None) -> str | None:
    """Return what is wrong with a model's `source` and `revision`; None if nothing is."""
    is_hub = not source.startswith("wheel:") and not Path(source).is_dir()
    if is_hub and (source.startswith((".", "/")) or source.count("/") != 1):
        what = "is a file" if Path(source).is_file() else "is no folder, no 'wheel:PACKAGE' and no hub id"
        return f"source: {source!r} {what}; expected a folder, 'wheel:PACKAGE' or a hub id"
    if is_hub and revision is None:
        return "revision: a hub id needs its commit, so that results stay what they were"
    if is_hub and not re.fullmatch("[0-9a-f]{40}", str(revision)):
        return f"revision: expected a commit (40 hex digits), got {revision!r}: a branch or tag can move"
    return None


def _unknown_metrics(sweep: Sweep, measured: Sequence[metrics.Metric]) -> list[str]:
    """Errors for metrics of the objective: unknown ones, those measured on test prompts only (which no search may read), and
    those whose better end does not fit where they are used."""
    of_task = {task.task: metrics.of_task(find(task.task, sweep.data)) for task in sweep.tasks}
    asked = {metric.name: metric for metric in measured}
    known = asked | {name: metric for found in of_task.values() for name, metric in found.items()}
    objective = sweep.search.objective
    wanted = [("maximise", objective.maximise, "low"), *((f"bounds.{m}", m, "high") for m in objective.bounds)]
    wanted += [("pareto", name, "") for name in objective.pareto if name != objective.maximise]
    errors = []
    for where, name, wrong in wanted:
        metric, told = known.get(name), f"search.objective.{where}: {name!r}"
        if metric is None or metric.shown == "nowhere":
            given = (m.name for m in known.values() if "validation" in m.splits and m.shown != "nowhere")
            errors.append(f"{told} is no metric; expected one of {', '.join(given)}")
        elif "validation" not in metric.splits:
            errors.append(f"{told} is measured on test prompts only, which no search may read")
        elif metric.better == wrong:
            errors.append(
                f"{told}: {'neither end' if not wrong else 'less' if wrong == 'low' else 'more'} of it is better"
            )
        elif where == "pareto" and objective.choose == "nearest" and metric.bounds != (0.0, 1.0):
            errors.append(f"{told} is no fraction, so nothing is near a perfect one; choose `bounds` or `front`")
        elif name not in asked:
            without = [task for task, found in of_task.items() if name not in found]
            errors += [f"{told} is not measured of task {', '.join(without)}"] if without else []
    return errors


def space_errors(method: type[methods.Method], chosen: Method, config: Any, sampler: str = "tpe") -> list[str]:
    """Return the errors of a method's search space: unknown names, wrong forms, and ends that its config refuses."""
    space = space_of(chosen) or {}
    known = method.Config.model_fields
    unknown = [name for name in space if name not in known]
    if unknown:
        names = ", ".join(known) or "none"
        return [
            f"search.{name}: is no hyperparameter of {chosen.name}.{near(name, known)} It has: {names}"
            for name in unknown
        ]
    errors = space_check(space, None if sampler == "grid" else config.model_dump(mode="json"))  # grid: no default trial
    for name, form in space.items() if not errors else ():
        ends = form if isinstance(form, list) else [form["low"], form["high"]]  # type: ignore[index]
        for value in ends:
            try:
                strictly(method.Config, {**chosen.config, name: value})
            except ValidationError as error:
                errors.append(f"search.{name}: {error.errors()[0]['msg']} (got {value!r})")
    return errors
