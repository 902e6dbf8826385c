"""Charts: what they hold, and that every one is a specification that Vega-Lite draws."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from safecl.report import charts
from safecl.report.tables import Facts, blocks
from tests.report import golden
from tests.report.test_tables import FACTS, ROWS, metric, row


def drawn(chart: charts.Chart) -> str:
    """As SVG; fails on what is no specification."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg({**chart.spec, "width": 400} if "facet" not in chart.spec else chart.spec))


def values(chart: charts.Chart) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chart.spec["data"]["values"]
    return found


def test_base_and_aligned_stand_in_every_poison_panel() -> None:
    (ratios,) = charts.panels(ROWS).values()
    assert {r: [m["method"] for m in members] for r, members in ratios.items()} == {
        0.0: ["base", "aligned", "sft", "der"],
        0.1: ["base", "aligned", "sft", "der"],
    }


def test_the_front_holds_every_method_that_has_both_values() -> None:
    broken = row("lwf", 0.8, 0.9)
    broken["metrics"] = {**broken["metrics"], "asr_coherent": metric(0.1), "utility": metric(None)}
    strict = row("ewc", 0.8, 0.9)
    strict["metrics"] = {**strict["metrics"], "asr_coherent": metric(0.1)}
    [_, poisoned] = charts.front([*ROWS, broken, strict], FACTS)
    assert poisoned.title == "smol / mini, 10 % poison"
    points = {point["method"]: point for point in values(poisoned)}
    assert set(points) == {"base", "aligned", "sft", "der", "ewc"}
    assert points["sft"]["x"] == 80 and points["sft"]["y_low"] == pytest.approx(85) and points["ewc"]["strict"] == 10
    for method in points:
        assert method in drawn(poisoned)


def test_hypervolume_is_that_of_the_methods_with_an_interval_over_seeds() -> None:
    def with_seeds(method: str, asr: list[float], use: list[float]) -> dict[str, Any]:
        made = row(method, sum(asr) / 2, sum(use) / 2, seeds=[0, 1])
        for name, each in (("asr", asr), ("utility", use)):
            made["metrics"][name]["seeds"] = {str(seed): value for seed, value in enumerate(each)}
        return made

    [chart] = charts.front(
        [with_seeds("sft", [0.5, 0.5], [0.8, 0.8]), with_seeds("der", [0.1, 0.1], [0.6, 0.6])], FACTS
    )
    # der reaches .9 x .6, sft adds .5 x (.8 - .6); both seeds alike, so the interval has no width
    assert "0.640; over 2 seeds 0.640 [0.640, 0.640]" in chart.caption
    [chart] = charts.front([with_seeds("sft", [0.4, 0.6], [1.0, 1.0])], FACTS)
    half = 12.706204736 * math.sqrt(0.02) / math.sqrt(2)
    assert f"0.500 [{max(0, 0.5 - half):.3f}, {min(1, 0.5 + half):.3f}]" in chart.caption


def test_a_method_has_one_colour_and_shape_and_no_two_have_both_alike() -> None:
    names = ["base", "aligned", *(f"method{i}" for i in range(40))]
    found = charts.scales(names)
    pairs = list(zip(found["color"]["scale"]["range"], found["shape"]["scale"]["range"], strict=True))
    assert len(set(pairs)) == len(names) and found["color"]["scale"]["domain"] == names


def test_harm_by_ratio_and_by_memory_where_rows_differ_in_it() -> None:
    [chart] = charts.by_setting(ROWS, FACTS, "poison", "poison")
    assert {(p["method"], p["x"]) for p in values(chart)} == {("sft", 0), ("sft", 10), ("der", 0), ("der", 10)}
    assert "svg" in drawn(chart)
    assert charts.by_setting(ROWS[:4], FACTS, "poison", "poison") == []
    sized = [
        row("der", 0.2, 0.8, memory=10.0),
        row("der, 50", 0.1, 0.8, memory=50.0),
        row("sft", 0.9, 0.9, memory=None),
    ]
    [chart] = charts.by_setting(sized, FACTS, "memory", "rows")
    assert [point["x"] for point in values(chart)] == [10, 50]
    assert charts.by_setting(sized[:1], FACTS, "memory", "rows") == []


def test_curves_skip_what_is_not_a_number_and_stay_small_with_300() -> None:
    points = [{"step": s, "loss": 1 / s, "nan": float("nan")} for s in range(1, 401)]
    runs = [{"run": f"r{i}", "method": f"m{i % 12}", "points": points} for i in range(300)]
    [chart] = charts.curves(runs)
    assert chart.title == "loss" and len(values(chart)) == 300 * 40 and "300 runs" in chart.caption
    assert len(json.dumps(chart.spec)) < 1_200_000
    few = charts.curves(runs[:3])[0]
    assert len(few.spec["layer"]) == 1 and len(chart.spec["layer"]) == 4 and "svg" in drawn(few)
    assert charts.curves([]) == []


def test_a_search_shows_what_was_chosen_what_is_infeasible_and_what_mattered() -> None:
    space = {"weight": {"low": 0.1, "high": 10.0, "log": True}, "size": [10, 20]}
    trials = [{"number": i, "value": i / 20, "excess": 0.1 * (i > 10), "feasible": i <= 10, "best": min(i, 10) / 20,
               "params": {"weight": 0.1 * 10 ** (i / 10), "size": 10 + 10 * (i % 2)}} for i in range(20)]  # fmt: skip
    found = {
        "trials": trials,
        "space": space,
        "maximise": "utility",
        "chosen": 10,
        "importance": {"size": 0.1, "weight": 0.9},
    }
    history, region, importance, parallel = charts.search(found)
    assert [point["number"] for point in values(history) if point["state"] == "chosen"] == [10]
    assert sum(point["state"] == "violates a bound" for point in values(history)) == 9
    assert "size and weight" in region.caption and values(importance)[1] == {"parameter": "weight", "share": 90}
    assert [point["at"] for point in values(parallel) if point["number"] == 10] == [
        pytest.approx(0.5),
        0,
        pytest.approx(10 / 19),
    ]
    assert all("svg" in drawn(chart) for chart in (history, region, importance, parallel))


def test_every_metric_has_a_panel_and_an_empty_report_has_no_chart() -> None:
    rows = golden.rows()
    gsm8k, code = charts.dots(blocks(rows, golden.FACTS))
    assert {point["metric"] for point in values(gsm8k)} >= {"ASR (guard)", "utility"} and "der" in drawn(code)
    assert charts.front([], Facts(name="s")) == charts.dots([]) == charts.cost({"methods": []}) == []


def test_a_search_with_several_objectives_shows_its_front_once() -> None:
    tried = [{"number": i, "values": {"utility": use, "asr": harm}, "feasible": i != 2, "is_front": i < 2, "is_taken": i == 0}
             for i, (use, harm) in enumerate([(0.9, 0.3), (0.6, 0.1), (0.95, 0.9), (0.5, 0.4)])]  # fmt: skip
    search = {"objectives": ["utility", "asr"], "tried": tried}
    rows = [
        row("der #1", 0.1, 0.8, search=search),
        row("der #2", 0.1, 0.8, search=search),
        row("sft", 0.5, 0.9, search=None),
    ]
    [chart] = charts.fronts(rows)
    assert [point["state"] for point in values(chart)] == ["run", "front", "violates a bound", "beaten"]
    assert values(chart)[0]["x"] == 30 and values(chart)[0]["y"] == 90 and "svg" in drawn(chart)
    assert chart.title == "smol / mini, der, 10 % poison"
