"""What a run would cost: never unknown, corrected by what past stages took, and counted without building anything twice."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safecl import cost, estimate, hardware, identity
from safecl.config import Execution
from safecl.cost import Forecast, Open, Remaining, Todo, _uses, rounds
from safecl.estimate import Estimate, Estimator
from safecl.eta import EVERY_S, Eta
from safecl.graph import Graph
from safecl.hardware import Speed
from safecl.overview import plan
from safecl.project import Project, load
from safecl.sizes import TYPICAL_PARAMETERS, Size, shape
from safecl.stages import finetune
from safecl.stages import load as kind_of
from safecl.store import Stage, Store, below
from safecl.tasks.mini import Mini
from tests.made_up import finish, put

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
SPEEDS = {"bfloat16": Speed(100.0, 50.0), "float32": Speed(20.0, 10.0)}


@pytest.fixture(autouse=True)
def _measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: SPEEDS)


def project(root: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [*settings, "models.0.dtype=bfloat16", f"execution.root={root}"]))


def forecast(root: Path, **execution: Any) -> Forecast:
    chosen = Execution(root=str(root), **execution)
    return Forecast(Store(str(root)), chosen, Estimator(Store(str(root)), chosen, SPEEDS))


def stages(found: Project, kind: str) -> list[Stage]:
    made = {s.key: s for _, _, jobs, _ in found.finals() for job in jobs for s in job.evidence.metrics.walk()}
    return [stage for stage in made.values() if stage.kind == kind]


# -- estimates --------------------------------------------------------------------------------------------------------


def test_every_kind_has_hours_on_an_empty_store_and_trials_that_are_not_suggested_yet_count(tmp_path: Path) -> None:
    searched = plan(project(tmp_path))
    assert set(searched["stages"]) == {
        "tokenizer",
        "data",
        "model",
        "finetune",
        "memory",
        "generate",
        "judge",
        "metrics",
    }
    assert all(counts["hours"] > 0 for counts in searched["stages"].values()) and searched["hours"] > 0
    # Two cells search: trial 0 is known, two more and one final each come later.
    assert searched["open_trials"] == 2 * (2 + 1)
    assert searched["stages"]["finetune"]["later"] == searched["stages"]["metrics"]["later"] == 6
    more = plan(project(tmp_path, "search.trials=5"))
    one = (more["hours"] - searched["hours"]) / 4
    assert one > 0 and plan(project(tmp_path, "search.trials=13"))["hours"] == pytest.approx(
        more["hours"] + 16 * one, rel=0.01
    )
    assert list(tmp_path.iterdir()) == []  # reading verbs write nothing


def test_trials_that_run_at_once_take_as_many_rounds_as_batches(tmp_path: Path) -> None:
    for at_once, expected in ((1, 7), (3, 2), (4, 1), (8, 0)):  # trials 1 to 7; trial 0 is under way
        found = project(tmp_path, "search.trials=8", f"search.at_once={at_once}")
        searched = next(cell for cell in found.cells if cell.space is not None)
        assert rounds(Open(searched, 7, (0,)), Execution(num_trials_at_once=64)) == expected
        assert rounds(Open(searched, 7, (0,)), Execution(num_trials_at_once=2)) == (expected if at_once == 1 else 3)
        assert rounds(Open(searched, 8, (0,)), Execution(num_trials_at_once=64)) == expected + 1
    # On as many devices as it likes, what a search takes is its rounds and the finals.
    alone = forecast(tmp_path, num_trials_at_once=64)

    def seconds(at_once: int) -> float:
        found = project(tmp_path, "search.trials=8", f"search.at_once={at_once}")
        searched = next(cell for cell in found.cells if cell.space is not None)
        return Remaining(alone, (), [Open(searched, 8, (0,))], 10**6)._later_s

    one, four, eight = map(seconds, (1, 4, 8))
    assert one - four == pytest.approx(6 * (four - eight)) and four > eight


def test_a_finetunes_time_is_its_tokens_times_the_models_products_over_the_measured_speed(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: sft}]", "lora.last_layers=15")
    tuned = found.cells[2].job({}, 0, "final").graph.tuned
    estimator = Estimator(found.store, found.sweep.execution, SPEEDS)
    rows = estimator.length(tuned.inputs["rows"])
    assert rows.rows == 72  # of the sweep file, one epoch in batches of 4
    tokens, size = 72 * (rows.prompt + rows.answer), estimator.size(tuned.inputs["model"])
    assert size == Size(135e6, 30)  # from the file's name: nothing is unpacked yet
    products = tokens * 2 * 0.135 * (1 / 100 + 0.5 / 50)  # backward through half of the layers
    rest = kind_of("finetune").fixed_s + 18 * finetune.OPTIMIZER_STEP_S["cpu"]
    other = tokens * size.layers * size.width * estimate.OTHER_S["cpu"] * (1 + 2 * 0.5) / 3
    assert estimator(tuned).seconds == pytest.approx(products + rest + other)
    half = Estimator(found.store, found.sweep.execution, {"bfloat16": Speed(50.0, 25.0)})
    assert half(tuned).seconds - estimator(tuned).seconds == pytest.approx(products)


def test_what_a_method_adds_to_each_step_is_in_its_estimate(tmp_path: Path) -> None:
    """Rows that pass forward and back, in batches of 4 of 72 user rows: 18 steps."""
    expected = {  # (passes of the user rows, memory rows drawn a step)
        "sft": (1, 0),
        "replay": (1, 4),
        "der, config: {label_weight: 1.0, memory_batch_size: 3}": (1, 6),
        "refresh, config: {unlearn_steps: 2}": (3, 4),
        "lisa, config: {cycles: 3, alignment_share: 0.25}": (0.75, 1),
        "sam": (2, 0),
        "kl, config: {on: user}": (1, 0),
        "kl, config: {memory_size: 2}": (1, 2),
        "agem": (1, 20),
        "safegrad": (1, 4),
        "constrained": (1, 0),
        "der, config: {weight: 0.0}": (1, 0),
    }
    found = project(tmp_path, f"methods=[{', '.join(f'{{name: {name}}}' for name in expected)}]", "poison.ratios=[0.0]")
    estimator = Estimator(found.store, found.sweep.execution, SPEEDS)
    fixed = kind_of("finetune").fixed_s + 18 * finetune.OPTIMIZER_STEP_S["cpu"]
    tuned = [cell.job({}, 0, "final").graph.tuned for cell in found.cells[2:]]
    user, kept = (estimator.length(tuned[1].inputs[name]) for name in ("rows", "memory"))
    plain = estimator(tuned[0]).seconds - fixed
    for stage, (passes, drawn) in zip(tuned, expected.values(), strict=True):
        share = passes + 18 * drawn * (kept.prompt + kept.answer) / (72 * (user.prompt + user.answer))
        assert estimator(stage).seconds - fixed == pytest.approx(share * plain), stage.config


def test_rows_that_a_method_mixes_in_are_more_steps_or_take_the_place_of_others(tmp_path: Path) -> None:
    methods = "[{name: sft}, {name: safeinstr}, {name: grsap}, {name: grsap, config: {mix: replace, num_rows: 30}}]"
    found = project(tmp_path, f"methods={methods}", "poison.ratios=[0.0]", "execution.engine_max_tokens=4096")
    estimator = Estimator(found.store, found.sweep.execution, SPEEDS)
    fixed = kind_of("finetune").fixed_s
    sft, safeinstr, added, replaced = (
        estimator(cell.job({}, 0, "final").graph.tuned).seconds - fixed for cell in found.cells[2:]
    )
    assert safeinstr == pytest.approx(sft * (72 + 250) / 72, rel=0.05)
    assert added == pytest.approx(sft * (72 + 100) / 72, rel=0.05) and replaced == pytest.approx(sft)


def test_a_merge_that_looks_at_rows_takes_the_forwards_that_it_needs(tmp_path: Path) -> None:
    found = project(
        tmp_path, "methods=[{name: safelora}, {name: regmean, config: {num_rows: 40}}]", "poison.ratios=[0.0]"
    )
    estimator = Estimator(found.store, found.sweep.execution, SPEEDS)
    plain, looks = (cell.job({}, 0, "final").graph.final for cell in found.cells[2:])
    assert plain is not None and looks is not None
    size, rows = estimator.size_of(looks), estimator.length(looks.inputs["user"])
    groups = -(-(30 * 15 * 8 * size.width**2) // 2**30)
    assert groups > 1
    more = estimator.passes(looks, 2 * 40 * groups * (rows.prompt + rows.answer), backward=0.0)
    assert estimator(looks).seconds - estimator(plain).seconds == pytest.approx(more)


def test_a_record_of_a_method_that_is_not_known_here_is_reckoned_as_sft(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: sft}]", "poison.ratios=[0.0]")
    estimator = Estimator(found.store, found.sweep.execution, SPEEDS)
    tuned = found.cells[2].job({}, 0, "final").graph.tuned
    for other in ({"method": "gone"}, {"method": "der", "params": {"wait": 1.0}}):
        stage = Stage("finetune", {**tuned.config, **other}, tuned.inputs)  # type: ignore[dict-item]
        assert estimator(stage).seconds == estimator(tuned).seconds


def test_plan_says_how_much_disk_hidden_states_will_take(tmp_path: Path) -> None:
    """A teacher's are of every token's row: user rows x answer tokens x numbers in a state x bytes each."""
    methods = "[{name: sft}, {name: lwf, config: {positions: response}}]"
    without, found = (
        project(root, f"methods={given}", "poison.ratios=[0.0]", "search={trials: 1}")
        for root, given in ((tmp_path / "a", "[{name: sft}]"), (tmp_path / "b", methods))
    )
    assert plan(without)["states_gib"] == 0.0
    size = Estimator(found.store, found.sweep.execution, SPEEDS).size(stages(found, "model")[0])
    assert plan(found)["states_gib"] == pytest.approx(72 * Mini.TYPICAL_TOKENS[1] * size.width * 2 / 2**30, abs=1e-4)


def test_a_models_size_comes_from_its_config_file_or_its_name(tmp_path: Path) -> None:
    smollm2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
               "intermediate_size": 1536, "vocab_size": 49152}  # fmt: skip
    layer = 576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536
    assert shape(smollm2) == Size(30 * layer + 49152 * 576, 30, 576)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(smollm2))
    estimator = Estimator(Store(str(tmp_path)), Execution(), SPEEDS)
    for source, path, parameters in (
        ({"files": {}}, str(tmp_path / "model"), shape(smollm2).parameters),
        ({"hub": "meta-llama/Llama-2-7b-chat-hf", "revision": "x"}, "", 7e9),
        ({"hub": "Qwen/Qwen2.5-1.5B-Instruct", "revision": "x"}, "", 1.5e9),
        ({"hub": "some/model", "revision": "x"}, "", TYPICAL_PARAMETERS),
    ):
        model = Stage("model", {"source": source, "dtype": "bfloat16"}, hints={"path": path})  # type: ignore[dict-item]
        assert estimator.size(model).parameters == parameters


def test_a_run_keeps_the_measured_speed_and_a_plan_only_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Store(str(tmp_path))
    assert estimate.speeds(here, False) == SPEEDS and not list(tmp_path.iterdir())
    assert estimate.speeds(here, False, keep=True) == SPEEDS
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: pytest.fail("measured again"))
    assert estimate.speeds(here, False) == SPEEDS
    monkeypatch.setattr(hardware, "device", lambda use_gpu=False: "another CPU")
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: None)
    assert estimate.speeds(here, False) == {}  # nothing was measured: typical values stand in
    assert forecast(tmp_path).estimator(stages(project(tmp_path), "finetune")[0]).seconds > 0


# -- records ----------------------------------------------------------------------------------------------------------


def test_past_records_correct_estimates_by_kind_and_method_and_one_outlier_does_not(tmp_path: Path) -> None:
    found = project(
        tmp_path, "methods=[{name: sft}, {name: lwf}, {name: ewc, config: {num_rows: 9}}]", "seeds=[0, 1, 2]"
    )
    cold = forecast(tmp_path)
    tuned = stages(found, "finetune")
    slow = {"sft": 3.0, "lwf": 5.0}  # times the estimate
    past = [stage for stage in tuned if stage.config["method"] in slow]
    outlier = next(stage for stage in past if stage.config["method"] == "lwf")

    def seconds(stage: Stage) -> float:
        if stage is outlier:  # the machine slept
            return 1e5
        return cold.seconds(stage) * slow[str(stage.config["method"])] if stage in past else cold.seconds(stage)

    needed = {s.key: s for stage in past for s in stage.walk() if s.kind != "finetune" or s in past}
    put(found.store, needed.values(), seconds)
    warm = forecast(tmp_path)
    for stage in tuned:
        told = warm.seconds(stage) / cold.seconds(stage)
        if stage.config["method"] == "ewc":  # none of it was run: as other finetunes
            assert 0.999 * min(slow.values()) <= told <= 1.001 * max(slow.values())
        else:
            assert told == pytest.approx(slow[str(stage.config["method"])])
    checked = warm.checked["finetune"]
    assert checked.num == len(past) and checked.recorded_s == pytest.approx(sum(map(seconds, past)))
    assert checked.estimated_s == pytest.approx(sum(cold.seconds(stage) for stage in past))


def test_stages_that_waited_for_one_engine_count_once(tmp_path: Path) -> None:
    """Four at a time, each recorded with the turns of the others: the engine was busy for 4000 s, not for 4 x 4000."""
    generate = stages(project(tmp_path, "methods=[{name: sft}]"), "generate")[:4]
    cold = forecast(tmp_path)
    work = sum(cold.seconds(stage) for stage in generate)
    cold.finished([(stage, 4000.0) for stage in generate], now=10_000.0)
    told = sum(map(cold.seconds, generate))
    assert told == pytest.approx(work * (4000 + cost.PRIOR_S) / (work + cost.PRIOR_S))
    other = stages(project(tmp_path), "generate")[5]
    cold.finished([(other, cold.seconds(other))], now=50_000.0)  # the idle time between is nobody's
    assert sum(map(cold.seconds, generate)) == pytest.approx(told)
    assert cost.busy([(0, 10, 0), (5, 12, 0), (20, 21, 0)]) == 13


def test_time_left_is_the_longest_of_the_chain_the_engine_and_all_work_over_the_slots(tmp_path: Path) -> None:
    def stage(name: str, kind: str = "memory", **inputs: Stage) -> Stage:
        return Stage(kind, {"name": name, "positions": None}, inputs)

    first, other = stage("first"), stage("other")
    second = stage("second", before=first)
    found = forecast(tmp_path)
    one = found.seconds(first)  # all of them cost as much

    def left(*stages: Stage, slots: int, running: dict[str, tuple[float, float | None]] | None = None) -> float:
        return Remaining(found, found.todo(stages), (), slots).seconds(running or {}) / one

    assert left(first, second, other, slots=1) == pytest.approx(3)
    assert left(first, second, other, slots=2) == pytest.approx(2)  # the chain
    assert left(first, second, other, slots=2, running={first.key: (one / 2, None)}) == pytest.approx(1.5)
    assert left(first, second, other, slots=2, running={first.key: (9 * one, 4 * one)}) == pytest.approx(
        5
    )  # its own pace


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(identity, "canonical")
    count(Store, "has")
    count(Store, "record")
    count(Graph, "__init__")
    count(Stage, "__init__")
    count(Estimator, "_estimate")
    return counts


def with_trials(root: Path, num: int) -> Project:
    """`num` trials of methods, by poison ratio and seed, and the references."""
    ratios = [i / num for i in range(num // 20)]
    methods = "[{name: sft}, {name: der, config: {memory_size: 20}}, {name: lwf}, {name: magmax}]"
    return project(root, f"methods={methods}", f"poison.ratios={ratios}", "seeds=[0, 1, 2, 3, 4]")


def test_ten_times_the_trials_cost_at_most_twelve_times_the_work(tmp_path: Path, counted: Counter[str]) -> None:
    found = []
    for num in (40, 400):
        counted.clear()
        plan(with_trials(tmp_path / "none", num))
        found.append(dict(counted))
    few, many = found
    assert many["__init__"] > 400
    assert all(many[name] <= 12 * few[name] for name in few), (few, many)
    # A trial: its finetune, 3 answers, 5 verdicts, its metrics, and what it shares with the other methods. Those of the first
    # seed, a fifth, are asked for twice: the rows of what is missing are previewed.
    assert many["has"] <= 400 * 14 * 6 / 5 and many["canonical"] <= 400 * 8


def test_a_tick_builds_no_graph_and_asks_the_store_nothing_once_it_knows_the_jobs(
    tmp_path: Path, counted: Counter[str]
) -> None:
    here = with_trials(tmp_path, 200)
    schedule = here.schedule()
    eta = Eta(here.store, here.forecast(), 2, here.guard_stages())
    order = list({s.key: s for job in schedule.open_jobs() for s in job.evidence.metrics.walk()}.values())
    snapshot: dict[str, Any] = {"running": [], "finished": [], "failed": {}}
    before = eta.state(schedule, snapshot, 0.0)
    assert before["trials"] == 200 + 2 * 5 and before["eta_s"] > 0
    counted.clear()
    told = []
    for tick in range(1, 20):
        snapshot["finished"].append({"kind": order[tick].kind, "key": order[tick].key, "seconds": 1.0})
        snapshot["running"] = [
            {"kind": s.kind, "key": s.key, "start": 0.0, "ends": None} for s in order[tick + 1 : tick + 4]
        ]
        told.append(eta.state(schedule, snapshot, tick * EVERY_S)["eta_s"])
    assert not counted, counted
    assert min(told) > 0 and told[-1] < before["eta_s"]
    # A job that came between two counts of the time left is known by its name at once.
    late = here.cells[2].job({}, 99, "final")
    schedule.queues[2].waiting.append(late)
    running = {"kind": "finetune", "key": late.graph.tuned.key, "start": 0.0, "ends": None}
    state = eta.state(schedule, {**snapshot, "running": [running]}, tick * EVERY_S)
    assert [stage["label"] for stage in state["running"]] == ["finetune sft, mini, seed 99"]


def test_what_a_run_counts_as_it_goes_is_what_one_that_begins_now_would_count(tmp_path: Path) -> None:
    here = with_trials(tmp_path, 40)
    schedule = here.schedule()
    eta = Eta(here.store, here.forecast(), 2, here.guard_stages())
    order = list({s.key: s for job in schedule.open_jobs() for s in job.evidence.metrics.walk()}.values())
    order += [s for s in below(here.guard_stages()) if s not in order]
    snapshot: dict[str, Any] = {"running": [], "finished": [], "failed": {}}
    done: set[str] = set()
    for tick, stage in enumerate(order[:200]):
        snapshot["finished"].append({"kind": stage.kind, "key": stage.key, "seconds": 3.0 + tick % 5})
        done.add(stage.key)
        for queue in schedule.queues:  # a job ends with its last stage
            for job in [job for job in queue.waiting if {s.key for s in job.evidence.targets} <= done]:
                queue.waiting.remove(job)
        if tick == 120:  # one fails half way
            schedule.queues[-1].waiting.pop()
        before = eta._remaining
        told = eta.state(schedule, snapshot, tick * EVERY_S)["eta_s"]
        assert (eta._remaining is before) == (tick not in (0, 120)), tick
        tops = [*here.guard_stages(), *(top for job in schedule.open_jobs() for top in job.evidence.targets)]
        left = below(tops, lambda other: other.key in done)
        fresh = Remaining(eta.forecast, eta.forecast.todo(left), (), eta.slots)
        assert told == pytest.approx(fresh.seconds({}), rel=1e-9)
        assert {kind: s for kind, s in eta._remaining.kinds.items() if s} == pytest.approx(
            {kind: s for kind, s in fresh.kinds.items() if s}
        )


def test_a_stage_is_needed_by_as_many_trials_as_lead_to_it(tmp_path: Path) -> None:
    tops = [job.evidence.metrics for job in with_trials(tmp_path, 40).schedule().open_jobs()]
    found, uses = _uses(tops)
    walked = [stage for top in tops for stage in top.walk()]
    assert uses == Counter(stage.key for stage in walked) and max(uses.values()) == len(tops)
    assert found.keys() == uses.keys()


def test_a_model_that_is_aligned_already_is_called_so(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: sft}]")
    base = next(s for s in found.cells[0].job({}, 0, "final").evidence.metrics.walk() if s.kind == "generate")
    assert kind_of("generate").label(base, {}).endswith("base")
    assert kind_of("generate").label(base, {"": "aligned"}).endswith("aligned")  # as the driver has it of `align: none`


def test_what_runs_is_named_by_what_people_know(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: der}, {name: magmax}]")
    names: set[str] = set()
    for cell in found.cells:
        names |= {kind_of(stage.kind).label(stage, {}) for stage in cell.job({}, 0, "final").evidence.metrics.walk()}
    assert {
        "model", "tokenizer", "finetune aligned, seed 0", "finetune guard, seed 1", "memory of 250 rows, seed 0",
        "finetune der, mini p=0.1, seed 0", "finetune der, mini, seed 0", "merge magmax, mini p=0.1, seed 0",
        "generate attack mini, test: der, mini p=0.1, seed 0", "generate benign mini, test: aligned, seed 0",
        "generate utility mini, test: base", "judge guard attack mini, test: magmax, mini, seed 0",
        "metrics test: der, mini, seed 0",
    } <= names  # fmt: skip
    [model] = {cell.job({}, 0, "final").graph.base.key for cell in found.cells}
    assert (
        kind_of("finetune").label(found.cells[1].job({}, 0, "final").graph.theta_safe, {model: "small"})
        == "finetune aligned, seed 0, small"
    )


def test_a_search_that_goes_on_is_a_chain_of_trials_and_then_its_finals(tmp_path: Path) -> None:
    found = project(tmp_path, "poison.ratios=[0.1]")
    [cell] = [cell for cell in found.cells if cell.space is not None]
    forecast_ = found.forecast()

    def left(num: int) -> float:
        return Remaining(forecast_, (), [Open(cell, num, (0,))], 64).seconds({})

    trial, final = cell.trial({}).own, cell.job({}, 0, "final").own
    assert {stage.kind for stage in trial} == {"finetune", "generate", "judge", "metrics"}
    assert left(3) - left(2) == pytest.approx(left(2) - left(1))
    slowest = sum(forecast_.seconds(s) for s in trial if s.kind == "finetune")
    assert left(3) - left(2) > slowest and left(0) > sum(forecast_.seconds(s) for s in final if s.kind == "finetune")


def test_a_finished_sweep_has_nothing_left(tmp_path: Path) -> None:
    found = project(tmp_path, "methods=[{name: sft}, {name: der}]")
    made = finish(found)
    told = plan(found)
    assert told["hours"] == 0 and {counts["to run"] for counts in told["stages"].values()} == {0}
    assert sum(counts["cached"] for counts in told["stages"].values()) == len(made)
    assert sum(checked["num"] for checked in told["records"].values()) == len(made)


# -- sharing ----------------------------------------------------------------------------------------------------------


def test_what_is_left_is_what_a_walk_over_the_stages_counts() -> None:
    draw = random.Random(3)
    forecast: Any = SimpleNamespace(
        factor=lambda estimate: {"a": 2.0, "b": 0.5, "generate": 1.0}[estimate.group[0]],
        seconds=lambda stage: stage.config["seconds"],
        execution=Execution(use_gpu=True),
    )
    for num in (0, 1, 60):
        todo: list[Todo] = []
        for number in range(num):
            kind = draw.choice(["a", "b", "generate"])
            stage, seconds = Stage(kind, {"number": number}), draw.uniform(1, 100)
            needs = draw.sample([other.stage.key for other in todo], min(len(todo), draw.randint(0, 3)))
            todo.append(Todo(stage, Estimate(seconds, (kind, ""), kind == "generate"), tuple(needs)))
        remaining = Remaining(forecast, todo, (), slots=1000)
        done: set[str] = set()
        for _ in range(5):
            left = {item.stage.key: item for item in todo if item.stage.key not in done}
            takes = {key: item.estimate.seconds * forecast.factor(item.estimate) for key, item in left.items()}
            ends: dict[str, float] = {}  # of the longest chain that ends with it
            for key, item in left.items():
                ends[key] = takes[key] + max((ends[need] for need in item.needs if need in left), default=0.0)
            by_kind = {item.stage.kind: 0.0 for item in todo}
            for key, item in left.items():
                by_kind[item.stage.kind] += takes[key]
            assert remaining.kinds == pytest.approx(by_kind)
            assert remaining.seconds({}) == pytest.approx(max([*ends.values(), by_kind.get("generate", 0.0), 0.0]))
            # The inputs of what is done are done.
            ready = [key for key, item in left.items() if done.issuperset(item.needs)]
            done.update(draw.sample(ready, len(ready) // 2 + len(ready) % 2))
            remaining.finish(done)
            remaining.settle(())
