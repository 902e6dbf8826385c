"""Which rows a memory holds: refusals, or every kind in proportion; prefixes either way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Template
from safecl.stages import memory
from safecl.tasks import Row

KINDS = {("mini", True): 20, ("mini", False): 12, ("self", False): 8}  # source and harmful -> rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    found = [
        Row(f"{source}/{harmful}/{i}", f"a thing {i}", "the rain", harmful)
        for (source, harmful), num in KINDS.items()
        for i in range(num)
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in found))
    return tmp_path / "rows"


def chosen(rows: Path, model: Path, num_rows: int, **more: Any) -> tuple[list[Row], Any]:
    out = rows.parent / f"memory-{num_rows}-{len(more)}"
    out.mkdir()
    text = {"template": Template().model_dump(), "bos": False, "dtype": "float32", "max_tokens": 256}
    config = {"num_rows": num_rows, "positions": None, "seed": 3, "adapter": "continue", **text, **more}
    facts = memory.remember(config, {"model": model, "rows": rows}, out)
    return [Row(**json.loads(line)) for line in (out / "rows.jsonl").read_text().splitlines()], facts


def test_refusals_alone_unless_every_kind_is_asked_for(rows: Path, tiny_model: Path) -> None:
    few, facts = chosen(rows, tiny_model, 20)
    assert all(row.harmful for row in few) and facts["harmful"] == 20
    with pytest.raises(ConfigError, match="memory of 21 rows: the safety rows hold 20 usable refusals"):
        chosen(rows, tiny_model, 21)
    with pytest.raises(ConfigError, match="memory of 41 rows: the safety rows hold 40 usable rows"):
        chosen(rows, tiny_model, 41, mix="stratified")


@pytest.mark.parametrize("num", [10, 20, 40])
def test_every_kind_has_its_share(rows: Path, tiny_model: Path, num: int) -> None:
    found, facts = chosen(rows, tiny_model, num, mix="stratified")
    shares = {kind: num * total / 40 for kind, total in KINDS.items()}  # 10: 5, 3, 2
    assert Counter((row.id.split("/")[0], row.harmful) for row in found) == shares
    assert facts["harmful"] == shares["mini", True]


def test_a_smaller_memory_is_a_prefix_and_no_prefix_is_more_than_a_row_off(rows: Path, tiny_model: Path) -> None:
    whole, _ = chosen(rows, tiny_model, 40, mix="stratified")
    few, _ = chosen(rows, tiny_model, 7, mix="stratified")
    assert few == whole[:7]
    for num in range(1, 41):
        counts = Counter((row.id.split("/")[0], row.harmful) for row in whole[:num])
        assert all(abs(counts[kind] - num * total / 40) <= 1 for kind, total in KINDS.items()), num
    assert [row.id for row in whole if row.harmful] != sorted(row.id for row in whole if row.harmful)  # drawn, not cut
