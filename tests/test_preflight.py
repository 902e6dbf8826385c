"""What a run needs of this machine, before anything is spent."""

from pathlib import Path

import pytest

from safecl import doctor, preflight
from safecl.base import PrerequisiteError
from safecl.config import Execution
from safecl.project import Project, load

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def test_a_run_that_does_not_fit_into_memory_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_gib", lambda: 9.0)
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 2)
    preflight.check_memory(Execution())  # 2 engines of 4 GiB, a worker of 2.5 on either core, 3 trials of .4: in turn
    assert preflight.needed_gib(Execution()) == pytest.approx(2 * 4 + 2 * 2.5 + 3 * 0.4)
    # 4 ranks of 2.5 at once, beside 3 trials
    with pytest.raises(PrerequisiteError, match=r"9\.0 GiB are free.*about 11\.2 .*4 training workers"):
        preflight.check_memory(Execution(num_workers=4))
    preflight.check_memory(Execution(address="auto", num_trials_at_once=44))  # what waits is here, nothing else
    with pytest.raises(PrerequisiteError, match=r"9\.0 GiB are free .* 50 trials at once need about 10\.0"):
        preflight.check_memory(Execution(address="auto", num_trials_at_once=50))


def test_doctor_asks_for_the_quickstarts_memory() -> None:
    assert preflight.needed_gib(doctor.QUICKSTART) == preflight.needed_gib(load(QUICKSTART, []).execution)


def test_a_sweep_that_runs_code_is_refused_before_anything_is_spent_where_nothing_isolates_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("graph.rows", "check"):
        monkeypatch.setattr(
            f"safecl.{place}.identity",
            lambda task, split, folder, planned=False: [{"hub": task.__name__, "split": split}],
        )
    monkeypatch.setattr("safecl.sandbox.missing", lambda: "nothing isolates here")
    settings = [
        "tasks.0.task=code",
        "tasks.0.num_rows=10",
        "execution.engine_max_tokens=768",
        f"execution.root={tmp_path}",
    ]
    project = Project(load(QUICKSTART, settings))  # reports of what ran elsewhere need no isolation
    with pytest.raises(PrerequisiteError, match=r"nothing isolates here.*evaluate\.unsafe_code"):
        preflight.check_isolation(project.sweep)
    preflight.check_isolation(load(QUICKSTART, [*settings, "evaluate.unsafe_code=true"]))
    preflight.check_isolation(load(QUICKSTART, []))  # other tasks run nothing
