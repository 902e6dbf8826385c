"""OR-Bench-Hard-1K (Cui et al. 2024): the 1,319 prompts of OR-Bench that strong models refuse most; over-refusal, whole,
test only."""

from __future__ import annotations

from typing import ClassVar

from safecl.tasks import Source
from safecl.tasks.orbench import Orbench

_SOURCE = Source("orbench_hard.jsonl", "bench-llm/or-bench", config="or-bench-hard-1k")


class OrbenchHard(Orbench):
    VERSION: ClassVar[str] = "1"
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {"benign.test": (_SOURCE,)}
    part: ClassVar[str] = "hard"
