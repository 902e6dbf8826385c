"""XSTest v2 (Roettger et al. 2024): over-refusal on its 250 safe prompts, whole, test only.

Its 200 unsafe prompts are contrasts and are not used, because over-refusal is measured only on safe prompts.
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import check_split, choose, made

_SOURCE = Source("xstest.jsonl", "walledai/XSTest", split="test", gated=True)


class Xstest(Task):
    VERSION: ClassVar[str] = "1"
    TYPICAL_TOKENS = (12, 60)
    SPLITS: ClassVar[tuple[str, ...]] = ("benign.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"benign.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.type` is the kind of look-alike (homonyms, figurative_language, ...)."""
        check_split(self, split)
        found = made(self, _SOURCE, _row)
        return choose(self, split, found, num_rows, seed)


def _row(index: int, record: Record) -> Row | None:
    if record.label("label") != "safe":
        return None
    return Row(f"test/{index}", record.text("prompt"), "", False, {"type": record.label("type")})
