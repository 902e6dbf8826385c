"""Nap: sleeps so long on a trainer, as if it computed. For tests of who waits for whom."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from safecl.base import Json
from safecl.stages import Kind
from safecl.store import Context, Stage

if TYPE_CHECKING:
    from safecl.estimate import Estimator

VERSION = "1"


class Nap(Kind):
    runs = "trainer"
    unit = ""
    fixed_s = 0.0
    apart_by = "name"
    reads = ()

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        return float(str(stage.config["seconds"]))


def run(context: Context) -> dict[str, Json]:
    time.sleep(float(str(context.stage.config["seconds"])))
    return {}
