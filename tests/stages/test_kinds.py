"""What a kind of stage says of itself, and that nothing else need know of one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from safecl import stages
from safecl.config import Execution
from safecl.cost import Forecast, cost
from safecl.estimate import Estimator
from safecl.eta import Eta
from safecl.execute import Broker
from safecl.store import Stage, Store
from tests.stages import beside


@pytest.fixture
def echo() -> Iterator[Stage]:
    beside.put()
    yield beside.Outside("echo", {"text": "one two three"})
    beside.remove()


@pytest.mark.parametrize("kind", stages.names())
def test_every_kind_declares_where_it_runs_what_it_counts_and_what_it_takes(kind: str) -> None:
    found = stages.load(kind)
    assert found.runs in ("trainer", "thread", "process") and found.fixed_s > 0
    assert not (found.engine and found.runs != "thread"), "waiting for an engine takes no trainer"
    assert not ((found.all_ranks or found.runs_anew) and found.runs != "trainer")


def test_a_file_is_a_kind_with_its_estimate_its_records_its_label_and_its_count_in_a_plan(
    echo: Stage, tmp_path: Path
) -> None:
    store, execution = Store(str(tmp_path)), Execution(root=str(tmp_path))
    assert "echo" in stages.names()
    estimator = Estimator(store, execution, {})
    assert estimator(echo)[:3] == (3.5, ("echo", "one two three"), False)
    forecast = Forecast(store, execution, estimator)
    planned = cost((), (), store, forecast, 2, [echo])
    assert planned.kinds["echo"][:3] == (1, 0, 0) and planned.kinds["echo"].hours == pytest.approx(3.5 / 3600)
    eta = Eta(store, forecast, 2, [echo])
    assert eta._label({"key": echo.key, "kind": "echo"}) == "echo one two three"
    store.publish(echo, store.new_folder(), {}, 14.0)
    learnt = Forecast(store, execution, Estimator(store, execution, {}))
    assert learnt.checked["echo"] == (1, 3.5, 14.0)
    assert learnt.seconds(Stage("echo", {"text": "one two three"})) == pytest.approx(3.5 * (1 + 4) / 2)


def test_a_kind_that_declares_nothing_or_too_little_is_refused_wherever_it_is_met(tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text('VERSION = "1"\ndef run(context): return {}\n')
    mute, store = Stage("mute", {}), Store(str(tmp_path))
    beside.put(str(tmp_path))
    try:
        with pytest.raises(TypeError, match=r"stages/mute\.py declares 0 kinds: expected one"):
            Estimator(store, Execution(), {})(mute)
        with pytest.raises(TypeError, match=r"stages/mute\.py declares"):
            stages.needs_trainer(mute)
        broker = Broker(store, Execution(), "", 2)
        with pytest.raises(TypeError, match=r"stages/mute\.py declares"):
            asyncio.run(broker.ensure([mute]))
        assert not broker.running
    finally:
        beside.remove(str(tmp_path))
    with pytest.raises(LookupError, match=r"unknown stage kind 'nothing'.*finetune"):
        stages.load("nothing")
    with pytest.raises(TypeError, match="kind Half: expected it to declare unit, fixed_s"):
        type("Half", (stages.Kind,), {"runs": "thread"})


def test_a_stage_that_one_rank_does_is_not_divided_among_all(tmp_path: Path) -> None:
    model = Stage("model", {"source": {"hub": "a/b-1b"}, "dtype": "float32"})
    rows = Stage("data", {"role": "user", "parts": [{"task": "mini", "num_rows": 100}]})
    config = {"num_rows": 100, "positions": "all", "max_tokens": 64, "dtype": "float32"}
    memory = Stage("memory", config, {"model": model, "rows": rows})  # type: ignore[arg-type]
    one, two = (Estimator(Store(str(tmp_path)), Execution(num_workers=num), {})(memory).seconds for num in (1, 2))
    assert one == two > stages.load("memory").fixed_s


def test_unpacking_a_model_says_the_memory_that_a_node_must_have_for_it(tmp_path: Path) -> None:
    packed = tmp_path / "model.gguf"
    packed.write_bytes(bytes(2**20))
    kind = stages.load("model")
    there = {"path": str(packed)}
    assert kind.memory_gib(Stage("model", {"source": {"wheel": "w"}}, hints=there)) == 8 * 2**20 / 2**30  # 4 bits to 32
    assert kind.memory_gib(Stage("model", {"source": {"hub": "h"}}, hints=there)) == 0
