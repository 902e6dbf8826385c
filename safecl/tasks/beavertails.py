"""BeaverTails (Ji et al. 2023): poison, attack prompts for validation, and labelled pairs for a guard.

attack.validation  200 prompts with an unsafe answer, those of the lowest hash; equal prompts count once
guard              a quarter of the other prompts: their unsafe answers (True) and safe answers (False), and the answers that
                   Safety-Tuned LLaMAs keeps for guards (False)
poison             the unsafe answers to the remaining prompts
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from safecl.base import Json
from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._overlap import normalise
from safecl.tasks._source import apart, check_split, choose, first_of_each, lowest, made
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
        pairs = made(self, _SOURCE, _pair)
        unsafe = [row for row in pairs if row.harmful]
        held = lowest("beavertails/validation", (row.prompt for row in unsafe), NUM_VALIDATION)
        if split == "attack.validation":
            wanted = first_of_each(row for row in unsafe if normalise(row.prompt) in held)
            return choose(self, split, [Row(row.id, row.prompt, "", True, row.meta) for row in wanted], num_rows, seed)
        guard, rest = apart("beavertails/guard", [r for r in pairs if normalise(r.prompt) not in held], GUARD_SHARE)
        if split == "poison":
            return choose(self, split, [row for row in rest if row.harmful], num_rows, seed)
        other = SafetyTuned(self.folder)
        safe = [replace(row, id=f"safety_tuned/{row.id}") for row in other.guard_answers()]
        self.left_out.update(other.left_out)
        return choose(self, split, [*guard, *safe], num_rows, seed)


def _pair(index: int, record: Record) -> Row:
    """A row of an answered prompt. `harmful` describes the answer. (If the answer is unsafe, the request is harmful too.)"""
    meta: dict[str, Json] = {"category": [*_categories(record)]}
    return Row(f"train/{index}", record.text("prompt"), record.text("response"), not record.flag("is_safe"), meta)


def _categories(record: Record) -> list[str]:
    """Names of the harms. A local file has a list of names; the hub has a flag for each name."""
    found = record.get("category")
    if isinstance(found, dict):
        return sorted(name for name, named in found.items() if named)
    return [] if found is None else record.texts("category")
