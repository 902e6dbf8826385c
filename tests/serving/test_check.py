"""Weights are looked at before a live engine's own are touched: here without an engine."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from safecl.base import PrerequisiteError
from safecl.serving import swap
from safecl.serving.engine import Engine
from safecl.serving.messages import Refused, Sampling, Settings, Unavailable, WeightsRef
from tests.serving.adapters import make_adapter


def replica(base: Path) -> Engine:
    engine = object.__new__(Engine)  # its `__init__` boots vLLM
    engine._base, engine._gate, engine._checks = base, SimpleNamespace(key=None), {}  # type: ignore[assignment]
    engine._store = None
    return engine


def test_requests_that_wait_for_the_same_weights_have_them_checked_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def check(served: Path, base: Path, adapter: Path | None) -> None:
        time.sleep(0.02)
        checked.append(base)

    monkeypatch.setattr(swap, "check", check)
    engine = replica(tiny_model)

    async def ask() -> None:
        refs = [WeightsRef(key, f"/{key}") for key in "ab" for _ in range(20)]
        await asyncio.gather(*(engine._check_weights(ref) for ref in refs))
        await engine._check_weights(refs[0])

    asyncio.run(ask())
    assert sorted(checked) == [Path("/a"), Path("/b")]


def test_weights_that_cannot_be_read_are_refused_and_looked_at_again_when_asked_for_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", seed=0)
    file, engine = adapter / "adapter_model.safetensors", replica(tiny_model)
    whole, ref = file.read_bytes(), WeightsRef("a", str(tiny_model), str(adapter))

    async def ask() -> None:
        file.write_bytes(whole[:100])  # cut off in its header: safetensors raises an error of its own
        for _ in range(2):
            with pytest.raises(Refused, match="cannot be served"):
                await engine._check_weights(ref)
        file.write_bytes(whole)
        await engine._check_weights(ref)

    asyncio.run(ask())


def test_a_disk_that_fails_is_no_fault_of_the_weights(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(swap, "check", check)
    with pytest.raises(Unavailable, match="Input/output"):
        asyncio.run(replica(tiny_model)._check_weights(WeightsRef("a", "/a")))


def test_what_is_longer_than_the_engine_was_set_up_for_is_the_settings_fault(tiny_model: Path) -> None:
    engine = replica(tiny_model)
    engine._settings = Settings(name="e", max_model_len=128)
    for ids, kind in (([5] * 100, PrerequisiteError), ([], Refused)):
        with pytest.raises(kind, match="engine_max_tokens" if ids else "no tokens"):
            asyncio.run(engine.generate([(ids, None)], WeightsRef("a", "/a"), Sampling(max_tokens=29)))
