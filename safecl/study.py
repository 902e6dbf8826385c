"""Searched cells as Optuna studies, which only the driver uses, by ask and tell.

Only this file, suggest.py and storage.py import optuna.

What `CellStudy` promises:
- Trial 0 uses the method's defaults. At most a quarter of the trials is random (with TPE); TPE models the rest.
- A suggestion depends only on the recipe's seed, the study's name, the trial's place, and the results of the earlier
  batches (suggest.py). A restarted study therefore asks the same trials, in whatever order results come.
- A crash of the driver loses no trial: `repair` first queues a running trial again, then closes the old one (the
  ghost).
- A fault of a machine loses no trial either: `release` does the same for one trial.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safecl.base import ConfigError, Json
from safecl.config import Objective, Sweep
from safecl.grid import Cell, points
from safecl.objective import Trial, goals
from safecl.space import space_check
from safecl.storage import open_storage
from safecl.store import canonical
from safecl.suggest import Sampling, known_params

_GHOST = "safecl:ghost"  # user attribute of a trial that died with its driver: it does not count as a trial
_REPAIRS = "safecl:repairs"  # user attribute of the queued copy: the ghost's number
_ONE = {"value": "maximize"}
_FIRST = "safecl:first"  # user attribute of a study: the trials it asks before it suggests any
_WHY = "safecl:why"  # user attribute of a trial that failed or was pruned: the reason


def study_name(
    cell: str,
    space: Mapping[str, Json],
    objective: Objective,
    seeds: Sequence[int],
    sampler: str = "tpe",
    at_once: int = 1,
    prune: str = "none",
) -> str:
    """Returns `<cell>-<12 hex digits>`; the digits are a hash of the cell, the space, the objective and the seeds.

    A changed search needs another study, because Optuna ignores or mixes changed ranges and directions when it reopens
    one. The hash also holds:
    - the sampler, if it is a grid: a grid asks each of its points, not the trials that another study left;
    - `at_once`, if above 1 with TPE or with pruning: trials of one batch know less of one another;
    - `prune`, if it is not "none".
    """
    objectives = objective.model_dump(mode="json", exclude={"choose"})  # `choose` selects among finished trials
    identity: list[Json] = [cell, dict(space), objectives, list(seeds)]
    identity += ["grid"] if sampler == "grid" else []
    identity += ["at_once", at_once] if (sampler == "tpe" or prune != "none") and at_once > 1 else []
    identity += ["prune", prune] if prune != "none" else []
    return f"{cell}-{hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]}"


def name_of(cell: Cell, sweep: Sweep) -> str:
    """Returns the name of a searched cell's study. It changes with a new VERSION, an edited plugin or an edited data
    file, so that no result of old code or data chooses a value. Data that only the tables read (test prompts) does not
    change it."""
    assert cell.space is not None
    metrics = cell.trial({}).evidence.metrics
    below: Json = {name: stage.key for name, stage in metrics.inputs.items()}
    rests_on = hashlib.sha256(canonical([metrics.version, below]).encode()).hexdigest()
    search = sweep.search
    return study_name(
        rests_on[:16], cell.space, search.objective, cell.search_seeds, search.sampler, search.at_once, search.prune
    )


class CellStudy:
    """One searched cell: `ask`, then `tell`, `fail`, `prune` or `release`. Opening creates the study or continues it.
    Only the driver may open it, and only one object per study at a time.

    A trial's place is its number minus the number of ghosts before it. The copy of a ghost has the ghost's place.

    Args:
        space: see `space_check`.
        defaults: values of at least the searched parameters.
        storage: a database URL, or the result of `open_storage`.
        trials: maximum number of trials; ghosts do not count.
        sampler: "tpe", "random" or "grid" (lists only).
        at_once: maximum number of trials that run at the same time.
        first: parameters that a new study asks before it suggests any, instead of the defaults.
        goals: "maximize" or "minimize" by objective. The first one is that of `Trial.value`.
        prunes: whether trials may be pruned.

    Raises:
        ConfigError: `space`, `sampler`, `trials` or `at_once` is invalid; one line per error.

    Example:
        study = CellStudy("der", {"weight": {"low": 0.1, "high": 9.0}}, {"weight": 1.0}, "sqlite:///study.db", seed=0, trials=4)
        number, params = study.ask()  # {"weight": 1.0}: the defaults come first
        study.tell(number, 0.7, {"asr": -0.02})
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
        at_once: int = 1,
        first: Sequence[Mapping[str, Json]] = (),
        goals: Mapping[str, str] = _ONE,
        prunes: bool = False,
    ) -> None:
        import optuna

        errors = space_check(space, None if sampler == "grid" else defaults)
        if sampler not in ("tpe", "random", "grid"):
            errors.append(f"search.sampler: expected 'tpe', 'random' or 'grid', got {sampler!r}")
        errors += [f"search.{what}: expected at least 1, got {number}"
                   for what, number in (("trials", trials), ("at_once", at_once)) if number < 1]  # fmt: skip
        if errors:
            raise ConfigError("\n".join(errors))
        self.name, self.trials, self._goals = name, trials, tuple(goals)
        self.space = {key: space[key] for key in sorted(space)}
        distributions = {key: _distribution(form) for key, form in self.space.items()}
        num_random = max(1, trials // 4)
        self._sampling = Sampling(
            name, seed, sampler, at_once, num_random, tuple(goals.values()), distributions, sampler == "tpe" or prunes
        )
        self._live: dict[int, Any] = {}
        self._known: list[Any] | None = None  # the study's trials, read again after each write: only this object writes
        self._study = optuna.create_study(
            study_name=name,
            storage=open_storage(storage) if isinstance(storage, str) else storage,
            directions=self._sampling.directions,
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=0),  # not used: each trial is stored with all its parameters
        )
        # A grid queues all its points at once and asks them in order. (Optuna's GridSampler picks points by trial
        # number. A trial that died and was queued again would then skip another point.)
        if sampler == "grid":
            first = points(self.space)
        for queued in self._begin(list(first)[:trials] or [{key: defaults[key] for key in self.space}]):
            self._enqueue(queued)

    def _begin(self, first: Sequence[Mapping[str, Json]]) -> list[dict[str, Any]]:
        """Trials still to be queued before the study suggests any. A study that was begun keeps its first list, even if
        other studies have finished more trials since."""
        begun = self._study.user_attrs.get(_FIRST)
        if begun is None:
            if self._trials():  # written by a version that stored no first list: its first trials were already asked
                return []
            begun = list(map(self._encode, first))
            self._study.set_user_attr(_FIRST, begun)
        return list(begun[len(self._trials()) :])

    @property
    def remaining(self) -> int:
        """How many trials may still be asked: `trials` less those finished, failed or running (ghosts do not count)."""
        return max(0, self.trials - len(_asked(self._trials())))

    @property
    def ready(self) -> bool:
        """Whether the next trial may be asked now. With TPE or pruning, all earlier batches must be finished. Otherwise
        fewer than `at_once` trials must be running."""
        places = _places(self._trials())
        if self._sampling.sampler != "tpe":
            return bool(sum(trial.state.name == "RUNNING" for trial in places) < self._sampling.at_once)
        if not self._sampling.in_batches:
            num_running = sum(trial.state.name == "RUNNING" for trial in places)
            return bool(num_running < self._sampling.at_once)
        next_one = next((place for place, t in enumerate(places) if t.state.name == "WAITING"), len(places))
        return bool(all(trial.state.is_finished() for trial in places[: self._sampling.begins(next_one)]))

    @property
    def is_done(self) -> bool:
        """Whether all trials were asked and none is running."""
        return _is_done(self._trials(), self.trials)

    def ask(self) -> tuple[int, dict[str, Json]]:
        """Returns (trial number, parameters) of the next trial. Raises RuntimeError if none remains, or none may be
        asked yet."""
        if self.remaining == 0:
            raise RuntimeError(f"study {self.name}: all {self.trials} trials were asked; look at `remaining` first")
        if not self.ready:
            raise RuntimeError(f"study {self.name}: the trials before the next one are not told; look at `ready` first")
        places = _places(self._trials())
        if not any(trial.state.name == "WAITING" for trial in places):
            self._enqueue(self._sampling.suggest(len(places), places))
        trial = self._study.ask(self._sampling.distributions)
        self._known = None
        self._live[trial.number] = trial
        return trial.number, _decode(trial.params, self.space)

    def tell(self, number: int, value: float | Mapping[str, float], violations: Mapping[str, float]) -> None:
        """Finish a trial that this object asked.

        Args:
            value: value of the objective, or of each objective by name.
            violations: by bounded metric; above 0 makes the trial infeasible.

        Raises:
            ValueError: a number is NaN or infinite (the message names it), or the trial is not running here. The trial
                then stays as it was.
        """
        values = value if isinstance(value, Mapping) else {self._goals[0]: value}
        named = {("value" if len(self._goals) == 1 else repr(goal)): values[goal] for goal in self._goals}
        for what, given in {**named, **{f"violation {k!r}": v for k, v in violations.items()}}.items():
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise ValueError(f"study {self.name}, trial {number}: {what} is {given}; expected a finite number")
        trial = self._running(number)
        for key in sorted(violations):
            trial.set_constraint(key, float(violations[key]))
        self._study.tell(trial, [float(values[goal]) for goal in self._goals])
        self._known = None
        del self._live[number]

    def fail(self, number: int, why: str) -> None:
        """Close a trial that gave no result because of an error of its own. It counts as one of the trials. No
        suggestion is based on it."""
        import optuna

        trial = self._running(number)
        trial.set_user_attr(_WHY, why)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._known = None
        del self._live[number]

    def before(self, number: int) -> list[Trial]:
        """Finished trials of the batches before this trial's batch. They are the same whenever they are read."""
        trials = self._trials()
        begins = self._sampling.begins(_places(trials).index(trials[number]))
        return [trial for trial in self.complete() if trial.number < begins]

    def prune(self, number: int, why: str, violations: Mapping[str, float], value: float | None = None) -> None:
        """Close a trial that can no longer be chosen. It counts as one of the trials. `violations` and `value`: what
        was measured."""
        import optuna

        trial = self._running(number)
        trial.set_user_attr(_WHY, why)
        for key in sorted(violations):
            trial.set_constraint(key, float(violations[key]))
        if value is not None:
            trial.report(value, 0)
        self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        self._known = None
        del self._live[number]

    def release(self, number: int) -> None:
        """Close a trial that gave no result because of an error outside it, such as a lost machine. It does not count,
        and its parameters are asked again."""
        self._running(number)
        del self._live[number]
        self._again([next(trial for trial in self._trials() if trial.number == number)])

    def repair(self) -> int:
        """Queue again the trials that a dead driver left RUNNING, with their parameters, then close the old ones as
        FAIL. In this order a crash in between loses none. Call once after opening, before `ask`. Returns their
        number."""
        ghosts = [t for t in self._trials() if t.state.name == "RUNNING" and t.number not in self._live]
        self._again(ghosts)
        return len(ghosts)

    def _again(self, ghosts: Sequence[Any]) -> None:
        import optuna

        self._known = None  # a driver that lost its lease may not be the only writer
        trials = self._trials()
        queued = {t.user_attrs[_REPAIRS] for t in trials if _REPAIRS in t.user_attrs}
        places = _places(trials)
        for ghost in (trials[ghost.number] for ghost in ghosts):
            if ghost.state.is_finished():
                continue
            if ghost.number not in queued:
                known = known_params(ghost)
                if len(known) < len(self.space):  # only drivers of older versions left such a trial
                    place = places.index(ghost)
                    known = {**self._sampling.suggest(place, places[:place]), **known}
                self._enqueue(known, {_REPAIRS: ghost.number})
            self._study._storage.set_trial_user_attr(ghost._trial_id, _GHOST, True)
            self._study.tell(ghost.number, state=optuna.trial.TrialState.FAIL)
            self._known = None

    @property
    def failures(self) -> list[str]:
        """Reasons of the trials that failed by an error of their own, in order of place."""
        return _failures(self._trials())

    @property
    def pruned(self) -> list[str]:
        """Reasons of the trials that were pruned, in order of place."""
        return _failures(self._trials(), "PRUNED")

    def complete(self) -> list[Trial]:
        """Finished trials in order of place."""
        return _complete(self._trials(), self.space, self._goals)

    def _trials(self) -> list[Any]:
        if self._known is None:
            self._known = self._study.get_trials(deepcopy=False)
        return self._known

    def _running(self, number: int) -> Any:
        if number not in self._live:
            raise ValueError(f"study {self.name}: trial {number} is not running here; running: {sorted(self._live)}")
        return self._live[number]

    def _enqueue(self, params: Mapping[str, Any], user_attrs: dict[str, Any] | None = None) -> None:
        self._study.enqueue_trial(dict(params), user_attrs=user_attrs)
        self._known = None

    # Choices travel through Optuna as JSON text: it compares them with ==, under which 1, 1.0 and True are one choice.
    def _encode(self, params: Mapping[str, Json]) -> dict[str, Any]:
        return {k: canonical(v) if isinstance(self.space[k], list | tuple) else v for k, v in params.items()}


class Past(NamedTuple):
    """A cell's study as it was when it was read.

    Fields: finished trials in order of place; whether no trial was left to ask or running; the reasons of failed
    trials; and the parameters of trials that are not finished, if all of them are set.
    """

    finished: list[Trial]
    is_done: bool
    failures: list[str]
    others: list[dict[str, Json]] = []
    pruned: list[str] = []  # why trials were pruned
    is_replayed: bool = False  # the study was not here: this is what the store's results tell of it

    def complete(self) -> list[Trial]:
        """Finished trials, as CellStudy.complete returns them."""
        return self.finished


def is_partial(study: object) -> bool:
    """Whether the search may have more trials than this study, read here, knows: it lies on another machine, or there is
    none."""
    return study is None or (isinstance(study, Past) and study.is_replayed and not study.is_done)


def importance(trials: Sequence[Trial], space: Mapping[str, Json]) -> dict[str, float]:
    """Returns the fraction that each searched parameter explains of the difference between good and other trials
    (PED-ANOVA). The fractions add up to 1. Empty for fewer than 10 trials, fewer than 2 parameters, or if all trials
    have one value."""
    import optuna

    if len(trials) < 10 or len(space) < 2 or len({trial.value for trial in trials}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    distributions = {name: _distribution(form) for name, form in space.items()}
    for trial in trials:
        params = {k: canonical(v) if isinstance(space[k], list | tuple) else v for k, v in trial.params.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=trial.value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def _places(trials: Sequence[Any]) -> list[Any]:
    """The trial at each place, in order. The copy of a ghost has the ghost's place."""
    found: list[Any] = []
    place_of: dict[int, int] = {}
    for trial in trials:
        place = place_of.get(trial.user_attrs.get(_REPAIRS), len(found))
        found[place : place + 1] = [trial]
        place_of[trial.number] = place
    return found


def _asked(trials: Sequence[Any]) -> list[Any]:
    return [trial for trial in _places(trials) if trial.state.name != "WAITING"]


def _is_done(trials: Sequence[Any], num: int) -> bool:
    asked = _asked(trials)
    return len(asked) >= num and all(trial.state.is_finished() for trial in asked)


def _failures(trials: Sequence[Any], state: str = "FAIL") -> list[str]:
    failed = (t for t in _asked(trials) if t.state.name == state)
    return [str(t.user_attrs.get(_WHY, "for a reason that was not kept")) for t in failed]


def _complete(trials: Sequence[Any], space: Mapping[str, Json], goals: Sequence[str]) -> list[Trial]:
    """A trial's number here is its place, because the number of a copy depends on how many ghosts there were."""
    return [
        Trial(
            place,
            _decode(t.params, space),
            float(t.values[0]),
            dict(t.constraints),
            dict(zip(goals, t.values, strict=True)) if len(goals) > 1 else {},
        )
        for place, t in enumerate(_places(trials))
        if t.state.name == "COMPLETE"
    ]


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


def elsewhere(cell: Cell, sweep: Sweep, storage: Any) -> list[dict[str, Json]]:
    """Returns the parameters of finished trials that other studies of this cell hold, each once, in order. Those
    studies have another objective or other bounds. Only parameters that the cell's space contains are returned. Such a
    study rests on the same code, data and seed, so the trials' stages are valid here too. Only their values must be
    computed again."""
    if cell.space is None:
        return []
    own, space = name_of(cell, sweep), cell.space
    same, found = own.rpartition("-")[0] + "-", dict[str, dict[str, Json]]()
    for study in sorted(storage.get_all_studies(), key=lambda study: study._study_id):
        if study.study_name != own and study.study_name.startswith(same):
            for trial in _places(storage.get_all_trials(study._study_id, deepcopy=False)):
                if trial.state.name == "COMPLETE" and trial.params.keys() == space.keys():
                    params = {key: _within(space[key], value) for key, value in trial.params.items()}
                    if None not in params.values():
                        decoded = _decode(params, space)
                        found.setdefault(canonical(decoded), decoded)
    return list(found.values())


def _within(form: Json, value: Any) -> Any:
    """The stored value, or None if the space does not contain it."""
    distribution = _distribution(form)
    try:
        return value if distribution._contains(distribution.to_internal_repr(value)) else None
    except (ValueError, TypeError):  # the value is of another type
        return None


def study_of(
    cell: Cell, sweep: Sweep, storage: Any, first: Sequence[Mapping[str, Json]] | None = None
) -> CellStudy | None:
    """Opens a cell's study and repairs it; creates it if needed. None if the cell searches nothing. A new study first
    asks the trials that `elsewhere` finds. Their stages are finished, so a changed bound costs no run."""
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
        sweep.search.at_once,
        elsewhere(cell, sweep, storage) if first is None else first,
        goals(sweep.search.objective),
        sweep.search.prune != "none",
    )
    study.repair()
    return study


def past_of(cell: Cell, sweep: Sweep, storage: Any) -> Past | None:
    """Reads a cell's study without changing it. None if the cell searches nothing, or no search was started."""
    if cell.space is None:
        return None
    try:
        study = storage.get_study_id_from_name(name_of(cell, sweep))
    except KeyError:
        return None
    trials = storage.get_all_trials(study, deepcopy=False)
    space, names = cell.space, tuple(goals(sweep.search.objective))
    others = [
        _decode(t.params, space) for t in trials if t.state.name != "COMPLETE" and t.params.keys() == space.keys()
    ]
    return Past(
        _complete(trials, space, names),
        _is_done(trials, cell.num_trials),
        _failures(trials),
        others,
        _failures(trials, "PRUNED"),
    )
