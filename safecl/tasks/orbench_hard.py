"""OR-Bench-Hard-1K (Cui et al. 2024): the 1,319 look-alikes that most models refuse; over-refusal, whole, test only."""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import check_split, choose, made

_SOURCE = Source("orbench_hard.jsonl", "bench-llm/or-bench", config="or-bench-hard-1k")


class OrbenchHard(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = ("benign.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"benign.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` is the data set's."""
        check_split(self, split)
        found = made(self, _SOURCE, _row)
        return choose(self, split, found, num_rows, seed)


def _row(index: int, record: Record) -> Row:
    return Row(f"hard/{index}", record.text("prompt"), "", False, {"category": record.label("category")})
