"""HEx-PHI (Qi et al. 2024): harmful instructions by category, test only. Gated.

Its authors removed one category, so the number of rows depends on the copy (330 at first, 300 later). The report shows it. The
hub has one CSV file without a header for each category. `load_dataset` cannot join them, so they are read one by one. A local
copy is a folder `hexphi` of these files, or a file with fields prompt and category. (Written without access to the data: not
yet run against the hub.)
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import check_split, choose, made

_SOURCE = Source("hexphi.jsonl", "LLM-Tuning-Safety/HEx-PHI", gated=True, headerless=True)


class Hexphi(Task):
    VERSION: ClassVar[str] = "1"
    TYPICAL_TOKENS = (40, 80)
    SPLITS: ClassVar[tuple[str, ...]] = ("attack.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"attack.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` is the file's or the field's name."""
        check_split(self, split)
        found = made(self, _SOURCE, _row)
        return choose(self, split, found, num_rows, seed)


def _row(index: int, record: Record) -> Row:
    category = record.label("category")
    return Row(f"test/{index}", record.text("prompt", "instruction"), "", True, {"category": category})
