"""What kind a failure is, and that only a trial's own is a result."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from safecl import faults, upkeep
from safecl.base import ConfigError, Damaged, Infrastructure, PrerequisiteError
from safecl.config import Execution
from safecl.faults import Cause, Journal, Kind, cause_of, kind_of
from safecl.project import Project, load
from safecl.schedule import Schedule
from safecl.serving.gate import GateBroken
from safecl.serving.messages import Refused, Unavailable
from safecl.store import Stage, Store, below
from safecl.trainers import _portable
from safecl.training.attention import NotHere
from safecl.work import run_stage
from tests.made_up import put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def _raised() -> dict[Kind, list[BaseException]]:
    import ray.exceptions
    import sqlalchemy.exc
    import torch

    no_space = OSError(28, "No space left on device")
    return {
        "trial": [
            ValueError("a shape"), FloatingPointError("step 3: the loss is nan"), RuntimeError("1 of 9 cannot be read"),
            KeyError("x"), ray.exceptions.RayTaskError("f", "Traceback", ValueError("it")), Refused("too long"),
            RuntimeError("CUDA error: device-side assert triggered"), ZeroDivisionError(),
        ],
        "configuration": [ConfigError("no"), PrerequisiteError("engine failed to start"), Damaged("x"), NotHere("y")],
        "infrastructure": [
            Infrastructure("lost its workers 3 times"), MemoryError(), no_space, TimeoutError(), ConnectionResetError(),
            BrokenPipeError(), EOFError(), torch.OutOfMemoryError("CUDA out of memory"), Unavailable("died"),
            GateBroken("x"), RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("CUDA error: an illegal memory access"), torch.distributed.DistBackendError("NCCL"),
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            ray.exceptions.WorkerCrashedError(), ray.exceptions.OutOfMemoryError("killed"), ray.exceptions.GetTimeoutError(),
            ray.exceptions.ActorDiedError(), ray.exceptions.NodeDiedError("gone"), subprocess.TimeoutExpired("x", 3),
            sqlalchemy.exc.OperationalError("select", {}, no_space),
        ],
    }  # fmt: skip


def test_every_failure_has_its_kind_and_keeps_it_on_the_way_to_the_driver() -> None:
    for kind, errors in _raised().items():
        for error in errors:
            assert kind_of(error) == kind, repr(error)
            if isinstance(error, Exception):
                assert kind_of(_portable(error)) == kind, repr(error)


def test_every_cause_has_its_name_and_keeps_it_on_the_way_to_the_driver() -> None:
    import ray.exceptions
    import torch

    found: dict[Cause, list[Exception]] = {
        faults.MEMORY: [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ray.exceptions.OutOfMemoryError("x"),
                        RuntimeError("DefaultCPUAllocator: can't allocate memory")],
        faults.DISK: [OSError(28, "No space left on device"), OSError(5, "Input/output error"),
                      RuntimeError("write: No space left on device")],
        faults.NODE: [ray.exceptions.NodeDiedError("gone")],
        faults.WORKER: [ray.exceptions.WorkerCrashedError(), Infrastructure("its worker died")],
        faults.ENGINE: [Unavailable("died"), GateBroken("x")],
        faults.SERVICE: [ConnectionResetError(), ConnectionRefusedError("no"), TimeoutError("no answer")],
        faults.DEVICE: [torch.distributed.DistBackendError("NCCL"), RuntimeError("CUDA error: an illegal access")],
        faults.DAMAGED: [Damaged("x")],
        faults.CONFIGURATION: [ConfigError("no")],
        faults.BUG: [ValueError("a shape"), RuntimeError("1 of 9 cannot be read")],
    }  # fmt: skip
    for cause, errors in found.items():
        for error in errors:
            assert cause_of(error) is cause, repr(error)
            assert cause_of(_portable(error)) in (cause, faults.CONFIGURATION), repr(error)
    assert cause_of(Infrastructure("ActorDiedError: of the process that held the workers")) is faults.CONTROLLER
    died = (
        "ActorDiedError: an error raised in its creation task\n  File ...\nOSError: [Errno 28] No space left on device"
    )
    assert cause_of(Infrastructure(died)) is faults.DISK, "passes by itself: another trainer, for as long as it takes"


def test_the_journal_counts_what_a_run_met_and_keeps_what_earlier_ones_did(tmp_path: Path) -> None:
    earlier = Journal(tmp_path / "logs")
    earlier.add(faults.DRIVER)
    mine, broker = Journal(tmp_path / "logs"), Journal(tmp_path / "logs")
    broker.add(faults.WORKER, "finetune abc", Infrastructure("its worker died"))
    broker.add(faults.WORKER, "finetune abc", "ActorDiedError: in its creation task" + "\n  File" * 400 + "\nits end")
    with mine.path.open("a") as file:
        file.write('{"at": 1, "cau')  # of a writer that was killed
    assert mine.told() == [f"2 x {faults.WORKER.what}"]
    assert mine.counts() == {"worker": 2, "driver": 1}
    assert mine.lines()[0]["where"] == "finetune abc" and "its worker died" in mine.lines()[0]["error"]
    assert mine.lines()[1]["error"].startswith("ActorDiedError") and mine.lines()[1]["error"].endswith("its end")
    (tmp_path / "no").touch()
    Journal(tmp_path / "no" / "folder").add(faults.BUG)  # never raises


def test_an_input_that_is_gone_from_the_store_is_no_fault_of_the_stage(tmp_path: Path) -> None:
    stage = Stage("judge", {}, {"rows": Stage("data", {})})
    with pytest.raises(Infrastructure, match=r"^stage data .* is not in the store"):
        run_stage(stage, Store(str(tmp_path)), Execution(), None, own_process=False)


def _settings(root: Path) -> list[str]:
    return [
        "models.0.dtype=float32",
        "poison.ratios=[0.1]",
        "search.trials=3",
        "evaluate.judges.asr=keywords",
        f"execution.root={root}",
    ]


def _fail(schedule: Schedule, error: str, kind: Kind) -> list[dict[str, Any]]:
    """Every job that is given out fails; the parameters of searched ones."""
    searched = []
    while (job := schedule.next()) is not None:
        searched += [job.params] if job.role == "search" else []
        schedule.finish(job, error, kind)
    assert schedule.is_done
    return searched


def test_a_fault_of_the_machine_is_tried_again_with_its_parameters_and_never_counts(tmp_path: Path) -> None:
    asked = []
    for kind in ("infrastructure", "configuration", "trial"):
        project = Project(load(QUICKSTART, _settings(tmp_path)))
        upkeep.check_writable(project.store, 0.0)
        schedule = project.schedule()
        asked.append(_fail(schedule, f"a fault: {kind}", kind))  # type: ignore[arg-type]
        [study] = [queue.study for queue in schedule.queues if queue.study is not None]
        lines = [line for line in schedule.missing() if "der" in line]
        if kind == "trial":
            assert study.remaining == 0 and study.failures == ["a fault: trial"] * 3
            assert lines == [
                "smollm2-135m / mini / p=0.1 / der (all 3 trials of its search failed, the last): a fault: trial"
            ]
        else:
            assert study.remaining == 3 and study.failures == []
            assert len(lines) == 1 and "der (search, {" in lines[0] and lines[0].endswith(f"}}): a fault: {kind}")
    first, again, own = asked
    assert len(first) == 1 and first == again == own[:1]  # one at a time, and the same one until it had a result
    assert len(own) == 3


def test_a_search_whose_last_trial_is_under_way_has_not_failed(tmp_path: Path) -> None:
    """The hours may end, and what is missing be told, at any time."""
    found = Project(load(QUICKSTART, [*_settings(tmp_path), "search.trials=2"]))
    upkeep.check_writable(found.store, 0.0)
    schedule = found.schedule()
    told = []
    while (job := schedule.next()) is not None:
        if job.role == "search":
            told.append([line for line in schedule.missing() if "search" in line])
        schedule.finish(job, "a fault", "trial")
    assert told == [[], []]
    assert [line for line in schedule.missing() if "all 2 trials" in line]


def test_a_missing_row_is_a_line_and_an_exit_code_where_nothing_is_left_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safecl import cli

    found = Project(load(QUICKSTART, _settings(tmp_path)))
    upkeep.check_writable(found.store, 0.0)
    schedule = found.schedule()
    plain = [cell for cell in found.cells if cell.space is None]
    tops = [cell.job({}, seed, "final").evidence.metrics for cell in plain for seed in found.sweep.seeds]
    put(found.store, below([*tops, *found.guard_stages()]))
    _fail(schedule, "ValueError: its own", "trial")
    monkeypatch.setattr("safecl.tracking.Tracker", _NoTracker)
    arguments = [part for setting in _settings(tmp_path) for part in ("--set", setting)]
    for json_ in ([], ["--json"]):
        code = cli.app(["run", str(QUICKSTART), *arguments, *json_], standalone_mode=False)
        told = capsys.readouterr().err
        assert code == 1 and "nothing left to do" not in told
        assert (
            "missing: smollm2-135m / mini / p=0.1 / der (all 3 trials of its search failed, the last): ValueError"
            in told
        )


class _NoTracker:
    problem = "http://nowhere did not answer"

    def __init__(self, *_: Any) -> None: ...
    def put(self, *_: Any, **__: Any) -> None: ...
    def knows(self, *_: Any) -> bool:
        return False

    def close(self, timeout_s: float) -> bool:
        return False


def test_a_result_without_the_number_that_is_searched_for_is_the_trials_own_fault(tmp_path: Path) -> None:
    """Nothing could be parsed: it counts as failed, and the run goes on."""
    found = Project(load(QUICKSTART, _settings(tmp_path)))
    upkeep.check_writable(found.store, 0.0)
    schedule = found.schedule()
    seen = 0
    while (job := schedule.next()) is not None:
        put(found.store, below([*job.evidence.targets, *job.aligned.evidence.targets], found.store.has))
        if job.role == "search":
            file = found.store.local / "store" / "metrics" / job.evidence.metrics.key / "record.json"
            file.write_text(file.read_text().replace('"utility": {"value": ', '"utility": {"value": null, "was": '))
            seen += 1
        schedule.finish(job, "")
    [study] = [queue.study for queue in schedule.queues if queue.study is not None]
    assert seen == 3 and len(study.failures) == 3 and "nan" in study.failures[0].lower()
