"""A study whose drivers are killed, and whose results come in any order, asks what it would have asked undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safecl.base import Json
from safecl.objective import hopeless
from safecl.study import CellStudy
from tests.test_study import DEFAULTS, SPACE, measured, url

CHILD = """
import json, sys, time
from safecl.study import CellStudy
study = CellStudy("kill", json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[1], seed=0, trials=4, at_once=4)
study.repair()
asked = [study.ask() for _ in range(int(sys.argv[4]))]
study.tell(asked[0][0], 0.5, {})
print(json.dumps(asked), flush=True)
time.sleep(60)
"""


def killed_driver(folder: Path, num: int) -> list[tuple[int, dict[str, Json]]]:
    command = [sys.executable, "-c", CHILD, url(folder), json.dumps(SPACE), json.dumps(DEFAULTS), str(num)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return [(number, params) for number, params in json.loads(line)]


def test_what_ran_in_a_killed_driver_is_asked_again_with_its_parameters(tmp_path: Path) -> None:
    first = killed_driver(tmp_path, 3)  # trial 0 told, 1 and 2 left running
    second = killed_driver(tmp_path, 1)  # repairs; takes the copy of 1 and finishes it; dies
    assert second[0][1] == first[1][1]
    study = CellStudy("kill", SPACE, DEFAULTS, url(tmp_path), seed=0, trials=4, at_once=4)
    assert study.repair() == 0 and study.remaining == 2  # the copy of 2 waits in the queue
    number, params = study.ask()
    assert params == first[2][1]
    study.tell(number, 0.1, {})
    number, params = study.ask()
    assert params not in [p for _, p in first]
    study.tell(number, 0.1, {})
    assert study.is_done and len(study.complete()) == 4
    assert not any(t.state.name == "RUNNING" for t in study._study.trials)


def test_a_driver_killed_inside_repair_or_inside_ask_loses_and_doubles_nothing(tmp_path: Path) -> None:
    study = CellStudy("half", SPACE, DEFAULTS, url(tmp_path), seed=0, trials=3, at_once=3)
    asked = [study.ask()[1] for _ in range(2)]
    # As after a death between the queueing and the closing of ghost 1 ...
    study._study.enqueue_trial(study._encode(asked[1]), user_attrs={"safecl:repairs": 1})
    # ... and after one that had created a third trial and stored nothing of it.
    study._study._storage.create_new_trial(study._study._study_id)
    again = CellStudy("half", SPACE, DEFAULTS, url(tmp_path), seed=0, trials=3, at_once=3)
    assert again.repair() == 3 and again.repair() == 0 and again.remaining == 3
    params = [again.ask()[1] for _ in range(3)]
    assert params[0] == asked[1] and params[1] == asked[0]
    assert set(params[2]) == set(SPACE) and params[2] not in asked
    assert again.remaining == 0


def test_a_repaired_default_is_still_the_default_when_its_parameters_were_never_stored(tmp_path: Path) -> None:
    study = CellStudy("early", SPACE, DEFAULTS, url(tmp_path), seed=0, trials=2)
    study._study.ask()  # popped from the queue, nothing suggested yet
    again = CellStudy("early", SPACE, DEFAULTS, url(tmp_path), seed=0, trials=2)
    assert again.repair() == 1
    assert again.ask()[1] == {k: DEFAULTS[k] for k in SPACE}


def in_order(study: CellStudy) -> list[tuple[int, dict[str, Json], float]]:
    return [(trial.number, trial.params, trial.value) for trial in study.complete()]


def settle_one(study: CellStudy, number: int, params: dict[str, Json], prunes: bool) -> None:
    value, asr = measured(params)
    why = hopeless({"asr": asr}, {"asr": 0.0}, "value", study.before(number)) if prunes else ""
    if why:
        study.prune(number, why, {"asr": asr})
    else:
        study.tell(number, value, {"asr": asr})


def undisturbed(sampler: str, at_once: int, trials: int, prunes: bool) -> list[tuple[int, dict[str, Json], float]]:
    study = CellStudy("b", SPACE, DEFAULTS, "sqlite://", 0, trials, sampler, at_once, prunes=prunes)
    while study.remaining:
        asked = []
        while study.remaining and study.ready:
            asked.append(study.ask())
        assert len(asked) <= at_once
        for number, params in asked:
            settle_one(study, number, params, prunes)
    assert study.is_done and bool(study.pruned) == prunes and len(study.complete()) + len(study.pruned) == trials
    return in_order(study)


def driver_that_dies(storage: str, sampler: str, at_once: int, trials: int, prunes: bool, seed: int) -> None:
    """Drives a study in an order of its own, and dies by SIGKILL in one of its next 25 writes; exits 0 when all is told."""
    import random

    from optuna.storages import RDBStorage

    chance = random.Random(seed)
    left = chance.randint(1, 25)

    def mortal(write):  # type: ignore[no-untyped-def]
        def wrapped(*given, **named):  # type: ignore[no-untyped-def]
            nonlocal left
            left -= 1
            if left == 0 and chance.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            found = write(*given, **named)
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return wrapped

    writes = [
        "create_new_trial",
        "set_trial_param",
        "set_trial_state_values",
        "set_trial_user_attr",
        "set_trial_system_attr",
    ]
    for name in writes:
        setattr(RDBStorage, name, mortal(getattr(RDBStorage, name)))
    study = CellStudy("b", SPACE, DEFAULTS, storage, 0, trials, sampler, at_once, prunes=prunes)
    study.repair()
    running: dict[int, dict[str, Json]] = {}
    while not study.is_done:
        if study.remaining and study.ready and (not running or chance.random() < 0.6):
            number, params = study.ask()
            running[number] = params
            assert len(running) <= at_once
            continue
        number = chance.choice(sorted(running))
        params = running.pop(number)
        if chance.random() < 0.15:
            study.release(number)
        else:
            settle_one(study, number, params, prunes)
    os._exit(0)


@pytest.mark.parametrize(
    ("sampler", "prunes"),
    [
        ("tpe", True),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (("tpe", False), ("random", False), ("random", True))
        ),
    ],
)
def test_whatever_order_results_come_in_and_whoever_is_killed_a_study_asks_the_same(
    tmp_path: Path, sampler: str, prunes: bool
) -> None:
    import multiprocessing

    forked = multiprocessing.get_context("fork")
    expected = undisturbed(sampler, 4, 14, prunes)
    assert prunes or [number for number, *_ in expected] == list(range(14))
    deaths = 0
    CellStudy(
        "b", SPACE, DEFAULTS, url(tmp_path), 0, 14, sampler, 4, prunes=prunes
    )  # the tables: made once, by a driver that lived
    for seed in range(200):
        driver = forked.Process(target=driver_that_dies, args=(url(tmp_path), sampler, 4, 14, prunes, seed))
        driver.start()
        driver.join(60)
        assert driver.exitcode in (0, -signal.SIGKILL), driver.exitcode
        if driver.exitcode == 0:
            break
        deaths += 1
    found = CellStudy("b", SPACE, DEFAULTS, url(tmp_path), 0, 14, sampler, 4, prunes=prunes)
    assert deaths >= 3 and found.is_done and in_order(found) == expected
    states = {trial.state.name for trial in found._study.trials}
    assert states == {"COMPLETE", "FAIL", *(["PRUNED"] if prunes else [])}  # FAIL: ghosts
    assert found.failures == [] and len(found.pruned) == 14 - len(expected)
