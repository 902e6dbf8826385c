"""BeaverTails (Ji et al. 2023): poison, attack prompts for validation, and labelled pairs for a guard.

poison             unsafe answers to prompts that are not in attack.validation
attack.validation  200 prompts that have an unsafe answer: those of the lowest hash, equal prompts counted once
guard              unsafe answers (True); its few safe answers and the answers of Safety-Tuned LLaMAs (False). None
                   of its prompts is an attack.validation prompt of either data set
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._overlap import normalise
from safecl.tasks._source import Record, check_split, choose, first_of_each, lowest, records, text
from safecl.tasks.safety_tuned import SOURCE as SAFETY_TUNED
from safecl.tasks.safety_tuned import SafetyTuned

NUM_VALIDATION = 200
_SOURCE = Source("beavertails_train.jsonl", "PKU-Alignment/BeaverTails", split="30k_train")


class Beavertails(Task):
    VERSION: ClassVar[str] = "1"
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
        if split == "poison":
            return choose(self, split, [r for r in unsafe if normalise(r.prompt) not in held], num_rows, seed)
        safe = [
            Row(f"safety_tuned/{row.id}", row.prompt, row.response, False)
            for row in SafetyTuned(self.folder).rows("safety", None, 0)
        ]
        found = [row for row in [*pairs, *safe] if normalise(row.prompt) not in held]
        return choose(self, split, found, num_rows, seed)

    def _pairs(self) -> Iterator[Row]:
        """All answered prompts; `harmful` is of the answer (for unsafe ones the request is harmful too)."""
        for index, record in enumerate(records(_SOURCE, self.folder)):
            prompt, response = text(record, "prompt"), text(record, "response")
            if prompt and response:
                meta = {"category": _categories(record)}
                yield Row(f"train/{index}", prompt, response, not bool(record["is_safe"]), {**meta})


def _categories(record: Record) -> list[bool | int | float | str | list | dict | None]:  # type: ignore[type-arg]
    """The local file holds a list of names, the hub a flag by name."""
    found = record.get("category", [])
    return sorted(name for name, flag in found.items() if flag) if isinstance(found, dict) else list(found)
