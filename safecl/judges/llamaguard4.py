"""Llama Guard 4 (12B): is the answer unsafe? True = unsafe. Text only.

Checked against Meta's model card and prompt page: the fourteen categories, and Llama 4's control tokens
(`<|header_start|>`, `<|header_end|>`, `<|eot|>`). The wording between them and the categories' names in the prompt are those
of Llama Guard 3, as which Meta describes it ("drop-in replacement"); the model's own chat template is gated and was NOT
compared byte for byte. Compare `safecl.judges.load("llamaguard4")().prompt(...)` with it before figures are published, and
give other names by `config: {categories: [...]}`.
"""

from __future__ import annotations

from typing import ClassVar

from safecl.judges.llamaguard import TEMPLATE, Llamaguard


class Llamaguard4(Llamaguard):
    published: ClassVar[tuple[str, ...]] = ("meta-llama/Llama-Guard-4-12B",)
    template: ClassVar[str] = (
        TEMPLATE.replace("<|start_header_id|>", "<|header_start|>")
        .replace("<|end_header_id|>", "<|header_end|>")
        .replace("<|eot_id|>", "<|eot|>")
    )
