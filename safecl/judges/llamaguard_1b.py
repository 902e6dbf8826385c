"""Llama Guard 3 1B: is the answer unsafe? True = unsafe.

The prompt is the chat template of meta-llama/Llama-Guard-3-1B. It differs from Llama Guard 3 (8B) in two ways: it has only
the thirteen categories that this model was trained on (no code interpreter abuse), and it has a space between the last line
and the end of the turn. It was compared with four copies in other projects' code (three have the space, one does not). The
model itself is gated and was not run here. Its output layer has only the twenty tokens of its answers, so fewer than
`logprobs` tokens may be returned.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.base import Strict
from safecl.judges.llamaguard import CATEGORIES as OF_8B
from safecl.judges.llamaguard import TEMPLATE, Llamaguard

CATEGORIES = tuple(name for name in OF_8B if name != "Code Interpreter Abuse.")


class Llamaguard1b(Llamaguard):
    class Config(Strict):
        # Names of S1, S2, ... as they stand in the prompt.
        categories: Annotated[tuple[str, ...], Field(min_length=1)] = CATEGORIES

    published: ClassVar[tuple[str, ...]] = ("meta-llama/Llama-Guard-3-1B",)
    template: ClassVar[str] = TEMPLATE.replace("<|eot_id|>", " <|eot_id|>")
