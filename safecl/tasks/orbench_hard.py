"""OR-Bench-Hard-1K (Cui et al. 2024): the 1,319 look-alikes that most models refuse; over-refusal, whole, test only."""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._source import check_split, choose, records, text

_SOURCE = Source("orbench_hard.jsonl", "bench-llm/or-bench", config="or-bench-hard-1k")


class OrbenchHard(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = ("benign.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"benign.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` is the data set's."""
        check_split(self, split)
        found = [
            Row(f"hard/{index}", text(record, "prompt"), "", False, {"category": text(record, "category")})
            for index, record in enumerate(records(_SOURCE, self.folder))
        ]
        return choose(self, split, found, num_rows, seed)
