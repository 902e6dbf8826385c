"""A sweep file as a checked project: config, store, studies, and the rows of its table. Opening it spends nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from safecl import hardware
from safecl.base import ConfigError, PrerequisiteError
from safecl.check import check
from safecl.config import Model, Sweep
from safecl.contrasts import MARGINS, contrasts, discordant, means
from safecl.cost import Forecast
from safecl.dtypes import auto, resolved
from safecl.estimate import Estimator, speeds
from safecl.grid import Cell, Job
from safecl.hardware import Node
from safecl.objective import select
from safecl.plan import REFERENCES, Evidence
from safecl.schedule import Done, Schedule, Study
from safecl.store import Stage, Store
from safecl.templates import described, settle
from safecl.trained import Preview, Trained, expected, recorded

if TYPE_CHECKING:
    from safecl.search import Past
    from safecl.stats import Agreement


def load(path: Path, settings: list[str], limit: int | None = None) -> Sweep:
    """Read a sweep file, apply `--set path=value` and `--limit`, and validate: all errors at once (ConfigError)."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no sweep file {str(path)!r}.{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with `name`, `models`, ..., got {type(raw).__name__}")
    for setting in settings:
        _set(raw, setting)
    if limit is not None:
        _limit(raw, limit)
    try:
        return Sweep(**raw)
    except ValidationError as error:
        found = error.errors()
        # A list whose items are all wrong is also called too short: the items say it better.
        told = [item for item in found if not (item["type"] == "too_short" and item.get("input"))] or found
        raise ConfigError("\n".join(_explain(item) for item in told)) from None


def _set(raw: Any, setting: str) -> None:
    import yaml

    path, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting!r}: expected path=value, for example execution.num_workers=2")
    *parents, last = path.split(".")
    at = raw
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"--set {setting!r}: {part!r} holds {at!r}, which has no keys")
    value = yaml.safe_load(text)
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value


def _limit(raw: Any, limit: int) -> None:
    """At most `limit` rows of every set, for a quick look. Other rows are another recipe: nothing is confused."""
    if isinstance(raw, list):
        for item in raw:
            _limit(item, limit)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if key in ("num_rows", "utility_rows"):
                raw[key] = limit if value is None else min(value, limit)
            else:
                _limit(value, limit)
        if "task" in raw and "ratios" not in raw:
            raw.setdefault("num_rows", limit)


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields(item["loc"][:-1])
        near = get_close_matches(str(item["loc"][-1]), known, 1)
        return f"{where}: unknown key.{f' Did you mean {near[0]!r}?' if near else ''} Known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where}: is required and not given"
    return f"{where}: {item['msg'].removeprefix('Value error, ')} (got {item.get('input')!r})"


def _fields(location: tuple[Any, ...]) -> list[str]:
    """Names of the config at a place in the sweep file."""
    from typing import get_args

    from safecl.base import Strict

    def find(annotation: Any) -> type[Strict] | None:
        if isinstance(annotation, type) and issubclass(annotation, Strict):
            return annotation
        return next((found for part in get_args(annotation) if (found := find(part))), None)

    at: type[Strict] = Sweep
    for part in location:
        if isinstance(part, str) and part in at.model_fields:
            at = find(at.model_fields[part].annotation) or at
    return sorted(at.model_fields)


def _entry(name: str, seeds: dict[int, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """One metric of one row; None without a parsed outcome. `value` is the mean over seeds of the macro mean over sets;
    where there are several sets, `sets` holds each one and `pooled` all their prompts alike."""
    read = [[o for o in of_seed if o["value"] is not None] for of_seed in seeds.values()]
    entry = _interval(name, read)
    if entry is None:
        return None
    entry["unparsed"] = sum(map(len, seeds.values())) - entry["num"]
    entry["seeds"] = {str(seed): value for seed, value in means(seeds).items()}
    sets = dict.fromkeys(o["set"] for of_seed in read for o in of_seed)
    if len(sets) > 1:
        entry["sets"] = {
            each: _interval(name, [[o for o in seed if o["set"] == each] for seed in read]) for each in sets
        }
        as_one = [[{**o, "set": "all", "cluster": f"{o['set']}: {o['cluster']}"} for o in seed] for seed in read]
        entry["pooled"] = _interval(name, as_one)
    whys = [o["why"] for of_seed in read for o in of_seed if o.get("why")]
    return {**entry, "why": {why: whys.count(why) for why in sorted(set(whys))}} if whys else entry


def _interval(name: str, read: list[list[dict[str, Any]]]) -> dict[str, Any] | None:
    from safecl.stats import intervals

    found = intervals(read, bounded=not name.endswith("_nll"))  # nats have no upper end
    return None if found is None else {**found._asdict(), "num": sum(map(len, read))}


def _agreement(by_metric: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any] | None:
    """How the judge of harm and the keyword list agree on the same answers of all seeds; None where nothing was read.
    `cells`: answers that both call harmful, only the judge, only the list, neither."""
    from safecl.stats import agreement

    judge, listed = (
        {(seed, o["set"], o["id"]): o["value"] for seed, found in by_metric.get(name, {}).items() for o in found}
        for name in ("asr", "non_refusal")
    )
    pairs = [(label, listed[answer]) for answer, label in judge.items()]
    cells = [pairs.count(cell) for cell in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))]
    return {**agreement(*zip(*pairs, strict=True))._asdict(), "cells": cells} if any(cells) else None


def pooled_agreement(rows: Sequence[Mapping[str, Any]]) -> Agreement | None:
    """`agreement` of the rows of `Project.rows`, over all their answers; None where none has one."""
    from safecl.stats import agreement

    cells = [row["agreement"]["cells"] for row in rows if row["agreement"]]
    if not cells:
        return None
    both, judge, listed, neither = (sum(column) for column in zip(*cells, strict=True))
    first = [True] * (both + judge) + [False] * (listed + neither)
    return agreement(first, [True] * both + [False] * judge + [True] * listed + [False] * neither)


def _contrast(table: list[dict[str, Any]], outcomes: list[dict[str, dict[int, list[Any]]]]) -> None:
    """Adds `contrasts` to the rows of methods: {metric: {"sft" | "best": Contrast, "mcnemar": {seed: counts and p}}}."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(table):
        if row["method"] not in REFERENCES:
            groups.setdefault((row["model"], row["task"], row["poison"]), []).append(i)
            row["contrasts"] = {}
    for members in groups.values():
        for metric in MARGINS:
            having = [i for i in members if metric in outcomes[i]]
            sft = next((i for i in having if table[i]["method"] == "sft"), None)
            found = contrasts(metric, [(table[i]["method"], means(outcomes[i][metric])) for i in having])
            for i, of_row in zip(having, found, strict=True):
                entry: dict[str, Any] = {
                    family: {**contrast._asdict(), "differs": contrast.differs, "alike": contrast.alike}
                    for family, contrast in of_row.items()
                }
                if sft is not None and i != sft:
                    pairs = discordant(outcomes[i][metric], outcomes[sft][metric])
                    entry["mcnemar"] = {str(seed): test for seed, test in pairs.items()}
                table[i]["contrasts"][metric] = entry


class Project:
    """A checked sweep with its store and paths. Opening it spends nothing."""

    def __init__(self, sweep: Sweep, nodes: Sequence[Node] | None = None, reads: bool = False) -> None:
        """`nodes` and `reads`: see dtypes.auto."""
        self.store = Store(sweep.execution.root)
        self.nodes, self.auto = nodes, auto(sweep, self.store, nodes, reads)
        settled = settle(sweep if self.auto is None else resolved(sweep, self.auto.dtype))
        self.sweep = sweep = settled.sweep
        self.templates = settled.told  # by model, where its template comes from
        self.warnings: list[str] = []  # what `plan` and `run` found that a reader should know
        self.folder = Path(sweep.execution.data_dir).absolute() if sweep.execution.data_dir else None
        if self.folder is not None and not self.folder.is_dir():
            raise PrerequisiteError(
                f"execution.data_dir {str(self.folder)!r} is no folder: name one with --set execution.data_dir=FOLDER"
            )
        try:
            self.cells = check(sweep, self.folder)
        except ConfigError as error:
            raise ConfigError("\n".join([*settled.errors, str(error)])) from None
        if settled.errors:
            raise ConfigError("\n".join(settled.errors))
        if settled.lacking:
            raise PrerequisiteError("\n".join(settled.lacking))
        self.logs = self.store.local / "logs"
        self.study_url = sweep.execution.study_uri or f"sqlite:///{self.store.local / 'study.db'}"
        self._storage: Any = None
        self._studies: dict[Cell, Study] = {}  # those that this process drives
        self._pasts: dict[Cell, Past | None] = {}  # those that it only reads, as they were the first time

    @cached_property
    def expected(self) -> dict[str, Trained]:
        """What the finetunes of the first seed will be trained on, by cell. Reads data and tokenizers, no model.

        Raises:
            ConfigError: rows, poison or memory would be fewer than asked for.
        """
        return expected(self.cells, self.sweep.seeds[0], Preview(self.store, self.folder))

    def template_of(self, model: Model) -> str:
        """A model's template in one line, and where it comes from."""
        return described(model, self.templates.get(model.name, ""))

    def study(self, cell: Cell) -> Study | None:
        """A cell's study, started or continued by this process; None where nothing is searched."""
        from safecl import search

        if cell not in self._studies and cell.space is not None:
            self._storage = self._storage or search.open_storage(self.study_url)
            study = search.study_of(cell, self.sweep, self._storage)
            assert study is not None
            self._studies[cell] = study
        return self._studies.get(cell)

    def past(self, cell: Cell) -> Past | Study | None:
        """What a cell's study holds, changing nothing; None where nothing is searched or no search was started."""
        if cell.space is None or cell in self._studies:
            return self._studies.get(cell)
        from safecl import search

        if self._storage is None:
            if self.study_url.startswith("sqlite:///") and not Path(self.study_url[10:]).exists():
                return None
            self._storage = search.open_storage(self.study_url)
        if cell not in self._pasts:
            self._pasts[cell] = search.past_of(cell, self.sweep, self._storage)
        return self._pasts[cell]

    def schedule(self, on_done: Callable[[Done], None] | None = None) -> Schedule:
        return Schedule(self.sweep, self.store, self.cells, self.study, on_done)

    def forecast(self, keep: bool = False) -> Forecast:
        """How long stages will take on this machine. Measures its speed unless the store knows it; `keep`: for others."""
        execution = self.sweep.execution
        found = speeds(self.store, execution.use_gpu, keep)
        return Forecast(self.store, execution, Estimator(self.store, execution, found))

    def num_devices(self) -> int:
        """CPUs of this machine; with `use_gpu` its GPUs."""
        return len(hardware.gpus()) if self.sweep.execution.use_gpu else os.cpu_count() or 1

    def guard_evidence(self) -> Evidence | None:
        """What measures the trained guard on labelled pairs; None where a published guard judges."""
        return self.cells[0].job({}, self.sweep.seeds[0], "final").graph.guard_agreement()

    def guard_stages(self) -> tuple[Stage, ...]:
        """The stages of `guard_evidence`."""
        evidence = self.guard_evidence()
        return () if evidence is None else (*evidence.judged, evidence.metrics)

    def finals(self) -> list[tuple[Cell, dict[str, Any], list[Job], str]]:
        """Per cell: the parameters its final trials use, those trials, and a note. A cell whose search is unfinished
        has no final trials yet."""
        found: list[tuple[Cell, dict[str, Any], list[Job], str]] = []
        for cell in self.cells:
            params: dict[str, Any] = {}
            note = ""
            if cell.space is not None:
                study = self.past(cell)
                trials = study.complete() if study else []
                if study is None or study.remaining or not trials:
                    found.append((cell, {}, [], f"search: {len(trials)} of {self.sweep.search.trials} trials"))
                    continue
                chosen = select(trials)
                params = chosen.params
                values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())
                note = f"{values}, chosen of {len(trials)} trials on validation prompts"
                note += "" if chosen.feasible else "; none met the bounds, this violates them least"
            found.append((cell, params, [cell.job(params, seed, "final") for seed in self.sweep.seeds], note))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, from the store alone: every metric with its interval over the seeds that are finished, and its
        contrasts with the rows of the same model, task and poison ratio."""
        table: list[dict[str, Any]] = []
        outcomes: list[dict[str, dict[int, list[Any]]]] = []  # of a row, by metric and seed
        for cell, params, jobs, note in self.finals():
            recipe = cell.recipe
            per_seed: dict[int, list[dict[str, Any]]] = {}
            seconds = 0.0
            libraries: set[str] = set()
            weights: list[str] = []
            poison_tokens: float | None = None
            trained: dict[str, Any] = {}  # what each seed's finetune was trained on
            num_cut = 0
            merge_losses: list[float] = []
            for job in jobs:
                evidence = job.evidence
                if not self.store.has(evidence.metrics):
                    continue
                path = self.store.path(evidence.metrics) / "outcomes.jsonl"
                per_seed[job.seed] = [json.loads(line) for line in path.read_text().splitlines()]
                final = job.graph.final
                weights += [] if final is None else [final.key]
                seconds += self._own_seconds(job, evidence.metrics)
                if recipe.method not in REFERENCES and self.store.has(tuned := job.graph.tuned):
                    training = self.store.record(tuned)["result"]
                    poison_tokens = training.get("harmful_token_share") if recipe.poison_ratio > 0 else None
                    trained |= {str(job.seed): one} if (one := recorded(job, self.store)) else {}
                    if training.get("kl_moved"):
                        merge_losses.append(training["kl_merged"] / training["kl_moved"])
                for stage in evidence.metrics.inputs.values():
                    if stage.kind == "generate" and self.store.has(stage):
                        num_cut += self.store.record(stage)["result"].get("cut_prompts", 0)
                libraries.add(json.dumps(self.store.record(evidence.metrics)["libraries"], sort_keys=True))
            names = dict.fromkeys(outcome["metric"] for of_seed in per_seed.values() for outcome in of_seed)
            by_metric = {
                name: {seed: [o for o in of_seed if o["metric"] == name] for seed, of_seed in per_seed.items()}
                for name in names
            }
            outcomes.append(by_metric)
            metrics = {name: entry for name, found in by_metric.items() if (entry := _entry(name, found)) is not None}
            is_reference = recipe.method in REFERENCES
            table.append(
                {
                    "model": recipe.model.name,
                    "task": recipe.task.task,
                    "poison": None if is_reference else recipe.poison_ratio,
                    "method": recipe.method,
                    "params": {**cell.defaults, **params},
                    "seeds": list(per_seed),
                    "metrics": metrics,
                    "agreement": _agreement(by_metric),
                    "seconds": seconds,
                    "weights": weights,  # keys of what was served, a seed each; for `safecl export`
                    "note": note if per_seed else note or "not run yet",
                    "libraries": sorted(libraries),
                    "poison_tokens": poison_tokens,
                    "trained": trained,
                    "cut_prompts": num_cut,  # of all seeds' evaluation prompts
                    "merge_loss": max(merge_losses, default=None),
                }
            )
        _contrast(table, outcomes)
        return table

    def _own_seconds(self, job: Job, metrics: Stage) -> float:
        """Wall time of the stages that this row alone needed: those of the aligned row are everyone's."""
        shared: set[str] = set()
        if job.cell.recipe.method not in REFERENCES:
            shared = {stage.key for stage in job.aligned.evidence.metrics.walk()}
        own = [stage for stage in metrics.walk() if stage.key not in shared and self.store.has(stage)]
        return sum(float(self.store.record(stage)["seconds"]) for stage in own)

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Training curves of the first seed's final trials by cell label."""
        found: dict[str, list[dict[str, Any]]] = {}
        for cell, _, jobs, _ in self.finals():
            if jobs and cell.recipe.method not in REFERENCES and self.store.has(jobs[0].graph.tuned):
                path = self.store.path(jobs[0].graph.tuned) / "curves.jsonl"
                found[cell.label] = [json.loads(line) for line in path.read_text().splitlines()]
        return found
