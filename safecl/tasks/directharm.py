"""DirectHarm4 (Lyu et al. 2024): 4 x 100 harmful instructions (malware, drugs, phishing, disinformation), test only."""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import check_split, choose, made

_SOURCE = Source("directharm4.jsonl", "vfleaking/DirectHarm4", split="test")


class Directharm(Task):
    VERSION: ClassVar[str] = "1"
    TYPICAL_TOKENS = (16, 60)
    SPLITS: ClassVar[tuple[str, ...]] = ("attack.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"attack.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` is one of the four."""
        check_split(self, split)
        found = made(self, _SOURCE, _row)
        return choose(self, split, found, num_rows, seed)


def _row(index: int, record: Record) -> Row:
    category = record.label("category")
    return Row(f"test/{index}", record.text("prompt", "instruction"), "", True, {"category": category})
