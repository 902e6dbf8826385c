"""One searched cell as an Optuna study, driven by ask and tell from the driver alone. The only file that imports optuna.

What `CellStudy` promises:
- trial 0 is the method's defaults; a quarter of the trials at most is random (with TPE), the rest is modelled;
- a suggestion is a function of (recipe seed, study name, number of trials so far) and the results told, so a study
  that was reopened goes on exactly as it would have gone on, and repeats nothing;
- a crash loses nothing: `repair` puts what was running back into the queue, then closes the ghost;
- nor does a fault of the machine: `release` does so with one trial.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple
from urllib.parse import quote

from safecl.base import ConfigError, Json, sqlite_path
from safecl.config import Objective, Sweep
from safecl.grid import Cell, points
from safecl.objective import Trial
from safecl.space import space_check
from safecl.store import canonical

_GHOST = "safecl:ghost"  # user attribute of a trial that died with its driver: it does not count as a trial
_REPAIRS = "safecl:repairs"  # user attribute of the queued copy: the ghost's number
_WHY = "safecl:why"  # user attribute of a trial that failed


def study_name(
    cell: str, space: Mapping[str, Json], objective: Objective, seeds: Sequence[int], sampler: str = "tpe"
) -> str:
    """`<cell>-<12 hex digits>` of (cell, space, objective, seeds): Optuna ignores or mixes changed ranges and directions of
    a study that it reopens, so a changed search must be another study. A grid is one too: it asks each of its points, and
    not as many as others have left over."""
    identity: list[Json] = [cell, dict(space), objective.model_dump(mode="json"), list(seeds)]
    identity += ["grid"] if sampler == "grid" else []
    return f"{cell}-{hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]}"


def name_of(cell: Cell, sweep: Sweep) -> str:
    """The study of a searched cell. Its trials rest on the code and data of today: a new VERSION, an edited plugin or an
    edited file of rows makes another study, so that no old number chooses a value. What only the tables read (test
    prompts) is none of its business."""
    assert cell.space is not None
    metrics = cell.trial({}).evidence.metrics
    below: Json = {name: stage.key for name, stage in metrics.inputs.items()}
    rests_on = hashlib.sha256(canonical([metrics.version, below]).encode()).hexdigest()
    return study_name(rests_on[:16], cell.space, sweep.search.objective, cell.search_seeds, sweep.search.sampler)


def open_storage(url: str) -> Any:
    """Optuna's storage at a database URL, to be shared by the studies of one driver. SQLite waits for locks."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def open_to_read(url: str) -> Any:
    """What Optuna's storage at a database URL holds now, for reading: an SQLite file is opened read-only and read into
    memory, so that nothing is written to it. None where there is none yet."""
    import optuna
    from sqlalchemy.pool import StaticPool

    file = sqlite_path(url)
    if file is None:
        return open_storage(url)
    file = file.absolute()
    if not file.exists():
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        _read_into(memory, f"file:{quote(str(file))}?mode=ro")
    except sqlite3.OperationalError:  # a driver died while it wrote: only a writer can undo that, so a copy is undone
        with tempfile.TemporaryDirectory() as folder:
            for part in (file, file.with_name(f"{file.name}-journal"), file.with_name(f"{file.name}-wal")):
                with suppress(FileNotFoundError):
                    shutil.copy(part, folder)
            _read_into(memory, f"file:{quote(folder)}/{quote(file.name)}")
    return optuna.storages.RDBStorage("sqlite://", {"creator": lambda: memory, "poolclass": StaticPool})


def _read_into(memory: sqlite3.Connection, uri: str) -> None:
    with closing(sqlite3.connect(uri, timeout=60, uri=True)) as source:
        source.backup(memory)


class CellStudy:
    """One searched cell: `ask`, then `tell` or `fail`. Driver only, one object per study at a time.

    `space`: see `space_check`; `defaults`: at least the searched parameters; `storage`: a database URL or what
    `open_storage` gave; `trials`: how many may count; `sampler`: "tpe", "random" or "grid" (of lists). Opening creates or
    continues.
    """

    def __init__(
        self,
        name: str,
        space: Mapping[str, Json],
        defaults: Mapping[str, Json],
        storage: Any,
        seed: int,
        trials: int,
        sampler: str = "tpe",
    ) -> None:
        import optuna

        errors = space_check(space, None if sampler == "grid" else defaults)
        if sampler not in ("tpe", "random", "grid"):
            errors.append(f"search.sampler: expected 'tpe', 'random' or 'grid', got {sampler!r}")
        if trials < 1:
            errors.append(f"search.trials: expected at least 1, got {trials}")
        if errors:
            raise ConfigError("\n".join(errors))
        self.name, self.seed, self.trials, self.sampler = name, seed, trials, sampler
        self.space = {key: space[key] for key in sorted(space)}
        self._distributions = {key: _distribution(form) for key, form in self.space.items()}
        self._live: dict[int, Any] = {}
        self._known: list[Any] | None = None  # the study's trials, until something is written: only this object writes
        self._study = optuna.create_study(
            study_name=name,
            storage=open_storage(storage) if isinstance(storage, str) else storage,
            direction="maximize",
            load_if_exists=True,
        )
        # Of a grid all points are queued at once, and asked in their order. (Optuna's GridSampler deals them out by trial
        # number, so that a trial that died and is queued again would cost another point.)
        first = points(self.space) if sampler == "grid" else [{key: defaults[key] for key in self.space}]
        for queued in map(self._encode, first[len(self._trials()) :]):
            self._study.enqueue_trial(queued)
            self._known = None

    @property
    def remaining(self) -> int:
        """How many trials may still be asked: `trials` less those finished, failed or running (ghosts do not count)."""
        return max(0, self.trials - len(_counted(self._trials())))

    @property
    def is_done(self) -> bool:
        """Nothing left to ask, and nothing running."""
        return _is_done(self._trials(), self.trials)

    def ask(self) -> tuple[int, dict[str, Json]]:
        """(trial number, parameters) of the next trial. Raises RuntimeError when none remains."""
        if self.remaining == 0:
            raise RuntimeError(f"study {self.name}: all {self.trials} trials were asked; look at `remaining` first")
        self._study.sampler = self._new_sampler()
        trial = self._study.ask(self._distributions)
        self._known = None
        self._live[trial.number] = trial
        return trial.number, _decode(trial.params, self.space)

    def tell(self, number: int, value: float, violations: Mapping[str, float]) -> None:
        """Finish a trial asked from this object. `value` is maximised; a violation above 0 makes it infeasible.

        Raises ValueError for a NaN or infinite number, naming it, and for a trial that is not running here; the trial
        then stays as it was.
        """
        for what, given in {"value": value, **{f"violation {k!r}": v for k, v in violations.items()}}.items():
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise ValueError(f"study {self.name}, trial {number}: {what} is {given}; expected a finite number")
        trial = self._running(number)
        for key in sorted(violations):
            trial.set_constraint(key, float(violations[key]))
        self._study.tell(trial, float(value))
        self._known = None
        del self._live[number]

    def fail(self, number: int, why: str) -> None:
        """Close a trial that gave no result for a fault of its own. It counts as one of the trials and is never suggested
        from."""
        import optuna

        trial = self._running(number)
        trial.set_user_attr(_WHY, why)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._known = None
        del self._live[number]

    def release(self, number: int) -> None:
        """Close a trial that gave no result for a fault of another's. It does not count, and is asked again with its
        parameters."""
        self._running(number)
        del self._live[number]
        self._again([next(trial for trial in self._trials() if trial.number == number)])

    def repair(self) -> int:
        """Call once after opening, before `ask`. Trials left RUNNING by a dead driver are queued again with their
        parameters and then told FAIL (in this order, so that a crash in between loses none). Returns how many."""
        ghosts = [t for t in self._trials() if t.state.name == "RUNNING" and t.number not in self._live]
        self._again(ghosts)
        return len(ghosts)

    def _again(self, ghosts: Sequence[Any]) -> None:
        import optuna

        trials = self._trials()
        queued = {t.user_attrs[_REPAIRS] for t in trials if _REPAIRS in t.user_attrs}
        for ghost in ghosts:
            if ghost.number not in queued:
                # A driver may die between creating a trial and storing its parameters: those that were fixed for it
                # are in `fixed_params`, and what is still open is suggested when the copy is asked.
                known = {**ghost.system_attrs.get("fixed_params", {}), **ghost.params}
                self._study.enqueue_trial(known, user_attrs={_REPAIRS: ghost.number})
            self._study._storage.set_trial_user_attr(ghost._trial_id, _GHOST, True)
            self._study.tell(ghost.number, state=optuna.trial.TrialState.FAIL)
            self._known = None

    @property
    def failures(self) -> list[str]:
        """Why trials failed for a fault of their own, by number."""
        return _failures(self._trials())

    def complete(self) -> list[Trial]:
        """Finished trials by number."""
        return _complete(self._trials(), self.space)

    def _trials(self) -> list[Any]:
        if self._known is None:
            self._known = self._study.get_trials(deepcopy=False)
        return self._known

    def _running(self, number: int) -> Any:
        if number not in self._live:
            raise ValueError(f"study {self.name}: trial {number} is not running here; running: {sorted(self._live)}")
        return self._live[number]

    def _new_sampler(self) -> Any:
        """A fresh sampler per trial: one kept over many asks would repeat its sequence when the study is reopened."""
        import optuna

        num_asked = sum(t.state.name != "WAITING" for t in self._trials())
        text = canonical([self.seed, self.name, num_asked])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        if self.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = max(1, self.trials // 4)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True)

    # Choices travel through Optuna as JSON text: it compares them with ==, under which 1, 1.0 and True are one choice.
    def _encode(self, params: Mapping[str, Json]) -> dict[str, Any]:
        return {k: canonical(v) if isinstance(self.space[k], list | tuple) else v for k, v in params.items()}


class Past(NamedTuple):
    """A cell's study as it was when it was read: finished trials by number, whether nothing was left to ask or running,
    and why others failed for a fault of their own."""

    finished: list[Trial]
    is_done: bool
    failures: list[str]

    def complete(self) -> list[Trial]:
        return self.finished


def _counted(trials: Sequence[Any]) -> list[Any]:
    return [t for t in trials if t.state.name != "WAITING" and _GHOST not in t.user_attrs]


def _is_done(trials: Sequence[Any], num: int) -> bool:
    counted = _counted(trials)
    return len(counted) >= num and all(t.state.name != "RUNNING" for t in counted)


def _failures(trials: Sequence[Any]) -> list[str]:
    failed = (t for t in _counted(trials) if t.state.name == "FAIL")
    return [str(t.user_attrs.get(_WHY, "for a reason that was not kept")) for t in failed]


def _complete(trials: Sequence[Any], space: Mapping[str, Json]) -> list[Trial]:
    finished = (t for t in trials if t.state.name == "COMPLETE")
    return [Trial(t.number, _decode(t.params, space), float(t.value), dict(t.constraints)) for t in finished]


def _decode(params: Mapping[str, Any], space: Mapping[str, Json]) -> dict[str, Json]:
    return {k: json.loads(params[k]) if isinstance(space[k], list | tuple) else params[k] for k in sorted(space)}


def _distribution(form: Json) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(form, list | tuple):
        return CategoricalDistribution([canonical(choice) for choice in form])
    options: Any = form
    if "step" in options:
        return IntDistribution(options["low"], options["high"], log=options.get("log", False), step=options["step"])
    return FloatDistribution(float(options["low"]), float(options["high"]), log=bool(options.get("log", False)))


def study_of(cell: Cell, sweep: Sweep, storage: Any) -> CellStudy | None:
    """The study of a cell, continued if it exists, its ghosts repaired; None where nothing is searched."""
    if cell.space is None:
        return None
    study = CellStudy(
        name_of(cell, sweep),
        cell.space,
        cell.defaults,
        storage,
        cell.recipe.seed,
        cell.num_trials,
        sweep.search.sampler,
    )
    study.repair()
    return study


def past_of(cell: Cell, sweep: Sweep, storage: Any) -> Past | None:
    """What a cell's study holds, changing nothing; None where nothing is searched or no search was started."""
    if cell.space is None:
        return None
    try:
        study = storage.get_study_id_from_name(name_of(cell, sweep))
    except KeyError:
        return None
    trials = storage.get_all_trials(study, deepcopy=False)
    return Past(_complete(trials, cell.space), _is_done(trials, cell.num_trials), _failures(trials))
