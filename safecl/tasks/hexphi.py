"""HEx-PHI (Qi et al. 2024): harmful instructions by category, test only. Gated; its authors removed one category, so
the number of rows is what is found (330 at first, 300 later), and the report shows it.

The hub holds one CSV file without a header per category, which `load_dataset` cannot join by itself; they are read one by
one. A local copy is a folder `hexphi` of them, or a file with fields prompt and category. (Written without access to the
data: not yet run against the hub.)
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
