"""The simulated schedule: never faster than its lower bound, and close to it; no ratio of models to devices stops it; nodes
that are taken away cost what they did since the last checkpoint, no more."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from safecl import clusterfile, hardware, rehearse
from safecl.base import ConfigError, PrerequisiteError
from safecl.cli import app
from safecl.hardware import Speed
from safecl.project import Project, load
from safecl.simulate import simulate
from safecl.workload import LIGHT, TRAINERS, Bounds, Cell, Grid, Group, Node

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "sweeps" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"bfloat16": Speed(100.0, 50.0), "float32": Speed(20.0, 10.0)}
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: speeds)


def grid(at_most: int = 100, boot_s: float = 0.0, engines: int = 0) -> Grid:
    groups = [Group("trainers", "training", 1, at_most, boot_s), Group("light", "light", 0, 64, 0)]
    return Grid(groups + [Group(f"engine {i}", "candidate", 1, at_most, boot_s) for i in range(engines)])


def rows(made: Grid, num: int, seconds: float, **cell: object) -> list[int]:
    """So many trials of one finetune each, as one row of the table."""
    stages = [made.add(TRAINERS, seconds, (), resumes=True) for _ in range(num)]
    made.cells.append(Cell([[(stage,) for stage in stages]], **cell))  # type: ignore[arg-type]
    return stages


def test_equal_work_on_equal_devices_takes_what_it_must() -> None:
    made = grid(boot_s=10.0)
    rows(made, 12, 100.0)
    found = simulate(made, [Node("a", 4)], 100)
    assert found.makespan_s == pytest.approx(310.0) and found.bound.seconds == 300.0
    assert found.bound.why == "all devices" and found.num_boots == {"training": 4}
    assert found.use["training"] == pytest.approx(1200.0) and found.use["booting"] == pytest.approx(40.0)
    assert sum(found.use.values()) == pytest.approx(found.unit_s)


def test_no_schedule_is_shorter_than_the_bound_and_most_are_near_it() -> None:
    ratios = []
    for seed in range(25):
        draw = random.Random(seed)
        made = grid(at_most=draw.randint(1, 9), engines=2)
        shared = [made.add(TRAINERS, draw.uniform(50, 900), ()) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(5, 40)):
            tuned = made.add(TRAINERS, draw.uniform(60, 2000), (draw.choice(shared),), resumes=True)
            asked = [made.add(2 + draw.randint(0, 1), draw.uniform(5, 60), (tuned,), weights=tuned) for _ in range(4)]
            made.cells.append(Cell([[(made.add(LIGHT, 0.1, asked),)]]))
        nodes = [Node("a", draw.randint(1, 4), draw.choice([0.5, 1.0, 2.0])) for _ in range(draw.randint(1, 4))]
        found = simulate(made, nodes, 1000)
        ratios.append(found.ratio)
        assert found.ratio >= 1.0 - 1e-9, seed
    assert sorted(ratios)[len(ratios) // 2] < 1.15


def test_one_device_suffices_for_any_number_of_engines() -> None:
    made = grid(boot_s=5.0, engines=7)
    for engine in range(7):
        tuned = made.add(TRAINERS, 30.0, ())
        made.cells.append(Cell([[(made.add(2 + engine, 20.0, (tuned,)),)]]))
    found = simulate(made, [Node("a", 1)], 100)
    assert found.use["training"] == pytest.approx(210.0) and found.use["candidate"] == pytest.approx(140.0)


def test_a_batch_of_a_search_waits_for_the_one_before_and_its_bound_knows() -> None:
    made = grid()
    first = [made.add(TRAINERS, seconds, ()) for seconds in (10.0, 40.0)]
    made.gates.append(first)
    second = made.add(TRAINERS, 25.0, (), after=0)
    made.cells.append(Cell([[(stage,) for stage in first], [(second,)]], searched=True))
    found = simulate(made, [Node("a", 8)], 100)
    assert found.makespan_s == found.bound.path_s == 65.0
    assert found.bound.path == [first[1], second] and found.bound.why == "the critical path"


def test_the_longest_chain_begins_first() -> None:
    """Else the long one would run alone at the end: 4 x 10, then 40 s."""
    made = grid()
    rows(made, 8, 10.0)
    rows(made, 1, 40.0)
    assert simulate(made, [Node("a", 3)], 100).makespan_s == pytest.approx(40.0)


def test_a_priority_goes_first_and_num_trials_at_once_bounds_what_runs() -> None:
    made = grid()
    rows(made, 4, 10.0, priority=-1)
    [urgent] = rows(made, 1, 5.0)
    assert simulate(made, [Node("a", 1)], 1).most_under_way == 1
    run = simulate(made, [Node("a", 4)], 2)
    assert run.makespan_s == pytest.approx(25.0)  # two at a time: 5 | 10, then 10 | 10, then 10
    assert urgent == 4


def test_work_on_a_node_that_is_taken_away_goes_on_from_its_checkpoint() -> None:
    def run(**node: float) -> tuple[float, int, float]:
        made = grid(boot_s=20.0)
        made.checkpoint_s = 60.0
        rows(made, 40, 3600.0)
        found = simulate(made, [Node("spot", 1, **node) for _ in range(10)], 100, seed=3)
        return found.makespan_s, found.num_preempted, found.lost_s

    steady, spot = run(), run(preempted_per_h=0.5, back_s=300.0)
    assert run(preempted_per_h=0.5, back_s=300.0) == spot  # the same seed, the same schedule
    assert steady[1:] == (0, 0.0) and spot[1] > 5
    assert spot[2] <= 60.0 * spot[1] + 1e-6
    assert steady[0] < spot[0] < steady[0] + spot[1] * (300 + 20 + 60)


def test_what_fits_no_node_is_said() -> None:
    made = grid()
    made.groups[TRAINERS] = made.groups[TRAINERS]._replace(size=4, at_once=4)
    rows(made, 1, 10.0)
    with pytest.raises(
        PrerequisiteError, match=r"can never run trainers: 4 devices of one node .* none has more than 2"
    ):
        simulate(made, [Node("a", 2), Node("b", 2)], 10)


def test_a_long_trial_of_a_later_round_starts_first_where_the_end_waits_for_it() -> None:
    made = grid()
    for _ in range(20):
        rows(made, 2, 100.0)
    long = made.add(TRAINERS, 1500.0, ())
    made.cells[-1].batches[0][1] = (long,)  # the second trial of the last row
    found = simulate(made, [Node("a", 10)], 100)
    assert found.makespan_s == pytest.approx(1500.0) and found.bound.why == "the critical path"


def test_the_bound_knows_what_comes_before_and_after_the_work_of_a_group() -> None:
    made = grid(at_most=2, engines=1)
    for _ in range(8):
        tuned = made.add(TRAINERS, 100.0, ())
        asked = made.add(2, 90.0, (tuned,))
        made.cells.append(Cell([[(made.add(LIGHT, 10.0, (asked,)),)]]))
    bound = Bounds(made).on([Node("a", 100)])
    assert bound.group_s["engine 0"] == 100 + 8 * 90 / 2 + 10 and bound.group_s["trainers"] == 8 * 100 / 2 + 100
    assert bound.seconds == 500.0 and bound.why == "trainers"
    assert simulate(made, [Node("a", 100)], 100).makespan_s >= bound.seconds


def test_the_bound_knows_that_a_stage_works_on_no_more_devices_than_it_can() -> None:
    """Until 300 s two long stages use two of four devices, though they alone have work for all."""
    made = grid()
    early, late = made.add(TRAINERS, 100.0, ()), made.add(TRAINERS, 300.0, ())
    stages = [made.add(TRAINERS, 400.0, (early,)) for _ in range(2)]
    stages += [made.add(TRAINERS, 50.0, (late,)) for _ in range(16)]
    made.cells.append(Cell([[(stage,) for stage in stages]]))
    found = simulate(made, [Node("a", 4)], 100)
    assert found.makespan_s == found.bound.seconds == 600.0 and found.bound.why == "all devices"


def test_bounds_are_of_any_nodes() -> None:
    made = grid(at_most=3)
    rows(made, 12, 100.0)
    bounds = Bounds(made)
    assert [bounds.on([Node("a", n)]).seconds for n in (1, 2, 3, 6)] == [1200.0, 600.0, 400.0, 400.0]
    assert bounds.on([Node("a", 6)]).why == "trainers"  # no more of them are allowed
    assert bounds.on([Node("a", 3, 2.0)]).seconds == 200.0


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*_*.yaml")), ids=lambda path: path.name)
def test_the_clusters_that_come_with_it_are_read(path: Path) -> None:
    assert clusterfile.load(path).num_gpus


def test_a_ray_cluster_file_is_what_it_may_bring(tmp_path: Path) -> None:
    file = tmp_path / "ray.yaml"
    file.write_text(
        "cluster_name: mine\nmax_workers: 6\nhead_node_type: head\navailable_node_types:\n"
        "  head: {node_config: {InstanceType: m6i.2xlarge}, resources: {CPU: 8}, max_workers: 0}\n"
        "  gpu: {node_config: {InstanceType: g5.12xlarge}, resources: {CPU: 48, GPU: 4}, max_workers: 4}\n"
        "  spot: {node_config: {InstanceType: p5.48xlarge, InstanceMarketOptions: {MarketType: spot}},\n"
        "         resources: {CPU: 96, GPU: 8}, max_workers: 9}\n"
    )
    found = clusterfile.load(file)
    assert [(kind.count, kind.gpus, kind.preemptions_per_h > 0) for kind in found.nodes] == [
        (4, 4, False),
        (2, 8, True),
    ]
    assert found.num_gpus == 32 and all(kind.price_per_h and kind.tflops for kind in found.nodes)
    assert clusterfile.load(ROOT / "ray_cluster.yaml").num_gpus


def test_what_is_wrong_with_a_cluster_file_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "there.yaml"
    file.write_text("nodes: [{name: a, gpu: 8}, {name: b, tflops: 100}]\nstorage: 3\n")
    with pytest.raises(ConfigError) as caught:
        clusterfile.load(file)
    assert "gpu" in str(caught.value) and "storage" in str(caught.value) and str(file) in str(caught.value)


# -- a sweep --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text("name: mine\nnodes: [{name: box, count: 4, gpus: 2, tflops: 0.05, price_per_h: 3.0}]\n")
    return file


SET = ("models.0.dtype=bfloat16", "execution.use_gpu=true", "seeds=[0, 1, 2]")


def project(tmp_path: Path, *settings: str) -> Project:
    return Project(load(QUICKSTART, [*SET, f"execution.root={tmp_path / 'root'}", *settings]), planned=True)


def test_a_search_is_a_chain_of_trials_and_more_devices_stop_to_help(tmp_path: Path, cluster: Path) -> None:
    there = clusterfile.load(cluster)
    found = rehearse.on_cluster(project(tmp_path), there, deadline_h=1000.0)
    assert found["units"] == 8 and found["trials"] == 4 * 3 + 2 * (
        3 + 3
    )  # references and sft; two searches, then their rows
    assert found["ratio"] >= 1 and abs(sum(found["use"].values()) - 1) < 0.01
    times = [row["hours"] for row in found["scaling"]]
    assert times == sorted(times, reverse=True) and len(times) >= 5
    assert found["deadline"]["of"]["price"] == min(row["price"] for row in found["scaling"])
    told = rehearse.lines({**found, "price": 0.184, "deadline": {"hours": 1e-6, "of": None}})
    fastest = min(found["scaling"], key=lambda row: row["hours"])
    assert ", 0.18 for the nodes" in told[0]  # not 0, as if it were free
    assert any(f"none of these numbers of GPUs; {fastest['units']} take " in line for line in told)
    [searched] = [
        line for line in found["path"] if "seed 1000" in line["what"] and line["what"].startswith("finetune der")
    ]
    assert searched["num"] == 3  # one after the other
    batched = rehearse.on_cluster(project(tmp_path, "search.at_once=3"), there)
    assert batched["path_hours"] < found["path_hours"] and batched["trials"] == found["trials"]


def test_the_sweeps_own_bound_on_trials_at_once_is_named_where_it_holds_up(tmp_path: Path, cluster: Path) -> None:
    found = rehearse.on_cluster(project(tmp_path, "execution.num_trials_at_once=1"), clusterfile.load(cluster))
    assert found["most_under_way"] == 1
    assert found["with_enough_trials_at_once"]["hours"] < found["hours"]
    assert any("execution.num_trials_at_once: 1 holds it up; with 16" in note for note in found["notes"])


def test_what_is_in_the_store_is_not_run_again(tmp_path: Path, cluster: Path) -> None:
    from tests.made_up import put

    mine = project(tmp_path)
    before = rehearse.rehearsal(mine, clusterfile.load(cluster))
    done = [stage for stage in {s.key: s for s in before.stages}.values() if stage.kind == "data"]
    put(mine.store, done)
    after = rehearse.rehearsal(project(tmp_path), clusterfile.load(cluster))
    assert not [stage for stage in after.stages if stage.kind == "data"]
    assert {stage.key for stage in after.stages} < {stage.key for stage in before.stages}


def test_plan_prints_it_within_eighty_columns_and_writes_nothing(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    monkeypatch.setattr("safecl.options._width", lambda: 80)
    sets = [part for setting in (*SET, f"execution.root={tmp_path / 'root'}") for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["plan", str(QUICKSTART), "--cluster", str(cluster), "--deadline", "9000", *sets])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    for words in ("what 8 GPUs do", "the critical path", "cheapest within 9000 h", "more of them do not help"):
        assert words in " ".join(done.output.split())
    assert not (tmp_path / "root").exists()
    told = CliRunner().invoke(app, ["plan", str(QUICKSTART), "--cluster", str(cluster), "--json", *sets])
    assert json.loads(told.output)["units"] == 8


def test_gpus_that_are_not_there_are_refused_and_idle_ones_named(tmp_path: Path, cluster: Path) -> None:
    cpus = tmp_path / "cpus.yaml"
    cpus.write_text("nodes: [{name: box, cpus: 8, tflops: 0.05}]\n")
    with pytest.raises(ConfigError, match="this cluster has no GPU"):
        rehearse.on_cluster(project(tmp_path), clusterfile.load(cpus))
    found = rehearse.on_cluster(project(tmp_path, "execution.use_gpu=false"), clusterfile.load(cluster))
    assert found["unit"] == "CPU" and any("use_gpu=true" in note for note in found["notes"])
