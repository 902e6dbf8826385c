"""Tokenizer: a model's tokenizer without its weights, in Hugging Face format. It measures rows before a model is loaded."""

from __future__ import annotations

from typing import Any

from safecl import tokenizer_files
from safecl.base import Json
from safecl.stages import Kind
from safecl.store import Context

VERSION = "1"


class Tokenizer(Kind):
    runs = "thread"
    unit = ""
    fixed_s = 1.0
    at_driver = True
    reads = ()


def run(context: Context) -> dict[str, Json]:
    """Write the tokenizer's files. Raises PrerequisiteError if they cannot be found or downloaded."""
    source: Any = context.stage.config["source"]
    tokenizer_files.write(source, context.stage.hints["path"], context.out)
    return {}
