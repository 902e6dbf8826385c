"""What is wrong with a sweep, before anything is spent: every config error at once, then missing data and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safecl import methods, objective, tasks
from safecl.base import ConfigError
from safecl.config import Method, Sweep
from safecl.grid import Cell, cells
from safecl.search import space_check


def check(sweep: Sweep, folder: Path | None) -> list[Cell]:
    """The sweep's cells, after everything that can be known to be wrong before anything is spent, all at once
    (ConfigError), then whether the data and models are there (PrerequisiteError)."""
    errors: list[str] = []

    def attempt(where: str, action: Any) -> Any:
        try:
            return action()
        except ConfigError as error:
            errors.append(f"{where}: {error}")
        except ValidationError as error:
            for item in error.errors():
                name = ".".join(str(part) for part in item["loc"])
                errors.append(f"{where}.{name}: {item['msg']} (got {item.get('input')!r})")
        return None

    def has_split(where: str, name: str, split: str) -> None:
        kind = attempt(where, lambda: tasks.load(name))
        if kind is not None and split not in kind.SPLITS:
            having = [other for other in tasks.names() if split in tasks.load(other).SPLITS]
            errors.append(f"{where}: task {name!r} has no {split!r} rows. Tasks that have: {', '.join(having)}")

    for i, task in enumerate(sweep.tasks):
        for split in ("user", "utility.validation", "utility.test"):
            has_split(f"tasks[{i}].task", task.task, split)
    has_split("poison.task", sweep.poison.task, "poison")  # also without a ratio: a guard's rows keep clear of it
    for name, split in (("safety", "safety"), ("self_answered", "benign.train")):
        for i, part in enumerate(getattr(sweep.align, name)):
            has_split(f"align.{name}[{i}].task", part.task, split)
    for split in ("validation", "test"):
        for role in ("attack", "benign"):
            for i, part in enumerate(getattr(getattr(sweep.evaluate, split), role)):
                has_split(f"evaluate.{split}.{role}[{i}].task", part.task, f"{role}.{split}")
    guard = sweep.evaluate.judges.guard
    for name, split in (("rows", "guard"), ("heldout", "guard.heldout")) if guard else ():
        for i, part in enumerate(getattr(guard, name)):
            has_split(f"evaluate.judges.guard.{name}[{i}].task", part.task, split)
    for i, chosen in enumerate(sweep.methods):
        where = f"methods[{i}]"
        method = attempt(where, lambda name=chosen.name: methods.load(name))
        if method is None:
            continue
        attempt(f"{where}.config", lambda method=method, config=chosen.config: method.Config(**config))
        for task in sweep.tasks if not errors else ():
            num_steps = -(-round((task.num_rows or 0) * task.epochs) // task.batch_size)
            if task.num_rows is not None:  # else known where the rows are
                made = method(method.Config(**chosen.config))
                attempt(f"{where}, task {task.task}", lambda made=made, steps=num_steps: made.check_steps(steps))
        if chosen.search is not None:
            errors += [f"{where}.{text}" for text in _space_errors(method, chosen)]
    for i, model in enumerate(sweep.models):
        if problem := source_problem(model.source, model.revision):
            errors.append(f"models[{i}].{problem}")
    errors += objective.check(sweep.search.objective) + _unknown_metrics(sweep)
    longest = sweep.evaluate.max_prompt_tokens + sweep.evaluate.max_new_tokens
    if longest > sweep.execution.engine_max_tokens:
        errors.append(
            f"execution.engine_max_tokens: expected at least {longest} (evaluate.max_prompt_tokens + max_new_tokens), "
            f"got {sweep.execution.engine_max_tokens}"
        )
    if errors:
        raise ConfigError("\n".join(errors))
    found = cells(sweep, folder)
    for cell in found:  # builds every stage: missing data files and models raise here
        job = cell.job({}, sweep.seeds[0], "final")
        attempt(f"method {cell.recipe.method!r}", lambda job=job: job.evidence)
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    return found


def source_problem(source: str, revision: str | None) -> str | None:
    """What is wrong with where a model comes from."""
    is_hub = not source.startswith("wheel:") and not Path(source).is_dir()
    if is_hub and (source.startswith((".", "/")) or source.count("/") != 1):
        return f"source: {source!r} is no folder, no 'wheel:PACKAGE' and no hub id"
    if is_hub and revision is None:
        return "revision: a hub id needs its commit, so that results stay what they were"
    return None


# What is measured of validation answers whatever the task.
ON_VALIDATION = ("asr", "asr_coherent", "non_refusal", "over_refusal", "degenerate", "off_topic", "hit_limit")


def _unknown_metrics(sweep: Sweep) -> list[str]:
    """Metrics of the objective that validation prompts do not give: unknown ones, and those that a search would have to
    read test prompts for."""
    used = {
        task.task: tasks.load(task.task) for task in sweep.tasks if task.task in tasks.names()
    }  # others: said elsewhere
    on_test = {name for kind in used.values() for name in kind().likelihood_scores([], [])}
    known = dict.fromkeys([*ON_VALIDATION, *(name for kind in used.values() for name in kind.SCORES)])
    wanted = {"maximise": sweep.search.objective.maximise, **{f"bounds.{m}": m for m in sweep.search.objective.bounds}}
    errors = []
    for where, metric in wanted.items():
        if metric in on_test:
            errors.append(
                f"search.objective.{where}: {metric!r} is measured on test prompts only, which no search may read"
            )
        elif metric not in known:
            errors.append(f"search.objective.{where}: {metric!r} is no metric; expected one of {', '.join(known)}")
        elif metric not in ON_VALIDATION:
            without = [name for name, kind in used.items() if metric not in kind.SCORES]
            told = f"search.objective.{where}: {metric!r} is not measured of task {', '.join(without)}"
            errors += [told] if without else []
    return errors


def _space_errors(method: type[methods.Method], chosen: Method) -> list[str]:
    try:
        config = method.Config(**chosen.config)
    except ValidationError:
        return []  # reported with the config
    space = chosen.search or method.search_space(config)
    known = method.Config.model_fields
    unknown = [name for name in space if name not in known]
    if unknown:
        names = ", ".join(known) or "none"
        return [f"search.{name}: is no hyperparameter of {chosen.name}; it has: {names}" for name in unknown]
    errors = space_check(space, config.model_dump(mode="json"))
    for name, form in space.items() if not errors else ():
        ends = form if isinstance(form, list) else [form["low"], form["high"]]  # type: ignore[index]
        for value in ends:
            try:
                method.Config(**{name: value})
            except ValidationError as error:
                errors.append(f"search.{name}: {error.errors()[0]['msg']} (got {value!r})")
    return errors
