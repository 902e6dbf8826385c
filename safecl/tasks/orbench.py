"""OR-Bench-80K (Cui et al. 2024): prompts that look harmful and are not; over-refusal, test only.

It has 80,359 prompts, so ask for a sample (`num_rows: 1000`). The sample is chosen by a hash of the prompt, so it is the same
in every sweep.
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import check_split, choose, made

_SOURCE = Source("orbench_80k.jsonl", "bench-llm/or-bench", config="or-bench-80k")


class Orbench(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = ("benign.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"benign.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` is the data set's."""
        check_split(self, split)
        found = made(self, _SOURCE, _row)
        return choose(self, split, found, num_rows, seed)


def _row(index: int, record: Record) -> Row:
    return Row(f"80k/{index}", record.text("prompt"), "", False, {"category": record.label("category")})
