"""What recipes of one sweep have in common is derived once: `@shared(*fields)` on a method of graph.Graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from operator import attrgetter
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from safecl import registry


class Shared:
    """What the graphs of one sweep share. `folder`: of local data files; None: the hub. `data`: tasks that the sweep file
    writes. `planned`: see tasks._source.identity."""

    def __init__(self, folder: Path | None, data: tuple[Any, ...] = (), planned: bool = False) -> None:
        self.folder, self.data, self.planned = folder, data, planned
        self.made: dict[Hashable, Any] = {}
        self.kept: list[object] = []  # whose ids are in the keys of `made`

    def __reduce__(self) -> tuple[Any, ...]:
        return _elsewhere, (self.folder, self.data, registry.in_use())  # another process makes its own


def _elsewhere(folder: Path | None, data: tuple[Any, ...], plugins: tuple[registry.Plugin, ...]) -> Shared:
    registry.add(plugins)
    return Shared(folder, data)


class _Graph(Protocol):
    recipe: Any
    shared: Shared


P = ParamSpec("P")
G = TypeVar("G", bound=_Graph)
Made = TypeVar("Made")


def shared(*fields: str) -> Callable[[Callable[Concatenate[G, P], Made]], Callable[Concatenate[G, P], Made]]:
    """Made once for all recipes of a sweep that hold the same objects in `fields`; it may depend on nothing else."""
    read = attrgetter(*fields)

    def wrap(make: Callable[Concatenate[G, P], Made]) -> Callable[Concatenate[G, P], Made]:
        @wraps(make)
        def get(self: G, /, *args: P.args, **kwargs: P.kwargs) -> Made:
            memo = self.shared
            key = (make.__name__, args, *kwargs.items(), *map(id, read(self.recipe)))
            if key not in memo.made:
                memo.kept.append(self.recipe)
                memo.made[key] = make(self, *args, **kwargs)
            found: Made = memo.made[key]
            return found

        return get

    return wrap
