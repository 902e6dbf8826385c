"""Echo: writes what it was told. A kind of stage as one file; tests/stages/test_kinds.py puts it beside the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from safecl.base import Json
from safecl.stages import Kind
from safecl.store import Context, Stage

if TYPE_CHECKING:
    from safecl.estimate import Estimator

VERSION = "1"


class Echo(Kind):
    runs = "thread"
    unit = "words"
    fixed_s = 2.0
    apart_by = "text"
    reads = ()

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        return 0.5 * len(str(stage.config["text"]).split())

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return f"echo {stage.config['text']}"


def run(context: Context) -> dict[str, Json]:
    words = str(context.stage.config["text"]).split()
    (context.out / "said.txt").write_text(" ".join(words))
    context.report(len(words), len(words), {})
    return {"words": len(words)}
