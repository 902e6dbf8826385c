"""XSTest v2 (Roettger et al. 2024): over-refusal on its 250 safe prompts, and labelled pairs for a guard.

benign.test  the safe prompts, whole, test only
guard        answers of five models to its 200 unsafe prompts, as people labelled them: full compliance (True), full refusal
             (False); partial refusals are left out
"""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Row, Source, Task
from safecl.tasks._source import check_split, choose, records, text

_SOURCE = Source("xstest.jsonl", "walledai/XSTest", split="test", gated=True)
_ANSWERS = Source(
    "xstest_completions_human.jsonl", page="https://github.com/paul-rottger/exaggerated-safety (model_completions)"
)
_LABELS = {"1_full_compliance": True, "2_full_refusal": False}


class Xstest(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = ("benign.test", "guard")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"benign.test": (_SOURCE,), "guard": (_ANSWERS,)}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.type` is the kind of look-alike (homonyms, figurative_language, ...)."""
        check_split(self, split)
        found = self._labelled() if split == "guard" else self._prompts()
        return choose(self, split, found, num_rows, seed)

    def _prompts(self) -> list[Row]:
        return [
            Row(f"test/{index}", text(record, "prompt"), "", False, {"type": text(record, "type")})
            for index, record in enumerate(records(_SOURCE, self.folder))
            if text(record, "label") == "safe"
        ]

    def _labelled(self) -> list[Row]:
        """Answers to contrasts, as the unsafe prompts' types are called; `harmful` is of the answer."""
        found = []
        for index, record in enumerate(records(_ANSWERS, self.folder)):
            label, kind = _LABELS.get(text(record, "final_label")), text(record, "type")
            if label is not None and kind.startswith("contrast"):
                prompt, answer = text(record, "prompt"), text(record, "response", "completion")
                found.append(Row(f"answer/{index}", prompt, answer, label, {"type": kind}))
        return found
