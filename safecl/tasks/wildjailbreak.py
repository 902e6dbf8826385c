"""WildJailbreak, its vanilla half (Jiang et al. 2024): alignment rows. Gated.

Harmful requests with refusals and benign look-alikes with help, as the data set pairs them (`data_type`
vanilla_harmful, vanilla_benign). The hub's file is TSV: read with a tab as `delimiter` and `keep_default_na=False`,
else empty cells are lost (allenai/wildteaming#1). Held-out validation prompts of both kinds are taken by hash. (Written
without access to the data: not yet run against the hub.)
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._overlap import normalise
from safecl.tasks._source import check_split, choose, first_of_each, lowest, made

NUM_VALIDATION = 100  # of each kind
_SOURCE = Source(
    "wildjailbreak_train.jsonl",
    "allenai/wildjailbreak",
    config="train",
    gated=True,
    options=(("delimiter", "\t"), ("keep_default_na", False)),
)
_SPLITS = ("safety", "benign.train", "attack.validation", "benign.validation")


class Wildjailbreak(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = _SPLITS
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {split: (_SOURCE,) for split in _SPLITS}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        check_split(self, split)
        found = made(self, _SOURCE, _row)
        chosen: list[Row] = []
        for harmful in (True, False):
            rows = [row for row in found if row.harmful == harmful]
            held = lowest("wildjailbreak/validation", (row.prompt for row in rows), NUM_VALIDATION)
            if split == "safety":
                chosen += [row for row in rows if normalise(row.prompt) not in held]
            elif harmful == split.startswith("attack"):
                validation = split.endswith("validation")
                wanted = [row for row in rows if (normalise(row.prompt) in held) == validation]
                chosen += [Row(row.id, row.prompt, "", harmful) for row in first_of_each(wanted)]
        return choose(self, split, chosen, num_rows, seed)


def _row(index: int, record: Record) -> Row | None:
    kind = record.label("data_type")
    if kind not in ("vanilla_harmful", "vanilla_benign"):
        return None
    return Row(f"train/{index}", record.text("vanilla"), record.text("completion"), kind == "vanilla_harmful")
