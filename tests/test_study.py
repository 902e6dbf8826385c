"""One cell's Optuna study on real SQLite: defaults first, feedback, constraints. Killed drivers: test_study_kills.py."""

from pathlib import Path

import numpy as np
import pytest

from safecl import graph
from safecl.base import ConfigError, Json
from safecl.config import Objective
from safecl.dtypes import resolved
from safecl.grid import cells
from safecl.objective import Trial, select
from safecl.storage import open_storage
from safecl.study import CellStudy, name_of, study_name
from safecl.sweepfile import load
from safecl.templates import settle

SWEEPS = Path(__file__).parents[1] / "sweeps"

SPACE: dict[str, Json] = {
    "weight": {"low": 0.001, "high": 10.0, "log": True},
    "rows": {"low": 8, "high": 64, "step": 8},
    "centre": [True, 1, 1.0, None, "one"],
}
DEFAULTS: dict[str, Json] = {"weight": 0.5, "rows": 16, "centre": 1.0, "not_searched": 3}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> object:
    return open_storage(f"sqlite:///{tmp_path_factory.mktemp('study')}/study.db")


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/study.db"


def measured(params: dict[str, Json]) -> tuple[float, float]:
    """(value, violation) of a made-up trial."""
    weight, rows = float(str(params["weight"])), int(str(params["rows"]))
    return 1 - abs(np.log10(weight) - 0.5) / 4 - 0.1 * (params["centre"] is None), 0.02 * weight - rows / 640


def test_trial_zero_is_the_defaults_with_their_exact_types(storage: object) -> None:
    number, params = CellStudy("zero", SPACE, DEFAULTS, storage, seed=0, trials=4).ask()
    assert number == 0 and params == {"centre": 1.0, "rows": 16, "weight": 0.5}
    assert type(params["centre"]) is float and type(params["rows"]) is int


def test_choices_that_python_calls_equal_stay_apart(storage: object) -> None:
    study = CellStudy("types", {"centre": SPACE["centre"]}, DEFAULTS, storage, seed=0, trials=60, sampler="random")
    seen = set()
    for _ in range(60):
        number, params = study.ask()
        study.tell(number, 0.0, {})
        seen.add(repr(params["centre"]))
    assert seen == {"True", "1", "1.0", "None", "'one'"}
    assert {repr(t.params["centre"]) for t in study.complete()} == seen


def run_study(name: str, trials: int, value: float, reopen: bool) -> list[dict[str, Json]]:
    def fresh() -> CellStudy:
        return CellStudy("follow", SPACE, DEFAULTS, open_storage(f"sqlite:///{name}"), seed=3, trials=trials)

    study, asked = fresh(), []
    for index in range(trials):
        if reopen:
            study = fresh()
        number, params = study.ask()
        asked.append(params)
        study.tell(number, value if index % 2 else 1 - value, {})
    return asked


def test_a_reopened_study_goes_on_as_if_it_had_never_closed_and_repeats_nothing(tmp_path: Path) -> None:
    whole = run_study(f"{tmp_path}/a.db", 8, 0.2, reopen=False)
    pieces = run_study(f"{tmp_path}/b.db", 8, 0.2, reopen=True)
    assert whole == pieces
    assert len({p["weight"] for p in whole}) == 8


def test_later_suggestions_change_when_earlier_results_change(tmp_path: Path) -> None:
    one = run_study(f"{tmp_path}/a.db", 8, 0.2, reopen=False)
    other = run_study(f"{tmp_path}/b.db", 8, 0.9, reopen=False)
    startup = 8 // 4
    assert one[:startup] == other[:startup]  # the random quarter knows no results
    assert one[startup:] != other[startup:]


def test_seed_and_study_name_change_the_suggestions(storage: object) -> None:
    def second(name: str, seed: int) -> dict[str, Json]:
        study = CellStudy(name, SPACE, DEFAULTS, storage, seed=seed, trials=4, sampler="random", at_once=2)
        study.ask()
        return study.ask()[1]

    assert len({str(second(name, seed)) for name, seed in [("s1", 0), ("s2", 0), ("s3", 1)]}) == 3


def test_constraints_keep_the_search_out_of_what_is_unsafe(storage: object) -> None:
    """Value rises with x, but x > .3 is unsafe: the modelled trials must crowd below .3, not at 1."""

    def modelled(name: str, constrained: bool) -> tuple[float, CellStudy]:
        study = CellStudy(name, {"x": {"low": 0.0, "high": 1.0}}, {"x": 0.2}, storage, seed=1, trials=32)
        xs = []
        for _ in range(32):
            number, params = study.ask()
            x = float(str(params["x"]))
            xs.append(x)
            study.tell(number, x, {"asr": x - 0.3} if constrained else {})
        return sum(x > 0.3 for x in xs[8:]) / 24, study

    unsafe, study = modelled("bound", True)
    free, _ = modelled("free", False)
    assert unsafe < 0.5 < 0.8 < free
    best, trials = select(study.complete()), study.complete()
    assert best.feasible and best.value == max(t.value for t in trials if t.feasible)
    assert best.value < max(t.value for t in trials)  # an infeasible one had more, and was not taken


def test_violations_come_back_as_told(storage: object) -> None:
    study = CellStudy("told", SPACE, DEFAULTS, storage, seed=0, trials=2)
    number, params = study.ask()
    study.tell(number, 0.75, {"asr": 0.02, "degenerate": -0.05})
    again = CellStudy("told", SPACE, DEFAULTS, storage, seed=0, trials=2).complete()
    assert again == [(0, params, 0.75, {"asr": 0.02, "degenerate": -0.05}, {})]


def test_nan_raises_by_name_and_leaves_the_trial_running(storage: object) -> None:
    study = CellStudy("nan", SPACE, DEFAULTS, storage, seed=0, trials=1)
    number, _ = study.ask()
    with pytest.raises(ValueError, match="trial 0: value is nan"):
        study.tell(number, float("nan"), {})
    with pytest.raises(ValueError, match="violation 'asr' is nan"):
        study.tell(number, 0.5, {"asr": float("nan")})
    study.tell(number, 0.5, {"asr": 0.0})
    with pytest.raises(ValueError, match="not running here"):
        study.tell(number, 0.5, {})


def test_failed_trials_count_and_the_budget_is_kept(storage: object) -> None:
    study = CellStudy("budget", SPACE, DEFAULTS, storage, seed=0, trials=3, at_once=3)
    numbers = [study.ask()[0] for _ in range(3)]
    assert numbers == [0, 1, 2] and study.remaining == 0 and not study.is_done
    with pytest.raises(RuntimeError, match="all 3 trials"):
        study.ask()
    study.fail(1, "ValueError: its own")
    study.tell(0, 0.1, {})
    study.tell(2, 0.2, {})
    assert study.is_done and [t.number for t in study.complete()] == [0, 2]
    assert CellStudy("budget", SPACE, DEFAULTS, storage, seed=0, trials=5).remaining == 2


def test_one_at_a_time_a_study_asks_what_optuna_itself_asks(storage: object) -> None:
    """Searches that were made before trials ran at once go on as they began."""
    import hashlib

    import optuna

    study = CellStudy("plain", SPACE, DEFAULTS, storage, seed=3, trials=12)
    plain = optuna.create_study(direction="maximize")
    plain.enqueue_trial(study._encode({name: DEFAULTS[name] for name in SPACE}))
    for place in range(12):
        seed = int.from_bytes(hashlib.sha256(f'[3,"plain",{place}]'.encode()).digest()[:4], "big")
        plain.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=3, multivariate=True)
        trial = plain.ask({name: study._sampling.distributions[name] for name in sorted(SPACE)})
        number, params = study.ask()
        assert study._encode(params) == trial.params
        if place % 5 == 4:
            plain.tell(trial, state=optuna.trial.TrialState.FAIL)
            study.fail(number, "its own")
            continue
        value, asr = measured(params)
        trial.set_constraint("asr", asr)
        plain.tell(trial, value)
        study.tell(number, value, {"asr": asr})


def test_batches_know_the_batches_before_them_and_spread_out() -> None:
    space: dict[str, Json] = {"x": {"low": 0.0, "high": 1.0}}

    def asked(name: str, at_once: int, worst: bool) -> list[float]:
        study, xs = CellStudy(name, space, {"x": 0.5}, "sqlite://", 0, 24, at_once=at_once), []
        while study.remaining:
            batch = []
            while study.remaining and study.ready:
                batch.append(study.ask())
            assert len(batch) == at_once
            for number, params in batch:
                x = float(str(params["x"]))
                xs.append(x)
                study.tell(number, -abs(x - 0.7) * (-1 if worst and len(xs) <= at_once else 1), {})
        return xs

    first, other = asked("batches", 8, False), asked("batches", 8, True)
    assert first[:8] == other[:8] and first[8:16] != other[8:16]
    assert len(set(first)) == 24
    assert np.mean(np.abs(np.array(first[16:]) - 0.7)) < np.mean(np.abs(np.array(first[:8]) - 0.7))


def test_several_objectives_are_searched_for_their_front(storage: object) -> None:
    """Use grows with x, harm with its square and with y: the front is y = 0."""
    space: dict[str, Json] = {name: {"low": 0.0, "high": 1.0} for name in ("x", "y")}

    def mean_y(name: str, sampler: str) -> float:
        goals = {"utility": "maximize", "asr": "minimize"}
        study = CellStudy(name, space, {"x": 0.5, "y": 0.5}, storage, 0, 40, sampler, 4, goals=goals)
        while study.remaining:
            for number, params in [study.ask() for _ in range(4)]:
                x, y = float(str(params["x"])), float(str(params["y"]))
                study.tell(number, {"asr": (x * x + y) / 2, "utility": x}, {"asr": -1.0})
        trials = CellStudy(name, space, {"x": 0.5, "y": 0.5}, storage, 0, 40, sampler, 4, goals=goals).complete()
        for trial in trials:
            x, y = float(str(trial.params["x"])), float(str(trial.params["y"]))
            assert trial.value == x and trial.values == {"utility": x, "asr": (x * x + y) / 2}
        return float(np.mean([float(str(trial.params["y"])) for trial in trials[20:]]))

    assert mean_y("front", "tpe") < 0.6 * mean_y("front-random", "random")
    study = CellStudy(
        "front-nan", space, {"x": 0.5, "y": 0.5}, storage, 0, 4, goals={"utility": "maximize", "asr": "minimize"}
    )
    number, _ = study.ask()
    with pytest.raises(ValueError, match="'asr' is nan"):
        study.tell(number, {"utility": 0.5, "asr": float("nan")}, {})


def test_what_others_found_since_changes_nothing_of_a_study_that_was_begun(tmp_path: Path) -> None:
    def opened(name: str, *weights: float) -> CellStudy:
        found: list[dict[str, Json]] = [{"weight": weight, "rows": 8, "centre": True} for weight in weights]
        return CellStudy(name, SPACE, DEFAULTS, url(tmp_path), 0, 6, first=found)

    def asked(name: str, *others: tuple[float, ...]) -> list[dict[str, Json]]:
        params = []
        for weights in others:  # a driver each
            study = opened(name, *weights)
            assert study.repair() == 0
            number, one = study.ask()
            params.append(one)
            study.tell(number, measured(one)[0], {})
        return params

    alone = asked("first", (), (), (), ())
    assert alone == asked("first-again", (), (), (), ())[:1] + alone[1:] and alone[0]["weight"] == DEFAULTS["weight"]
    whole = CellStudy(
        "first", SPACE, DEFAULTS, url(tmp_path), 0, 6, first=[{"weight": 7.0, "rows": 8, "centre": True}] * 6
    )
    assert not any(trial.state.name == "WAITING" for trial in whole._study.trials)
    begun = asked("begun", (1.0, 2.0), (3.0, 4.0, 5.0, 6.0), (9.0,))
    assert [one["weight"] for one in begun[:2]] == [1.0, 2.0] and begun[2]["weight"] not in (3.0, 5.0, 9.0)


def test_another_size_of_batch_is_another_study_of_tpe_alone() -> None:
    objective = Objective()

    def names(sampler: str) -> set[str]:
        return {study_name("cell", SPACE, objective, (1000, 0), sampler, at_once) for at_once in (1, 4, 8)}

    assert len(names("tpe")) == 3 and len(names("random")) == len(names("grid")) == 1
    assert study_name("cell", SPACE, objective, (1000, 0)) in names("tpe")
    pruned = {
        study_name("cell", SPACE, objective, (1000, 0), "grid", 1, prune) for prune in ("none", "bounds", "wilcoxon")
    }
    assert len(pruned) == 3 and pruned & names("grid")


@pytest.mark.parametrize("changed", ["safecl.methods.der.Der", "safecl.tasks.mini.Mini", "safecl.stages.generate"])
def test_trials_of_other_code_choose_no_value(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new VERSION of a method, of a task's rows or of a stage begins a new study; consent to run programs does not."""

    def name(*settings: str) -> str:
        sweep = settle(resolved(load(SWEEPS / "quickstart.yaml", list(settings)), "bfloat16")).sweep
        return name_of(next(cell for cell in cells(sweep) if cell.space is not None), sweep)

    before = name()
    assert before == name() == name("evaluate.unsafe_code=true", "execution.num_workers=2")
    assert before == name("evaluate.test.utility_rows=9") and before != name("evaluate.validation.utility_rows=9")
    monkeypatch.setattr(f"{changed}.VERSION", "another")
    graph.recipe._version.cache_clear()
    assert name() != before
    monkeypatch.undo()
    graph.recipe._version.cache_clear()


def test_the_study_name_covers_cell_space_objective_and_seeds() -> None:
    objective, other = Objective(), Objective(bounds={"asr": 0.5})
    name = study_name("smol.der", SPACE, objective, (1000, 0))
    turned = study_name("smol.der", dict(reversed(SPACE.items())), objective, (1000, 0))
    assert name.startswith("smol.der-") and name == turned
    changed = SPACE | {"weight": {"low": 0.001, "high": 10.1, "log": True}}
    names = {
        name,
        study_name("smol.der2", SPACE, objective, (1000, 0)),
        study_name("smol.der", changed, objective, (1000, 0)),
        study_name("smol.der", SPACE, other, (1000, 0)),
        study_name("smol.der", SPACE, Objective(pareto=("utility", "asr")), (1000, 0)),
        study_name(
            "smol.der", SPACE, Objective(pareto=("utility", "asr"), choose="front"), (1000, 0)
        ),  # no other trials
        study_name("smol.der", SPACE, objective, (1001, 0)),
        study_name("smol.der", SPACE, objective, (1000, 1000)),
    }
    assert len(names) == 7


def test_a_study_of_a_wrong_space_is_not_opened(storage: object) -> None:
    with pytest.raises(ConfigError, match=r"search\.weight"):
        CellStudy("wrong", {"weight": []}, {"weight": 1}, storage, seed=0, trials=1)


def test_reading_a_study_changes_nothing_and_finds_what_its_driver_told(tmp_path: Path) -> None:
    from safecl.project import Project, load

    file = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
    settings = ["models.0.dtype=bfloat16", "poison.ratios=[0.1]", "search.at_once=3", f"execution.root={tmp_path}"]
    reader = Project(load(file, settings))
    searched = [cell for cell in reader.cells if cell.space is not None]
    assert [reader.past(cell) for cell in searched] == [None] and not list(tmp_path.iterdir())
    driver = Project(load(file, settings))
    [study] = [study for cell in driver.cells if (study := driver.study(cell)) is not None]
    number, params = study.ask()
    study.tell(number, 0.5, {"asr": -0.1})
    study.ask()  # under way: a reader takes it for no ghost
    before = (tmp_path / "study.db").read_bytes()
    past = Project(load(file, settings)).past(searched[0])
    assert past is not None and not past.is_done and not study.is_done and study.remaining == 1
    assert [(trial.params, trial.value) for trial in past.complete()] == [(params, 0.5)]
    assert (tmp_path / "study.db").read_bytes() == before
    study.ask()  # the last: the search is not over before it is
    for project in (driver, Project(load(file, settings))):
        assert [found[1:] for found in project.finals() if found[0].space] == [({}, [], "search: 1 of 3 trials")]


@pytest.mark.slow
@pytest.mark.parametrize("trials", [3, 20])
@pytest.mark.parametrize("stage_two", [0.03, 0.06])
@pytest.mark.parametrize("alignment", [0.02, 0.04])
def test_the_chosen_trial_owes_nothing_to_a_seed_that_is_not_reported(
    trials: int, stage_two: float, alignment: float
) -> None:
    """A value is a configuration's own, plus what the alignment and the rest of its seed make of it (sd in fractions);
    trials are read on 100 prompts. How much the chosen one's row says more than is so, by what a search was run on."""
    rng, owed = np.random.default_rng(0), {"reported seed": 0.0, "its alignment": 0.0, "own seed": 0.0}
    for _ in range(1500):
        own = 0.6 + rng.normal(0, 0.03, trials)
        luck = {seed: (rng.normal(0, alignment, trials), rng.normal(0, stage_two, trials)) for seed in (0, 1000)}
        for name, (align, rest) in zip(owed, ((0, 0), (0, 1000), (1000, 1000)), strict=True):
            seen = rng.binomial(100, np.clip(own + luck[align][0] + luck[rest][1], 0, 1)) / 100
            chosen = select([Trial(i, {}, value, {}) for i, value in enumerate(seen)]).number
            owed[name] += (luck[0][0][chosen] + luck[0][1][chosen]) / 1500
    print({name: f"{100 * value:+.1f} points" for name, value in owed.items()})
    assert owed["reported seed"] > 0.01 > owed["own seed"] > -0.01
    assert owed["own seed"] < owed["its alignment"] < owed["reported seed"]
