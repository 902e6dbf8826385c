"""Llama Guard 4 (12B): is the answer unsafe? True = unsafe. Text only.

The prompt is the output of the model's own processor for a request and an answer (`tokenize=False`), taken from a run that
others published. It differs from Llama Guard 3 in four places: "according to our"; one line break after "<BEGIN
CONVERSATION>"; the characters backslash and n, twice, after each turn (an error in the template, with which the model is
served); and a space before the end of the turn. It also has Llama 4's control tokens. These and the fourteen categories agree
with Meta's model card. The template itself is gated and was not compared. Before you publish numbers, compare
`safecl.judges.load("llamaguard4")().prompt(...)` with it. Other category names can be set by `config: {categories: [...]}`.
"""

from __future__ import annotations

from typing import ClassVar

from safecl.judges.llamaguard import TEMPLATE, Llamaguard

_DIFFERS = {
    "according our": "according to our",
    "<BEGIN CONVERSATION>\n\n": "<BEGIN CONVERSATION>\n",
    "{request}\n\n": "{request}\\n\\n\n\n",
    "{response}\n\n": "{response}\\n\\n\n\n",
    "<|start_header_id|>": "<|header_start|>",
    "<|end_header_id|>": "<|header_end|>",
    "<|eot_id|>": " <|eot|>",
}


def _template() -> str:
    text = TEMPLATE
    for of_3, of_4 in _DIFFERS.items():
        text = text.replace(of_3, of_4)
    return text


class Llamaguard4(Llamaguard):
    VERSION: ClassVar[str] = "2"
    published: ClassVar[tuple[str, ...]] = ("meta-llama/Llama-Guard-4-12B",)
    template: ClassVar[str] = _template()
