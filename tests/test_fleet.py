"""Engines leased to stages, on the event loop they live on; their boots are told, not made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from safecl.base import PrerequisiteError
from safecl.capacity import Capacity
from safecl.config import Execution
from safecl.devices import Devices, Holder
from safecl.fleet import App, Fleet, Group
from safecl.lender import Lender
from safecl.order import UNNAMED, Turn
from safecl.store import Stage, Store

BASE, OTHER = Stage("model", {"source": "base"}), Stage("model", {"source": "other"})


class Told(Fleet):
    """Engines are up once `boots` lets them."""

    def __init__(self, tmp_path: Path, num_units: float, at_once: int = 8, **execution: Any) -> None:
        chosen = Execution(**{"address": "auto", **execution})
        held = Capacity("CPU", num_units, 1.0, 1.0, 2)
        lender = Lender(Devices(num_units, turn_s=0.1, linger_s=0.02))
        self.booted: list[str] = []
        self.down: list[str] = []
        self.failing = ""
        super().__init__(Store(str(tmp_path)), chosen, lender, held, at_once, lambda *_: None, lambda key: None)

    async def _boot(self, group: Group, holder: Holder) -> None:
        self.booted.append(holder.name)
        await asyncio.sleep(0.01)
        if self.failing and self.failing in holder.name:
            if not self.lender.never_came(holder):
                self._failed(group, PrerequisiteError("failed to start"))
            self.lender.gone(holder)
            return
        group.apps.append(App(holder))
        self.lender.up(holder)

    async def _remove(self, holder: Holder) -> None:
        self.down.append(holder.name)

    async def ask(self, model: Stage, weights: str, seconds: float, role: str = "candidate", number: int = 0) -> str:
        async with self.lease(role, model, f"{weights}{number}", weights, Turn.of(UNNAMED, 0.0, number)) as groups:
            await asyncio.sleep(seconds)
            [(name, [app])] = groups.items()
            assert name == f"{role}-{model.key[:8]}"
            return app


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 20))


def test_one_unit_serves_the_engines_of_any_number_of_models_in_turn(tmp_path: Path) -> None:
    models = [Stage("model", {"source": str(number)}) for number in range(3)]

    async def scene() -> None:
        fleet = Told(tmp_path, 1)
        asked = [
            fleet.ask(model, f"w{number}", 0.03, role, number)
            for number in range(8) for model in models for role in ("candidate", "judge")
        ]  # fmt: skip
        assert len(await asyncio.gather(*asked)) == 48
        assert len(fleet.booted) == 6 and len(fleet.down) >= 5  # each did all its work in one turn

    play(scene)


def test_an_engine_that_has_had_its_turn_takes_no_new_stage_and_is_back_for_the_rest(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 1, at_once=1)
        first = [asyncio.create_task(fleet.ask(BASE, "w", 0.04, number=number)) for number in range(8)]
        await asyncio.sleep(0.02)
        other = asyncio.create_task(fleet.ask(OTHER, "w", 0.01))
        await other
        assert 2 <= sum(task.done() for task in first) <= 6
        await asyncio.gather(*first)
        assert [name.rpartition("-")[0] for name in fleet.booted] == [
            f"candidate-{model.key[:8]}" for model in (BASE, OTHER, BASE)
        ]

    play(scene)


def test_a_stage_gets_the_engine_that_has_its_weights_and_a_queue_gets_more_engines(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 4, at_once=2, num_candidate_engines=2)
        asked = [fleet.ask(BASE, weights, 0.05, number=number) for number in range(4) for weights in ("a", "b")]
        apps = await asyncio.gather(*asked)
        assert len(fleet.booted) == 2
        later = await asyncio.gather(*(fleet.ask(BASE, weights, 0.02, number=9) for weights in ("a", "b", "a", "b")))
        assert later[0] == later[2] and later[1] == later[3] and later[0] != later[1] and set(later) == set(apps)

    play(scene)


def test_a_hoped_for_engine_is_booted_ahead_only_where_its_unit_is_nobodys(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 2)
        for role, model in (("candidate", BASE), ("judge", BASE)):
            fleet.hope(role, model)
        await asyncio.sleep(0.05)
        assert len(fleet.booted) == 2
        short = Told(tmp_path, 1)
        await asyncio.gather(*(short.ask(BASE, "w", 0.05), asyncio.sleep(0)))
        short.hope("judge", BASE)
        await asyncio.sleep(0.05)
        assert len(short.booted) == 1

    play(scene)


@pytest.mark.parametrize("num_judge_replicas", [0, 1])
def test_without_replicas_of_its_own_a_judge_answers_from_the_candidates_engine(
    num_judge_replicas: int, tmp_path: Path
) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 8, num_judge_replicas=num_judge_replicas)
        judge, candidate, foreign = await asyncio.gather(
            fleet.ask(BASE, "w", 0.05, "judge"),
            fleet.ask(BASE, "w", 0.05, "candidate"),
            fleet.ask(OTHER, "w", 0.05, "judge"),
        )
        if num_judge_replicas:
            assert len({judge, candidate, foreign}) == 3 and judge.startswith("judge-")
        else:  # one engine a base model, whoever asks
            assert judge == candidate == f"candidate-{BASE.key[:8]}-1-{fleet.store.short}"
            assert foreign == f"candidate-{OTHER.key[:8]}-1-{fleet.store.short}"

    play(scene)


def test_an_engine_that_did_not_boot_is_told_to_who_waits_and_gives_its_unit_back(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 1)
        fleet.failing = OTHER.key[:8]
        for _ in range(2):  # who asks next boots it anew
            with pytest.raises(PrerequisiteError, match="failed to start"):
                await fleet.ask(OTHER, "w", 0.01)
        assert len(fleet.booted) == 2 and fleet.lender.devices.free == 1
        assert await fleet.ask(BASE, "w", 0.01)

    play(scene)


def test_a_second_engine_that_does_not_boot_leaves_the_work_to_the_first(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 4, num_candidate_engines=2)
        fleet.failing = "-2"
        apps = await asyncio.gather(*(fleet.ask(BASE, f"w{number}", 0.05) for number in range(6)))
        assert set(apps) == {f"candidate-{BASE.key[:8]}-1-{fleet.store.short}"} and len(fleet.booted) == 2

    play(scene)


def test_who_stops_waiting_for_an_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scene() -> None:
        fleet = Told(tmp_path, 1, at_once=1)
        first = asyncio.create_task(fleet.ask(BASE, "w", 0.1))
        second = asyncio.create_task(fleet.ask(BASE, "w", 0.1, number=1))
        await asyncio.sleep(0.05)
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        group = fleet.groups[f"candidate-{BASE.key[:8]}"]
        assert not group.wishes and not group.leased and group.apps[0].holder.num_working == 0
        assert await fleet.ask(BASE, "w", 0.01)

    play(scene)


def test_units_that_autoscaling_never_brings_are_counted_on_no_more(tmp_path: Path) -> None:
    """Of two units one is there: an engine that cannot be placed waits for its turn on it."""

    async def scene() -> None:
        fleet = Told(tmp_path, 2)
        fleet.lender.resize(2, have=1)
        first = asyncio.create_task(fleet.ask(BASE, "w", 0.3))
        await asyncio.sleep(0.05)
        fleet.failing = OTHER.key[:8]
        other = asyncio.create_task(fleet.ask(OTHER, "w", 0.01))
        await asyncio.sleep(0.05)
        fleet.failing = ""
        assert fleet.lender.devices.num_units == 1 and not other.done()
        await asyncio.gather(first, other)
        fleet.lender.resize(2, have=2)
        assert fleet.lender.devices.num_units == 2

    play(scene)
