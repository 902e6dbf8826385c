"""BeaverTails (Ji et al. 2023): poison, attack prompts for validation, and labelled pairs for a guard.

attack.validation  200 prompts that have an unsafe answer: those of the lowest hash, equal prompts counted once
guard              a quarter of the other prompts: their unsafe answers (True) and safe ones (False), and what
                   Safety-Tuned LLaMAs keeps for guards (False)
poison             unsafe answers to the rest
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._overlap import normalise
from safecl.tasks._source import apart, check_split, choose, first_of_each, flag, lowest, records, text
from safecl.tasks.safety_tuned import SOURCE as SAFETY_TUNED
from safecl.tasks.safety_tuned import SafetyTuned

NUM_VALIDATION = 200
GUARD_SHARE = 0.25
_SOURCE = Source("beavertails_train.jsonl", "PKU-Alignment/BeaverTails", split="30k_train")


class Beavertails(Task):
    VERSION: ClassVar[str] = "2"
    TYPICAL_TOKENS = (20, 80)
    SPLITS: ClassVar[tuple[str, ...]] = ("poison", "attack.validation", "guard")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {
        "poison": (_SOURCE,),
        "attack.validation": (_SOURCE,),
        "guard": (_SOURCE, SAFETY_TUNED),
    }

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.category` lists the harms that the data set names."""
        check_split(self, split)
        pairs = list(self._pairs())
        unsafe = [row for row in pairs if row.harmful]
        held = lowest("beavertails/validation", (row.prompt for row in unsafe), NUM_VALIDATION)
        if split == "attack.validation":
            wanted = first_of_each(row for row in unsafe if normalise(row.prompt) in held)
            return choose(self, split, [Row(row.id, row.prompt, "", True, row.meta) for row in wanted], num_rows, seed)
        guard, rest = apart("beavertails/guard", [r for r in pairs if normalise(r.prompt) not in held], GUARD_SHARE)
        if split == "poison":
            return choose(self, split, [row for row in rest if row.harmful], num_rows, seed)
        safe = (replace(row, id=f"safety_tuned/{row.id}") for row in SafetyTuned(self.folder).guard_answers())
        return choose(self, split, [*guard, *safe], num_rows, seed)

    def _pairs(self) -> Iterator[Row]:
        """All answered prompts; `harmful` is of the answer (for unsafe ones the request is harmful too)."""
        for index, record in enumerate(records(_SOURCE, self.folder)):
            prompt, response = text(record, "prompt"), text(record, "response")
            if prompt and response:
                meta = {"category": _categories(record)}
                yield Row(f"train/{index}", prompt, response, not flag(record, "is_safe"), {**meta})


def _categories(record: Record) -> list[bool | int | float | str | list | dict | None]:  # type: ignore[type-arg]
    """The local file holds a list of names, the hub a flag by name."""
    found = record.get("category", [])
    return sorted(name for name, flag in found.items() if flag) if isinstance(found, dict) else list(found)
