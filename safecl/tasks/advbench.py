"""AdvBench harmful_behaviors (Zou et al. 2023): 520 harmful instructions, whole, test only. Some are near twins."""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._source import check_split, choose, made

_SOURCE = Source("advbench.jsonl", "walledai/AdvBench", gated=True)


class Advbench(Task):
    VERSION: ClassVar[str] = "1"
    TYPICAL_TOKENS = (16, 60)
    SPLITS: ClassVar[tuple[str, ...]] = ("attack.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"attack.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        check_split(self, split)
        found = made(self, _SOURCE, lambda i, record: Row(f"test/{i}", record.text("goal", "prompt"), "", True))
        return choose(self, split, found, num_rows, seed)
