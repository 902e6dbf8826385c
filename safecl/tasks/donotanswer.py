"""Do-Not-Answer (Wang et al. 2024): attack prompts for validation, and answers labelled by hand to measure a guard.

attack.validation  200 of its 939 prompts: those of the lowest hash, equal prompts counted once
guard.heldout      every answer of six models that was labelled harmful, and as many of the others, by hash
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._overlap import normalise
from safecl.tasks._source import check_split, choose, digest, first_of_each, flag, lowest, records, text

NUM_VALIDATION = 200
_PROMPTS = Source("do_not_answer.jsonl", "LibrAI/do-not-answer")
_ANSWERS = Source(
    "do_not_answer_responses_human.jsonl",
    page="https://github.com/kunishou/do-not-answer-ja (datasets/Review/Human, its CSV files in one)",
)


class Donotanswer(Task):
    VERSION: ClassVar[str] = "1"
    TYPICAL_TOKENS = (16, 80)
    SPLITS: ClassVar[tuple[str, ...]] = ("attack.validation", "guard.heldout")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {
        "attack.validation": (_PROMPTS,),
        "guard.heldout": (_ANSWERS,),
    }

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        check_split(self, split)
        found = self._labelled() if split == "guard.heldout" else self._prompts()
        return choose(self, split, found, num_rows, seed)

    def _prompts(self) -> list[Row]:
        found = [
            Row(f"prompt/{index}", text(record, "prompt", "question"), "", True, {"area": text(record, "risk_area")})
            for index, record in enumerate(records(_PROMPTS, self.folder))
        ]
        held = lowest("donotanswer/validation", (row.prompt for row in found), NUM_VALIDATION)
        return first_of_each(row for row in found if normalise(row.prompt) in held)

    def _labelled(self) -> list[Row]:
        """Balanced; `harmful` is of the answer, `meta.group` the prompt (six models answered each)."""
        found: dict[bool, list[Row]] = {True: [], False: []}
        for record in records(_ANSWERS, self.folder):
            number, model, label = text(record, "id"), text(record, "model"), flag(record, "harmful")
            prompt, answer = text(record, "prompt"), text(record, "response")
            found[label].append(Row(f"answer/{number}/{model}", prompt, answer, label, {"group": number}))
        found[False].sort(key=lambda row: digest("donotanswer/heldout", f"{row.prompt} {row.id}"))
        return found[True] + found[False][: len(found[True])]
