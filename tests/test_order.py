"""Whose turn it is: the critical path, priorities and shares, as pure functions; on real Ray in test_trainers.py."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.order import Claim, Line, Queue, Turn, chains
from safecl.project import Project, load

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"


def test_chains_are_the_longest_of_all_that_wait() -> None:
    draw = random.Random(0)
    for _ in range(20):
        num = draw.randint(1, 9)
        seconds = [draw.random() for _ in range(num)]
        needs = [[other for other in range(place) if draw.random() < 0.4] for place in range(num)]

        def longest(place: int, seconds: list[float] = seconds, needs: list[list[int]] = needs) -> float:
            above = [other for other in range(len(needs)) if place in needs[other]]
            return seconds[place] + max((longest(other) for other in above), default=0.0)

        assert chains(seconds, needs) == pytest.approx([longest(place) for place in range(num)])


def test_training_goes_by_rounds_unless_the_end_waits_for_it_or_engines_would_get_their_work_too_late() -> None:
    queue: Queue[str] = Queue()
    for number, (name, rounds, chain) in enumerate((("long", 3, 100.0), ("short", 0, 10.0), ("middle", 0, 50.0))):
        queue.put(name, Turn.of(Claim(rank=1, round=rounds), chain, number))
    assert queue.first(left_s=101.0, coming_s=0.0) == "middle"  # of the first round the longest
    assert queue.first(left_s=100.0, coming_s=0.0) == "long"  # as long as until all others have begun
    assert queue.first(left_s=200.0, coming_s=100.0) == "middle"
    assert queue.first(left_s=200.0, coming_s=101.0) == "short"  # 100 s and then 101 s of engines: later than the end
    queue.put("long", Turn.of(Claim(rank=0, round=3), 1.0, 9))  # a search waits for it now
    assert queue.first(left_s=200.0, coming_s=0.0) == "long"
    queue.remove("long")
    assert set(queue) == {"short", "middle"} and queue.first(200.0, 0.0) == "middle"
    queue.remove("middle")
    queue.remove("short")
    assert queue.first(1.0, 0.0) is None


def test_turns_go_by_priority_then_rank_then_round_then_chain_then_who_asked_first() -> None:
    ordered = [
        Turn.of(Claim(priority=0, rank=2, round=9), 1.0, 9),
        Turn.of(Claim(priority=-1, rank=0, round=0), 99.0, 0),
        Turn.of(Claim(priority=-1, rank=1, round=0), 5.0, 3),
        Turn.of(Claim(priority=-1, rank=1, round=0), 5.0, 4),
        Turn.of(Claim(priority=-1, rank=1, round=0), 4.0, 1),
        Turn.of(Claim(priority=-1, rank=1, round=0.5), 99.0, 0),
    ]
    assert sorted(reversed(ordered)) == ordered
    levels = [turn.level for turn in ordered]
    assert levels == sorted(levels) and len(set(levels)) == 3  # an engine knows only these


def test_the_lowest_turn_enters_a_line_next_and_who_was_cancelled_costs_no_place() -> None:
    async def scenario() -> list[str]:
        line, entered = Line(1), []

        async def wait(name: str, chain: float) -> None:
            await line.enter(Turn.of(Claim(), chain, 0))
            entered.append(name)
            await asyncio.sleep(0)
            line.leave()

        tasks = [asyncio.create_task(wait(*what)) for what in (("first", 0), ("short", 1), ("long", 9), ("gone", 5))]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(line.enter(Turn.of(Claim(), 0.0, 0)), 1)
        return entered

    assert asyncio.run(scenario()) == ["first", "long", "short"]


def schedule(tmp_path: Path, **raw: Any) -> Any:
    settings = [f"{key}={value}" for key, value in raw.items()]
    fixed = [
        "models.0.dtype=bfloat16",
        f"execution.root={tmp_path}",
        "methods=[sft, {name: der, config: {memory_size: 10}}]",
    ]
    return Project(load(QUICKSTART, [*fixed, "seeds=[0, 1, 2, 3]", *settings])).schedule()


def given(schedule: Any) -> list[tuple[str, float, int]]:
    jobs = []
    while (job := schedule.next()) is not None:
        jobs.append((job.cell.recipe.method, job.cell.recipe.poison_ratio, job.seed))
    return jobs


def test_each_cells_first_seed_is_given_out_before_anybodys_second(tmp_path: Path) -> None:
    seeds = [seed for _, _, seed in given(schedule(tmp_path))]
    assert seeds == sorted(seeds) and len(seeds) == 6 * 4


def test_a_higher_priority_goes_first_and_a_double_share_has_two_trials_for_one(tmp_path: Path) -> None:
    turns = "[{methods: [der], ratios: [0.1], priority: 2}, {methods: [sft], share: 2}]"
    jobs = given(schedule(tmp_path, **{"execution.turns": turns}))
    assert [job[:2] for job in jobs[:4]] == [("der", 0.1)] * 4
    others = [method for method, _, _ in jobs[4:]]
    of_sft = [sum(other == "sft" for other in others[:num]) for num in (10, 15)]
    assert (
        of_sft[0] == 5 and of_sft[1] == 8
    )  # two rows of sft: of the first 10 and 15 among five rows, four shares in seven


def test_a_trial_given_back_has_its_turn_again(tmp_path: Path) -> None:
    found = schedule(tmp_path)
    first = found.next()
    found.give_back(first)
    assert found.next() is first and found.claim(first).round == 0
    second = found.next()
    assert second.cell is not first.cell and found.claim(second).round == 0


def test_a_row_that_is_not_there_cannot_go_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"execution\.turns\[0\]\.methods: 'ders' is none of this sweep's: sft, der"):
        schedule(tmp_path, **{"execution.turns": "[{methods: [ders], priority: 1}]"})


def test_whose_turn_it_is_is_part_of_no_identity(tmp_path: Path) -> None:
    plain, ordered = (schedule(tmp_path, **more) for more in ({}, {"execution.turns": "[{priority: 3}]"}))
    assert [q.cell.key for q in plain.queues] == [q.cell.key for q in ordered.queues]
