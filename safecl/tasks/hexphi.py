"""HEx-PHI (Qi et al. 2024): harmful instructions by category, test only. Gated; its authors removed one category, so
the number of rows is what is found (330 at first, 300 later), and the report shows it.

A local copy is `hexphi.jsonl` with fields prompt and category. The hub holds one CSV file without a header per
category, which `load_dataset` cannot join by itself; they are read one by one. (Written without access to the data:
not yet run against the hub.)
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._source import Record, check_split, choose, hub_csv_files, local_file, records, text

_SOURCE = Source("hexphi.jsonl", "LLM-Tuning-Safety/HEx-PHI", gated=True)


class Hexphi(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = ("attack.test",)
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"attack.test": (_SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` is the file's or the field's name."""
        check_split(self, split)
        found = [
            Row(f"test/{i}", text(record, "prompt", "instruction"), "", True, {"category": text(record, "category")})
            for i, record in enumerate(self._records())
        ]
        return choose(self, split, found, num_rows, seed)

    def _records(self) -> list[Record]:
        if local_file(_SOURCE, self.folder) is not None:
            return records(_SOURCE, self.folder)
        return [
            {"prompt": line[0], "category": name.removesuffix(".csv")}
            for name, lines in hub_csv_files(_SOURCE)
            for line in lines
        ]
