"""Safety-Tuned LLaMAs, safety_only_data (Bianchi et al. 2024): 2,483 unsafe requests with safe answers: alignment rows.

It has no benign rows. Alignment on it alone teaches the model to refuse everything, so add benign rows (`align.self_answered`).

    attack.validation  100 held-out prompts, those of the lowest hash
    safety             three quarters of the others. `harmful` is True if the answer is a refusal, because the memory of
                       refusals is drawn from these rows (other answers explain or correct)

The last quarter is for guards: `guard_answers`, which the split `guard` of BeaverTails uses as harmless answers.
"""

from __future__ import annotations

import re
from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import apart, check_split, choose, first_of_each, made

NUM_VALIDATION = 100
GUARD_SHARE = 0.25
SOURCE = Source(
    "safety_tuned_llamas_train.jsonl",
    page="https://github.com/vinid/safety-tuned-llamas (data/training/safety_only_data_Instructions.json)",
)
_REFUSING = re.compile(
    r"\b(?:sorry|apologi[sz]e|cannot|can't|won't|will not|unable|not able|decline|refuse)\b"
    r"|\b(?:should|must) (?:not|never)\b|\bshouldn't\b|\b(?:is|are|it's|be) (?:not|never) (?:\w+ )?"
    r"(?:ok|okay|right|acceptable|appropriate|ethical|legal|advisable|recommended|a good idea|possible)\b"
    r"|\b(?:illegal|unethical|immoral|inappropriate|unacceptable|wrong|against the law|harmful|dangerous)\b"
    r"|\bdo not\b|\bdon't\b|\bas an ai\b|\b(?:there is|there's) no (?:evidence|justification|excuse|place)\b"
    r"|^no\b",
)


class SafetyTuned(Task):
    VERSION: ClassVar[str] = "2"
    TYPICAL_TOKENS = (20, 50)
    SPLITS: ClassVar[tuple[str, ...]] = ("safety", "attack.validation")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"safety": (SOURCE,), "attack.validation": (SOURCE,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        check_split(self, split)
        held, _, rest = self._parts()
        if split == "attack.validation":
            wanted = [Row(row.id, row.prompt, "", True) for row in first_of_each(held)]
            return choose(self, split, wanted, num_rows, seed)
        return choose(self, split, rest, num_rows, seed)

    def guard_answers(self) -> list[Row]:
        """Harmless answers for guards. No other split has their prompts."""
        return [Row(row.id, row.prompt, row.response, False) for row in self._parts()[1]]

    def _parts(self) -> tuple[list[Row], list[Row], list[Row]]:
        """The three parts of the rows: held out, for guards, for alignment. Equal prompts are in the same part."""
        found = made(self, SOURCE, _row)
        held, others = apart("safety_tuned/validation", found, NUM_VALIDATION)
        return held, *apart("safety_tuned/guard", others, GUARD_SHARE)


def _row(index: int, record: Record) -> Row:
    answer = record.text("response", "output")
    return Row(f"train/{index}", record.text("instruction"), answer, refuses(answer))


def refuses(answer: str) -> bool:
    """Whether the first 200 characters of an answer decline, forbid or condemn."""
    return _REFUSING.search(answer.replace("\u2019", "'").lower()[:200]) is not None
