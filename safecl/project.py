"""A sweep file as a checked project: config, store, studies, and the rows of its table. Opening it spends nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import hardware, registry
from safecl.base import ConfigError, Damaged, PrerequisiteError, sqlite_url
from safecl.check import check
from safecl.config import Model, Sweep
from safecl.contrasts import MARGINS, contrasts, discordant, means
from safecl.cost import Forecast
from safecl.dtypes import auto, resolved
from safecl.estimate import Estimator, speeds
from safecl.graph import REFERENCES, Evidence
from safecl.grid import Cell, Job
from safecl.hardware import Node
from safecl.lease import Lease
from safecl.objective import select
from safecl.schedule import Done, Schedule, Study
from safecl.store import Stage, Store, below
from safecl.sweepfile import load as load
from safecl.tasks._source import UNKNOWN
from safecl.templates import described, settle
from safecl.trained import Preview, Trained, expected, recorded

if TYPE_CHECKING:
    from safecl.stats import Quality
    from safecl.study import Past


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
    from safecl.crossed import intervals

    found = intervals(read, bounded=not name.endswith("_nll"))  # nats have no upper end
    return None if found is None else {**found._asdict(), "num": sum(map(len, read))}


def _agreement(
    by_metric: dict[str, dict[int, list[dict[str, Any]]]], decides: str = "asr", beside: str = "non_refusal"
) -> dict[str, Any] | None:
    """How two judges (by their metrics; the judge of harm and the keyword list) agree on the same answers of all seeds, with
    intervals in which a prompt counts once; None where nothing was read."""
    from safecl.stats import agreement, as_json

    judge, listed = (
        {(seed, o["set"], o["id"]): o["value"] for seed, found in by_metric.get(name, {}).items() for o in found}
        for name in (decides, beside)
    )
    other = [listed[answer] for answer in judge]
    if all(None in pair for pair in zip(judge.values(), other, strict=True)):
        return None
    return as_json(agreement([*judge.values()], other, [answer[1:] for answer in judge]))


def _beside(by_metric: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """How each further judge of a question agrees with the one that decides, by its metric (`asr:LABEL`)."""
    names = [name for name in by_metric if ":" in name and name.partition(":")[0] in by_metric]
    return {name: _agreement(by_metric, name.partition(":")[0], name) for name in names}


def _worst(served: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Trained against served over all seeds: the largest gap, the worst mean (nats a token), and of how many tokens."""
    if not served:
        return None
    gap, mean = (max(result[name] for result in served) for name in ("served_gap", "served_mean"))
    return {"gap": gap, "mean": mean, "tokens": sum(result["served_tokens"] for result in served)}


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
            sft = next((i for i in having if _named(table[i]) == "sft"), None)
            found = contrasts(metric, [(_named(table[i]), outcomes[i][metric]) for i in having])
            for i, of_row in zip(having, found, strict=True):
                entry: dict[str, Any] = {
                    family: {**contrast._asdict(), "differs": contrast.differs, "alike": contrast.alike}
                    for family, contrast in of_row.items()
                }
                if sft is not None and i != sft:
                    pairs = discordant(outcomes[i][metric], outcomes[sft][metric])
                    entry["mcnemar"] = {str(seed): test for seed, test in pairs.items()}
                table[i]["contrasts"][metric] = entry


def _named(row: Mapping[str, Any]) -> str:
    """A row's method; what all are compared with is sft whatever its label."""
    return "sft" if row.get("kind") == "sft" else str(row["method"])


def unknown_sources(cells: Sequence[Cell]) -> list[str]:
    """Data sets of these cells that are not known: by their hub id or file."""
    tops = [cell.job({}, cell.recipe.seed, "final").evidence.metrics for cell in cells]
    configs: list[Any] = [stage.config for stage in below(tops) if stage.kind == "data"]
    parts = [part for config in configs for part in (*config["parts"], config["poison"]) if part is not None]
    sources = [source for part in parts if isinstance(part["source"], list) for source in part["source"]]
    return sorted({str(source.get("hub") or source["file"]) for source in sources if UNKNOWN in source.values()})


class Swing(NamedTuple):
    """`num` guards judged the same answers, those of `source`; their shares of harmful ones part by `points`, in [0, 1]."""

    num: int
    points: float
    source: str


class Project:
    """A checked sweep with its store and paths. Opening it spends nothing."""

    def __init__(
        self, sweep: Sweep, nodes: Sequence[Node] | None = None, reads: bool = False, planned: bool = False
    ) -> None:
        """`nodes` and `reads`: see dtypes.auto. `planned`: nothing will be run of it, so that what the hub alone knows (commits
        of data sets, tokenizers) may be unknown; it is said in `warnings`."""
        registry.use(sweep.plugins)
        self.store = Store(sweep.execution.root)
        if self.store.local.exists() and not self.store.local.is_dir():
            raise ConfigError(f"execution.root: {str(self.store.local)!r} is a file; expected a folder")
        self.planned = planned
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
        self.logs = self.store.local / "logs"
        self.study_url = sweep.execution.study_uri or sqlite_url(self.store.local / "study.db")
        self._storage: Any = None
        self._snapshot: Any = None  # of the studies, where this process only reads them
        self._studies: dict[Cell, Study] = {}  # those that this process drives
        self._pasts: dict[Cell, Past | None] = {}  # those that it only reads, as they were the first time

    @cached_property
    def expected(self) -> dict[str, Trained | None]:
        """What the finetunes of the first seed will be trained on, by cell. Reads data and tokenizers, no model.

        Raises:
            ConfigError: rows, poison or memory would be fewer than asked for.
        """
        return expected(self.cells, self.sweep.seeds[0], Preview(self.store, self.folder, self.planned))

    def template_of(self, model: Model) -> str:
        """A model's template in one line, and where it comes from."""
        return described(model, self.templates.get(model.name, ""))

    def study(self, cell: Cell) -> Study | None:
        """A cell's study, started or continued by this process; None where nothing is searched."""
        from safecl.study import open_storage, study_of

        if cell not in self._studies and cell.space is not None:
            self._storage = self._storage or open_storage(self.study_url)
            study = study_of(cell, self.sweep, self._storage)
            assert study is not None
            self._studies[cell] = study
        return self._studies.get(cell)

    def past(self, cell: Cell) -> Past | Study | None:
        """What a cell's study holds, changing nothing; None where nothing is searched or no search was started."""
        if cell.space is None or cell in self._studies:
            return self._studies.get(cell)
        from safecl.study import open_to_read, past_of

        if cell not in self._pasts:
            storage = self._storage
            if storage is None:
                self._snapshot = self._snapshot or open_to_read(self.study_url)
                storage = self._snapshot
            self._pasts[cell] = None if storage is None else past_of(cell, self.sweep, storage)
        return self._pasts[cell]

    def lease(self) -> Lease:
        """What a run of this sweep holds: its name, and its studies, which a sweep of another name may share."""
        from safecl.study import name_of

        studies = [name_of(cell, self.sweep) for cell in self.cells if cell.space is not None]
        return Lease(self.store, self.sweep.name, [f"sweep {self.sweep.name}", *studies])

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

    def guard_evidence(self, alone: bool = False) -> Evidence | None:
        """What measures the trained guards on labelled pairs: constructed ones, and answers of base, aligned and sft to
        validation prompts (`alone`: without these, which need models). None where a published guard judges."""
        first, seed = self.cells[0].recipe, self.sweep.seeds[0]
        answering = [cell for cell in self.cells if (cell.recipe.model, cell.recipe.task) == (first.model, first.task)
                     and cell.space is None and cell.recipe.method in (*REFERENCES, "sft")]  # fmt: skip
        worst = {cell.recipe.method: cell for cell in answering}  # of sft the last: the most poison
        graphs = {} if alone else {name: cell.job({}, seed, "final").graph for name, cell in worst.items()}
        return self.cells[0].job({}, seed, "final").graph.guard_agreement(graphs.values())

    def guard_stages(self) -> tuple[Stage, ...]:
        """The stages of `guard_evidence`."""
        evidence = self.guard_evidence()
        return () if evidence is None else (*evidence.judged, evidence.metrics)

    def guard_quality(self, alone: bool = False) -> Quality | None:
        """How well the trained guards' vote tells the labels of held-out pairs (`alone`: constructed ones); None where none
        is trained, or not judged yet."""
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
        """How far several guards part on the held-out answers of one model (constructed pairs where no model answered): the
        most that a share of harmful answers depends on which guard judged. None for one guard, or before it was judged."""
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
        """The held-out pairs of the trained guards, and the verdicts on them by id; None where there are none yet."""
        evidence = self.guard_evidence(alone)
        if evidence is None or not all(map(self.store.has, evidence.judged)):
            return None
        [judged] = evidence.judged
        verdicts = {line["id"]: line for line in self._lines(judged, "verdicts")}
        return self._lines(judged.inputs["rows"], "rows"), verdicts

    def _lines(self, stage: Stage, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.store.file(stage, f"{name}.jsonl").read_text().splitlines()]

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
                if study is None or not study.is_done or not trials:
                    told = f"search: {len(trials)} of {cell.num_trials} trials"
                    if study is not None and study.is_done and study.failures:
                        told = f"all {len(study.failures)} trials of its search failed, the last: {study.failures[-1]}"
                    found.append((cell, {}, [], told))
                    continue
                chosen = select(trials)
                params = chosen.params
                values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())
                note = f"{values}, chosen of {len(trials)} trials on validation prompts"
                note += "" if chosen.feasible else "; none met the bounds, this violates them least"
            found.append((cell, params, [cell.job(params, seed, "final") for seed in self.sweep.seeds], note))
        return found

    def outcomes(self, job: Job) -> list[dict[str, Any]] | None:
        """What was measured of a job's answers, a line an outcome; None where it is not finished."""
        metrics = job.evidence.metrics
        return self._lines(metrics, "outcomes") if self.store.has(metrics) else None

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
            served: list[dict[str, Any]] = []
            for job in jobs:
                evidence = job.evidence
                try:
                    found = self.outcomes(job)
                except Damaged as error:
                    note = f"{note}; seed {job.seed}: {error}".removeprefix("; ")
                    continue
                if found is None:
                    continue
                per_seed[job.seed] = found
                final = job.graph.final
                weights += [] if final is None else [final.key]
                seconds += self._own_seconds(job, evidence.metrics)
                if recipe.method not in REFERENCES and self.store.has(tuned := job.graph.tuned):
                    training: dict[str, Any] = {}
                    with suppress(Damaged):
                        training = self.store.record(tuned)["result"]
                    poison_tokens = training.get("harmful_token_share") if recipe.poison_ratio > 0 else None
                    with suppress(Damaged):
                        trained |= {str(job.seed): one} if (one := recorded(job, self.store)) else {}
                    if training.get("kl_moved"):
                        merge_losses.append(training["kl_merged"] / training["kl_moved"])
                served += self._served(job)
                for stage in evidence.metrics.inputs.values():
                    with suppress(Damaged):
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
                    "task": cell.task,
                    "poison": None if is_reference else recipe.poison_ratio,
                    "method": cell.method,
                    "kind": recipe.method,  # whatever it is called here
                    "params": {**cell.defaults, **params},
                    "seeds": list(per_seed),
                    "metrics": metrics,
                    "agreement": _agreement(by_metric),
                    "beside": _beside(by_metric),
                    "seconds": seconds,
                    "weights": weights,  # keys of what was served, a seed each; for `safecl export`
                    "note": note if per_seed else note or "not run yet",
                    "libraries": sorted(libraries),
                    "poison_tokens": poison_tokens,
                    "trained": trained,
                    "cut_prompts": num_cut,  # of all seeds' evaluation prompts
                    "merge_loss": max(merge_losses, default=None),
                    "served": _worst(served),
                }
            )
        _contrast(table, outcomes)
        return table

    def _served(self, job: Job) -> list[dict[str, Any]]:
        """How the log-probabilities that the served model gave differ from the trained one's, once for each measurement."""
        found = []
        for answers in {s.key: s for s in job.evidence.metrics.inputs.values() if s.kind == "generate"}.values():
            with suppress(KeyError, Damaged):  # a stage below a finished one may have been pruned
                found.append(self.store.record(answers)["result"])
        return [result for result in found if "served_gap" in result]

    def _own_seconds(self, job: Job, metrics: Stage) -> float:
        """Wall time of the stages that this row alone needed: those of the aligned row are everyone's."""
        shared: set[str] = set()
        if job.cell.recipe.method not in REFERENCES:
            shared = {stage.key for stage in job.aligned.evidence.metrics.walk()}
        total = 0.0
        for stage in metrics.walk():
            if stage.key not in shared and self.store.has(stage):
                with suppress(Damaged):
                    total += float(self.store.record(stage)["seconds"])
        return total

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Training curves of the first seed's final trials by cell label."""
        found: dict[str, list[dict[str, Any]]] = {}
        for cell, _, jobs, _ in self.finals():
            if jobs and cell.recipe.method not in REFERENCES and self.store.has(jobs[0].graph.tuned):
                with suppress(Damaged):
                    path = self.store.file(jobs[0].graph.tuned, "curves.jsonl")
                    found[cell.label] = [json.loads(line) for line in path.read_text().splitlines()]
        return found
