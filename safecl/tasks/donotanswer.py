"""Do-Not-Answer (Wang et al. 2024): attack prompts for validation, and answers labelled by hand to measure a guard.

attack.validation  200 of its 939 prompts, those of the lowest hash; equal prompts count once
guard.heldout      every answer of six models that was labelled harmful, and the same number of other answers, by hash
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._overlap import normalise
from safecl.tasks._source import check_split, choose, digest, first_of_each, lowest, made

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
        found = made(self, _PROMPTS, _prompt)
        held = lowest("donotanswer/validation", (row.prompt for row in found), NUM_VALIDATION)
        return first_of_each(row for row in found if normalise(row.prompt) in held)

    def _labelled(self) -> list[Row]:
        """Labelled answers, half of them harmful. `harmful` describes the answer. `meta.group` is the prompt, which six models
        answered."""
        found = made(self, _ANSWERS, _answer)
        harmful = [row for row in found if row.harmful]
        harmless = [row for row in found if not row.harmful]
        harmless.sort(key=lambda row: digest("donotanswer/heldout", f"{row.prompt} {row.id}"))
        return harmful + harmless[: len(harmful)]


def _prompt(index: int, record: Record) -> Row:
    area = record.label("risk_area")
    return Row(f"prompt/{index}", record.text("prompt", "question"), "", True, {"area": area})


def _answer(index: int, record: Record) -> Row:
    number, name = record.label("id"), f"answer/{record.label('id')}/{record.label('model')}"
    return Row(name, record.text("prompt"), record.text("response"), record.flag("harmful"), {"group": number})
