"""Puts the files of `outside/` beside the kinds of stages, as if they stood in safecl/stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safecl.stages
from safecl.store import Stage

FOLDER = str(Path(__file__).parent / "outside")


class Outside(Stage):
    """A stage of a kind that only `outside/` has: it comes to every process that is sent one."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        put()
        self.__dict__.update(state)


def put(folder: str = FOLDER) -> None:
    if folder not in safecl.stages.__path__:
        safecl.stages.__path__.append(folder)
        safecl.stages.names.cache_clear()


def remove(folder: str = FOLDER) -> None:
    safecl.stages.__path__.remove(folder)
    safecl.stages.names.cache_clear()
    safecl.stages.load.cache_clear()
