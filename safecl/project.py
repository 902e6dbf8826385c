"""A sweep file as a checked project: config, store and studies. Opening it runs no stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import hardware, registry
from safecl.base import ConfigError, PrerequisiteError, sqlite_url
from safecl.check import check
from safecl.config import Model, Sweep
from safecl.cost import Forecast
from safecl.dtypes import auto, resolved
from safecl.estimate import Estimator, speeds
from safecl.graph import REFERENCES, Evidence
from safecl.grid import Cell, Job, points, steps
from safecl.hardware import Node
from safecl.lease import Lease
from safecl.objective import Trial, chosen
from safecl.schedule import Done, Schedule, Study
from safecl.store import Stage, Store
from safecl.sweepfile import load as load
from safecl.tasks._source import UNKNOWN
from safecl.templates import described, settle
from safecl.trained import Preview, Trained, expected

if TYPE_CHECKING:
    from safecl.stats import Quality
    from safecl.study import Past


def unknown_sources(cells: Sequence[Cell]) -> list[str]:
    """Data sets of these cells whose content is unknown (see `planned` of Project), as hub ids or file names."""
    every = [source for found in cells[0].shared.sources if isinstance(found, list) for source in found]
    return sorted({str(source.get("hub") or source["file"]) for source in every if UNKNOWN in source.values()})


def _refuse_without_driver(where: str, uri: str) -> None:
    if uri.startswith("postgres://"):
        raise ConfigError(f"{where}: a PostgreSQL's address begins with postgresql://, not with postgres://")
    driver = "psycopg2" if uri.startswith("postgresql+psycopg2") else "psycopg"
    if uri.startswith("postgresql") and find_spec(driver) is None:
        raise PrerequisiteError(
            f"{where}: {uri.partition('://')[0]}:// needs the package {driver}, which is not installed here: "
            "pip install 'safecl[postgres]'"
        )


class Swing(NamedTuple):
    """How much the choice of the guard changes the fraction of harmful answers.

    Fields: the number of guards that judged the same answers; the difference between their highest and lowest fraction,
    in [0, 1]; and whose answers these are.
    """

    num: int
    points: float
    source: str


class _Read:
    """A store that is only read: a damaged stage is not moved."""

    def __init__(self, store: Store) -> None:
        self.sound, self.record, self.file = store.has, store.record, store.file


class Project:
    """A checked sweep with its store and paths. Opening it runs no stage."""

    def __init__(
        self, sweep: Sweep, nodes: Sequence[Node] | None = None, reads: bool = False, planned: bool = False
    ) -> None:
        """Check the sweep and open its store.

        Args:
            nodes: see dtypes.auto.
            reads: see dtypes.auto.
            planned: nothing of it will be run. Facts that only the hub knows (commits of data sets, tokenizers) may
                then be unknown, which `warnings` reports.

        Raises:
            ConfigError: the sweep is wrong; one line per error.
            PrerequisiteError: a folder, a driver of a database or a tokenizer is missing.
        """
        registry.use(sweep.plugins)
        self.store = Store(sweep.execution.root, cache_gib=sweep.execution.cache_gib)
        if self.store.local.exists() and not self.store.local.is_dir():
            raise ConfigError(f"execution.root: {str(self.store.local)!r} is a file; expected a folder")
        self.planned = planned
        self.nodes, self.auto = nodes, auto(sweep, self.store, nodes, reads)
        settled = settle(sweep if self.auto is None else resolved(sweep, self.auto.dtype))
        self.sweep = sweep = settled.sweep
        self.templates = settled.told  # by model name: where its template comes from
        self.warnings: list[str] = []  # warnings of `plan` and `run` for the reader
        self.folder = Path(sweep.execution.data_dir).absolute() if sweep.execution.data_dir else None
        if self.folder is not None and not self.folder.is_dir():
            raise PrerequisiteError(
                f"execution.data_dir {str(self.folder)!r} is no folder: name one with --set execution.data_dir=FOLDER"
            )
        try:
            self.cells = check(sweep, self.folder, None if reads else self.warnings, planned)
        except (ConfigError, PrerequisiteError) as error:
            kind = ConfigError if settled.errors else type(error)
            raise kind("\n".join([*settled.errors, str(error), *settled.lacking])) from None
        if settled.errors:
            raise ConfigError("\n".join(settled.errors))
        if settled.lacking and not planned:
            raise PrerequisiteError("\n".join(settled.lacking))
        self.warnings += [f"not checked here, and needed to run: {line}" for line in settled.lacking]
        if planned and (unknown := unknown_sources(self.cells)):
            self.warnings.append(
                f"{len(unknown)} data sets are not here, nor did the hub tell what they are ({', '.join(unknown)}): counts and "
                "hours hold, keys are not those of a run"
            )
        self.logs = self.store.logs
        searches = any(cell.space is not None for cell in self.cells)
        if self.store.remote is not None and sweep.execution.study_uri is None and searches and not reads:
            self.warnings.append(
                f"the studies of this search lie on this machine alone ({self.store.local}), as execution.study_uri is null: "
                "another one asks their trials again, and finds in the store what is finished; name a database that both reach"
            )
        if sweep.execution.cache_gib is not None and self.store.remote is None and not reads:
            self.warnings.append("execution.cache_gib bounds a node's copies of a store at a URL: this one is a folder")
        at_once, in_all = sweep.search.at_once, sweep.execution.num_trials_at_once
        if searches and at_once > in_all and not reads:
            self.warnings.append(
                f"search.at_once is {at_once}, but execution.num_trials_at_once lets only {in_all} of all trials run at a time: "
                "raise that, or suggestions know less for nothing"
            )
        if (uri := sweep.execution.study_uri) is not None and uri == sweep.execution.tracking_uri:
            raise ConfigError(
                "execution.study_uri and tracking_uri are one database: expected two, since Optuna and MLflow each keep the "
                "version of their tables in a table of the same name"
            )
        for where, uri in (("tracking_uri", sweep.execution.tracking_uri), ("study_uri", sweep.execution.study_uri)):
            _refuse_without_driver(f"execution.{where}", uri or "")
        self.study_url = sweep.execution.study_uri or sqlite_url(self.store.local / "study.db")
        self._storage: Any = None
        self._snapshot: Any = None  # snapshot of the studies, if this process only reads them
        self._studies: dict[Cell, Study] = {}  # studies that this process drives
        self._pasts: dict[Cell, Past | None] = {}  # studies that it only reads, as they were when first read

    @cached_property
    def expected(self) -> dict[str, Trained | None]:
        """What the finetunes of the first seed will be trained on, by cell. Reads data and tokenizers, but no model.

        Raises:
            ConfigError: there would be fewer rows, poisoned rows or memory rows than the sweep asks for.
        """
        return expected(self.cells, self.sweep.seeds[0], Preview(self.store, self.folder, self.planned))

    def template_of(self, model: Model) -> str:
        """A model's template in one line, with its origin."""
        return described(model, self.templates.get(model.name, ""))

    def study(self, cell: Cell) -> Study | None:
        """A cell's study, which this process starts or continues. None if the cell searches nothing."""
        from safecl.storage import open_storage
        from safecl.study import study_of

        if cell not in self._studies and cell.space is not None:
            self._storage = self._storage or open_storage(self.study_url)
            study = study_of(cell, self.sweep, self._storage)
            assert study is not None
            self._studies[cell] = study
        return self._studies.get(cell)

    def past(self, cell: Cell) -> Past | Study | None:
        """A cell's study, read without changing it. None if the cell searches nothing, or no search was started."""
        if cell.space is None or cell in self._studies:
            return self._studies.get(cell)
        from safecl.storage import open_to_read
        from safecl.study import past_of

        if cell not in self._pasts:
            storage = self._storage
            if storage is None:
                self._snapshot = self._snapshot or open_to_read(self.study_url)
                storage = self._snapshot
            past = None if storage is None else past_of(cell, self.sweep, storage)
            self._pasts[cell] = past or self._replayed(cell, storage)
        return self._pasts[cell]

    @cached_property
    def _listed(self) -> Callable[[Stage], bool]:
        return self.store.listed()

    def _replayed(self, cell: Cell, storage: Any) -> Past | None:
        """A search of which there is no study here, as a run would find it: a study suggests the same trials again, and is
        told those that the store holds. None if it holds none.

        The search was run on another machine, whose study this one does not see; or it was never started, and studies with
        another objective or other bounds (in `storage`) asked its trials.
        """
        from safecl.storage import in_memory
        from safecl.study import elsewhere, past_of, study_of

        first = elsewhere(cell, self.sweep, storage) if storage is not None else []
        begin: dict[str, Any] = first[0] if first else {}  # none: it begins with the defaults
        if self.sweep.search.sampler == "grid":
            begin = points(dict(sorted((cell.space or {}).items())))[0]
        if not self._listed(cell.trial(begin, steps(self.sweep)[0]).evidence.metrics):
            return None
        memory = in_memory()
        reading: Any = _Read(self.store)
        schedule = Schedule(self.sweep, reading, [cell], lambda cell: study_of(cell, self.sweep, memory, first))
        schedule.next()  # tells the study each stored trial, up to the first that would have to run
        past = past_of(cell, self.sweep, memory)
        return past and past._replace(is_replayed=True)

    def lease(self) -> Lease:
        """The lease of a run of this sweep. It holds the sweep's name and its studies, which a sweep of another name
        may share."""
        from safecl.study import name_of

        studies = [name_of(cell, self.sweep) for cell in self.cells if cell.space is not None]
        return Lease(self.store, self.sweep.name, [f"sweep {self.sweep.name}", *studies])

    def schedule(self, on_done: Callable[[Done], None] | None = None) -> Schedule:
        """A new schedule of the sweep's jobs. `on_done` is called with each finished job."""
        return Schedule(self.sweep, self.store, self.cells, self.study, on_done)

    def forecast(self, keep: bool = False) -> Forecast:
        """A forecast of how long stages will take on this machine. Measures the machine's speed if the store does not
        hold it. `keep`: also note that speed in the store."""
        execution = self.sweep.execution
        found = speeds(self.store, execution.use_gpu, keep)
        return Forecast(self.store, execution, Estimator(self.store, execution, found))

    def num_devices(self) -> int:
        """Number of CPUs of this machine; with `use_gpu`, of its GPUs."""
        return len(hardware.gpus()) if self.sweep.execution.use_gpu else os.cpu_count() or 1

    def guard_evidence(self, alone: bool = False) -> Evidence | None:
        """The stages that measure the trained guards on labelled pairs. The pairs are constructed ones, and answers of
        base, aligned and sft to validation prompts. `alone`: without these answers, which need models. None if a
        published guard judges."""
        first, seed = self.cells[0].recipe, self.sweep.seeds[0]
        answering = [cell for cell in self.cells if (cell.recipe.model, cell.recipe.task) == (first.model, first.task)
                     and cell.space is None and cell.recipe.method in (*REFERENCES, "sft")]  # fmt: skip
        worst = {cell.recipe.method: cell for cell in answering}  # of sft the last cell, which has the most poison
        graphs = {} if alone else {name: cell.job({}, seed, "final").graph for name, cell in worst.items()}
        return self.cells[0].job({}, seed, "final").graph.guard_agreement(graphs.values())

    def guard_stages(self) -> tuple[Stage, ...]:
        """The stages of `guard_evidence`."""
        evidence = self.guard_evidence()
        return () if evidence is None else (*evidence.judged, evidence.metrics)

    def guard_quality(self, alone: bool = False) -> Quality | None:
        """How well the trained guards' vote agrees with the labels of held-out pairs. `alone`: of constructed pairs
        only. None if no guard is trained, or the pairs are not judged yet."""
        from safecl.stats import quality

        if (heldout := self._heldout(alone)) is None:
            return None
        rows, said = heldout
        return quality(
            [row["harmful"] for row in rows],
            [said[row["id"]]["label"] for row in rows],
            [row["prompt"] for row in rows],
            [said[row["id"]].get("score") for row in rows],
        )

    def guard_swing(self) -> Swing | None:
        """How far several guards differ on the held-out answers of one model, for the model where they differ most.
        This is the largest change of a fraction of harmful answers that the choice of a guard can make. If no model
        answered, the constructed pairs are used. None for one guard, or if the pairs are not judged yet."""
        if (heldout := self._heldout()) is None:
            return None
        votes: dict[str, list[list[bool]]] = {}
        for row in heldout[0]:
            found = heldout[1][row["id"]]["detail"].get("votes", [None])
            if None not in found:
                votes.setdefault(row["meta"].get("source", ""), []).append(found)
        of_models = {source: found for source, found in votes.items() if source} or votes
        swings = []
        for source, found in of_models.items():
            shares = [sum(of_guard) / len(found) for of_guard in zip(*found, strict=True)]
            swings.append(Swing(len(shares), max(shares) - min(shares), source or "constructed pairs"))
        return max(swings, key=lambda swing: swing.points, default=None)

    def _heldout(self, alone: bool = False) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]] | None:
        """The held-out pairs of the trained guards, and the verdicts on them by id. None if there are none yet."""
        evidence = self.guard_evidence(alone)
        if evidence is None or not all(map(self.store.has, evidence.judged)):
            return None
        [judged] = evidence.judged
        verdicts = {line["id"]: line for line in self.lines(judged, "verdicts")}
        return self.lines(judged.inputs["rows"], "rows"), verdicts

    def lines(self, stage: Stage, name: str) -> list[dict[str, Any]]:
        """The lines of file `NAME.jsonl` of a finished stage. Raises KeyError if it is not finished, Damaged if it was
        changed."""
        return [json.loads(line) for line in self.store.file(stage, f"{name}.jsonl").read_text().splitlines()]

    def finals(self) -> list[tuple[Cell, dict[str, Any], list[Job], str]]:
        """Returns for each cell: the parameters of its final trials, those trials, and a note. A cell whose search is
        not finished has no final trials yet. A cell of which a front is run appears once for each trial of the
        front."""
        found: list[tuple[Cell, dict[str, Any], list[Job], str]] = []
        for cell in self.cells:
            if cell.space is not None:
                study = self.past(cell)
                trials = study.complete() if study else []
                if study is None or not study.is_done or not trials:
                    told = f"search: {len(trials)} of {cell.num_trials} trials"
                    if study is not None and study.is_done and study.failures:
                        told = f"all {len(study.failures)} trials of its search failed, the last: {study.failures[-1]}"
                    found.append((cell, {}, [], told))
                    continue
                taken = chosen(trials, self.sweep.search.objective)
                for place, trial in enumerate(taken):
                    found.append((cell, trial.params, self._seeds(cell, trial.params), self._note(study, taken, place)))
                continue
            found.append((cell, {}, self._seeds(cell, {}), ""))
        return found

    def _seeds(self, cell: Cell, params: dict[str, Any]) -> list[Job]:
        return [cell.job(params, seed, "final") for seed in self.sweep.seeds]

    def _note(self, study: Past | Study, taken: Sequence[Trial], place: int) -> str:
        """How the values of a row were chosen, as text."""
        one, objective = taken[place], self.sweep.search.objective
        values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.params.items())
        rule = ""
        if objective.pareto:
            rules = {"bounds": f"most {objective.maximise} of", "nearest": "nearest to perfect values of",
                     "front": f"number {place + 1} of the {len(taken)} on"}  # fmt: skip
            rule = f" ({rules[objective.choose]} the front)"
        pruned = f" ({num} more were pruned)" if (num := len(study.pruned)) else ""
        note = f"{values}, chosen of {len(study.complete())} trials on validation prompts{pruned}{rule}"
        return note + ("" if one.feasible else "; none met the bounds, this violates them least")

    def outcomes(self, job: Job) -> list[dict[str, Any]] | None:
        """The measured outcomes of a job's answers, one dict each. None if the job is not finished."""
        metrics = job.evidence.metrics
        return self.lines(metrics, "outcomes") if self.store.has(metrics) else None


class Trials(NamedTuple):
    """A row's trials: searched ones that are finished; ones that are certain to run; and how many more its search may
    suggest before the final ones. `num_more` is None if the search is finished, or nothing is searched."""

    cell: Cell
    done: list[Job]
    known: list[Job]
    num_more: int | None


def trials(project: Project) -> Iterator[Trials]:
    """Yields the trials that a sweep runs, row by row. Reads its studies."""
    for cell, _, finals, _ in project.finals():
        study = project.past(cell)
        tried = [trial.params for trial in study.complete()] if study else []
        done = [cell.trial(params) for params in tried]
        if finals:
            yield Trials(cell, done, finals, None)
            continue
        first: list[dict[str, Any]] = [{}] if not tried else []  # trial 0 is the defaults
        if project.sweep.search.sampler == "grid":
            first = [point for point in points(cell.space or {}) if point not in tried]
        known = [cell.trial(params) for params in first]
        yield Trials(cell, done, known, cell.num_trials - len(tried) - len(known))
