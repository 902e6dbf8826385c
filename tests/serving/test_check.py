"""Weights are looked at before a live engine's own are touched: here without an engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from safecl.serving import swap
from safecl.serving.engine import Engine
from safecl.serving.messages import Refused, WeightsRef
from tests.serving.adapters import make_adapter


def replica(base: Path) -> Engine:
    engine = object.__new__(Engine)  # its `__init__` boots vLLM
    engine._base, engine._gate, engine._checks = str(base), SimpleNamespace(key=None), {}  # type: ignore[assignment]
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
