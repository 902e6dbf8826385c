"""What the Broker keeps of times, and what the driver notes of its run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safecl import watch
from safecl.store import Place, Stage, Store
from safecl.times import Times, here, queue, state_of
from safecl.watch import CHUNK, RUN, TRACE, Notes

MODEL = Stage("model", {})


def stage(number: int = 0) -> Stage:
    return Stage("generate", {"number": number}, {"model": MODEL})


def test_a_stage_waits_for_its_inputs_then_for_its_turn_and_then_runs() -> None:
    times = Times()
    asked = stage()
    times.asked(asked, 1)
    states = [queue(times.under_way())]
    times.ready(asked.key)
    states.append(queue(times.under_way()))
    times.works(asked.key, here(Place(device="cuda:1")))
    times.works(asked.key, {**here(Place(rank=1)), "pid": -1})  # another rank of the same stage
    times.begins(asked.key)
    states.append(queue(times.under_way()))
    times.ends(asked.key)
    assert states == [{"generate": {state: 1}} for state in ("waiting", "ready", "running")]
    [found] = times.closed
    assert found["asked"] <= found["ready"] <= found["start"] <= found["end"]
    assert found["needs"] == f"candidate-{MODEL.key[:8]}" and found["inputs"] == [MODEL.key] and found["rank"] == 1
    assert found["device"] == "cuda:1" and found["pid"] > 0 and "error" not in found
    assert queue(times.under_way()) == {}


def test_a_failure_is_kept_with_its_cause_and_an_engines_boot_is_a_slice_of_its_own() -> None:
    times = Times()
    times.asked(stage(), 0)
    times.ends(stage().key, MemoryError("no"))
    times.begins("candidate-1", "engine candidate")
    assert state_of(times.under_way()[0]) == "running"
    times.ends("candidate-1")
    times.ends("candidate-1")  # what is not under way has no end
    failed, boot = times.closed
    assert (failed["error"], failed["cause"]) == ("MemoryError: no", "infrastructure") and "start" not in failed
    assert boot["kind"] == "engine candidate" and boot["end"] >= boot["start"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setattr(watch, "cluster", lambda use_gpu: {"unit": "CPU", "devices": 2.0})
    eta: Any = SimpleNamespace(
        state=lambda schedule, snapshot, now: {"trials": 3, "trials_done": 1, "eta_s": 9.0, "running": []},
        forecast=SimpleNamespace(execution=SimpleNamespace(use_gpu=False)),
    )
    schedule: Any = SimpleNamespace(sweep=SimpleNamespace(name="mine"), queues=[], done=[])
    return Notes(schedule, eta, Store(str(tmp_path)))


def closed(number: int, **more: Any) -> dict[str, Any]:
    return {"key": f"k{number}", "kind": "data", "start": 1.0, "end": 2.0, **more}


def snapshot(times: list[dict[str, Any]], broker: str = "one") -> dict[str, Any]:
    return {"broker": broker, "running": [], "finished": [], "failed": {}, "queue": {}, "times": times}


def test_times_lie_in_notes_that_grow_and_are_full(notes: Notes) -> None:
    notes.look(snapshot([closed(number) for number in range(CHUNK + 2)]))
    notes.write("ended")
    notes.look(snapshot([closed(CHUNK + 2)]))
    notes.write("ended")
    found = notes.store.notes(TRACE + notes.run)
    assert [len(times) for times in found.values()] == [CHUNK, 3]
    assert [times[0]["key"] for times in found.values()] == ["k0", f"k{CHUNK}"]


def test_a_failure_is_told_until_it_is_made_good_and_what_waited_for_it_is_not(notes: Notes) -> None:
    notes.look(
        snapshot([closed(1, error="E: no", cause="trial", host="there"), {"key": "k2", "kind": "x", "error": "E: no"}])
    )
    notes.write("stopped")
    told = notes.store.noted(RUN + notes.run)
    assert [(f["key"], f["cause"], f["host"]) for f in told["failed"]] == [("k1", "trial", "there")]
    assert told["how"] == "stopped" and told["trials"] == 3
    notes.look(snapshot([closed(1)]))
    notes.write("ended")
    assert notes.store.noted(RUN + notes.run)["failed"] == [] and notes.done == {"data": 1}


def test_a_broker_that_takes_anothers_place_counts_anew(notes: Notes) -> None:
    notes.look(snapshot([closed(1), closed(2)]))
    assert notes.told == (0, 2)
    notes.look(snapshot([], broker="two"))  # asked with the other's counts, it left out what it has
    assert notes.told == (0, 0)
    notes.look(snapshot([closed(3)], broker="two"))
    assert notes.told == (0, 1) and [found["key"] for found in notes.times] == ["k1", "k2", "k3"]


def test_between_notes_nothing_is_written(notes: Notes) -> None:
    notes.look(snapshot([closed(1)]))
    notes.write()
    assert notes.store.notes(RUN) == {}
    notes._at -= watch.NOTE_S
    notes.write()
    assert len(notes.store.notes(RUN)) == len(notes.store.notes(TRACE)) == 1
