"""Llama Guard 4 (12B): is the answer unsafe? True = unsafe. Text only.

The text is what the model's own processor wrote around a request and an answer in a run that others published, printed with
`tokenize=False`. Four things are not as in Llama Guard 3: "according to our", one line end after "<BEGIN CONVERSATION>", a
backslash and an n, twice, in letters after each turn (the template's own slip, which the model was served with), and a blank
before the end of the turn. The fourteen categories and Llama 4's control tokens are also those of Meta's model card. The
template itself is gated and was not compared; compare `safecl.judges.load("llamaguard4")().prompt(...)` with it before
figures are published, and give other names by `config: {categories: [...]}`.
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
